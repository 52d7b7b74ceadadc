"""A function of tensors recorded as a CUDA graph: everything that it launches becomes one launch.

On a GPU a Python loop waits for launches: every operation costs some microseconds of the CPU and little of the GPU.
A recording works on memory of its own: what it reads is copied there before, what it gives is copied out after. So
nothing that it was recorded with goes out of date, and nothing that it gave is overwritten later.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_WAIT = (
    "linalg_", "_linalg", "cholesky", "triangular_solve", "lu_", "ormqr", "geqrf", "bincount", "histc", "unique",
    "masked_select", "nonzero", "repeat_interleave", "multinomial", "_local_scalar_dense", "_ctc_loss",
    "_embedding_bag",
)  # fmt: skip


def reasons_against(calls: Iterable[fx.Node]) -> list[tuple[str, str]]:
    """Why calls can't be recorded, as (reason, source line)."""
    found = ((_reason(node), node.meta.get("line", "")) for node in calls)
    return [(reason, line) for reason, line in found if reason]


def _reason(node: fx.Node) -> str:
    target = node.target
    name = str(getattr(target, "overloadpacket", target)).removeprefix("aten.")
    if target is not operator.getitem:
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return f"{name} may do something on the CPU, which would be done once"
        if torch.Tag.nondeterministic_seeded in target.tags:
            return f"{name} draws random numbers"
        if torch.Tag.data_dependent_output in target.tags or name.startswith(_WAIT):
            return f"{name} may wait for the device"
        if name.startswith(("index", "_index_put")) and any(_is_mask(n) for n in node.all_input_nodes[1:]):
            return f"{name} with a mask waits for the device"
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    if any(isinstance(v, Tensor) and _on_cpu(v) for v in values):
        return f"{name} works with a tensor on the CPU"
    return ""


def _on_cpu(value: Tensor) -> bool:
    return value.device.type == "cpu"


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


class CudaRecorder:
    """Records what a function launches on a CUDA device. Its recordings share memory for what they do not keep, so
    one must end before the next begins: they are launched on one stream, or `follow` says what comes first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = None

    def possible(self) -> bool:
        """Not while the caller records a graph: then our launches are to be part of it."""
        return not torch.cuda.is_current_stream_capturing()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs `function` without executing what it launches; gives what executes that, as often as it is called."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        collecting = gc.isenabled()
        gc.disable()  # freeing some things is forbidden meanwhile
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                pool = {} if self.pool is None else {"pool": self.pool}
                graph.capture_begin(**pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        current.wait_stream(self.stream)
        self.pool = graph.pool()

        def launch() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return launch

    def place(self) -> Any:
        """The stream on which work is queued now."""
        return torch.cuda.current_stream(self.device)

    def follow(self, place: Any) -> None:
        """What is queued from now on comes after what was queued at `place`."""
        torch.cuda.current_stream(self.device).wait_stream(place)

    def finish(self) -> None:
        """Waits until nothing runs any more: before a recording is dropped."""
        torch.cuda.synchronize(self.device)


def settings() -> Hashable:
    """What decides, beside shapes, which kernels torch launches."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation,
        cudnn.fp32_precision, cudnn.enabled, cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def types_of(tensors: Iterable[Tensor]) -> Hashable:
    return tuple((t.shape, t.stride(), t.dtype) for t in tensors)


class Recording:
    """One recorded function: `load` its inputs, `launch` it, `give` copies of its results.

    function: a list of tensors like `inputs` -> a list of tensors.
    """

    def __init__(self, recorder: Any, function: Callable[[list[Tensor]], list[Tensor]], inputs: Sequence[Tensor]):
        self.results: list[Tensor] = []
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty_like(t) for t in inputs]
            self.load(inputs)
            self.launch = recorder.record(lambda: self._run(function))

    def _run(self, function: Callable[[list[Tensor]], list[Tensor]]) -> None:
        results = function(self.inputs)
        if not self.results:
            self.results = results
        else:  # a recorder that runs the function again, as tests have it: results stay where they are
            copy(self.results, results)

    def load(self, inputs: Sequence[Tensor], first: int = 0) -> None:
        """Copies inputs to where the recording reads them, from its input number `first` on."""
        copy(self.inputs[first : first + len(inputs)], inputs)

    def give(self) -> list[Tensor]:
        """Copies of the results."""
        made = [torch.empty_like(t) for t in self.results]
        copy(made, self.results)
        return made


def copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """One launch for all tensors of a dtype, as a rule."""
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for place, value in zip(into, values, strict=True):
        if place.numel():
            places, new = kinds.setdefault(place.dtype, ([], []))
            places.append(place)
            new.append(value)
    for places, new in kinds.values():
        torch._foreach_copy_(places, new)
