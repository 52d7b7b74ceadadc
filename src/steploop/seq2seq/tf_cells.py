"""TF1's cells (tf.nn.rnn_cell, tf.contrib.rnn) as Steps: TF's formulas, kernel layout and variable names.

`GRUCell(num_units)` as in TF: what the cell is given to (a decoder, MultiRNNCell, EmbeddingWrapper) tells it the
size of its inputs. Where nothing does: `GRUCell(num_units, input_size=8)`.

Any other Step may stand in their place (sl.nn.LSTMCell, your own) if it has States (B, features) and says its
`output_size`; only TF1 checkpoints then have no names for its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..errors import InputError, StepError, describe, message
from ..state import State
from ..step import Step
from .tf_state import LSTMStateTuple, output_size, state_size, zero_state
from .tf_variables import Variable, joined, variables_of

__all__ = [
    "BasicLSTMCell",
    "BasicRNNCell",
    "EmbeddingWrapper",
    "GRUCell",
    "LSTMStateTuple",
    "Linear",
    "MultiRNNCell",
    "OutputProjectionWrapper",
    "zero_state",
]

Activation = Callable[[Tensor], Tensor]


class Linear(nn.Module):
    """concat(inputs) @ kernel + bias. kernel: (inputs, outputs), TF's layout; drawn Glorot-uniform.

    bias_start: what the bias starts as.
    """

    def __init__(
        self, input_size: int, output_size: int, bias_start: float = 0.0, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(input_size, output_size, dtype=dtype))
        self.bias = nn.Parameter(torch.full((output_size,), bias_start, dtype=dtype))
        nn.init.xavier_uniform_(self.kernel)

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, -1) @ self.kernel + self.bias

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        """The weights, by the names that TF gives them below `scope`."""
        yield Variable(joined(scope, "kernel"), self.kernel)
        yield Variable(joined(scope, "bias"), self.bias)

    def extra_repr(self) -> str:
        return ", ".join(str(n) for n in self.kernel.shape)


class TFCell(Step):
    """What the cells share: a size of inputs that may be told later, and TF's names.

    output_size: features of what a step returns.  state_size: the structure of the TF state, with numbers.
    """

    tf_name: str
    output_size: int
    state_size: Any
    input_size: int | None = None

    def build(self, input_size: int) -> None:
        """Say how many features the inputs have: makes the weights. InputError if it is known and another."""
        if self.input_size is None:
            self.input_size = input_size
            self._make(input_size)
        elif self.input_size != input_size:
            raise InputError(
                message(
                    f"{type(self).__name__} was made for inputs of another size.",
                    expected=f"inputs (B, {self.input_size})",
                    found=f"inputs (B, {input_size})",
                    fix=f"a cell of its own for these inputs: {type(self).__name__}(...)",
                )
            )

    def _make(self, input_size: int) -> None:
        raise NotImplementedError

    def zero_state(self, batch_size: int, dtype: torch.dtype | None = None) -> Any:
        """A TF state of zeros: (B, features) tensors in the structure of `state_size`."""
        return zero_state(self, batch_size, dtype)

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        """The weights, by the names that TF gives them below `scope`."""
        raise NotImplementedError


def build(cell: Step, input_size: int) -> None:
    """Tell a cell the size of its inputs; a Step that is not of TF knows it already."""
    if isinstance(cell, TFCell):
        cell.build(input_size)


def _checked_units(owner: str, num_units: Any) -> int:
    if isinstance(num_units, bool) or not isinstance(num_units, int) or num_units < 1:
        raise InputError(
            message(f"{owner}: num_units is a whole number >= 1.", expected="int", found=describe(num_units))
        )
    return num_units


class _NotBuilt(nn.Module):
    """In the place of weights whose sizes are not known yet."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, *_: Tensor) -> Tensor:
        raise StepError(
            message(
                f"{self.owner} does not know the size of its inputs yet.",
                expected="input_size, or a decoder or wrapper that knows it",
                fix=f"{self.owner}(..., input_size=...)",
            )
        )


class _Units(TFCell):
    """A cell with units of its own. weights: the names of its Linears."""

    weights: tuple[str, ...] = ("linear",)

    def __init__(
        self,
        num_units: int,
        *,
        activation: Activation | None = None,
        input_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_units = self.output_size = _checked_units(type(self).__name__, num_units)
        self.activation = torch.tanh if activation is None else activation
        self.dtype = dtype
        self._make_states()
        for name in self.weights:
            self.add_module(name, _NotBuilt(type(self).__name__))
        if input_size is not None:
            self.build(input_size)

    def _make_states(self) -> None:
        self.h = State(self.num_units)
        self.state_size = self.num_units

    def extra_repr(self) -> str:
        return f"{self.num_units}, input_size={self.input_size}"


class BasicRNNCell(_Units):
    """h' = activation([x, h] W + b). One step takes x (B, input_size) and returns h (B, num_units)."""

    tf_name = "basic_rnn_cell"

    def _make(self, input_size: int) -> None:
        self.linear = Linear(input_size + self.num_units, self.num_units, dtype=self.dtype)

    def step(self, x: Tensor) -> Tensor:
        self.h.next = h = self.activation(self.linear(x, self.h.prev))
        return h

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        return self.linear.tf_variables(joined(scope, self.tf_name))


class GRUCell(_Units):
    """r, u = split(sigmoid([x, h] Wg + bg));  c = activation([x, r h] Wc + bc);  h' = u h + (1 - u) c.

    Cho et al. 2014: r multiplies h before the product, not after it as in torch.nn.GRUCell. bg starts at 1.
    One step takes x (B, input_size) and returns h (B, num_units).
    """

    tf_name = "gru_cell"
    weights = ("gates", "candidate")

    def _make(self, input_size: int) -> None:
        size = input_size + self.num_units
        self.gates = Linear(size, 2 * self.num_units, bias_start=1.0, dtype=self.dtype)
        self.candidate = Linear(size, self.num_units, dtype=self.dtype)

    def step(self, x: Tensor) -> Tensor:
        h = self.h.prev
        r, u = torch.sigmoid(self.gates(x, h)).chunk(2, -1)
        c = self.activation(self.candidate(x, r * h))
        self.h.next = h = u * h + (1 - u) * c
        return h

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        scope = joined(scope, self.tf_name)
        yield from self.gates.tf_variables(joined(scope, "gates"))
        yield from self.candidate.tf_variables(joined(scope, "candidate"))


class BasicLSTMCell(_Units):
    """i, j, f, o = split([x, h] W + b);  c' = sigmoid(f + forget_bias) c + sigmoid(i) activation(j);
    h' = sigmoid(o) activation(c').

    forget_bias: added at run time; it is no part of b.
    state_is_tuple: the state is LSTMStateTuple(c, h); else one tensor (B, 2 num_units), c before h.
    One step takes x (B, input_size) and returns h (B, num_units).
    """

    tf_name = "basic_lstm_cell"

    def __init__(
        self,
        num_units: int,
        *,
        forget_bias: float = 1.0,
        state_is_tuple: bool = True,
        activation: Activation | None = None,
        input_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_units, activation=activation, input_size=input_size, dtype=dtype)
        self.forget_bias = forget_bias
        self.state_size = LSTMStateTuple(num_units, num_units) if state_is_tuple else 2 * num_units

    def _make_states(self) -> None:
        self.c, self.h = State(self.num_units), State(self.num_units)

    def _make(self, input_size: int) -> None:
        self.linear = Linear(input_size + self.num_units, 4 * self.num_units, dtype=self.dtype)

    def step(self, x: Tensor) -> Tensor:
        i, j, f, o = self.linear(x, self.h.prev).chunk(4, -1)
        new = torch.sigmoid(f + self.forget_bias) * self.c.prev + torch.sigmoid(i) * self.activation(j)
        self.c.next = new
        self.h.next = h = torch.sigmoid(o) * self.activation(new)
        return h

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        return self.linear.tf_variables(joined(scope, self.tf_name))


class MultiRNNCell(TFCell):
    """Cells one above the other, "cell_0", "cell_1", ...; the last one's output is returned.

    state_is_tuple: the state is a tuple with one state per layer; else all of them side by side in one tensor.
    Raises StepError for no cells and for one cell given twice, InputError where sizes do not fit.
    """

    tf_name = "multi_rnn_cell"

    def __init__(self, cells: Sequence[Step], *, state_is_tuple: bool = True, input_size: int | None = None) -> None:
        super().__init__()
        cells = list(cells)
        if not cells or not all(isinstance(cell, Step) for cell in cells):
            raise StepError(
                message(
                    "MultiRNNCell takes a list of cells.",
                    expected="one Step or more",
                    found=", ".join(type(cell).__name__ for cell in cells) or "none",
                    fix="MultiRNNCell([GRUCell(64) for _ in range(3)])",
                )
            )
        if len({id(cell) for cell in cells}) < len(cells):
            raise StepError(
                message(
                    "MultiRNNCell was given the same cell more than once.",
                    expected="a cell of its own for every layer",
                    found="[cell] * n, which some versions of TF1 took for shared weights and some did not",
                    fix="[GRUCell(64) for _ in range(3)], or sl.share(cell) for shared weights",
                )
            )
        for k, cell in enumerate(cells):
            self.add_module(f"cell_{k}", cell)
        self.output_size = output_size(cells[-1])
        sizes = tuple(state_size(cell) for cell in cells)
        self.state_size = sizes if state_is_tuple else sum(pytree.tree_leaves(sizes))
        if input_size is not None:
            self.build(input_size)

    def _make(self, input_size: int) -> None:
        for cell in cast("Iterator[Step]", self.children()):
            build(cell, input_size)
            input_size = output_size(cell)

    def step(self, x: Any, **constants: Any) -> Any:
        for cell in self.children():
            x = cell(x, **constants)
        return x

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        for name, cell in self.named_children():
            yield from variables_of(cell, joined(scope, f"{self.tf_name}/{name}"))


class OutputProjectionWrapper(TFCell):
    """cell's output @ kernel + bias: (B, output_size). The state is the cell's.

    activation: of the projected output, or None.
    """

    tf_name = "output_projection_wrapper"

    def __init__(
        self,
        cell: Step,
        output_size: int,
        *,
        activation: Activation | None = None,
        input_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cell = _checked_cell("OutputProjectionWrapper", cell)
        self.output_size = output_size
        self.state_size = state_size(cell)
        self.activation = activation
        self.projection = Linear(_output_size(cell), output_size, dtype=dtype)
        self.input_size = getattr(cell, "input_size", None)
        if input_size is not None:
            self.build(input_size)

    def _make(self, input_size: int) -> None:
        build(self.cell, input_size)

    def step(self, x: Any, **constants: Any) -> Tensor:
        y = self.projection(self.cell(x, **constants))
        return y if self.activation is None else self.activation(y)

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        scope = joined(scope, self.tf_name)
        yield from variables_of(self.cell, scope)
        yield from self.projection.tf_variables(scope)


_output_size = output_size


class EmbeddingWrapper(TFCell):
    """A step takes a label (B,) and gives the cell its embedding: cell(embedding[label]).

    embedding: (embedding_classes, embedding_size), drawn uniform in +-sqrt(3).
    """

    tf_name = "embedding_wrapper"

    def __init__(
        self, cell: Step, embedding_classes: int, embedding_size: int, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.cell = _checked_cell("EmbeddingWrapper", cell)
        self.embedding = nn.Parameter(torch.empty(embedding_classes, embedding_size, dtype=dtype))
        nn.init.uniform_(self.embedding, -(3**0.5), 3**0.5)
        self.output_size = output_size(cell)
        self.state_size = state_size(cell)
        build(cell, embedding_size)
        self.input_size = 1  # a label

    def step(self, label: Tensor, **constants: Any) -> Any:
        return self.cell(F.embedding(label, self.embedding), **constants)

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        scope = joined(scope, self.tf_name)
        yield Variable(joined(scope, "embedding"), self.embedding)
        yield from variables_of(self.cell, scope)


def _checked_cell(owner: str, cell: Any) -> Step:
    if not isinstance(cell, Step):
        raise StepError(
            message(
                f"{owner} takes a cell.",
                expected="a Step: steploop.seq2seq.tf_cells.GRUCell(64), sl.nn.LSTMCell(8, 64), your own",
                found=describe(cell),
            )
        )
    return cell
