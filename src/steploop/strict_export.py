"""Whole-sequence calls under torch.export.export(..., strict=True).

There dynamo reads the Python of a model. It can't read steploop's own: a loop is captured, not traced. So the call
becomes one function of tensors, which dynamo writes into its graph unread. Then torch.export runs that function under
its other tracer, which records an operator, as without strict=True. (torch.compile leaves its graph for a loop instead:
see `Loop.forward`.) This module is imported when dynamo asks for it: it brings in all of dynamo.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._dynamo import allow_in_graph, assume_constant_result
from torch.nn.utils.stateless import _reparametrize_module

from .errors import UnsupportedError, describe, message
from .states import States
from .tracked import module_of

_FORMS: dict[int, Any] = {}  # of what a call returned


@allow_in_graph  # type: ignore[untyped-decorator]  # torch's function has no annotations
def _run(number: int, weights: dict[str, Tensor], method: str, arguments: Any, named: Any) -> list[Tensor]:
    module = module_of(number)
    with _reparametrize_module(module, dict(weights)):
        returned = getattr(module, method)(*_plain(arguments), **_plain(named))
    tensors: list[Tensor] = []
    _FORMS[number] = _form(returned, tensors)
    return tensors


@assume_constant_result  # type: ignore[untyped-decorator]  # torch's function has no annotations
def _form_of(number: int) -> Any:
    return _FORMS[number]


def _plain(given: Any) -> Any:
    """Graphs hold containers that can't be changed."""
    if isinstance(given, dict):
        return {key: _plain(value) for key, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(map(_plain, given))
    return list(given) if isinstance(given, list) else given


def _form(tree: Any, tensors: list[Tensor]) -> Any:
    """A tree as nested tuples of strings and numbers, which dynamo can read; puts its tensors into the list."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return ("tensor",)
    if isinstance(tree, States):
        return ("states", tuple(tree), tuple(tree._own), _form([*tree.values(), *tree._own.values()], tensors))
    if type(tree) in (list, tuple):
        return (type(tree).__name__, *(_form(part, tensors) for part in tree))
    if type(tree) is dict:
        return ("dict", tuple(tree), *(_form(part, tensors) for part in tree.values()))
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return ("constant", tree)
    raise UnsupportedError(
        message(
            "Under torch.export.export(strict=True) a loop returns tuples, lists and dicts of tensors.",
            found=describe(tree),
            fix="torch.export.export(..., strict=False), which is the default",
        )
    )


def _built(form: Any, tensors: list[Tensor], at: int) -> tuple[Any, int]:
    """The tree of a form, from the tensors that begin at number `at`; and where they end."""
    kind = form[0]
    if kind == "tensor":
        return tensors[at], at + 1
    if kind == "constant":
        return _made_anew(form[1]), at
    parts = []
    for part in form[2:] if kind == "dict" else form[3:] if kind == "states" else form[1:]:
        value, at = _built(part, tensors, at)
        parts.append(value)
    if kind == "dict":
        return dict(zip(form[1], parts)), at
    if kind == "states":
        count = len(form[1])
        return States(dict(zip(form[1], parts[0][:count])), dict(zip(form[2], parts[0][count:]))), at
    return (tuple(parts) if kind == "tuple" else parts), at


def _made_anew(constant: Any) -> Any:
    """The same value. Dynamo can't guard where a constant of `_form_of` comes from, and would where it is returned."""
    if constant is None:
        return None
    if isinstance(constant, bool):
        return not not constant
    return constant + "" if isinstance(constant, str) else constant * 1


def call(module: nn.Module, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """module.method(*arguments, **named), as one node of dynamo's graph."""
    number = id(module)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = _run(number, weights, method, arguments, named)
    return _built(_form_of(number), tensors, 0)[0]
