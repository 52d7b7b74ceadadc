"""Step: one step of a sequence, written as an nn.Module. Also `unbatched`, and a survey of a Step's tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import torchscript, tracked
from .errors import InputError, StateError, StepError, defined_at, describe, message, user_line
from .frame import Frame, running
from .signature import signature_of
from .state import State
from .tracebacks import ends_at_the_call

if TYPE_CHECKING:
    from typing_extensions import Self

# The name of what is kept, in a Step's __dict__ (slots would bar it from torch.export, which makes proxies of modules
# that share parts). It begins so that captures pass it by.
_KEPT = "_steploop_kept"


class Kept(dict[str, Any]):
    """What a Step keeps between calls. It is no part of the module: a copy or pickle of it is empty.

    owner: the id of the Step that it belongs to (a copy may share the __dict__'s values).
    """

    def __init__(self, owner: int = 0) -> None:
        super().__init__()
        self.owner = owner

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


class Step(nn.Module):
    """One step of a sequence. Subclasses define `step`, and `begin` if a State needs it.

        class Cell(sl.Step):
            def __init__(self, input_size, hidden_size):
                super().__init__()
                self.linear = nn.Linear(input_size + hidden_size, hidden_size)
                self.h = sl.State(hidden_size)

            def step(self, x):                                # (B, input_size)
                self.h.next = torch.tanh(self.linear(torch.cat([x, self.h.prev], -1)))
                return self.h.next

    Inside another Step's `step`, calling a Step does one step of it. Anywhere else, calling it runs the
    whole sequence: `cell(xs, ...)` is `sl.Loop(cell)(xs, ...)`, xs (T, B, ...).
    """

    _loop_class: ClassVar[Any] = None  # set by loop.py, which may not be imported here

    def __new__(cls, *_: Any, **__: Any) -> Self:
        if cls.forward is not Step.forward:
            raise StepError(defines_forward(cls))
        step = super().__new__(cls)
        step.__dict__[_KEPT] = Kept(id(step))
        tracked.register(step)
        return step

    @property
    def _kept(self) -> Kept:
        """What is kept between calls: its Loop, its Programs."""
        kept = self.__dict__.get(_KEPT)
        if kept is None or kept.owner != id(self):
            kept = self.__dict__[_KEPT] = Kept(id(self))
        return kept

    def step(self, *per_step: Any, **constants: Any) -> Any:
        """One step: positional arguments are this step's slices (B, ...), keyword arguments the constants."""
        raise StepError(
            message(
                f"{type(self).__name__} does not define step.",
                expected="a method step(self, x): one step, x is (B, ...) without a time axis",
                at=defined_at(type(self).__init__),
                fix="def step(self, x): ...",
            )
        )

    def sequences_of(self, xs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(positional, keyword) arguments of a call outside a loop, before they are looked at.

        For a Step that takes a sequence by keyword (Masked's `where`): it makes it a positional one.
        """
        return xs, named

    def begin(self, *_: Any, **constants: Any) -> None:
        """Runs once per call before the first step, and may assign `self.h.prev`. Does nothing by default."""

    __call__ = ends_at_the_call(nn.Module.__call__)

    def forward(self, *xs: Any, **arguments: Any) -> Any:
        frame = running()
        if frame is None:
            if torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
                return Step._loop_class._as_one_node(self, xs, arguments)
            if type(xs) is not tuple:
                torchscript.refuse_proxy(xs)
            return self.whole_sequence()(*xs, **arguments)
        return _one_step(self, frame, xs, arguments)

    def _step_inside(self, frame: Frame, xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        """One step in a running frame; operations that remember put one opaque call here."""
        return self.step(*xs, **arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and isinstance(self.__dict__.get("_modules", {}).get(name), State):
            raise StateError(
                message(
                    f"State {name!r} was replaced by a tensor.",
                    expected=f"self.{name}.next is what a step writes, self.{name}.prev what it reads",
                    found=f"self.{name} = {describe(value)}",
                    fix=f"self.{name}.next = value",
                )
            )
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for of every module."""
        raise torchscript.error()

    def _run_given(self, *xs: Any, **arguments: Any) -> Any:
        return self.whole_sequence()._run_given(*xs, **arguments)

    def whole_sequence(self) -> Any:
        """The Loop that calling this Step outside a loop goes through; made once."""
        loop = self._kept.get("loop")
        if loop is None:
            loop = self._kept["loop"] = Step._loop_class(self)
        return loop


def defines_forward(kind: type[Step]) -> str:
    """The message for a Step with a `forward` of its own."""
    return message(
        f"{kind.__name__} defines forward, which a Step uses itself.",
        expected="a method named step",
        found="forward",
        at=defined_at(kind.forward),
        fix="rename it: def step(self, x): ...  one step, x is (B, ...) without a time axis",
    )


def _one_step(child: Step, frame: Frame, xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
    if frame.phase != "step":
        raise StepError(
            message(
                f"{type(child).__name__} was called inside begin, where no step runs yet.",
                expected="begin only assigns .prev",
                fix="for a whole inner sequence, keep sl.Loop(cell) as an attribute and call that",
            )
        )
    if id(child) in frame.called:
        raise StepError(
            message(
                f"{type(child).__name__} was called twice in one step.",
                expected="one call per step: the second would overwrite the states of the first",
                found=f"first called at {frame.called[id(child)]}",
                fix="self.cell2 = sl.share(self.cell1)  has the same parameters and its own states",
            )
        )
    signature_of(child).check(child, len(xs), arguments, inside=True)
    frame.called[id(child)] = user_line()
    return child._step_inside(frame, xs, arguments)


@dataclass
class Survey:
    """What a Loop needs to know of its step's tree.

    names, states: every State with its path.  begins: every Step that defines `begin`, parents first.
    parameter: the first floating parameter, or None.
    copies: by State, how many copies of it a row has (a search holds one per hypothesis); 0 where it is plain.
    """

    names: list[str]
    states: list[State]
    begins: list[Step]
    parameter: Tensor | None
    copies: list[int] = field(default_factory=list)

    @property
    def unsized(self) -> bool:
        """Whether some State's shape is told by the first step only."""
        return any(state.unsized for state in self.states)

    def with_copies(self, values: list[Tensor | None]) -> list[Tensor | None]:
        """Values (B, ...) of the States with a row's copies: (B, K, ...), or (B, room, K, ...) of a history."""
        if not any(self.copies):
            return values
        found = []
        for value, state, copies in zip(values, self.states, self.copies, strict=True):
            if value is not None and copies:
                axis = 2 if state.grows_with is not None else 1
                value = value.unsqueeze(axis)
                value = value.expand(*value.shape[:axis], copies, *value.shape[axis + 1 :])
            found.append(value)
        return found


def survey(root: nn.Module) -> Survey:
    """Walk a Step's tree. A Loop inside it has states of its own, which are left out."""
    found = Survey([], [], [], None)
    _visit(root, "", found, set(), True, 0)
    return found


def _visit(module: nn.Module, path: str, found: Survey, seen: set[int], ours: bool, copies: int) -> None:
    seen.add(id(module))
    if found.parameter is None:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                found.parameter = parameter
                break
    if isinstance(module, State):
        if ours:
            found.names.append(path)
            found.states.append(module)
            found.copies.append(copies)
        return
    if ours and isinstance(module, Step) and type(module).begin is not Step.begin:
        found.begins.append(module)
    inside = ours and not getattr(type(module), "_holds_own_states", False)
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen:
            own: Any = module.copies if name in getattr(type(module), "_copied", ()) else copies
            _visit(child, f"{path}.{name}" if path else name, found, seen, inside, own)


def states_below(module: nn.Module) -> Iterator[tuple[str, State]]:
    """(path, State) of every State that one step of `module` threads; for steps that wrap other steps."""
    found = survey(module)
    return iter(zip(found.names, found.states, strict=True))


class Unbatched:
    """A constant without a batch axis. Made by `unbatched`."""

    __slots__ = ("tree",)

    def __init__(self, tree: Any) -> None:
        self.tree = tree


def unbatched(tensor: Any) -> Unbatched:
    """Mark a constant (a tensor or a pytree of tensors) as having no batch axis: every row sees all of it.

        loop(xs, table=sl.unbatched(table))

    Raises InputError for a module.
    """
    if isinstance(tensor, Unbatched):
        return tensor
    if isinstance(tensor, nn.Module):
        raise InputError(message("sl.unbatched takes a tensor.", found=describe(tensor), fix="pass a tensor"))
    return Unbatched(tensor)
