"""From the arguments of a search function to its Hypotheses: one loop, and what is before and after it."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import dispatch
from ..devices import explained
from ..errors import InputError, describe, message
from ..loop import Loop
from ..marks import wide
from ..nn._constants import _begins_with, _takes, check_constants_used
from ..prepared import Prepared
from ..states import States
from ..step import Step, survey
from .hypotheses import Hypotheses, of_slot, traced_back
from .labels import counts, explained_labels
from .prefix import Prefix
from .search import NEVER, Search
from .started import taken_apart

_KEPT = 16  # searches that are kept per model: their captures are used again
REPLACED = ("scores", "allowed")  # functions that may be new ones at every call
FREE = ("temperature", "top_p", "min_p", "diversity")  # numbers that may differ at every call


def run_search(kind: type[Search], model: Any, options: dict[str, Any], count: int, **given: Any) -> Hypotheses:
    """Search with `kind(model, ..., **options)`; count: N.  given: see `_Run`."""
    model, given["state"], given["constants"] = taken_apart(model, given["state"], given["constants"])
    with torch.no_grad():
        return _Run(kind, model, options, count, **given).hypotheses()


class _Run:
    def __init__(
        self, kind: type[Search], model: Step, options: dict[str, Any], count: int, *, start: Any, end: int | None,
        max_steps: Any, min_steps: Any, prefix: Any, prefix_lengths: Any, xs: Any, state: Any, batch_size: Any,
        backend: str, constants: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.count, self.end, self.constants = model, count, end, constants
        self.xs = xs if isinstance(xs, (tuple, list)) else (xs,)
        self.backend = dispatch.checked_backend(backend)
        self.start, self.least, self.given = start, counts("min_steps", min_steps), state
        self.prefix = None if prefix is None else Prefix(prefix, prefix_lengths, end)
        if self.prefix is not None and self.xs:
            raise InputError(message("A search over given sequences has no prefix.", expected="xs= or prefix="))
        self.limit = counts("max_steps", max_steps)
        self.steps = int(self.limit.max()) if self.limit.numel() else 0
        if self.xs:
            self.steps = min(self.steps, self._time())
        self.batch = self._batch(batch_size)
        room = self.steps + (0 if self.prefix is None else len(self.prefix.labels))
        self.search = _kept_search(kind, model, options, end, room)
        check_constants_used(self.search, self.search._steps(), constants)

    def _time(self) -> int:
        return int(self.xs[0].shape[0]) if isinstance(self.xs[0], Tensor) else self.steps

    def _batch(self, batch_size: Any) -> Any:
        if batch_size is not None:
            return batch_size
        if self.prefix is not None:
            return self.prefix.labels.shape[1]
        for value in (self.start, self.limit, self.least):
            if isinstance(value, Tensor) and value.dim() == 1:
                return value.shape[0]
        if isinstance(self.given, dict):
            return next((v.shape[0] for v in self.given.values()), None)
        return None

    def hypotheses(self) -> Hypotheses:
        loop = _kept_loop(self.search, self.backend)
        xs = tuple(x[: self.steps] for x in self.xs)
        arguments = {"steps": self.steps, "batch_size": self.batch, **self.constants}
        prefix = None if self.prefix is None else self.prefix.labels
        with explained(self.search, xs, arguments), explained_labels(start=self.start, prefix=prefix):
            prepared = loop.prepare(*xs, **arguments)
            own = prepared.states(prepared.call.initial)
            prepared = loop.prepare(*xs, state=self._first_states(own, prepared), **arguments)
            result = dispatch.run(prepared.program, prepared.call, self.backend)
            outputs, state = prepared.finish(result)
        self._check_nan(outputs["nan"])
        return self._found(outputs, state, cast(Tensor, result.taken))

    # before

    def _first_states(self, own: States, prepared: Prepared) -> States:
        batch = cast(int, prepared.call.batch)
        label = own["label"]
        device, shape = label.device, label.shape
        start = torch.as_tensor(self.start, device=device, dtype=torch.int64)
        limit, least = (_rows(n, v, batch, device) for n, v in (("max_steps", self.limit), ("min_steps", self.least)))
        own["label"] = _rows("start", start, batch, device).unsqueeze(1).expand(shape)
        own["limit"], own["least"] = limit.clamp(max=self.steps), least
        own["done"] = own["limit"] <= 0
        if self.given is not None:
            self._put(own, "model", self.model, self.given)
        if self.prefix is not None:
            self._read_prefix(own, start, batch)
        return own

    def _put(self, own: States, path: str, step: Step, values: Any) -> None:
        """The States of a part, one value a row, as those of all hypotheses."""
        found = self._tree(path)
        missing = [n for n in found if n not in values]
        if missing or len(values) != len(found):
            raise InputError(
                message(
                    "`state` does not name the States of the model.",
                    expected=", ".join(found) or "none", found=", ".join(map(str, values)) or "none",
                )
            )  # fmt: skip
        for name, (index, tree) in found.items():
            lone = [None] * len(tree.names)
            lone[index] = values[name]
            own[tree.names[index]] = tree.with_copies(lone)[index]

    def _tree(self, path: str) -> dict[str, Any]:
        whole = survey(self.search)
        start = f"{path}."
        return {n[len(start) :]: (i, whole) for i, n in enumerate(whole.names) if n.startswith(start)}

    def _read_prefix(self, own: States, start: Tensor, batch: int) -> None:
        prefix = cast(Prefix, self.prefix)
        device = own["label"].device
        labels, lengths = prefix.labels.to(device), prefix.lengths.to(device)
        first = _rows("start", start, batch, device)
        inputs = prefix.read(first)
        parts = [("model", self.search.model)]
        parts += [(f"scorers.{i}", scorer) for i, scorer in enumerate(cast("Iterable[Step]", self.search.scorers))]
        parts += [("constraint", self.search.constraint)] if self.search.constraint is not None else []
        for path, step in parts:
            begun = {n: v for n, v in self.given.items()} if path == "model" and self.given is not None else None
            constants = _taken_by(step, self.constants)
            _, after = Loop(step, backend=self.backend)(inputs, lengths=lengths, state=begun, **constants)
            self._put(own, path, step, after)
        last = prefix.last(first)
        own["label"] = last.unsqueeze(1).expand(own["label"].shape)
        over = prefix.ended.to(device)
        own["ended"] = own["ended"] | over.unsqueeze(1)
        own["done"] = own["done"] | over
        if "labels" in own:
            room = own["labels"].shape[2]
            valid = torch.arange(room, device=device) < lengths.unsqueeze(1)
            padded = torch.full((batch, room), -1, dtype=torch.int64, device=device)
            padded[:, : len(labels)] = labels.T
            padded = torch.where(valid, padded, -1)
            own["labels"] = padded.unsqueeze(1).expand(own["labels"].shape)
            own["written"] = lengths.clone()

    # after

    def _check_nan(self, bad: Tensor) -> None:
        """bad: (T, B), where an open hypothesis got a score that is NaN."""
        if bool(bad.any()):
            step, row = bad.nonzero()[0].tolist()
            raise InputError(
                message(
                    "The model, or a scorer, gave scores that are NaN.",
                    expected="numbers; -inf for a label that cannot come",
                    found=f"NaN in row {row} at step {step}",
                )
            )

    def _found(self, outputs: Any, state: States, taken: Tensor) -> Hypotheses:
        search = self.search
        score, ended = state["score"], state["ended"]
        order = torch.sort(score, dim=1, descending=True, stable=True).indices
        slot = order[:, : self.count]
        final, factor = search.final_scores(state)
        scores, finished = of_slot(final, slot), of_slot(ended, slot)
        labels, log_probs, kept = traced_back(outputs, taken, slot, self.end)
        there = scores > NEVER
        finished = finished & there
        bound = search.final_bound(outputs, state, taken) * factor
        labels = torch.where(there.unsqueeze(2), labels, 0 if self.end is None else self.end)
        log_probs = torch.where(there.unsqueeze(2), log_probs, 0.0)
        counted = taken.T.unsqueeze(1) & there.unsqueeze(2)
        lengths = (counted if self.end is None else counted & (labels != self.end)).sum(2)
        read = (lengths + finished.to(lengths.dtype)).unsqueeze(2)
        inside = torch.arange(labels.shape[2], device=labels.device) < read
        return Hypotheses(
            labels=labels, lengths=lengths, scores=scores, log_probs=torch.where(there, log_probs.sum(2), NEVER),
            label_log_probs=log_probs, finished=finished, proved_best=(scores[:, 0] >= bound) & there[:, 0],
            bound=bound, state=self._states(state, slot), kept=_named(kept, inside), end=self.end,
        )  # fmt: skip

    def _states(self, state: States, slot: Tensor) -> States:
        """The model's States of the hypotheses, rows B * N."""
        found = {}
        for name, (index, tree) in self._tree("model").items():
            value = state[tree.names[index]]
            value = value.movedim(2, 1) if tree.states[index].grows_with is not None else value
            found[name] = of_slot(value, slot).flatten(0, 1)
        return States(found)


def _rows(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    """(B,) int64."""
    value = torch.as_tensor(value).to(device=device, dtype=torch.int64)
    if value.dim() == 1 and value.shape[0] != batch:
        raise InputError(
            message(f"`{name}` has one entry for each row.", expected=f"({batch},)", found=describe(value))
        )
    return value.expand(batch)


def _taken_by(step: Step, constants: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if _takes(step, name) or _begins_with(step, name)}


def _named(kept: Any, inside: Tensor) -> dict[Any, Any]:
    def cut(value: Tensor) -> Tensor:
        return torch.where(wide(inside, value), value, torch.zeros_like(value))

    return pytree.tree_map(cut, kept)


def _kept_search(kind: type[Search], model: Step, options: dict[str, Any], end: int | None, room: int) -> Search:
    """The Search with these options, the same object at every call: what was captured of it stays."""
    free = {name: options[name] for name in FREE if name in options}
    fixed = {name: value for name, value in options.items() if name not in free}
    kept = model._kept.setdefault("searches", {})
    remembers = bool(options.get("no_repeat")) or (
        options.get("allowed") is not None and not isinstance(options["allowed"], Step)
    )
    least = room if remembers else 1
    key = (kind, end, least, *((name, _key(value, name in REPLACED)) for name, value in sorted(fixed.items())))
    found = kept.get(key)
    if found is None:
        if len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        found = kept[key] = kind(model, 0, end, least, shows=False, **fixed, **free)
    for name, value in free.items():
        if getattr(found, name) != value:
            setattr(found, name, value)
    if _is_function(options.get("scores")):  # a new function of the same code needs no new capture
        found.picks = options["scores"]
    if _is_function(options.get("allowed")):
        found.permits = options["allowed"]
    return found


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType)


def _key(value: Any, by_code: bool) -> Any:
    """What tells an option from another. by_code: functions of the same code are alike; the last one given is used."""
    if isinstance(value, (list, tuple)):
        return tuple(_key(v, by_code) for v in value)
    if isinstance(value, Tensor):
        return tuple(value.tolist())
    if isinstance(value, (int, float, str, type(None))):
        return type(value), value
    return value.__code__ if by_code and _is_function(value) else id(value)


def _kept_loop(search: Search, backend: str) -> Loop[Any]:
    loops = search._kept.setdefault("loops", {})
    if backend not in loops:
        loops[backend] = Loop(search, until="done", backend=backend)
    return loops[backend]
