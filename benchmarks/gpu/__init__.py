"""What a machine with a GPU tells about steploop: `scripts/gpu-check`, or `python -m benchmarks.gpu`.

kernels.cu    the kernels of the microbenchmarks
micro.py      the constants of the cost model, measured
cost_model.py microseconds of one step, by way of launching; its constants
steps.py      the recurrent programs that are timed
ways.py       the ways to run them: a plain loop, steploop, cuDNN, torch.compile, a CUDA graph
timing.py     paired rounds
kernels.py    our own kernels: against the plain loop, under compute-sanitizer, for a million steps
suite.py      the oracle tests on the GPU
report.py     docs/gpu-results/<gpu>.md and .json
"""
