"""State: a named slot that a Step reads before, and writes after, each step."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import torchscript
from .errors import StateError, describe, describe_type, message
from .frame import Frame, running
from .state_messages import bad_init, bad_unsized_init, checked_shape, fix_type, needs_prev


class State(nn.Module):
    """One value per batch row that goes from each step to the next.

    Assigned as an attribute of a Step (or of any module below one); its name is the dotted path to it.

    shape: the shape of one row's value; the value is (B, *shape).
    init:  the value before the first step: a number, a tensor of `shape` (kept as a buffer, not in the
           state_dict), "learned" (a parameter named `init`, of `shape`, zeros at first), or None: the
           step's `begin` must assign `.prev`, of any shape (B, ...).
           State(...) (a literal Ellipsis) is a State whose shape the first step tells, by `sized`. Its `init`
           is a number, a tensor that broadcasts to the shape, or a function (shape, dtype, device) -> tensor.
    grows_with: for State(...): the State (B,) that counts how many entries of this one's first axis are in
           use. That axis is then a history: before a call the loop makes room for all steps of the call.
    dtype: None: that of the first floating parameter of the Loop's step, else of the first floating
           input, else torch's default (a tensor `init` that is not floating keeps its own dtype).

    `.prev`   the value after the previous step; may be read any number of times; assigned in `begin` only.
    `.next`   the value after this step; written at most once a step, readable once written; a State whose
              `.next` is not written keeps its value. Under autocast a floating value is cast to the
              State's dtype; otherwise another shape or dtype is a StateError.

    Values live in the running loop, never in this module, so one module can serve many streams at once.

    For steps that wrap other steps (Zoneout and the like), after the child was called:
    `.latest`         what the next step would see: `.next` if it was written, else `.prev`.
    `.rewrite(value)` puts another value in the place of `.next`, written before or not; same checks.
    `steploop.step.states_below(child)` lists the child's States.

    Raises StateError with what was expected, what was found and the line.
    """

    # torch.jit reads all other attributes of a module; these have no value outside a running loop.
    init: Any
    __jit_ignored_attributes__ = __jit_unused_properties__ = ("prev", "next", "latest")

    def __dir__(self) -> list[str]:
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in names if name not in self.__jit_ignored_attributes__]

    def __init__(
        self,
        *shape: int | EllipsisType,
        init: float | Tensor | str | Callable[..., Tensor] | None = 0.0,
        dtype: torch.dtype | None = None,
        grows_with: State | None = None,
    ) -> None:
        super().__init__()
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        self.unsized = len(shape) == 1 and shape[0] is ...
        self._counter = (grows_with,)  # in a tuple: it is no child of this module
        self.shape = () if self.unsized else checked_shape(shape)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise StateError(message("A State's dtype is a torch.dtype or None.", found=describe(dtype)))
        self.dtype = dtype
        if self.unsized:
            self._unsized_init(init)
        elif isinstance(init, str):
            self._learn(init)
        elif isinstance(init, Tensor):
            self._keep(init)
        elif init is None or isinstance(init, (bool, int, float, complex)):
            self.init = init
        else:
            raise StateError(bad_init(describe(init)))

    def _unsized_init(self, init: Any) -> None:
        if not (isinstance(init, (bool, int, float, complex, Tensor)) or callable(init)):
            raise StateError(bad_unsized_init(init))
        if isinstance(init, Tensor) and not isinstance(init, nn.Parameter):
            self.register_buffer("init", init, persistent=False)
        else:
            self.init = init

    @property
    def grows_with(self) -> State | None:
        """The State that counts the entries in use, where this one is a history that grows."""
        return self._counter[0]

    def _learn(self, init: str) -> None:
        if init != "learned":
            raise StateError(bad_init(describe(init)))
        self.init = nn.Parameter(torch.zeros(self.shape, dtype=self.dtype))

    def _keep(self, init: Tensor) -> None:
        if tuple(init.shape) != self.shape:
            raise StateError(
                message(
                    "A State's tensor `init` has the shape of one row's value.",
                    expected=f"a tensor of shape {self.shape}",
                    found=describe(init),
                    fix="leave out the batch axis; the same value starts every row",
                )
            )
        if isinstance(init, nn.Parameter):
            self.init = init
        else:
            self.register_buffer("init", init, persistent=False)

    def start(
        self, batch: Any, dtype: torch.dtype, device: torch.device, shape: tuple[Any, ...] | None = None
    ) -> Tensor | None:
        """The value before the first step, (B, *shape), as `init` says; None where `begin` must say.

        shape: for State(...) what `sized` found; None there gives None.
        """
        init = self.init
        if init is None or (self.unsized and shape is None):
            return None
        shape = shape if self.unsized and shape is not None else self.shape
        if isinstance(init, Tensor):
            return init.to(device=device, dtype=dtype).expand(batch, *shape)
        if callable(init):
            return init(shape, dtype, device).expand(batch, *shape)
        return torch.full((batch, *shape), init, dtype=dtype, device=device)

    def sized(self, *shape: Any, like: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`.prev` of a State(...), saying of what shape it is: (B, *shape), or (B, room, *shape) if it grows.

        like: a tensor whose dtype it has, where neither `dtype` nor the State says. Called at every step,
        before anything else reads the State; it must say the same at all of them.
        """
        frame = self._frame("read")
        if frame.sizing is not None and self not in frame.sizing.found:
            frame.prev[self] = frame.sizing.size(self, shape, self.dtype or dtype or _dtype_of(like))
        return self.prev

    def own_dtype(self) -> torch.dtype | None:
        """The dtype that this State itself asks for; None where the loop decides."""
        if self.dtype is None and isinstance(self.init, Tensor) and not self.init.is_floating_point():
            return self.init.dtype
        return self.dtype

    @property
    def prev(self) -> Tensor:
        """(B, *shape): the value after the previous step, or before the first. Only `begin` may assign it.

        Raises StateError outside a running loop, and where nothing has set the value of a State without init.
        """
        frame = self._frame("read")
        value = frame.prev[self]
        if value is None and self.unsized:
            raise StateError(
                message(
                    f"State '{frame.names[self]}' has no value yet: it was made as sl.State(...).",
                    expected="`sized` says its shape before anything reads it",
                    fix="held = self.<name>.sized(*x.shape[1:], like=x)",
                )
            )
        if value is None:
            raise StateError(
                message(
                    f"State '{frame.names[self]}' has no value yet: it was made with init=None.",
                    expected="begin assigns .prev before anything reads it",
                    fix="self.<name>.prev = ...  in begin(self, ...)",
                )
            )
        return value

    @prev.setter
    def prev(self, value: Tensor) -> None:
        frame = self._frame("assigned")
        name = frame.names[self]
        if frame.phase != "begin":
            raise StateError(
                message(
                    f"State '{name}'.prev was assigned inside step.",
                    expected=".prev is read in step, and assigned only in begin",
                    fix="self.<name>.next = value  (what the next step will read as .prev)",
                )
            )
        frame.prev[self] = self._checked_start(value, frame, name)

    @property
    def next(self) -> Tensor:
        """(B, *shape): the value after this step. A step assigns it once, or leaves it: then the value stays.

        Raises StateError where it is read before it is written, written twice, or of another shape or dtype.
        """
        frame = self._frame("read")
        if self not in frame.next:
            raise StateError(
                message(
                    f"State '{frame.names[self]}'.next was read before it was written in this step.",
                    expected="assign .next first",
                    fix="read .prev for the value after the previous step",
                )
            )
        return frame.next[self]

    @next.setter
    def next(self, value: Tensor) -> None:
        frame = self._step_frame()
        if self in frame.next:
            raise StateError(
                message(
                    f"State '{frame.names[self]}'.next was written twice in one step.",
                    expected="one assignment per step",
                    fix="compute the final value first, then assign .next once",
                )
            )
        frame.next[self] = self._checked_next(value, frame)

    @property
    def latest(self) -> Tensor:
        """`.next` if it has been written in this step, else `.prev`."""
        frame = self._frame("read")
        return frame.next[self] if self in frame.next else self.prev

    def rewrite(self, value: Tensor) -> None:
        """Put `value` in the place of `.next`, whether or not it has been written (for wrappers)."""
        frame = self._step_frame()
        frame.next[self] = self._checked_next(value, frame)

    def _frame(self, verb: str) -> Frame:
        frame = running()
        if frame is None:
            if torchscript.asks():
                raise torchscript.error()
            raise StateError(
                message(
                    f"A State was {verb} outside a running loop, where it has no value.",
                    expected=".prev and .next are used inside step (or .prev in begin)",
                    fix="outputs, state = loop(xs); state['<path>'] is the final value, "
                    "loop(xs, state=...) gives the first one",
                )
            )
        if self not in frame.names:
            raise StateError(
                message(
                    f"A State was {verb} that is not part of the step that is running.",
                    expected="a State below the Loop's step: "
                    + (", ".join(frame.names.values()) or "it has none"),
                    fix="make it, or the module that holds it, an attribute of the step: self.cell = cell",
                )
            )
        return frame

    def _step_frame(self) -> Frame:
        frame = self._frame("written")
        if frame.phase != "step":
            raise StateError(
                message(
                    f"State '{frame.names[self]}'.next was written inside begin, before the first step.",
                    expected="begin assigns .prev",
                    fix="self.<name>.prev = value",
                )
            )
        return frame

    def _checked_next(self, value: Any, frame: Frame) -> Tensor:
        prev = self.prev
        if isinstance(value, Tensor):
            value = _autocast_to(value, prev.dtype)
            if value.dtype == prev.dtype and value.shape == prev.shape:
                return value
        raise StateError(
            message(
                f"State '{frame.names[self]}'.next was given another type than the State has.",
                expected=describe_type(prev.shape, prev.dtype),
                found=describe(value),
                fix=fix_type(value, prev.shape, prev.dtype),
            )
        )

    def _checked_start(self, value: Any, frame: Frame, name: str) -> Tensor:
        old: Any = frame.prev[self]
        if self.init is None or self.unsized:
            dtype = self.dtype if self.dtype is not None or not isinstance(value, Tensor) else value.dtype
            shape = (frame.batch, *value.shape[1:]) if isinstance(value, Tensor) else (frame.batch, "...")
        else:
            dtype, shape = old.dtype, tuple(old.shape)
        if isinstance(value, Tensor):
            value = _autocast_to(value, dtype)
            if value.dtype == dtype and value.dim() > 0 and tuple(value.shape) == tuple(shape):
                return value
        wanted = describe_type(shape, dtype) if dtype is not None else "a tensor (B, ...)"
        raise StateError(
            message(
                f"State '{name}'.prev was given a value in begin that does not fit.",
                expected=wanted,
                found=describe(value),
                fix=fix_type(value, shape, dtype),
            )
        )

    def extra_repr(self) -> str:
        init = self.init
        shown = (
            "learned" if isinstance(init, nn.Parameter) else "tensor" if isinstance(init, Tensor) else init
        )
        sizes = "..., " if self.unsized else "".join(f"{n}, " for n in self.shape)
        return f"{sizes}init={shown!r}" + (f", dtype={self.dtype}" if self.dtype is not None else "")

    def forward(self, *_: Any) -> None:
        raise StateError(
            message("A State is not called.", expected="self.h.prev is its value", fix="read .prev or .next")
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A State is no tensor: torch.cat([x, self.h]) and x + self.h come here."""
        given = pytree.tree_leaves((args, kwargs or {}))
        state = next((value for value in given if isinstance(value, State)), None)
        raise StateError(needs_prev(state, f"given to {getattr(function, '__name__', 'torch')}"))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Tensor, name) and running() is not None:
            raise StateAttributeError(needs_prev(self, f"asked for .{name}", f".{name}"))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would take a Parameter assigned to .next for a new parameter
        if name in ("prev", "next"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class StateAttributeError(StateError, AttributeError):
    """A State was asked for what its value has: `hasattr` is still answered."""


def _refused(operator: str) -> Callable[..., Any]:
    def refuse(self: State, *_: Any) -> Any:
        raise StateError(needs_prev(self, f"used as a value in `{operator}`"))

    return refuse


_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "matmul": "@", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
_ALONE = {
    "neg": "-", "invert": "~", "abs": "abs()", "float": "float()", "int": "int()", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "getitem": "[...]", "setitem": "[...]",
}  # fmt: skip
for _name, _sign in _OPERATORS.items():
    for _side in ("", "r", "i"):
        setattr(State, f"__{_side}{_name}__", _refused(_sign if _side != "i" else f"{_sign}="))
for _name, _sign in _ALONE.items():
    setattr(State, f"__{_name}__", _refused(_sign))


def _dtype_of(like: Tensor | None) -> torch.dtype | None:
    return None if like is None else like.dtype


def _autocast_to(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Under autocast torch chooses the dtype of what a step computes: cast it back to the State's."""
    if dtype is None or value.dtype == dtype or not (value.is_floating_point() and dtype.is_floating_point):
        return value
    return value.to(dtype) if torch.is_autocast_enabled(value.device.type) else value
