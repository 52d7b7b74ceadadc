"""Benchmarks: steploop and its peers side by side in one run.  Run by scripts/bench; see __main__.py.

cases.py       what is measured: sizes, peers, modes
models.py      the steps in PyTorch; jax_models.py and keras_models.py hold the same in those libraries
data.py        inputs and weights, equal for every peer
peers.py       one class per peer
measure.py     interleaved runs, time limits, peak memory, processes of their own
jobs.py        what runs in such a process
targets.py     the targets and whether they are met
report.py      JSON and Markdown;  plots.py: PNG
"""
