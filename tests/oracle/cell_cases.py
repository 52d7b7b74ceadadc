"""Every cell of sl.nn in some configurations, each with its formula written a second time, without steploop.

A test in test_cells.py fails where a Step exported by sl.nn has no case here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import steploop as sl

INPUT, HIDDEN = 5, 6


@dataclass(frozen=True, eq=False)
class Case:
    """make() -> the cell.  plain(cell) -> a function (x (1, I), states) -> (y, states).

    states: the sizes of the states, by path.  width: features of the output.  covers: the classes it tests.
    """

    name: str
    make: Callable[[], sl.Step]
    plain: Callable[[Any], Callable]
    states: dict[str, int]
    width: int
    covers: tuple[type, ...]


def plain_rnn(cell):
    function = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}[cell.nonlinearity]

    def step(x, states):
        h = function(x, states["h"], cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        return h, {"h": h}

    return step


def plain_gru(cell):
    def step(x, states):
        h = torch.gru_cell(x, states["h"], cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        return h, {"h": h}

    return step


def plain_gru_reset_before(cell):
    def step(x, states):
        h, size = states["h"], cell.hidden_size
        from_x = x @ cell.weight_ih.T + (0 if cell.bias_ih is None else cell.bias_ih)
        bias = torch.zeros(3 * size, dtype=h.dtype) if cell.bias_hh is None else cell.bias_hh
        r = torch.sigmoid(from_x[:, :size] + h @ cell.weight_hh[:size].T + bias[:size])
        z = torch.sigmoid(from_x[:, size : 2 * size] + h @ cell.weight_hh[size : 2 * size].T + bias[size : 2 * size])
        n = torch.tanh(from_x[:, 2 * size :] + (r * h) @ cell.weight_hh[2 * size :].T + bias[2 * size :])
        h = (1 - z) * n + z * h
        return h, {"h": h}

    return step


def plain_lstm(cell):
    def step(x, states):
        hx = states["h"], states["c"]
        if not cell.proj_size:
            h, c = torch.lstm_cell(x, hx, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            return h, {"h": h, "c": c}
        weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, cell.weight_hr]
        hx = tuple(v.unsqueeze(0) for v in hx)
        _, h, c = torch._VF.lstm(x.unsqueeze(0), hx, weights, True, 1, 0.0, True, False, False)
        return h[0], {"h": h[0], "c": c[0]}

    return step


def normalise(a, norm):
    mean = a.mean(-1, keepdim=True)
    variance = ((a - mean) ** 2).mean(-1, keepdim=True)
    return (a - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def plain_layer_norm_lstm(cell):
    def step(x, states):
        size = cell.hidden_size
        from_x, from_h = x @ cell.weight_ih.T, states["h"] @ cell.weight_hh.T
        if cell.layer_norm == "all":
            total = normalise(from_x, cell.norm_ih) + normalise(from_h, cell.norm_hh) + cell.bias
            i, f, g, o = (total[:, k * size : (k + 1) * size] for k in range(4))
        else:
            norms = [cell.norm_i, cell.norm_f, cell.norm_g, cell.norm_o]
            i, f, g, o = (
                normalise((from_x + from_h)[:, k * size : (k + 1) * size], norm)
                for k, norm in enumerate(norms)
            )
        c = f.sigmoid() * states["c"] + i.sigmoid() * g.tanh()
        seen = normalise(c, cell.norm_c) if cell.layer_norm == "all" else c
        h = o.sigmoid() * seen.tanh()
        return h, {"h": h, "c": c}

    return step


def below(path, states):
    return {name.removeprefix(path): value for name, value in states.items() if name.startswith(path)}


def plain_stack(*layers):
    """layers: one plain(cell) per layer, None for a layer that is an ordinary module."""

    def plain(stack):
        steps = [make and make(cell) for make, cell in zip(layers, stack, strict=True)]

        def step(x, states):
            after = {}
            for k, (one, module) in enumerate(zip(steps, stack, strict=True)):
                if one is None:
                    x = module.forward(x)
                    continue
                x, new = one(x, below(f"{k}.", states))
                after |= {f"{k}.{name}": value for name, value in new.items()}
            return x, after

        return step

    return plain


def plain_residual(inner):
    def plain(residual):
        one = inner(residual.cell)

        def step(x, states):
            y, new = one(x, below("cell.", states))
            return x + y, {f"cell.{name}": value for name, value in new.items()}

        return step

    return plain


def plain_zoneout_in_eval(inner, keep, output):
    """keep: state name -> probability of its previous value."""

    def plain(zoneout):
        one = inner(zoneout.cell)

        def step(x, states):
            old = below("cell.", states)
            y, new = one(x, old)
            mixed = {name: keep[name] * old[name] + (1 - keep[name]) * new[name] for name in new}
            return mixed["h"] if output == "zoned" else y, {
                f"cell.{name}": value for name, value in mixed.items()
            }

        return step

    return plain


def no_dropout(_):
    return lambda x, states: (x, states)


def in_eval(step):
    return step.eval()


nn_ = sl.nn
LSTM_STATES = {"h": HIDDEN, "c": HIDDEN}
CASES = [
    Case("rnn", lambda: nn_.RNNCell(INPUT, HIDDEN), plain_rnn, {"h": HIDDEN}, HIDDEN, (nn_.RNNCell,)),
    Case(
        "rnn_relu_no_bias",
        lambda: nn_.RNNCell(INPUT, HIDDEN, bias=False, nonlinearity="relu"),
        plain_rnn,
        {"h": HIDDEN},
        HIDDEN,
        (nn_.RNNCell,),
    ),
    Case("lstm", lambda: nn_.LSTMCell(INPUT, HIDDEN), plain_lstm, LSTM_STATES, HIDDEN, (nn_.LSTMCell,)),
    Case(
        "lstm_no_bias",
        lambda: nn_.LSTMCell(INPUT, HIDDEN, bias=False),
        plain_lstm,
        LSTM_STATES,
        HIDDEN,
        (nn_.LSTMCell,),
    ),
    Case(
        "lstm_projection",
        lambda: nn_.LSTMCell(INPUT, HIDDEN, proj_size=4),
        plain_lstm,
        {"h": 4, "c": HIDDEN},
        4,
        (nn_.LSTMCell,),
    ),
    Case("gru", lambda: nn_.GRUCell(INPUT, HIDDEN), plain_gru, {"h": HIDDEN}, HIDDEN, (nn_.GRUCell,)),
    Case(
        "gru_no_bias",
        lambda: nn_.GRUCell(INPUT, HIDDEN, bias=False),
        plain_gru,
        {"h": HIDDEN},
        HIDDEN,
        (nn_.GRUCell,),
    ),
    Case(
        "gru_reset_before",
        lambda: nn_.GRUCell(INPUT, HIDDEN, reset_after=False),
        plain_gru_reset_before,
        {"h": HIDDEN},
        HIDDEN,
        (nn_.GRUCell,),
    ),
    Case(
        "layer_norm_lstm_gates",
        lambda: nn_.LayerNormLSTMCell(INPUT, HIDDEN, layer_norm="gates", eps=1e-3),
        plain_layer_norm_lstm,
        LSTM_STATES,
        HIDDEN,
        (nn_.LayerNormLSTMCell,),
    ),
    Case(
        "layer_norm_lstm_all",
        lambda: nn_.LayerNormLSTMCell(INPUT, HIDDEN, layer_norm="all"),
        plain_layer_norm_lstm,
        LSTM_STATES,
        HIDDEN,
        (nn_.LayerNormLSTMCell,),
    ),
    Case(
        "stack_of_three_grus",
        lambda: nn_.Stack(nn_.GRUCell(INPUT, HIDDEN), nn_.GRUCell(HIDDEN, 4), nn_.GRUCell(4, HIDDEN)),
        plain_stack(plain_gru, plain_gru, plain_gru),
        {"0.h": HIDDEN, "1.h": 4, "2.h": HIDDEN},
        HIDDEN,
        (nn_.Stack, nn_.GRUCell),
    ),
    Case(
        "stack_of_many_kinds",
        lambda: in_eval(
            nn_.Stack(
                nn_.LSTMCell(INPUT, HIDDEN),
                nn_.Dropout(0.5),
                nn.LayerNorm(HIDDEN),
                nn_.Residual(nn_.RNNCell(HIDDEN, HIDDEN)),
                nn.Linear(HIDDEN, 3),
            )
        ),
        plain_stack(plain_lstm, no_dropout, None, plain_residual(plain_rnn), None),
        {"0.h": HIDDEN, "0.c": HIDDEN, "3.cell.h": HIDDEN},
        3,
        (nn_.Stack, nn_.Dropout, nn_.Residual),
    ),
    Case(
        "residual",
        lambda: nn_.Residual(nn_.GRUCell(INPUT, INPUT)),
        plain_residual(plain_gru),
        {"cell.h": INPUT},
        INPUT,
        (nn_.Residual,),
    ),
    Case(
        "zoneout_in_eval",
        lambda: in_eval(nn_.Zoneout(nn_.LSTMCell(INPUT, HIDDEN), {"h": 0.1, "c": 0.4})),
        plain_zoneout_in_eval(plain_lstm, {"h": 0.1, "c": 0.4}, "zoned"),
        {"cell.h": HIDDEN, "cell.c": HIDDEN},
        HIDDEN,
        (nn_.Zoneout,),
    ),
    Case(
        "zoneout_in_eval_raw",
        lambda: in_eval(nn_.Zoneout(nn_.GRUCell(INPUT, HIDDEN), 0.3, output="raw")),
        plain_zoneout_in_eval(plain_gru, {"h": 0.3}, "raw"),
        {"cell.h": HIDDEN},
        HIDDEN,
        (nn_.Zoneout,),
    ),
]


def randomised(cell, dtype):
    """The cell in dtype with every parameter random, gains of norms and their biases too."""
    torch.manual_seed(11)
    cell = cell.to(dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return cell
