"""OpenAI Baselines' `lnlstm` and `lstm` (a2c/utils.py): layers over episodes, with a mask of where one starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import dispatch
from ..errors import InputError, StateError, describe, message
from ..state import State
from ..step import Step
from .tf_variables import HasTFVariables, Variable, joined

MASKS = ("done", "keep")
EPS = 1e-5


class LNLSTMCell(Step):
    """One step of Baselines' lnlstm (layer_norm=False: of its lstm), with its names and kernel layout.

    z = LN(x wx; gx, bx) + LN(h wh; gh, bh) + b;  i, f, o, u = split(z);  c' = sigmoid(f) c + sigmoid(i) tanh(u);
    h' = sigmoid(o) tanh(LN(c'; gc, bc)); the state is c', not LN(c'). LN is over all features, 4H of z and H of
    c', with the biased variance and eps 1e-5. No forget bias.
    wx: (I, 4H).  wh: (H, 4H).  b, gx, bx, gh, bh: (4H,).  gc, bc: (H,).

    One step takes x (B, input_size) and returns h (B, hidden_size). States: c, h (B, hidden_size).
    """

    def __init__(self, input_size: int, hidden_size: int, layer_norm: bool = True) -> None:
        super().__init__()
        self.hidden_size = self.output_size = hidden_size
        self.input_size, self.layer_norm = input_size, layer_norm
        self.c, self.h = State(hidden_size), State(hidden_size)
        four = 4 * hidden_size
        self.wx, self.wh = nn.Parameter(torch.empty(input_size, four)), nn.Parameter(torch.empty(hidden_size, four))
        for kernel in (self.wx, self.wh):
            nn.init.orthogonal_(kernel)
        self.b = nn.Parameter(torch.zeros(four))
        sizes = {"x": four, "h": four, "c": hidden_size} if layer_norm else {}
        for name, size in sizes.items():
            self.register_parameter(f"g{name}", nn.Parameter(torch.ones(size)))
            self.register_parameter(f"b{name}", nn.Parameter(torch.zeros(size)))

    def step(self, x: Tensor) -> Tensor:
        z = self._norm(x @ self.wx, "x") + self._norm(self.h.prev @ self.wh, "h") + self.b
        i, f, o, u = z.chunk(4, -1)
        c = torch.sigmoid(f) * self.c.prev + torch.sigmoid(i) * torch.tanh(u)
        self.c.next = c
        self.h.next = h = torch.sigmoid(o) * torch.tanh(self._norm(c, "c"))
        return h

    def _norm(self, z: Tensor, name: str) -> Tensor:
        if not self.layer_norm:
            return z
        return F.layer_norm(z, z.shape[-1:], getattr(self, f"g{name}"), getattr(self, f"b{name}"), EPS)


class LNLSTM(HasTFVariables):
    """Baselines' lnlstm(xs, ms, s, scope, nh): an LNLSTMCell over a sequence in which episodes end.

    Where the mask says that an episode starts, c and h are zero before that step, which is computed and returned
    like any other: c, h = (1 - m) c, (1 - m) h.

    input_size, hidden_size: Baselines' nh is hidden_size.
    layer_norm: False: Baselines' `lstm`.
    mask: "done" (Baselines'): 1 where this step starts a new episode.  "keep": 1 where the state is kept, the
        complement.
    scope: of the variables in a checkpoint; None: "lnlstm", or "lstm" without LN.

    layer(xs, ms, s) -> (hs, s). xs: T tensors (B, input_size), or (T, B, input_size).  ms: T tensors (B,) or
    (B, 1), or (T, B), of zeros and ones, or bool.  s: (B, 2H), c before h.  hs: in the form of xs.
    Raises InputError for a mask of other values or another shape, StateError for another state.
    """

    _holds_own_states = True  # inside a Step, an inner sequence

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        layer_norm: bool = True,
        mask: str = "done",
        scope: str | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__()
        if mask not in MASKS:
            raise InputError(message("LNLSTM: which mask?", expected='"done" or "keep"', found=describe(mask)))
        self.mask = mask
        self.scope = ("lnlstm" if layer_norm else "lstm") if scope is None else scope
        self.backend, self.save = dispatch.checked_backend(backend), dispatch.checked_save(save)
        self.cell = LNLSTMCell(input_size, hidden_size, layer_norm)

    def forward(self, xs: Any, ms: Any, s: Tensor) -> tuple[Any, Tensor]:
        listed = isinstance(xs, (list, tuple))
        inputs = torch.stack(list(xs)) if listed else xs
        wanted = (inputs.shape[1], 2 * self.cell.hidden_size)
        if not isinstance(s, Tensor) or tuple(s.shape) != wanted:
            shown = f"{wanted}: c, then h"
            raise StateError(message("LNLSTM: not a state of it.", expected=shown, found=describe(s)))
        loop = self.cell.whole_sequence()
        loop.backend, loop.save = self.backend, self.save
        c, h = s.chunk(2, -1)
        outputs, state = loop(inputs, state={"c": c, "h": h}, resets=self._resets(ms, inputs))
        hs = list(outputs.unbind(0)) if listed else outputs
        return hs, torch.cat([state["c"], state["h"]], -1)

    def _resets(self, ms: Any, inputs: Tensor) -> Tensor:
        """(T, B) bool, True where the state starts anew."""
        listed = isinstance(ms, Sequence) and len(ms) and all(isinstance(m, Tensor) for m in ms)
        mask = torch.stack([m.reshape(-1) for m in ms]) if listed else ms
        fits = isinstance(mask, Tensor) and mask.shape == inputs.shape[:2]
        if not fits or not bool(((mask == 0) | (mask == 1)).all()):
            means = "a new episode starts" if self.mask == "done" else "the state is kept"
            raise InputError(
                message(
                    "LNLSTM: the mask is not one of zeros and ones for every step and row.",
                    expected=f"{tuple(inputs.shape[:2])}, 1 where {means}",
                    found="other values than 0 and 1" if fits else describe(mask),
                )
            )
        return mask.bool() if self.mask == "done" else ~mask.bool()

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        for name, parameter in self.cell.named_parameters():
            yield Variable(joined(scope, name), parameter)

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}"
