"""The public names, pinned; what `dir` and `help` show of them."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch

import steploop as sl

NAMES = """
BuildError CarryError DataError DivisionError InputError Loop MismatchError OutsideError Report SingularError State
StateError States Step StepError SteploopError Stream UnsupportedError length_mask memory nn plan register_operation
scan search seq2seq share unbatched verify view
""".split()


def test_the_public_names_are_these():
    assert sorted(sl.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(sl, name) is not None


def test_every_error_is_a_steploop_error_and_a_builtin_one():
    kinds = {
        sl.StepError: TypeError,
        sl.StateError: ValueError,
        sl.CarryError: TypeError,
        sl.InputError: ValueError,
        sl.UnsupportedError: NotImplementedError,
        sl.MismatchError: AssertionError,
        sl.DataError: ValueError,
        sl.BuildError: RuntimeError,
        sl.OutsideError: IndexError,
        sl.DivisionError: ZeroDivisionError,
        sl.SingularError: torch.linalg.LinAlgError,
    }
    for error, builtin in kinds.items():
        assert issubclass(error, sl.SteploopError) and issubclass(error, builtin)


def test_dir_shows_the_public_names_only():
    assert dir(sl) == sorted(NAMES)


def public(module: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """What a module's `__all__` names, and that of the modules among it."""
    for name in module.__all__:
        value = getattr(module, name)
        if id(value) not in seen:
            seen.add(id(value))
            yield f"{path}.{name}", value
            if inspect.ismodule(value) and hasattr(value, "__all__"):
                yield from public(value, f"{path}.{name}", seen)


def test_every_public_name_has_a_docstring_of_its_own():
    names = dict(public(sl, "sl", set()))
    assert len(names) > 100
    for name, value in names.items():
        assert value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__, name


def test_every_public_method_has_a_docstring():
    """`help` shows a method's own, or that of the method it takes the place of."""
    for name, value in public(sl, "sl", set()):
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if not method.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"
