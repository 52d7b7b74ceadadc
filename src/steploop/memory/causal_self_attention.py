"""CausalSelfAttention: attention to this step and all before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, describe, message
from ..frame import Frame
from ..nn.dropout import hashed_keep
from ..state import State
from .base import Memory, check_step_input, cleaned, latest_reset, whole_number
from .history import Slots, appended
from .step_index import counting


class CausalSelfAttention(Memory):
    """y_t = sum_s softmax_s(scale q_t . k_s) v_s over s <= t, per head. Vaswani et al. 2017,
    arXiv:1706.03762.

    RETURNN's SelfAttentionLayer with attention_left_only. One step appends its key and value to a history and
    looks at all of it; in a stream the history is preallocated and doubles. A whole sequence is one call of
    torch's scaled_dot_product_attention: `is_causal` where that is exact, else with a mask that lets a
    handed-over history be seen in full and nothing across a reset.

    heads: how many.
    size: of x. attention(x): x (B, size) -> (B, value_size); "qkv" is a Linear(size, 2 key_size +
        value_size) whose columns are q, k, v, each head after head. None: attention(q, k, v) takes them,
        each (B, heads * n).
    key_size, value_size: of all heads together (default: size). output_size: adds "out", a
        Linear(value_size, output_size), over the result. bias: of both.
    scale: default (key_size / heads) ** -0.5.
    rope: rotary positions (Su et al. 2021, arXiv:2104.09864): True, or the base (True: 10000).
    relative: clip c: adds scale q_t . r_{clip(s - t, -c, c) + c} to the scores, r the parameter
        "relative_keys" (2c + 1, key_size / heads), the same for all heads (Shaw et al. 2018,
        arXiv:1803.02155, keys only).
    dropout: in training each weight is zero with this probability, else divided by 1 - dropout (Vaswani et al.'s
        code). Each step draws one seed per row; which weights are dropped is a hash of seed, head and place, so that
        a whole sequence and single steps drop the same for the same seeds. attention(q, k, v, seed) gives them:
        (B, 1) int64.
    Positions count the row's valid steps since the start or the latest reset.

    Raises InputError for sizes that do not fit.
    """

    def __init__(
        self,
        heads: int,
        size: int | None = None,
        *,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        rope: bool | float = False,
        relative: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        owner = "CausalSelfAttention"
        self.heads = whole_number(owner, "heads", heads, 1)
        self.size = size if size is None else whole_number(owner, "size", size, 1)
        self.key_size = self._divided("key_size", size if key_size is None else key_size)
        self.value_size = self._divided("value_size", size if value_size is None else value_size)
        self.scale = scale
        self.rope = 10000.0 if rope is True else float(rope)
        if not 0.0 <= dropout <= 1.0:
            raise InputError(
                message(f"{owner}: dropout is a probability.", expected="0 <= dropout <= 1", found=repr(dropout))
            )
        self.dropout = dropout
        self.relative = relative if relative is None else whole_number(owner, "relative", relative, 0)
        self.qkv = nn.Linear(size, 2 * self.key_size + self.value_size, bias) if size is not None else None
        self.out = None
        if output_size is not None:
            self.out = nn.Linear(self._known("value_size"), output_size, bias)
        if self.relative is not None:
            table = torch.empty(2 * self.relative + 1, self._known("key_size") // heads)
            self.relative_keys = nn.Parameter(nn.init.normal_(table, std=table.shape[1] ** -0.5))
        self.count = State(init=0, dtype=torch.int64)
        self.keys = State(..., grows_with=self.count)
        self.values = State(..., grows_with=self.count)

    def _divided(self, name: str, size: Any) -> Any:
        """The size, None where it is not given."""
        if size is None:
            return None
        whole_number("CausalSelfAttention", name, size, 1)
        if size % self.heads:
            raise InputError(
                message(
                    f"CausalSelfAttention: heads divides {name}.",
                    expected=f"a multiple of {self.heads}",
                    found=f"{name}={size}",
                )
            )
        return size

    def _known(self, name: str) -> int:
        if getattr(self, name) is None:
            raise InputError(
                message(
                    f"CausalSelfAttention without size needs {name} for output_size or relative.",
                    fix=f"CausalSelfAttention({self.heads}, {name}=...)",
                )
            )
        return getattr(self, name)

    # one step

    def check(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None, seed: Tensor | None = None) -> None:
        check_step_input("CausalSelfAttention", "x" if self.qkv is not None else "q", x, features=self.size)

    def _step_inside(self, frame: Frame, xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        # A seed is an input: the gradient of a whole sequence computes the outputs once more, from the same ones.
        if self._drops() and len(xs) < 4:
            xs = (*xs, *[None] * (3 - len(xs)), _seeds(xs[0].shape[:1], xs[0].device))
        return super()._step_inside(frame, xs, arguments)

    def step(
        self,
        x: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        self.check(x, k, v)
        q, k, v = self._heads(x, k, v)
        count = self.count.prev
        q, k = self._rotated(q, count), self._rotated(k, count)
        keys = appended(self.keys.sized(*k.shape[1:], like=k), k, count)
        values = appended(self.values.sized(*v.shape[1:], like=v), v, count)
        self.keys.next, self.values.next, self.count.next = keys, values, count + 1
        distance = torch.arange(keys.shape[1], device=x.device) - count.unsqueeze(1)  # (B, C)
        scale = self._scale(q)
        scores = torch.matmul(q.unsqueeze(2), keys.permute(0, 2, 3, 1)).squeeze(2) * scale  # (B, heads, C)
        if self.relative is not None:
            index = self._positions(distance).unsqueeze(1).expand(scores.shape)
            scores = scores + torch.matmul(q, self.relative_keys.t()).gather(2, index) * scale
        scores = torch.where((distance <= 0).unsqueeze(1), scores, float("-inf"))
        weights = torch.softmax(scores, -1)
        if seed is not None and self._drops():
            slots = torch.arange(keys.shape[1], device=x.device)
            weights = self._dropped(weights, seed.unsqueeze(-1), slots * self.heads + self._head_numbers(slots, 1))
        y = torch.matmul(weights.unsqueeze(2), values.transpose(1, 2)).squeeze(2)
        return self._output(y)

    def _heads(self, x: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (..., heads, n)."""
        if self.qkv is not None:
            if k is not None or v is not None:
                raise InputError(_not_three(self.heads, "one: it has a size, so it makes q, k, v itself"))
            q, k, v = self.qkv(x).split([self.key_size, self.key_size, self.value_size], -1)
        elif not isinstance(k, Tensor) or not isinstance(v, Tensor):
            raise InputError(_not_three(self.heads, "q, k and v: it has no size to make them with"))
        else:
            q = x
        for name, value in (("q", q), ("k", k), ("v", v)):
            if value.shape[-1] % self.heads:
                raise InputError(
                    message(
                        f"CausalSelfAttention: heads divides the features of {name}.",
                        expected=f"a multiple of {self.heads}",
                        found=describe(value),
                    )
                )
        return tuple(part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))

    def _rotated(self, x: Tensor, position: Tensor) -> Tensor:
        """x (..., heads, n) with pairs (i, i + n/2) turned by position / rope ** (2i/n)."""
        if not self.rope:
            return x
        half = x.shape[-1] // 2
        exponent = torch.arange(half, device=x.device, dtype=x.dtype) / half
        angle = position.to(x.dtype)[..., None, None] * self.rope**-exponent
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)

    def _positions(self, distance: Tensor) -> Tensor:
        assert self.relative is not None
        return distance.clamp(-self.relative, self.relative) + self.relative

    def _scale(self, q: Tensor) -> float:
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _head_numbers(self, like: Tensor, axes: int) -> Tensor:
        """(heads, 1, ...), with so many axes behind."""
        return torch.arange(self.heads, device=like.device).reshape(-1, *[1] * axes)

    def _dropped(self, weights: Tensor, seed: Tensor, place: Tensor) -> Tensor:
        """The weights with some of them zero. place: slot * heads + head, the number of a weight in its step."""
        keep = hashed_keep(seed, place, 1.0 - self.dropout)
        scale = 1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0
        return torch.where(keep, weights * scale, 0.0)

    def _output(self, y: Tensor) -> Tensor:
        y = y.flatten(-2)
        return y if self.out is None else self.out(y)

    # whole sequence

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        given: list[Any] = [*xs, *[None] * (4 - len(xs))]
        seed = given[3]
        parts: list[Any] = [None if part is None else cleaned(part, lengths) for part in given[:3]]
        q, k, v = self._heads(*parts)
        count, steps = state["count"], len(q)  # q (T, B, heads, n)
        position, after = counting(count, reset_to["count"], steps, lengths, resets)
        q, k = self._rotated(q, position), self._rotated(k, position)
        before = _used(count, state["keys"].shape[1])
        keys = torch.cat([state["keys"][:, :before], k.transpose(0, 1)], 1)
        values = torch.cat([state["values"][:, :before], v.transpose(0, 1)], 1)
        mask = None
        if before or resets is not None or self.relative is not None:
            mask = self._mask(q, position, count, before, lengths, resets)
        if self._drops():
            mask = self._mask(q, position, count, before, lengths, resets) if mask is None else mask
            seed = _seeds(q.shape[:2], q.device) if seed is None else seed
            slots = torch.cat([torch.arange(before, device=q.device).expand(len(count), -1), position.t()], 1)
            y = self._with_dropout(q, keys, values, mask, seed, slots)
        else:
            y = F.scaled_dot_product_attention(
                q.permute(1, 2, 0, 3), keys.transpose(1, 2), values.transpose(1, 2),
                attn_mask=mask, is_causal=mask is None, scale=self._scale(q),
            )  # fmt: skip
        kept = Slots(count, state["keys"].shape[1], steps, lengths, resets)
        ends = {
            name: kept.at_end(kept.join(state[name], new, reset_to[name]))
            for name, new in (("keys", k), ("values", v))
        }
        return self._output(y.permute(2, 0, 1, 3)), {"count": after, **ends}

    def _with_dropout(
        self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, seed: Tensor, slots: Tensor
    ) -> Tensor:
        """(B, heads, T, n). keys, values (B, S, heads, n); mask as `_mask`; seed (T, B, 1); slots (B, S)."""
        scores = torch.matmul(q.permute(1, 2, 0, 3), keys.permute(0, 2, 3, 1)) * self._scale(q)
        scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
        place = slots[:, None, None] * self.heads + self._head_numbers(slots, 2)
        weights = self._dropped(torch.softmax(scores, -1), seed.permute(1, 2, 0).unsqueeze(-1), place)
        return torch.matmul(weights, values.transpose(1, 2))

    def _mask(
        self,
        q: Tensor,
        position: Tensor,
        count: Tensor,
        before: int,
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> Tensor:
        """(B, 1 or heads, T, before + T): True where visible, or what is added to the scores."""
        steps = len(q)
        time = torch.arange(steps, device=q.device)
        old = torch.arange(before, device=q.device) < count.unsqueeze(1)  # (B, before)
        old = old.unsqueeze(1).expand(-1, steps, -1)
        new = (time[None, :] <= time[:, None]).expand(len(count), -1, -1)  # (B, T, T)
        if resets is not None:
            latest = latest_reset(resets, lengths)[:-1].t().unsqueeze(-1)  # (B, T, 1)
            old = old & (latest < 0)
            new = new & (time >= latest)
        seen = torch.cat([old, new], -1).unsqueeze(1)
        if self.relative is None:
            return seen
        ahead = torch.cat([torch.arange(before, device=q.device).expand(len(count), -1), position.t()], 1)
        distance = ahead.unsqueeze(1) - position.t().unsqueeze(-1)  # (B, T, before + T)
        index = self._positions(distance).unsqueeze(1).expand(-1, self.heads, -1, -1)
        added = torch.matmul(q, self.relative_keys.t()).permute(1, 2, 0, 3).gather(3, index)
        return torch.where(seen, added * self._scale(q), float("-inf"))

    def extra_repr(self) -> str:
        shown = f"heads={self.heads}" + (f", size={self.size}" if self.size is not None else "")
        shown += f", rope={self.rope:g}" if self.rope else ""
        shown += f", dropout={self.dropout:g}" if self.dropout else ""
        return shown + (f", relative={self.relative}" if self.relative is not None else "")


def _used(count: Tensor, room: int) -> int:
    """How many slots any row uses; all where that cannot be looked at."""
    return int(count.max()) if type(count) is Tensor and count.numel() else 0 if not count.numel() else room


def _seeds(shape: Any, device: torch.device) -> Tensor:
    """(*shape, 1) int64, drawn."""
    return torch.randint(1, 2**62, (*shape, 1), device=device)


def _not_three(heads: int, expected: str) -> str:
    return message(
        "CausalSelfAttention was given another number of sequences than it takes.",
        expected=expected,
        fix=f"CausalSelfAttention({heads}, size)(x), or CausalSelfAttention({heads})(q, k, v)",
    )
