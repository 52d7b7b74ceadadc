"""Location-sensitive attention (Chorowski et al. 2015, arXiv:1506.07503)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...state import State
from ..masks import masked_softmax
from .base import Attention


class LocationSensitiveAttention(Attention):
    """Additive attention that sees where it looked before:

        f = F * a' (eq. 8),  e_j = v^T tanh(W q + V h_j + U f_j + b) (eq. 9),  a = softmax(e),  c = sum_j a_j h_j

    a' are the weights of the step before, zeros before the first (the paper does not say); F * a' is a convolution
    over j with zeros at both ends, as torch.nn.Conv1d does it: it does not turn the filters round (Chorowski et al.
    2015; the paper's w is v here).

    query_size, memory_size: features of q and of each h_j.  size: of v.
    filters, width: k and r of F (k, r); an odd width, f_j sees a' from j - width // 2 to j + width // 2.
    smoothing: a_j = sigmoid(e_j) / sum_j sigmoid(e_j) in the place of the softmax (section 2.3 of the paper).
    accumulate: a' is the sum of the weights of all steps before (Shen et al. 2018, arXiv:1712.05884, section 2.2).
    Modules: "query" (W), "keys" (V and b), "location" (U), "energy" (v); parameter "filters" (F).

    State: `before` (B, S), a'. See `Attention` for the call. Raises ValueError for an even width.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        size: int,
        *,
        filters: int = 10,
        width: int = 31,
        smoothing: bool = False,
        accumulate: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if width < 1 or width % 2 == 0:
            raise ValueError(f"LocationSensitiveAttention: width is an odd number, got {width}")
        self.query_size, self.memory_size = query_size, memory_size
        self.smoothing, self.accumulate = smoothing, accumulate
        self.query = nn.Linear(query_size, size, bias=False)
        self.keys = nn.Linear(memory_size, size, bias=bias)
        self.location = nn.Linear(filters, size, bias=False)
        self.energy = nn.Linear(size, 1, bias=False)
        bound = width**-0.5  # as torch.nn.Conv1d begins
        self.filters = nn.Parameter(torch.empty(filters, width).uniform_(-bound, bound))
        self.before = State(...)

    def attend(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        before = self.before.sized(memory.shape[1], like=query)
        location = self.location(self._convolved(before))
        hidden = (self.keys(memory) + self.query(query).unsqueeze(1) + location).tanh()
        energies = self.energy(hidden).squeeze(-1)
        if self.smoothing:
            # sigmoids relative to the largest, as a softmax does it: their sum is never 0 where one entry counts
            weights = masked_softmax(F.logsigmoid(energies), mask, -1)
        else:
            weights = masked_softmax(energies, mask, -1)
        self.before.next = before + weights if self.accumulate else weights
        return weights

    def _convolved(self, before: Tensor) -> Tensor:
        """(B, S) -> (B, S, filters)."""
        width = self.filters.shape[1]
        # one frame too many, so that there is one where the memory has no entries
        frames = F.pad(before, (width // 2, width // 2 + 1)).unfold(1, width, 1)[:, : before.shape[1]]
        return F.linear(frames, self.filters)  # of (B, S, width)

    def extra_repr(self) -> str:
        filters, width = self.filters.shape
        shown = f"filters={filters}, width={width}"
        return shown + "".join(f", {n}=True" for n in ("smoothing", "accumulate") if getattr(self, n))
