"""What a Step's `step` or `begin` takes, and what is said where it is called with something else."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .errors import InputError, StepError, defined_at, message

RESERVED = ("state", "lengths", "mask", "resets", "steps", "on_masked", "batch_size", "backend")


@dataclass
class Signature:
    """What a `step` or `begin` takes, and whether it may be called so."""

    owner: str
    at: str
    positional: tuple[str, ...]
    names: frozenset[str]
    required: frozenset[str]
    any_positional: bool
    any_keyword: bool
    seen: set[Any] = field(default_factory=set)

    def takes(self, name: str) -> bool:
        """Whether a keyword argument of this name is wanted."""
        return self.any_keyword or name in self.names

    def check(self, module: nn.Module, count: int, arguments: dict[str, Any], *, inside: bool) -> None:
        """Raise StepError / InputError unless `count` positional and the keyword `arguments` fit."""
        key = (count, *arguments, inside)
        if key in self.seen:
            return
        if inside:
            self._no_reserved(arguments)
        if count > len(self.positional) and not self.any_positional:
            raise StepError(self._too_many(count))
        given = set(self.positional[:count])
        error = StepError if inside else InputError
        for name in arguments:
            if name in given or not self.takes(name):
                raise error(self._unexpected(name, name in given))
        missing = self.required - given - set(arguments)
        if missing:
            raise error(self._missing(missing, inside))
        self.seen.add(key)

    def _no_reserved(self, arguments: dict[str, Any]) -> None:
        for name in arguments:
            if name in RESERVED:
                raise StepError(
                    message(
                        f"`{name}=` was passed to {self.owner} inside a step, where one step of it runs.",
                        expected="this step's slices and constants; the loop threads the states by itself",
                        fix="self.cell(x); its states are self.cell.<name>.prev and .next",
                    )
                )

    def _too_many(self, count: int) -> str:
        constants = sorted(self.names - set(self.positional))
        by_keyword = f"a constant goes by keyword: {constants[0]}=...; " if constants else ""
        return message(
            f"{self.owner}.step takes {len(self.positional)} positional argument(s) "
            f"({', '.join(self.positional) or 'none'}), and {count} were given.",
            expected="one positional argument for each per-step input",
            fix=f"{by_keyword}if the extra one is a state: states are not passed by hand. In a step call self.cell(x): "
            "the loop threads its states; for a whole sequence pass state=..., an sl.States from an earlier "
            "call. Constants are keyword arguments",
        )

    def _unexpected(self, name: str, twice: bool) -> str:
        takes = ", ".join(sorted(self.names)) or "none"
        problem = "two values for" if twice else "a constant that no step or begin names:"
        meant = None if twice else _meant(name, self.names)
        fix = f"add {name} to the arguments of step (defined at {self.at}) or leave it out"
        return message(
            f"{self.owner} got {problem} `{name}`.",
            expected=f"arguments named {takes}",
            found=f"`{name}=`",
            fix=f"{meant}=... if that is meant; else {fix}" if meant else fix,
        )

    def _missing(self, missing: set[str] | frozenset[str], inside: bool) -> str:
        sequences = [n for n in self.positional if n in missing]
        constants = sorted(missing - set(sequences))
        call = "self.cell" if inside else "loop"
        given = [*self.positional[:1], *(n for n in sequences if n != self.positional[0])]
        return message(
            f"{self.owner} needs {', '.join([*sequences, *constants])}.",
            expected=f"positional arguments are per-step, keyword arguments constants; see {self.at}",
            fix=f"{call}({', '.join([*given, *(f'{n}={n}' for n in constants)])})",
        )


# What people call the arguments of a loop elsewhere.
_ELSEWHERE = {
    "hx": "state", "h0": "state", "h_0": "state", "hidden": "state", "initial_state": "state", "init": "state",
    "sequence_length": "lengths", "sequence_lengths": "lengths", "lens": "lengths", "x_lengths": "lengths",
    "padding_mask": "mask", "valid": "mask", "dones": "resets", "done": "resets", "episode_starts": "resets",
}  # fmt: skip


def _meant(name: str, own: frozenset[str]) -> str | None:
    """The argument that a name with a slip in it is taken for."""
    close = difflib.get_close_matches(name, [*own, *RESERVED], n=1, cutoff=0.75)
    return close[0] if close else _ELSEWHERE.get(name)


_signatures: WeakKeyDictionary[Any, Signature] = WeakKeyDictionary()


def signature_of(module: nn.Module, method: str = "step") -> Signature:
    """The Signature of a Step's `step` or `begin`. StepError where an argument's name is reserved."""
    function = getattr(type(module), method)
    found = _signatures.get(function)
    if found is None:
        found = _signatures[function] = _read_signature(type(module).__name__, function)
    return found


def _read_signature(owner: str, function: Any) -> Signature:
    kinds = inspect.Parameter
    parameters = list(inspect.signature(function).parameters.values())[1:]
    for parameter in parameters:
        if parameter.name in RESERVED and parameter.kind is not kinds.POSITIONAL_ONLY:
            raise StepError(
                message(
                    f"{owner}.{function.__name__} has an argument named `{parameter.name}`, "
                    "which is an argument of the loop itself.",
                    expected="any name but " + ", ".join(RESERVED),
                    found=f"`{parameter.name}`",
                    at=defined_at(function),
                    fix=f"rename it, for example to `{parameter.name}_`",
                )
            )
    ordinary = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    by_name = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    variable = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    return Signature(
        owner=owner,
        at=defined_at(function),
        positional=tuple(p.name for p in parameters if p.kind in ordinary),
        names=frozenset(p.name for p in parameters if p.kind in by_name),
        required=frozenset(p.name for p in parameters if p.kind not in variable and p.default is kinds.empty),
        any_positional=any(p.kind is kinds.VAR_POSITIONAL for p in parameters),
        any_keyword=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
    )
