"""What backends share that compile loops to kernels of their own.

language.py          the loop language: one row's program.  interpret.py: what it means, in plain torch
lower.py, ops_*.py   ATen calls on batches -> the loop language
fuse.py              statements -> phases of loop nests
emit.py              phases -> C++ in words that every backend defines for itself
scratch.py           where a kernel's temporaries are
runner.py            how tensors are laid out for a kernel
cache.py             the folders that kernels are kept in, and what is safe to load
kernels/             C++ that is the same on every device
checks.py            what a kernel finds wrong, as errors
"""
