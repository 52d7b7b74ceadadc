"""The sequence form of an operation that remembers, in the place of a loop."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from ..backends.contract import Runner
from .ir.graph import LoopProgram, shape_at
from .memory_operator import call_of, is_memory, is_whole
from .span import Span

# -- the sequence form in the place of a loop ------------------------------------------------------------------


class SequenceRunner(Runner):
    """Runs a component that is one remembering operation, over all steps of a span at once.

    Stands in for a compiled loop; see `backends.eager.Runner` for what it takes and gives.
    """

    backend = "sequence"

    def __init__(self, loop: LoopProgram):
        self.loop = loop
        self.node = next(n for n in loop.calls if is_memory(n))
        self.backward = self.node.target is torch.ops.steploop.memory_backward.default
        self.call = call_of(self.node)

    def __call__(
        self, inputs: Sequence[Any], states: Sequence[Tensor], reset_to: Sequence[Tensor] | None, span: Span,
        down: bool, sizes: dict[str, int],
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        known: dict[fx.Node, Any] = dict(zip(self.loop.prevs, states))
        known.update(zip((i.node for i in self.loop.inputs), inputs))
        resets = dict(zip(self.loop.prevs, reset_to)) if reset_to is not None else {}
        if span.total == 0:
            return self._nothing(known, span, sizes)
        dense = Dense(span)
        run = self._gradient if self.backward else self._values
        return run(known, resets, dense)

    def _nothing(
        self, known: dict[fx.Node, Any], span: Span, sizes: dict[str, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """No steps: the states as they are, and nothing per step."""
        kept = []
        for node in self.loop.kept:
            value, summed = node.meta["val"], node.meta["rows"] is None
            shape = shape_at(value, {**sizes, str(self.loop.batch): 0})
            feature = shape if summed else shape[1:]
            rows = 1 if summed else span.schedule.batch if is_whole(node) else 0
            kept.append(torch.zeros([rows, *feature], dtype=value.dtype, device=value.device))
        return [known[p] for p in self.loop.prevs], kept

    def _values(
        self, known: dict[fx.Node, Any], resets: dict[fx.Node, Any], dense: Dense
    ) -> tuple[list[Tensor], list[Tensor]]:
        xs, constants, prevs, _ = self.call.split(self.node.args[0])
        edges = [_first(known[p]) for p in prevs]
        back = [_at_reset(known[p]) if p not in resets else resets[p] for p in prevs]
        outputs, finals = self.call.sequence(
            [dense.spread(known[x]) for x in xs], [known[c] for c in constants], edges,
            back, dense.lengths, dense.resets, dense.steps,
        )  # fmt: skip
        after = dict(zip(prevs, finals))
        kept = [outputs[n.args[1]] if is_whole(n) else dense.collect(outputs[n.args[1]]) for n in self.loop.kept]
        return [after[p] for p in self.loop.prevs], kept

    def _gradient(
        self, known: dict[fx.Node, Any], resets: dict[fx.Node, Any], dense: Dense
    ) -> tuple[list[Tensor], list[Tensor]]:
        cotangents, tensors, _, needs = self.node.args
        xs, constants, prevs, parameters = self.call.split(tensors)
        edges, back = [_first(known[p]) for p in prevs], [_at_reset(known[p]) for p in prevs]
        own = [p for p in self.call.op.parameters() if p.requires_grad]
        count = self.call.outputs
        # A cotangent that is not known here is one of the zeros that stand for "not differentiable".
        given = [
            None if c not in known else known[c] if self.call.whole and i == 0 else dense.spread(known[c])
            for i, c in enumerate(cotangents[:count])
        ]
        given += [known.get(c) for c in cotangents[count:]]
        with autograd_in_kernels():
            groups = [
                [_leaf(dense.spread(known[x])) for x in xs], [_leaf(known[c]) for c in constants],
                [_leaf(e) for e in edges], [_leaf(b) for b in back],
            ]  # fmt: skip
            outputs, finals = self.call.sequence(*groups, dense.lengths, dense.resets, dense.steps)
            wanted = [*groups[0], *groups[1], *groups[2], *own]
            found = _grad([*outputs, *finals], [*wanted, *groups[3]], given)
        gradients = dict(zip(map(id, wanted), found))
        through_resets = found[len(wanted) :]
        results = [gradients[id(t)] for t, n in zip(wanted, needs) if n]
        return self._placed(results, needs, through_resets, prevs, dense)

    def _placed(
        self, results: list[Any], needs: list[bool], through_resets: list[Any], prevs: list[fx.Node], dense: Dense
    ) -> tuple[list[Any], list[Tensor]]:
        """Gradients in the form of a loop's kept values: per step for inputs, summed for parameters."""
        kinds = (["x"] * self.call.xs + ["constant"] * self.call.constants + ["state"] * self.call.states
                 + ["parameter"] * len(needs))  # fmt: skip
        kinds = [k for k, n in zip(kinds, needs) if n]
        first_state = kinds.index("state") if "state" in kinds else 0
        kept = []
        for node in self.loop.kept:
            index = node.args[1]
            kind, value = kinds[index], results[index]
            if kind == "x":
                kept.append(dense.collect(value))
            elif kind == "state":
                kept.append(dense.at_resets(through_resets[index - first_state]))
            elif kind == "constant" and node.meta["rows"] is not None:
                kept.append(dense.at_first(value))
            else:
                kept.append(value.unsqueeze(0))
        after = []
        for node in self.loop.nexts:
            after.append(results[node.args[1]] if node.target is operator.getitem else None)
        return after, kept


def _first(state: Any) -> Tensor:
    """The value of a state before the first step; in a backward pass it comes with those of all steps."""
    return state if isinstance(state, Tensor) else state.edge


def _at_reset(state: Any) -> Tensor:
    return _first(state) if getattr(state, "reset_to", None) is None else state.reset_to


@contextmanager
def autograd_in_kernels() -> Iterator[None]:
    """Turns autograd on inside an operator's kernel, where torch's dispatcher leaves it out."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    autograd = (keys.AutogradFunctionality, keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradOther)
    for key in (*autograd, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _leaf(value: Tensor) -> Tensor:
    value = value.detach()
    return value.requires_grad_() if value.is_floating_point() else value


def _grad(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor | None]) -> list[Tensor]:
    pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad and c is not None]
    wanted = [i for i in inputs if i.requires_grad]
    found: list[Tensor | None] = [None] * len(wanted)
    if pairs and wanted:
        found = list(torch.autograd.grad(
            [o for o, _ in pairs], wanted, [c.expand_as(o) for o, c in pairs], allow_unused=True
        ))  # fmt: skip
    given = iter(found)
    gradients = [next(given) if i.requires_grad else None for i in inputs]
    return [torch.zeros_like(i) if g is None else g for g, i in zip(gradients, inputs)]


class Dense:
    """The rows of a span as (P, B, ...), valid steps first."""

    def __init__(self, span: Span):
        self.span = span
        self.steps, self.batch = span.stop - span.start, span.schedule.batch
        full = span.schedule.full
        self.lengths = None if full else torch.bincount(span.row, minlength=self.batch)
        marks = span.resets
        self.resets = None if marks is None else self.spread(marks)

    def spread(self, packed: Tensor) -> Tensor:
        if self.span.schedule.full:
            return packed.reshape(self.steps, self.batch, *packed.shape[1:])
        flat = packed.new_zeros(self.steps * self.batch, *packed.shape[1:])
        return flat.index_copy_(0, self.span.dense, packed).view(self.steps, self.batch, *packed.shape[1:])

    def collect(self, value: Tensor) -> Tensor:
        flat = value.reshape(self.steps * self.batch, *value.shape[2:])
        return flat if self.span.schedule.full else flat.index_select(0, self.span.dense)

    def at_resets(self, value: Tensor) -> Tensor:
        """(B, ...) as packed values whose sum over the resets of each row it is."""
        packed = value.new_zeros(self.span.total, *value.shape[1:])
        if (hits := self.span.hits) is not None:
            none = torch.full((self.batch,), self.span.total, dtype=torch.long, device=value.device)
            first = none.scatter_reduce(0, self.span.row[hits], hits, "amin")
            has = first < self.span.total
            packed[first[has]] = value[has]
        return packed

    def at_first(self, value: Tensor) -> Tensor:
        """(B, ...) as packed values whose sum over the steps of each row it is."""
        packed = value.new_zeros(self.span.total, *value.shape[1:])
        has = self.span.first_of_row >= self.batch
        packed[self.span.first_of_row[has] - self.batch] = value[has]
        return packed
