"""The constants of the cost model, measured: what a launch, a barrier, a byte and a product cost on this GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steploop.backends.cuda import nvrtc
from steploop.backends.cuda.driver import Module

ROUNDS = 5
SIZES = [(b, h) for h in (128, 256, 512, 1024, 2048) for b in (1, 16, 64, 256)]
KINDS = ("fp32", "tf32", "bf16")


def measure(sizes: list[tuple[int, int]] = SIZES) -> dict[str, Any]:
    """Seconds and bytes per second by name; "product" has seconds by kind and "B H", of (B, H) x (H, 4 H)."""
    major, minor = torch.cuda.get_device_capability()
    text = (Path(__file__).parent / "kernels.cu").read_text()
    module = Module(nvrtc.compile_cubin(text, f"sm_{major}{minor}")[0], torch.device("cuda"))
    blocks = torch.cuda.get_device_properties().multi_processor_count
    return {
        "op": eager_op(),
        "node": graph_node(),
        "replay": graph_replay(),
        "grid_barrier": grid_barrier(module, "grid_barriers", blocks),
        "grid_exchange": grid_barrier(module, "exchange", blocks),
        "block_barrier": block_barrier(module),
        "l2_bandwidth": l2_bandwidth(module, blocks),
        "memory_bandwidth": memory_bandwidth(),
        "product": {kind: products(kind, sizes) for kind in KINDS},
    }


def seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The median time between two events on the GPU around `run`, after one round that does not count."""
    found = []
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found[1:])


def eager_op(count: int = 2000) -> float:
    """One small operation of torch from Python, queued back to back: what bounds a plain loop."""
    x = torch.zeros(64, 512, device="cuda")
    found = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            x = torch.tanh(x)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / count)
    return statistics.median(found[1:])


def recorded(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of what `function` launches; it runs once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def graph_node(count: int = 500) -> float:
    """One small kernel that depends on the one before it, in a graph."""
    x = torch.zeros(64, 512, device="cuda")

    def run() -> None:
        for _ in range(count):
            x.tanh_()

    return seconds(recorded(run).replay) / count


def graph_replay(count: int = 200) -> float:
    """Launching a graph of one kernel, from Python."""
    x = torch.zeros(8, device="cuda")
    graph = recorded(lambda: x.add_(1))
    found = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            graph.replay()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / count)
    return statistics.median(found[1:])


def grid_barrier(module: Module, kernel: str, blocks: int, threads: int = 256, rounds: int = 2000) -> float:
    """All SMs wait for each other: alone, or around an exchange of a float per thread through global memory."""
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    state = torch.zeros(2 * blocks * threads, device="cuda")
    arguments = [counter, rounds] if kernel == "grid_barriers" else [counter, state, rounds]

    def run() -> None:
        counter.zero_()
        module.launch(kernel, blocks, threads, arguments, cooperative=True)

    return seconds(run) / rounds


def block_barrier(module: Module, rounds: int = 20000) -> float:
    """The threads of one block wait for each other twice, around one word of shared memory."""
    sink = torch.zeros(1, device="cuda")
    return seconds(lambda: module.launch("block_barriers", 1, 512, [sink, rounds])) / rounds


def l2_bandwidth(module: Module, blocks: int, megabytes: int = 16, rounds: int = 50) -> float:
    """Bytes per second that all SMs together read from L2."""
    data = torch.ones(megabytes << 18, device="cuda")
    sink, count = torch.zeros(1, device="cuda"), data.numel() // 4
    run = lambda: module.launch("read_again", 2 * blocks, 1024, [data, sink, count, rounds])
    return data.numel() * 4 * rounds / seconds(run)


def memory_bandwidth(megabytes: int = 2048) -> float:
    """Bytes read and written per second by a copy that fits into no cache."""
    data = torch.ones(megabytes << 18, device="cuda")
    into = torch.empty_like(data)
    return 2 * data.numel() * 4 / seconds(lambda: into.copy_(data))


def products(kind: str, sizes: list[tuple[int, int]], count: int = 20) -> dict[str, float]:
    """Seconds of one product (B, H) x (H, 4 H) in a graph of many, each with the same weight: as in a loop."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        return {f"{b} {h}": _product(kind, b, h, count) for b, h in sizes}
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _product(kind: str, batch: int, hidden: int, count: int) -> float:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    x: Tensor = torch.randn(batch, hidden, device="cuda", dtype=dtype)
    w = torch.randn(4 * hidden, hidden, device="cuda", dtype=dtype) / hidden
    into = torch.empty(batch, 4 * hidden, device="cuda", dtype=dtype)

    def run() -> None:
        for _ in range(count):
            torch.mm(x, w.t(), out=into)

    return seconds(recorded(run).replay) / count
