"""Operations that torch writes anew for every device, and that the fallback to the CPU's kernels can't stand for."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")
aten = torch.ops.aten


def _implements(name: str):
    def register(function):
        _library.impl(name, function, "PrivateUse1")
        return function

    return register


def _sum(*terms: Tensor | None) -> Tensor:
    present = [t for t in terms if t is not None]
    total = present[0]
    for term in present[1:]:
        total = total + term
    return total


@_implements("_thnn_fused_lstm_cell")
def _lstm_cell(from_x, from_h, c, bias_x=None, bias_h=None):
    i, f, g, o = _sum(from_x, from_h, bias_x, bias_h).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * c + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], 1)


@_implements("_thnn_fused_lstm_cell_backward_impl")
def _lstm_cell_backward(grad_h, grad_c, before, after, gates, has_bias):
    if grad_h is None and grad_c is None:
        return None, None, None
    i, f, g, o = gates.chunk(4, 1)
    grad_h = torch.zeros_like(after) if grad_h is None else grad_h
    squashed = after.tanh()
    into = grad_h * o * (1 - squashed * squashed) + (0 if grad_c is None else grad_c)
    grads = [into * g * i * (1 - i), into * before * f * (1 - f), into * i * (1 - g * g)]
    grads = torch.cat([*grads, grad_h * squashed * o * (1 - o)], 1)
    return grads, into * f, grads.sum(0) if has_bias else None


@_implements("_thnn_fused_gru_cell")
def _gru_cell(from_x, from_h, h, bias_x=None, bias_h=None):
    x_r, x_z, x_n = _sum(from_x, bias_x).chunk(3, 1)
    h_r, h_z, h_n = _sum(from_h, bias_h).chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return n + z * (h - n), torch.cat([r, z, n, h, h_n], 1)


@_implements("_thnn_fused_gru_cell_backward")
def _gru_cell_backward(grad, workspace, has_bias):
    r, z, n, h, h_n = workspace.chunk(5, 1)
    of_n = grad * (1 - z) * (1 - n * n)
    of_z = grad * (h - n) * z * (1 - z)
    of_r = of_n * h_n * r * (1 - r)
    of_x, of_h = torch.cat([of_r, of_z, of_n], 1), torch.cat([of_r, of_z, of_n * r], 1)
    sums = (of_x.sum(0), of_h.sum(0)) if has_bias else (None, None)
    return of_x, of_h, grad * z, *sums


@_implements("_fused_sdp_choice")
def _attention(*_, **__):
    return 0  # by products and a softmax


@_implements("convolution_overrideable")
def _convolution(x, weight, bias, *options):
    bias = None if bias is None else bias.cpu()
    return aten.convolution(x.cpu(), weight.cpu(), bias, *options).to(x.device)


@_implements("convolution_backward_overrideable")
def _convolution_backward(grad, x, weight, *options):
    *options, mask = options
    found = aten.convolution_backward(grad.cpu(), x.cpu(), weight.cpu(), [weight.shape[0]], *options, mask)
    return tuple(None if g is None else g.to(x.device) for g in found)
