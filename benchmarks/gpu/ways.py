"""The ways to run a recurrent program on a GPU. A backend more is a class more here: a column of every table.

make(problem, module, xs, constants, mode) gives a function of no arguments that does the whole work, or raises Blank.
Modes: "forward" (no gradients), "training" (also the gradients of parameters), "stream" (step after step as they come).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import steploop as sl

from .steps import Problem, first_states, one_step

Run = Callable[[], Any]


class Blank(Exception):
    """This way has no number here; the message says why."""


class Way:
    """name: of the column.  build_limit: seconds for the first run."""

    name = ""
    build_limit = 60.0

    def forward(self, problem: Problem, module: sl.Step, xs: list[Tensor], constants: dict[str, Tensor]) -> Run:
        """A function that gives the outputs (T, B, ...)."""
        raise NotImplementedError

    def make(self, problem: Problem, module: sl.Step, xs: list[Tensor], constants: dict, mode: str) -> Run:
        if mode == "stream":
            return self.stream(problem, module, xs, constants)
        forward = self.forward(problem, module, xs, constants)
        if mode == "forward":
            return lambda: _without_gradients(forward)
        parameters = [p for p in self.parameters(module) if p.requires_grad]
        cotangent = torch.randn_like(forward().detach())
        return lambda: torch.autograd.grad(forward(), parameters, cotangent, allow_unused=True)

    def stream(self, problem: Problem, module: sl.Step, xs: list[Tensor], constants: dict[str, Tensor]) -> Run:
        raise Blank("whole sequences only")

    def parameters(self, module: sl.Step) -> list[nn.Parameter]:
        return list(module.parameters())


def _without_gradients(forward: Run) -> Any:
    with torch.no_grad():
        return forward()


class Plain(Way):
    """A Python loop over the step, as its author would write it."""

    name = "plain loop"

    def body(self) -> Callable[..., Any]:
        return one_step

    def forward(self, problem, module, xs, constants):
        body = self.body()

        def run() -> Tensor:
            states, outputs = first_states(problem, module, xs[0]), []
            for x in zip(*(x.unbind(0) for x in xs)):
                states, y = body(module, x, states, constants)
                outputs.append(y)
            return torch.stack(outputs)

        return run

    def stream(self, problem, module, xs, constants):
        forward = self.forward(problem, module, xs, constants)
        return lambda: _without_gradients(forward)


class Steploop(Way):
    """steploop with a backend."""

    def __init__(self, name: str, backend: str):
        self.name, self.backend = name, backend

    def forward(self, problem, module, xs, constants):
        loop = sl.Loop(module, backend=self.backend)
        return lambda: loop(*xs, **constants)[0]

    def stream(self, problem, module, xs, constants):
        stream = sl.Loop(module, backend=self.backend).stream(problem.batch, **constants)
        first = stream.state

        def run() -> Tensor:
            stream.state = first
            return torch.stack([stream(*x) for x in zip(*(x.unbind(0) for x in xs))])

        return lambda: _without_gradients(run)


class CuDNN(Way):
    """torch.nn's layer, which is cuDNN's."""

    name = "cuDNN"

    def forward(self, problem, module, xs, constants):
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU}
        if problem.cell not in kinds:
            raise Blank("cuDNN has no such cell")
        layer = kinds[problem.cell](problem.hidden, problem.hidden).to(xs[0])
        layer.load_state_dict({f"{name}_l0": value for name, value in module.state_dict().items()})
        self.layer = layer
        return lambda: layer(xs[0])[0]

    def parameters(self, module):
        return list(self.layer.parameters())


class Compiled(Plain):
    """The plain loop over a step that torch.compile has compiled."""

    name = "torch.compile"
    build_limit = 90.0

    def body(self):
        torch._dynamo.reset()
        return torch.compile(one_step, dynamic=False)


class Graphed(Plain):
    """The whole plain loop as one CUDA graph: values only, on memory that stays where it is."""

    name = "plain loop, CUDA graph"

    def make(self, problem, module, xs, constants, mode):
        if mode != "forward":
            raise Blank("values of whole sequences only")
        if xs[0].device.type != "cuda":
            raise Blank("needs CUDA")
        from .micro import recorded

        forward, results = self.forward(problem, module, xs, constants), []

        def run() -> None:
            results[:] = [_without_gradients(forward)]

        graph = recorded(run)

        def replay() -> Tensor:
            graph.replay()
            return results[0]

        return replay


WAYS: tuple[Way, ...] = (
    Plain(), Steploop("steploop eager", "eager"), Steploop("steploop", "auto"), Steploop("steploop kernels", "cuda"),
    CuDNN(), Compiled(), Graphed(),
)  # fmt: skip
