"""Which backend runs a loop: the one that was asked for, or the first that takes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..compiler import choices, words
from ..compiler.ir.graph import LoopProgram
from ..errors import BuildError, InputError, UnsupportedError, describe, message, warn
from . import BACKENDS
from .contract import Backend, Reasons, Runner, Widen

_order: list[str] = ["cpu", "eager"]  # in which "auto" tries them; the last takes every loop
_made: dict[str, Backend] = {}


def register(backend: Backend, before: str = "eager") -> None:
    """Adds a backend under its name; "auto" tries it before another."""
    if backend.name in BACKENDS:
        raise InputError(
            message(
                "Every backend has a name of its own.",
                expected=f"none of {', '.join(map(repr, BACKENDS))}",
                found=describe(backend.name),
                fix='name = "..." in the backend\'s class',
            )
        )
    BACKENDS[backend.name] = backend.words
    _made[backend.name] = backend
    _order.insert(_order.index(before), backend.name)


def unregister(name: str) -> None:
    """Takes a backend away again that `register` added."""
    del BACKENDS[name], _made[name]
    _order.remove(name)


def backend_of(name: str) -> Backend:
    """A backend by its name. Ours are imported when they are first needed."""
    if name == "cpu" and name not in _made:
        from .cpu import Cpu, comparison

        _made[name], words.compare = Cpu(), comparison()
    elif name == "cuda" and name not in _made:
        from .cuda import Cuda

        _made[name] = Cuda()
    elif name == "eager" and name not in _made:
        from .eager import Eager

        _made[name] = Eager()
    return _made[name]


def _not_built(error: BuildError) -> tuple[str, str]:
    """The reason, of which a person is told: it is an accident, and what runs instead is slower."""
    reason = f"its kernel could not be built: {error}"
    warn(f"A loop runs without native code, which is slower: {reason}")
    return reason, ""


def _gave_up(loop: LoopProgram, error: BuildError) -> None:
    loop.backend, loop.reasons = _order[-1], [*loop.reasons, _not_built(error)]


@dataclass(frozen=True)
class Chosen:
    """See `contract.Choice`. name: "auto", or that of a backend."""

    name: str

    def select(self, loop: LoopProgram) -> tuple[Backend | None, Reasons]:
        """The backend for a loop, and why faster ones don't take it."""
        reasons: Reasons = []
        for name in _order if self.name == "auto" else (self.name,):
            backend = backend_of(name)
            against = backend.reasons_against(loop)
            if not against:
                return backend, reasons
            reasons += against
        return None, reasons

    def compile(self, loop: LoopProgram, widen: Widen) -> Runner:
        from . import cuda_graphs

        backend, reasons = self.select(loop)
        if backend is None:
            listed = "\n".join(f"  {line}: {reason}" if line else f"  {reason}" for reason, line in reasons)
            raise UnsupportedError(
                f'backend="{self.name}" can\'t run this loop:\n{listed}\n'
                'Use backend="auto", which chooses a backend for every loop.'
            )
        try:
            runner = self._compiled(backend, backend.wider(loop, widen), loop)
        except BuildError as error:
            if self.name != "auto":
                raise
            backend, reasons = backend_of(_order[-1]), [*reasons, _not_built(error)]
            runner = backend.compile(loop)
        if (self.name, backend.name) == ("auto", "eager") and cuda_graphs.takes(loop):
            runner, loop.launched = cuda_graphs.recorded(loop), "in CUDA graphs"
        loop.backend, loop.reasons = backend.name, reasons
        loop.launched = loop.launched or runner.launched
        return runner

    def plain(self, loop: LoopProgram) -> Runner:
        return self._compiled(self.select(loop)[0] or backend_of(_order[-1]), loop, loop)

    def _compiled(self, backend: Backend, loop: LoopProgram, shown: LoopProgram) -> Runner:
        """shown: the loop that plans speak of, where what runs is wider."""
        runner = backend.compile(loop)
        if self.name == "auto":
            runner.otherwise = partial(_gave_up, shown)
        return runner

    def prepare(self, dtypes: set[torch.dtype]) -> None:
        for backend in self._all():
            backend.prepare(dtypes)

    def takes_along(self, loop: LoopProgram) -> bool:
        backend, _ = self.select(loop)
        return backend is not None and backend.takes_along

    def stepping(self) -> Backend | None:
        return next((backend for backend in self._all() if backend.steps), None)

    def _all(self) -> list[Backend]:
        return [backend_of(name) for name in (_order if self.name == "auto" else [self.name])]


def chosen(name: str) -> Chosen:
    if name not in BACKENDS:
        raise UnsupportedError(f"there is no backend {name!r} here; there are {', '.join(map(repr, BACKENDS))}")
    return Chosen(name)


choices.hand_down(chosen)
