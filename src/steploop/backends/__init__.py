"""How a sequence runs. `BACKENDS` names every way; each is one file or folder here.

contract.py   what the compiler asks of a backend
choose.py     which backend runs a loop
"""

from __future__ import annotations

# name -> what it is, in words (messages and `steploop doctor` show them)
BACKENDS: dict[str, str] = {
    "auto": "native where a loop can be taken natively, else eager; per loop",
    "cpu": "native C++ loops, on the CPU",
    "cuda": "CUDA C++ loops, on NVIDIA GPUs; experimental, never chosen by \"auto\"",
    "eager": "batched pieces run by torch, a Python loop over the rest; any device",
    "reference": "the plain Python loop over the step",
}
