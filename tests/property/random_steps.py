"""Random steps: small programs over states and inputs, as plain data that Hypothesis can shrink and print."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import nn

import steploop as sl

WIDTHS = (2, 3)
KINDS = ("float", "int", "bool")


@dataclass(frozen=True)
class Op:
    """One call: `name` on earlier values (indices taken modulo what there is of a kind)."""

    name: str
    a: int
    b: int


@dataclass(frozen=True)
class Recipe:
    """states: (kind, width) each.  nexts: which value each state becomes: an index, None (not written).
    weights: how many weight matrices, which operations share.  outputs: indices."""

    states: tuple[tuple[str, int], ...]
    ops: tuple[Op, ...]
    nexts: tuple[int | None, ...]
    outputs: tuple[int, ...]
    weights: int = 2
    constant: bool = False
    extra: tuple = field(default=())


NAMES = (
    "linear", "linear", "tanh", "sigmoid", "add", "mul", "cat", "slice", "where", "detach", "norm", "softmax",
    "inplace", "count", "compare", "select", "attend", "mean", "flip", "no_grad", "centre", "relu", "scale",
)  # fmt: skip


@st.composite
def recipes(draw, largest: int = 9) -> Recipe:
    number = st.integers(0, 30)
    count = draw(st.integers(1, 5))
    kinds = st.sampled_from(("float", "float", "float", "float", "int", "bool"))
    states = tuple((draw(kinds), draw(st.sampled_from(WIDTHS))) for _ in range(count))
    op = st.builds(Op, st.sampled_from(NAMES), number, number)
    ops = tuple(draw(st.lists(op, min_size=1, max_size=largest)))
    nexts = tuple(draw(st.one_of(st.integers(0, 60), st.integers(0, 60), st.none())) for _ in range(count))
    outputs = tuple(draw(st.lists(st.integers(0, 60), min_size=1, max_size=3)))
    return Recipe(states, ops, nexts, outputs, draw(st.integers(1, 3)), draw(st.booleans()))


class RandomStep(sl.Step):
    """Runs a recipe. Values are (B, width) floats, (B,) integers and (B,) bools."""

    def __init__(self, recipe: Recipe, input_size: int = 3):
        super().__init__()
        self.recipe = recipe
        for i, (kind, width) in enumerate(recipe.states):
            if kind == "float":
                state = sl.State(width, init=(0.0, "learned", 0.5)[i % 3])
            else:
                state = sl.State(dtype={"int": torch.int64, "bool": torch.bool}[kind], init=0)
            setattr(self, f"s{i}", state)
        generator = torch.Generator().manual_seed(len(recipe.ops))
        self.weights = nn.ParameterList(
            torch.randn(6, 6, generator=generator, dtype=torch.float64) * 0.4 for _ in range(recipe.weights)
        )
        self.norm = nn.Parameter(torch.linspace(0.5, 1.5, 6, dtype=torch.float64))

    def begin(self, *, memory=None):
        pass

    def step(self, x, *, memory=None):
        values = _Values(self, x, memory)
        for op in self.recipe.ops:
            values.run(op)
        for i, (chosen, (kind, width)) in enumerate(zip(self.recipe.nexts, self.recipe.states, strict=True)):
            if chosen is not None:
                getattr(self, f"s{i}").next = values.as_state(kind, width, chosen)
        return tuple(values.any(i) for i in self.recipe.outputs)


class _Values:
    def __init__(self, step: RandomStep, x, memory):
        self.step, self.memory = step, memory
        self.floats, self.ints, self.bools = [x], [], []
        for i, (kind, _) in enumerate(step.recipe.states):
            self.of(kind).append(getattr(step, f"s{i}").prev)
        self.ints.append((x[:, 0] > 0).to(torch.int64))
        self.bools.append(x[:, 1] > 0)

    def of(self, kind):
        return {"float": self.floats, "int": self.ints, "bool": self.bools}[kind]

    def float(self, i):
        return self.floats[i % len(self.floats)]

    def any(self, i):
        everything = [*self.floats, *self.ints, *self.bools]
        return everything[i % len(everything)]

    def as_state(self, kind, width, i):
        if kind != "float":
            return self.of(kind)[i % len(self.of(kind))]
        return self.fit(self.float(i), width)

    def fit(self, value, width):
        """A value cut or padded to a width; one that fits is passed on as it is."""
        have = value.shape[1]
        if have > width:
            return value[:, :width]
        return value if have == width else torch.cat([value, value[:, :1].expand(-1, width - have)], 1)

    def run(self, op):
        result = getattr(self, f"op_{op.name}")(op.a, op.b)
        if result.dtype == torch.bool:
            self.bools.append(result)
        elif result.is_floating_point():
            self.floats.append(result if result.shape[1] <= 6 else result[:, :6])
        else:
            self.ints.append(result)

    def op_linear(self, a, b):
        x, weights = self.float(a), self.step.weights
        return x @ weights[b % len(weights)][: x.shape[1], : WIDTHS[b % 2]]

    def op_tanh(self, a, b):
        return torch.tanh(self.float(a))

    def op_sigmoid(self, a, b):
        return torch.sigmoid(self.float(a))

    def op_relu(self, a, b):
        return torch.nn.functional.softplus(self.float(a))

    def op_scale(self, a, b):
        return self.float(a) * self.step.norm[: self.float(a).shape[1]]

    def op_add(self, a, b):
        return self.float(a) + self.fit(self.float(b), self.float(a).shape[1])

    def op_mul(self, a, b):
        return torch.tanh(self.float(a)) * self.fit(torch.tanh(self.float(b)), self.float(a).shape[1])

    def op_cat(self, a, b):
        return torch.cat([self.float(a), self.float(b)], 1)

    def op_slice(self, a, b):
        return self.float(a)[:, -2:]

    def op_where(self, a, b):
        x = self.float(a)
        return torch.where(self.bools[b % len(self.bools)][:, None], x, -0.5 * x)

    def op_detach(self, a, b):
        return self.float(a).detach() * 0.7

    def op_no_grad(self, a, b):
        with torch.no_grad():
            return torch.tanh(self.float(a)) + 0.1

    def op_norm(self, a, b):
        x = self.float(a)
        return torch.nn.functional.layer_norm(x, (x.shape[1],), self.step.norm[: x.shape[1]], eps=1.0)

    def op_softmax(self, a, b):
        return torch.softmax(self.float(a), 1)

    def op_inplace(self, a, b):
        x = self.float(a) * 0.5
        x.add_(0.3)
        x[:, 0] = torch.tanh(self.float(b)[:, 0])
        return x

    def op_count(self, a, b):
        return self.ints[a % len(self.ints)] + self.bools[b % len(self.bools)].to(torch.int64)

    def op_compare(self, a, b):
        return (self.ints[a % len(self.ints)] % 3) > (b % 3)

    def op_select(self, a, b):
        x = self.float(a)
        return x * (self.ints[b % len(self.ints)] % 2)[:, None].to(x.dtype)

    def op_attend(self, a, b):
        if self.memory is None:
            return self.float(a) * 0.9
        query = self.fit(self.float(a), 3)
        weights = torch.softmax((self.memory @ query[:, :, None])[..., 0], -1)
        return (weights[:, None] @ self.memory)[:, 0]

    def op_mean(self, a, b):
        return self.float(a).mean(1, keepdim=True)

    def op_centre(self, a, b):
        # Rows influence each other: such steps run their rows together, in real time.
        return self.float(a) - self.float(a).mean(0)

    def op_flip(self, a, b):
        return self.float(a).flip(1)
