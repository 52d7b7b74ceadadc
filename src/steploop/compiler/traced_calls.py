"""A call of a Loop that somebody else traces (torch.export, make_fx): it becomes one operator, which carries the loop.

What is captured for it differs from what runs here in three ways. Every remembering operation is traced by its one-step
form: its form for a whole sequence is Python. Sizes that the tracer keeps free are free from the first capture on. And
the tracer is told what the capture relies on. The operator gets the loop as text (`exported.py`) and reads it when it
first runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import UnsupportedError
from . import capture_store, foreign, forward_mode, pipeline
from .capture import Capture, hint, lock, symbol_values
from .conditions import condition
from .dependencies import Dependencies
from .exported import Exported, Options, from_text, to_text
from .invocation import hints_of
from .loop_operator import readers, traced
from .lower import Needs
from .masking import masked_call
from .memory_operator import step_by_step
from .ones import allowed_ones
from .program import Call, Program, Result
from .trace_step import is_tracing


def run(program: Program, call: Call, backend: str, save: str) -> Result:
    """Runs a call. One that somebody else traces is one operator, which carries the loop."""
    if is_tracing() or not traced([*call.xs, *call.constants, *call.initial]):
        return pipeline.run(program, call, backend=backend, save=save)
    if torch.onnx.is_in_onnx_export():
        raise UnsupportedError(
            'ONNX has no operator that runs a Loop (or a scan). Export it with backend="reference", step by step and '
            "for one length; or keep the model in torch (torch.export, torch._inductor.aoti_compile_and_package)."
        )
    with foreign.hidden(), step_by_step():
        program, call = pipeline.batch_guessed(program, call)
        capture, dependencies = capture_store.find(program, call)
    if pipeline.needs_masks(program, call, capture):
        return _run_masked(program, call, backend, save)
    with foreign.hidden(), step_by_step():
        tensors = pipeline.tensors_of(call, capture, dependencies)
        if forward_mode.active():
            forward_mode.refuse_tangents(pipeline.named_tensors(call, capture, dependencies))
        training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if training:
            capture, dependencies = capture_store.with_gradient(program, call, capture, dependencies)
            if pipeline.needs_masks(program, call, capture):
                return _run_masked(program, call, backend, save)
            tensors = pipeline.tensors_of(call, capture, dependencies, joint=True)
        key = _text(program, call, capture, dependencies, backend, save, training, tensors)
    _hold_sizes(call, capture, training)
    batch = 1 if call.batch is None else call.batch
    operator = torch.ops.steploop.loop if isinstance(key, str) else torch.ops.steploop.inner_loop
    results = operator(tensors, key, call.steps, batch)
    count, states = len(capture.forward.graph.outputs), len(call.initial)
    return Result(list(results[:count]), list(results[count : count + states]), capture.out_spec)


def _run_masked(program: Program, call: Call, backend: str, save: str) -> Result:
    changed, changed_call, finish = masked_call(program, call)
    return finish(run(changed, changed_call, backend, save))


def _text(
    program: Program, call: Call, capture: Capture, dependencies: Dependencies, backend: str, save: str,
    training: bool, tensors: list[Tensor],
) -> str | int:  # fmt: skip
    """The loop as text; where a tracer that is not torch.export meets a step without one, a number of this process."""
    trace = capture.joint if training else capture.forward
    assert trace is not None
    layout = pipeline.layout_of(call, trace)
    rows = hint(call.steps) * max(hint(call.batch or 1), 1)
    policy = pipeline.policy_of(capture, save, training, rows, tensors)
    captured = layout.split(tensors)["captured"]
    flags = [t.requires_grad for t in captured]
    asked = (layout, call.reverse, call.on_masked, backend, policy, training)
    key = (*asked, *flags, *(t.device for t in tensors))
    if key not in capture.made.texts:
        with lock, _disable_current_modes(), torch._C._DisableFuncTorch(), torch.no_grad():
            ones = allowed_ones(program, capture, dependencies, training)
            options = Options(call.reverse, call.on_masked, training, backend, policy, flags, ones)
            hints = hints_of(trace, capture.signature)
            try:
                capture.made.texts[key] = to_text(trace, capture.program, layout, options, hints, tensors)
            except UnsupportedError:
                if torch.compiler.is_exporting():
                    raise
                capture.made.texts[key] = pipeline.compiled(capture, call, backend, policy, training, True, tensors)
    found = capture.made.texts[key]
    return found if isinstance(found, str) else found.key


def _hold_sizes(call: Call, capture: Capture, training: bool) -> None:
    """Tells the other tracer what a capture relies on, so that it refuses to keep sizes free that are not."""
    trace = capture.joint if training else capture.forward
    assert trace is not None
    sizes = symbol_values(trace, call)
    if capture.batch is not None and call.batch != capture.batch:
        raise AssertionError("a capture for another batch size")
    for one in trace.conditions:
        names = {str(s) for s in one.free_symbols}
        if str(trace.graph.batch) not in names and any(isinstance(sizes[n], torch.SymInt) for n in names):
            condition([one])(sizes)


@functools.lru_cache(maxsize=256)
def exported(text: str) -> Exported:
    """The loop that a text is, once for each text."""

    def lower(graph: Any, names: list[str], backend: str, save: str, one_loop: bool, needs: Needs | None) -> Any:
        with lock, _disable_current_modes(), torch._C._DisableFuncTorch(), torch.no_grad():
            return pipeline.Lowered(graph, names, backend, save, True, one_loop, needs)

    return from_text(text, lower)


readers[:] = [exported]
