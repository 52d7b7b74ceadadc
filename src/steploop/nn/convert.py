"""LSTM and GRU weights of other frameworks, into and out of the parameters of sl.nn's cells and layers.

    cell = sl.nn.LSTMCell(8, 16)
    cell.load_state_dict(sl.nn.convert.from_keras("lstm", layer.get_weights()))
    layer.set_weights(sl.nn.convert.to_keras("lstm", cell.state_dict()))

What the frameworks hold for inputs I and hidden size H, and where a bias of the forget gate hides:

| framework | kind | arrays, in order | gates | biases |
| --- | --- | --- | --- | --- |
| keras | lstm | kernel (I, 4H), recurrent_kernel (H, 4H), bias (4H,) | i f c o | one; unit_forget_bias is part of it |
| keras | gru | kernel (I, 3H), recurrent_kernel (H, 3H), bias (2, 3H) or (3H,) | z r h | reset_after: two, else one |
| tf1 | lstm | kernel (I + H, 4H), bias (4H,) | i j f o | one; forget_bias is added at run time |
| tf1 | gru | gates kernel (I + H, 2H), bias; candidate kernel (I + H, H), bias | r u, c | one; r h before the product |
| returnn | lstm | W (I, 4H), W_re (H, 4H), b (4H,) | j i f o | one; nothing is added (NativeLstm2) |
| onnx | lstm | W (D, 4H, I), R (D, 4H, H), B (D, 8H) | i o f c | two |
| onnx | gru | W (D, 3H, I), R (D, 3H, H), B (D, 6H) | z r h | two; linear_before_reset=1 is reset_after |

Ours, as torch's: weight_ih (gates H, I), weight_hh (gates H, H), bias_ih and bias_hh, gates i f g o and r z n.
A GRU that multiplies r with h before the product is `sl.nn.GRUCell(..., reset_after=False)`; torch's and
`sl.nn.GRU` have no such form.

kind:    "lstm" or "gru".  arrays: NumPy arrays or tensors, in the order of the table; a bias may be None or left
         out at the end. Two directions: the arrays of the forward one, then those of the backward one (Keras, TF1,
         RETURNN); ONNX has D = 2.
layer:   None: the names are those of a cell (weight_ih, ...). k: those of layer k of sl.nn.LSTM and GRU
         (weight_ih_l0, ...; with two directions also weight_ih_l0_reverse).
from_* return {name: tensor}; bias_hh is zero where the framework has one bias. to_* return a list of NumPy arrays
in the order of the table; where the framework has one bias it is the sum of ours.
Raises InputError for an unknown kind, for shapes that do not fit, and for what the framework cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError, describe, message

GATES = {"lstm": "ifgo", "gru": "rzn"}  # ours; a framework's order is written with the same letters
KERAS = {"lstm": "ifgo", "gru": "zrn"}
TF1 = "igfo"
RETURNN = "gifo"
ONNX = {"lstm": "iofg", "gru": "zrn"}
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

Weights = dict[str, Tensor]


def from_keras(kind: str, arrays: Sequence[Any], layer: int | None = None) -> Weights:
    """The arrays of `layer.get_weights()` of keras.layers.LSTM, GRU, or Bidirectional around one.

    A GRU's bias (2, 3H) is one of reset_after=True; (3H,) of False, for `GRUCell(..., reset_after=False)`.
    """
    order = KERAS[_checked_kind(kind)]
    directions = _directions("keras", arrays, 3)
    return _named([_from_keras(kind, order, part) for part in directions], layer)


def _from_keras(kind: str, order: str, part: list[Any]) -> list[Tensor]:
    kernel, recurrent, bias = part
    bias_ih, bias_hh = bias if bias is not None and bias.dim() == 2 else (bias, None)
    found = [kernel.t(), recurrent.t(), bias_ih, bias_hh]
    return _ours("keras", kind, found, order)


def to_keras(kind: str, weights: Mapping[str, Tensor], layer: int | None = None, reset_after: bool = True) -> list[Any]:
    """For `layer.set_weights(...)`. reset_after: of a GRU, how it was made, here and in Keras."""
    order = KERAS[_checked_kind(kind)]
    made: list[Any] = []
    for part in _parts(kind, weights, layer):
        w, r, bias_ih, bias_hh = _theirs(part, kind, order)
        two = kind == "gru" and reset_after
        made += [w.t(), r.t(), torch.stack([bias_ih, bias_hh]) if two else bias_ih + bias_hh]
    return _arrays(made)


def from_tf1(kind: str, arrays: Sequence[Any], layer: int | None = None, forget_bias: float = 1.0) -> Weights:
    """Of tf.nn.rnn_cell.BasicLSTMCell, LSTMCell or GRUCell. A GRU is one of `reset_after=False`.

    forget_bias: what the TF cell adds at run time; it becomes part of bias_ih.
    """
    _checked_kind(kind)
    if kind == "gru":
        parts = [_from_tf1_gru(part) for part in _directions("tf1", arrays, 4)]
    else:
        parts = [_from_tf1_lstm(part, forget_bias) for part in _directions("tf1", arrays, 2)]
    return _named(parts, layer)


def _from_tf1_lstm(part: list[Any], forget_bias: float) -> list[Tensor]:
    kernel, bias = part
    w, r = _split_rows(kernel, kernel.shape[1] // 4)
    found = _ours("tf1", "lstm", [w.t(), r.t(), bias, None], TF1)
    found[2] = found[2] + forget_bias * _forget_gate(found[2])
    return found


def _from_tf1_gru(part: list[Any]) -> list[Tensor]:
    gates, gates_bias, candidate, candidate_bias = part
    (w_rz, r_rz), (w_n, r_n) = (_split_rows(kernel, candidate.shape[1]) for kernel in (gates, candidate))
    bias = None if gates_bias is None else torch.cat([gates_bias, candidate_bias])
    found = [torch.cat([w_rz, w_n], 1).t(), torch.cat([r_rz, r_n], 1).t(), bias, None]
    return _ours("tf1", "gru", found, "rzn")


def to_tf1(kind: str, weights: Mapping[str, Tensor], layer: int | None = None, forget_bias: float = 1.0) -> list[Any]:
    """The variables of a TF1 cell. forget_bias: what that cell will add at run time; it is taken away here."""
    made: list[Any] = []
    for part in _parts(kind, weights, layer):
        order = TF1 if kind == "lstm" else "rzn"
        w, r, bias_ih, bias_hh = _theirs(part, kind, order)
        kernel, bias = torch.cat([w.t(), r.t()]), bias_ih + bias_hh
        if kind == "lstm":
            gate = _forget_gate(bias).reshape(4, -1)[[0, 2, 1, 3]].flatten()
            made += [kernel, bias - forget_bias * gate]
        else:
            size = 2 * r.shape[1]
            made += [kernel[:, :size], bias[:size], kernel[:, size:], bias[size:]]
    return _arrays(made)


def from_returnn(kind: str, arrays: Sequence[Any], layer: int | None = None) -> Weights:
    """Of RETURNN's NativeLstm2, gates j i f o."""
    _only_lstm(kind)
    directions = _directions("returnn", arrays, 3)
    return _named([_ours("returnn", "lstm", [w.t(), r.t(), b, None], RETURNN) for w, r, b in directions], layer)


def to_returnn(kind: str, weights: Mapping[str, Tensor], layer: int | None = None) -> list[Any]:
    """W, W_re, b of RETURNN's NativeLstm2."""
    _only_lstm(kind)
    made: list[Any] = []
    for part in _parts(kind, weights, layer):
        w, r, bias_ih, bias_hh = _theirs(part, "lstm", RETURNN)
        made += [w.t(), r.t(), bias_ih + bias_hh]
    return _arrays(made)


def from_onnx(kind: str, arrays: Sequence[Any], layer: int | None = None) -> Weights:
    """W, R, B of an ONNX LSTM or GRU node. A GRU's linear_before_reset=0 is `reset_after=False`.

    Raises UnsupportedError for peepholes (a fourth array, P).
    """
    order = ONNX[_checked_kind(kind)]
    if len(arrays) > 3 and any(array is not None for array in arrays[3:]):
        raise UnsupportedError(message("ONNX: peepholes (P) have no place in sl.nn.LSTMCell.", found="4 arrays"))
    given = [_tensor(array) for array in [*arrays[:3], *[None] * (3 - len(arrays))]]
    if any(array is None or array.dim() != 3 for array in given[:2]):
        shown = ", ".join(describe(array) for array in given)
        raise InputError(message("ONNX: W and R have three axes.", expected="(D, gates H, I)", found=shown))
    parts = []
    for direction in range(len(cast(Tensor, given[0]))):
        w, r, b = (None if array is None else array[direction] for array in given)
        biases = (None, None) if b is None else b.chunk(2)
        parts.append(_ours("onnx", kind, [w, r, *biases], order))
    return _named(parts, layer)


def to_onnx(kind: str, weights: Mapping[str, Tensor], layer: int | None = None) -> list[Any]:
    """W, R, B of an ONNX node; for a GRU set linear_before_reset=1, or 0 if it is one of reset_after=False."""
    order = ONNX[_checked_kind(kind)]
    parts = [_theirs(part, kind, order) for part in _parts(kind, weights, layer)]
    stacked = [(w, r, torch.cat([bias_ih, bias_hh])) for w, r, bias_ih, bias_hh in parts]
    return _arrays([torch.stack(column) for column in zip(*stacked)])


# ---- gates, names and shapes -------------------------------------------------------------------------------


def _ours(owner: str, kind: str, part: Sequence[Tensor | None], order: str) -> list[Tensor]:
    """[weight_ih, weight_hh, bias_ih, bias_hh] with our gates, of the same with gates in `order`."""
    w, r, bias_ih, bias_hh = cast("tuple[Tensor, Tensor, Tensor | None, Tensor | None]", part)
    hidden, gates = r.shape[1], len(order)
    zeros = torch.zeros(gates * hidden, dtype=r.dtype, device=r.device)
    found = [w, r, zeros if bias_ih is None else bias_ih, zeros if bias_hh is None else bias_hh]
    if any(len(t) != gates * hidden or t.dim() != d for t, d in zip(found, (2, 2, 1, 1))):
        raise InputError(
            message(
                f"{owner}: these are not the weights of one {kind.upper()}.",
                expected=f"{gates} gates of {hidden} units each, biases ({gates * hidden},)",
                found=", ".join(describe(t) for t in found),
                fix="see help(steploop.nn.convert) for the arrays and their order",
            )
        )
    return [_reordered(t, order, GATES[kind]) for t in found]


def _theirs(part: Sequence[Tensor], kind: str, order: str) -> list[Tensor]:
    return [_reordered(t, GATES[kind], order) for t in part]


def _reordered(tensor: Tensor, old: str, new: str) -> Tensor:
    return tensor.reshape(len(old), -1, *tensor.shape[1:])[[old.index(gate) for gate in new]].flatten(0, 1)


def _forget_gate(bias: Tensor) -> Tensor:
    """1 where our forget gate is, 0 elsewhere; (4H,)."""
    gate = torch.zeros(4, len(bias) // 4, dtype=bias.dtype, device=bias.device)
    gate[1] = 1
    return gate.flatten()


def _split_rows(kernel: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    if kernel.dim() != 2 or kernel.shape[0] <= hidden:
        raise InputError(
            message(
                "tf1: a kernel has rows for the inputs, then for the state.",
                expected=f"(I + {hidden}, ...)",
                found=describe(kernel),
            )
        )
    return kernel[:-hidden], kernel[-hidden:]


def _tensor(array: Any) -> Tensor | None:
    if array is None:
        return None
    return array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.array(array))


def _directions(owner: str, arrays: Sequence[Any], count: int) -> list[list[Any]]:
    """The arrays of each direction; missing biases of a single one are None."""
    given = [_tensor(array) for array in arrays]
    least = 4 if owner == "tf1" and count == 4 else count - 1
    if least <= len(given) < count:
        given += [None] * (count - len(given))
    if len(given) not in (count, 2 * count):
        raise InputError(
            message(
                f"{owner}: not the number of arrays that one layer has.",
                expected=f"{count}, or {2 * count} for two directions",
                found=str(len(arrays)),
                fix="one layer at a time; None stands for a bias that is not there",
            )
        )
    return [given[k : k + count] for k in range(0, len(given), count)]


def _suffixes(layer: int | None, directions: int) -> list[str]:
    if layer is None and directions == 1:
        return [""]
    return [f"_l{layer or 0}{suffix}" for suffix in ("", "_reverse")[:directions]]


def _named(parts: Sequence[Sequence[Tensor]], layer: int | None) -> Weights:
    suffixes = _suffixes(layer, len(parts))
    return {
        name + suffix: tensor.clone(memory_format=torch.contiguous_format)
        for suffix, part in zip(suffixes, parts)
        for name, tensor in zip(NAMES, part)
    }


def _parts(kind: str, weights: Mapping[str, Tensor], layer: int | None) -> list[list[Tensor]]:
    """[weight_ih, weight_hh, bias_ih, bias_hh] of each direction; biases that are not there are zeros."""
    _checked_kind(kind)
    given = {name: value.detach().cpu() for name, value in weights.items()}
    if layer is None and "weight_ih" not in given:
        layer = 0
    two = f"weight_ih_l{layer}_reverse" in given
    parts = []
    for suffix in _suffixes(layer, 2 if two else 1):
        missing = [name + suffix for name in NAMES[:2] if name + suffix not in given]
        if missing or f"weight_hr{suffix}" in given:
            raise InputError(
                message(
                    f"These are not the weights of one {kind.upper()}.",
                    expected=", ".join(name + suffix for name in NAMES),
                    found=", ".join(given) or "nothing",
                    fix="cell.state_dict(), or layer.state_dict() with layer=k; no projections",
                )
            )
        w, r = (given[name + suffix] for name in NAMES[:2])
        if len(w) != len(GATES[kind]) * r.shape[1]:
            found = f"{describe(w)}, {describe(r)}"
            raise InputError(message(f"These are not the weights of one {kind.upper()}.", found=found))
        zeros = torch.zeros(len(w), dtype=w.dtype, device=w.device)
        parts.append([w, r, *(given.get(name + suffix, zeros) for name in NAMES[2:])])
    return parts


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.contiguous().numpy().copy() for tensor in tensors]


def _checked_kind(kind: str) -> str:
    if kind in GATES:
        return kind
    raise InputError(message("Weights of which kind?", expected='"lstm" or "gru"', found=describe(kind)))


def _only_lstm(kind: str) -> None:
    if _checked_kind(kind) != "lstm":
        raise UnsupportedError(
            message("RETURNN has no native GRU.", expected='"lstm"', found=describe(kind), fix="from_tf1")
        )
