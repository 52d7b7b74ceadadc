"""What is traced in the place of torch functions that look at values, which a trace does not have.

    x[mask] = value        where(mask, value, x), where the value is the same for every place that is written
    x[i], x[:, i] = value  with i a tensor without axes: index_select, and a comparison with arange
    lstm_cell, gru_cell    their formulas, on devices where torch has one kernel for them
    fake_quantize_...      its formula, whose gradient torch's tracer can't make
    linalg.solve, inv, ... the forms that check nothing, and a look at what they found (`solved`)
    one_hot                without its check: no class is out of range
    gaussian_nll_loss      without its check: no variance is negative
    index_fill             by a comparison, where the value is a tensor: torch's vmap and its gradient look at it
    trace                  the sum of the diagonal, since its gradient is an index_fill
    sgn                    as sign: the sum of its gradient and others fixes the number of rows
    cov, corrcoef          their formulas, without weights
    lerp, pow              with a tensor for a float that is an input of the graph: the gradient of the form with a
                           number would keep the number
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .solved import looked_at


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes <= 0 or tensor.dtype != torch.int64:
        return F.one_hot(tensor, num_classes)
    return tensor.new_zeros((*tensor.shape, num_classes)).scatter(-1, tensor.unsqueeze(-1), 1)


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    known: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda loss: loss, "mean": Tensor.mean, "sum": Tensor.sum}
    if not isinstance(var, Tensor) or reduction not in known:
        return F.gaussian_nll_loss(input, target, var, full, eps, reduction)
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    elif var.shape != input.shape:
        sizes = [n for m, n in zip(input.shape, var.shape) if m != n]
        if var.dim() != input.dim() or sum(sizes) != 1:  # one axis may be 1
            raise ValueError("var is of incorrect size")
    var = var.clone()
    with torch.no_grad():  # the gradient of a variance that is too small is that of the least
        var.clamp_(min=eps)
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    return known[reduction](loss + 0.5 * math.log(2 * math.pi) if full else loss)


def _lstm_cell(
    x: Tensor, hx: tuple[Tensor, ...] | list[Tensor], w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None
) -> Any:
    """torch's own formula on the CPU. Elsewhere torch has one kernel for it, of which no part can leave the loop."""
    if x.device.type == "cpu":
        return torch.lstm_cell(x, hx, w_ih, w_hh, *biases)
    b_ih, b_hh = biases or (None, None)
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(hx[0], w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * hx[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> Tensor:
    """As `_lstm_cell`."""
    if x.device.type == "cpu":
        return torch.gru_cell(x, h, w_ih, w_hh, *biases)
    b_ih, b_hh = biases or (None, None)
    x_r, x_z, x_n = F.linear(x, w_ih, b_ih).chunk(3, 1)
    h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, 1)
    z, n = torch.sigmoid(x_z + h_z), torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + z * (h - n)


def _fake_quantize(x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Tensor:
    """torch's formula, in float32 for every dtype; the gradient passes where nothing was clipped."""
    if isinstance(scale, Tensor) or isinstance(zero_point, Tensor):
        return _quantized(x, torch.as_tensor(scale), torch.as_tensor(zero_point), quant_min, quant_max)
    scale = float(np.float32(scale))
    places = torch.round(x * float(np.float32(1) / np.float32(scale))) + zero_point
    return _at_places(x, places, scale, zero_point, quant_min, quant_max)


def _fake_quantize_per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    shape = [-1 if i == axis % x.dim() else 1 for i in range(x.dim())]
    return _quantized(x, scale.view(shape), zero_point.view(shape), quant_min, quant_max)


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    scale, zero_point = scale.detach().float(), zero_point.detach()
    places = x * (1 / scale)
    places = torch.round(places + zero_point if zero_point.is_floating_point() else places)
    places = places if zero_point.is_floating_point() else places + zero_point
    return _at_places(x, places, scale, zero_point, quant_min, quant_max)


def _at_places(x: Tensor, places: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Tensor:
    kept = torch.where((places >= quant_min) & (places <= quant_max), x, 0.0)
    value = ((places.clamp(quant_min, quant_max) - zero_point).float() * scale).to(x.dtype)
    return value.detach() + (kept - kept.detach())


# -- what torch makes of sizes and weights --------------------------------------------------------------------


def _sgn(input: Tensor) -> Tensor:
    return torch.sgn(input) if input.is_complex() else torch.sign(input)


def _trace(input: Tensor) -> Tensor:
    return input.diagonal().sum() if input.dim() == 2 else torch.trace(input)


def _cov(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    if fweights is not None or aweights is not None or input.dim() > 2 or input.dtype == torch.bool:
        return torch.cov(input, correction=correction, fweights=fweights, aweights=aweights)
    rows = input if input.dim() == 2 else input.reshape(1, -1)
    count = rows.shape[1]
    apart = rows - (rows.sum(1) / count).unsqueeze(1)
    return (apart @ apart.t().conj() / max(count - correction, 0)).squeeze()


def _corrcoef(input: Tensor) -> Tensor:
    if input.is_complex():
        return torch.corrcoef(input)
    found = _cov(input)
    if found.dim() == 0:
        return found / found
    deviation = found.diagonal().sqrt()
    return (found / deviation.unsqueeze(1) / deviation.unsqueeze(0)).clip(-1, 1)


def _tensorinv(A: Tensor, ind: int = 2) -> Tensor:
    if not 0 < ind < A.dim() or math.prod(A.shape[:ind]) != math.prod(A.shape[ind:]):
        return torch.linalg.tensorinv(A, ind)
    square = A.reshape(math.prod(A.shape[:ind]), -1)
    return looked_at("inv")(square).reshape(*A.shape[ind:], *A.shape[:ind])


def _tensorsolve(A: Tensor, B: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    moved = A if dims is None else A.movedim(dims, list(range(A.dim() - len(dims), A.dim())))
    shape = moved.shape[B.dim() :]
    if B.numel() != math.prod(shape):
        return torch.linalg.tensorsolve(A, B, dims)
    return looked_at("solve")(moved.reshape(B.numel(), -1), B.flatten()).reshape(shape)


# -- indexing ------------------------------------------------------------------------------------------------


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or input.dim() == 0:
        return torch.index_fill(input, dim, index, value)
    shape = [1] * input.dim()
    shape[dim] = -1
    places = torch.zeros(input.shape[dim], dtype=torch.bool, device=input.device).index_fill(0, index, True)
    return torch.where(places.view(shape), value.to(input.dtype), input)


def _index_fill_(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or input.dim() == 0:
        return input.index_fill_(dim, index, value)
    return input.copy_(_index_fill(input, dim, index, value))


def _is_number(index: Any) -> bool:
    """An integer that is a tensor: torch takes it for the place itself, and reads it."""
    integer = isinstance(index, Tensor) and not (index.is_floating_point() or index.is_complex())
    return integer and index.dim() == 0 and index.dtype not in (torch.bool, torch.uint8)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() > 0


def _split(tensor: Tensor, index: Any) -> tuple[tuple[Any, ...], int, Any] | None:
    """(the index with a full slice in the place of its one tensor, the axis of that tensor, the tensor).

    None where the index holds no tensor, several, or lists, which torch has to look at together."""
    parts = list(index) if isinstance(index, tuple) else [index]
    chosen = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
    if len(chosen) != 1 or any(isinstance(part, (list, tuple)) for part in parts):
        return None
    (at,) = chosen
    found = parts[at]
    if not (_is_number(found) or _is_mask(found)):
        return None
    count = found.dim() if _is_mask(found) else 1
    parts[at : at + 1] = [slice(None)] * count
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        used = sum(part is not None and part is not Ellipsis and not isinstance(part, bool) for part in parts)
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - used)
        at += tensor.dim() - used - 1 if place < at else 0
    if any(isinstance(part, bool) for part in parts):
        return None
    axis = sum(part is None or isinstance(part, slice) for part in parts[:at])
    return tuple(parts), axis, found


def _lifted(index: Any) -> Any:
    """The index with an axis for each number beside other places: torch's tracer forgets the places then."""
    if not isinstance(index, (tuple, list)) or max((i.dim() for i in index if isinstance(i, Tensor)), default=0) == 0:
        return index
    return type(index)([i.reshape(1) if _is_number(i) else i for i in index])


def _check_fits(tensor: Tensor, index: Any, value: Any) -> None:
    """A value must have a row for every place. torch's tracer does not ask, and a number of rows would seem free."""
    parts = index if isinstance(index, (tuple, list)) else (index,)
    places = [i for i in parts if isinstance(i, Tensor)]
    if not isinstance(value, Tensor) or not places or any(i.dtype in (torch.bool, torch.uint8) for i in places):
        return
    if all(i is None or i is Ellipsis or type(i) in (int, slice) or isinstance(i, Tensor) for i in parts):
        shape = tensor[tuple(parts)].shape
        while value.dim() > len(shape) and value.shape[0] == 1:
            value = value[0]
        value.expand(shape)


def _get_item(tensor: Tensor, index: Any) -> Tensor:
    split = _split(tensor, index)
    if split is None or not _is_number(split[2]):
        return tensor[_lifted(index)]
    parts, axis, number = split
    seen = tensor[parts]
    number = torch.where(number < 0, number + seen.shape[axis], number)
    return seen.index_select(axis, number.reshape(1)).squeeze(axis)


def _set_item(tensor: Tensor, index: Any, value: Any) -> None:
    split = _split(tensor, index)
    if split is None or not _written(tensor, *split, value, False):
        index = _lifted(index)
        _check_fits(tensor, index, value)
        tensor[index] = value


def _index_put_(tensor: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    split = _split(tensor, _as_index(indices))
    if split is None or not _written(tensor, *split, values, accumulate):
        indices = _lifted(indices)
        _check_fits(tensor, _as_index(indices), values)
        return tensor.index_put_(indices, values, accumulate)
    return tensor


def _index_put(tensor: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    copy = tensor.clone()
    split = _split(copy, _as_index(indices))
    if split is None or not _written(copy, *split, values, accumulate):
        indices = _lifted(indices)
        _check_fits(tensor, _as_index(indices), values)
        return tensor.index_put(indices, values, accumulate)
    return copy


def _as_index(indices: Any) -> tuple[Any, ...]:
    return tuple(slice(None) if i is None else i for i in indices)


def _written(tensor: Tensor, parts: tuple[Any, ...], axis: int, found: Tensor, value: Any, accumulate: bool) -> bool:
    """Writes a value to a place, or to all where a mask is true; says whether it could."""
    seen = tensor[parts]
    count = found.dim() if _is_mask(found) else 1
    if _is_mask(found):
        if tuple(found.shape) != tuple(seen.shape[axis : axis + count]):
            return False  # torch has the better message
        mask = found
    else:
        number = torch.where(found < 0, found + seen.shape[axis], found)
        mask = torch.arange(seen.shape[axis], device=seen.device) == number
    mask = mask.reshape(mask.shape + (1,) * (seen.dim() - axis - count))
    if isinstance(value, Tensor):
        behind, many = seen.dim() - axis - count, _is_mask(found)
        value = value.to(seen.dtype)
        while value.dim() > seen.dim() - count + many and value.shape[0] == 1:
            value = value[0]
        if value.dim() > behind:
            # The axis of the places that are written stands where the mask's axes stood.
            before = value.dim() - behind - many
            if many and value.shape[before] != 1:
                return False  # a value for every place: how many there are a trace can't know
            value = value.reshape(value.shape[:before] + (1,) * count + value.shape[before + many :])
    if accumulate:
        value = seen + value
    seen.copy_(torch.where(mask, value, seen))
    return True


def by_tensor(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Callable[..., Any] | None:
    """The same function by tensors without axes, where a number that it takes is a symbol."""
    if function not in BY_TENSOR or not any(isinstance(a, torch.SymFloat) for a in (*args, *(kwargs or {}).values())):
        return None
    values = (*args, *(kwargs or {}).values())
    like = next(a for a in values if isinstance(a, Tensor))
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()

    def as_tensor(value: Any) -> Any:
        is_symbol = isinstance(value, torch.SymFloat)
        return torch.scalar_tensor(value, dtype=dtype, device=like.device) if is_symbol else value

    def call(*given: Any, **named: Any) -> Any:
        return function(*map(as_tensor, given), **{name: as_tensor(value) for name, value in named.items()})

    return call


BY_TENSOR = {torch.lerp, Tensor.lerp, torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__}
TRACED_AS: dict[Any, Callable[..., Any]] = {
    torch.linalg.solve: looked_at("solve"), torch.linalg.inv: looked_at("inv"),
    torch.inverse: looked_at("inv"), Tensor.inverse: looked_at("inv"),
    torch.linalg.cholesky: looked_at("cholesky"), torch.cholesky: looked_at("cholesky"),
    Tensor.cholesky: looked_at("cholesky"), F.one_hot: _one_hot, torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell, torch.fake_quantize_per_tensor_affine: _fake_quantize,
    torch.fake_quantize_per_channel_affine: _fake_quantize_per_channel,
    F.gaussian_nll_loss: _gaussian_nll_loss, torch.trace: _trace, Tensor.trace: _trace,
    torch.sgn: _sgn, Tensor.sgn: _sgn,
    torch.cov: _cov, Tensor.cov: _cov, torch.corrcoef: _corrcoef, Tensor.corrcoef: _corrcoef,
    torch.index_fill: _index_fill, Tensor.index_fill: _index_fill, Tensor.index_fill_: _index_fill_,
    torch.linalg.tensorinv: _tensorinv, torch.linalg.tensorsolve: _tensorsolve,
    torch.linalg.lu_factor: looked_at("lu_factor", 2), torch.linalg.ldl_factor: looked_at("ldl_factor", 2),
    Tensor.__getitem__: _get_item, Tensor.__setitem__: _set_item, Tensor.index_put_: _index_put_,
    Tensor.index_put: _index_put, torch.index_put: _index_put, torch.index_put_: _index_put_,
}  # fmt: skip
