"""A backend from outside: it runs the loop language by its interpreter, one row's program in plain torch.

`pytest --toy` runs every oracle test that goes through the compiled backends on it as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from steploop.backends import choose, contract, eager
from steploop.backends.native.fuse import fuse
from steploop.backends.native.interpret import Interpreter
from steploop.backends.native.lower import lower
from steploop.backends.native.show import show
from steploop.compiler.ir.graph import LoopProgram, Rows, rows_of


class Runner(contract.Runner):
    def __init__(self, loop: LoopProgram):
        self.loop, self.plan = loop, fuse(lower(loop)[0])
        self.run, self.plain, self.calls = Interpreter(loop, self.plan), eager.Runner(loop), 0

    def __call__(self, inputs, states, reset_to, span, down, sizes):
        if span.schedule.members is not None:  # rows that come and go: the interpreter knows only shrinking batches
            return self.plain(inputs, states, reset_to, span, down, sizes)
        self.calls += 1
        return self.run(inputs, states, reset_to, span, down, sizes)

    def show(self) -> str:
        return show(self.plan)


class Toy(contract.Backend):
    name = "toy"
    words = "the loop language, interpreted"

    def __init__(self) -> None:
        self.made: list[Runner] = []

    def reasons_against(self, loop: LoopProgram) -> contract.Reasons:
        program, reasons = lower(loop)
        odd = [n for n in (*(i.node for i in loop.inputs), *loop.kept) if rows_of(n) not in (None, Rows(0))]
        if reasons or odd or loop.batch is None or program.checks:
            return reasons or [("rows that are not in front, checks, or no batch", "")]
        fixed = all(isinstance(n, int) for b in (*program.prevs, *program.nexts) for n in b.shape)
        return [] if fixed else [("a size that only a call knows", "")]

    def compile(self, loop: LoopProgram) -> Runner:
        with torch.no_grad():
            self.made.append(Runner(loop))
        return self.made[-1]


@contextmanager
def registered() -> Iterator[Toy]:
    """Ready to be named, while this lasts; "auto" tries it before "eager"."""
    backend = Toy()
    choose.register(backend)
    try:
        yield backend
    finally:
        choose.unregister("toy")
