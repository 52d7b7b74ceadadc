"""A step's graph as plain data (numbers, strings, lists, dictionaries), and back.

Operators are named, sizes are trees of named functions, and nothing is evaluated that is not on a list here: what is
read may come from a file. Of values only those of inputs are written. When a graph is read every call runs on fake
tensors again, so that torch itself says what shape each value has: data can't claim another.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import BooleanFalse, BooleanTrue
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy import functions as torch_functions

from .ir.graph import ROLES, Size, StepGraph, expression


class NotPlain(Exception):
    """Something in a graph has no form as data."""


class Damaged(Exception):
    """Data that no graph can be read from."""


def _names_of(module: Any, names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names.split() if hasattr(module, name)}


_FUNCTIONS: dict[str, Any] = {
    **_names_of(sympy, "Add Mul Pow Max Min Abs floor ceiling Eq Ne Lt Le Gt Ge And Or Not"),
    **_names_of(torch_functions, "FloorDiv ModularIndexing CleanDiv PythonMod Mod CeilDiv CeilToInt FloorToInt "
                                 "TruncToInt RoundToInt TruncToFloat RoundDecimal IntTrueDiv FloatTrueDiv ToFloat "
                                 "PowByNatural FloatPow LShift RShift Identity Where Max Min"),
    **{n: f for n, f in vars(torch_functions).items() if n.startswith("OpaqueUnaryFn_")}, "Modulo": sympy.Mod,
}  # fmt: skip
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_RELATIONS = {
    "Equality": "Eq", "Unequality": "Ne", "StrictLessThan": "Lt", "LessThan": "Le", "StrictGreaterThan": "Gt",
    "GreaterThan": "Ge",
}  # fmt: skip
_TORCH_VALUES = {
    "dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format,
}  # fmt: skip
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")  # of which small data would make huge numbers
_LARGEST = 1 << 63
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


# -- sizes ---------------------------------------------------------------------------------------------------


def size_to_data(size: Any) -> Any:
    """An int; a symbol's name; or [function, argument, ...]."""
    expr = expression(size)
    if isinstance(expr, int) or expr.is_Integer:
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return str(expr)
    if expr.is_Rational:
        return ["Rational", int(expr.p), int(expr.q)]
    if expr.is_Float:
        return ["Float", repr(float(expr))]
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return ["Bool", int(bool(expr))]
    name = _NAMES.get(type(expr)) or _RELATIONS.get(type(expr).__name__)
    if name is None:
        raise NotPlain(f"a size computed with {type(expr).__name__}")
    return [name, *map(size_to_data, expr.args)]


def size_from_data(data: Any, symbols: dict[str, Any]) -> Any:
    """The sympy expression (or int). symbols: by name."""
    if type(data) is int:
        if abs(data) >= _LARGEST:
            raise Damaged("a size that no tensor has")
        return data
    if isinstance(data, str):
        if data not in symbols:
            raise Damaged(f"an unknown size {data!r}")
        return symbols[data]
    if not isinstance(data, list) or not data:
        raise Damaged("a size that is none")
    name, *arguments = data
    if name == "Float" and len(arguments) == 1:
        return sympy.Float(float(arguments[0]))
    if name == "Rational" and len(arguments) == 2:
        return sympy.Rational(*(sympy.Integer(size_from_data(a, {})) for a in arguments))
    if name == "Bool" and len(arguments) == 1:
        return sympy.true if arguments[0] else sympy.false
    if name not in _FUNCTIONS:
        raise Damaged(f"a size computed with {name!r}")
    arguments = [sympy.sympify(size_from_data(a, symbols)) for a in arguments]
    if name in _POWERS and arguments[-1].is_number and not abs(arguments[-1]) <= 64:
        raise Damaged("a power that no size has")
    found = _FUNCTIONS[name](*arguments)
    if found.is_Integer and abs(found) >= _LARGEST:
        raise Damaged("a size that no tensor has")
    return found


# -- arguments of calls --------------------------------------------------------------------------------------


def argument_to_data(argument: Any, number: Callable[[fx.Node], int]) -> Any:
    if isinstance(argument, fx.Node):
        return {"node": number(argument)}
    if isinstance(argument, Size):
        return {"size": size_to_data(argument)}
    if argument is None or isinstance(argument, (bool, str)) or type(argument) is int:
        return argument
    if isinstance(argument, float):
        return argument if math.isfinite(argument) else {"float": repr(argument)}
    if isinstance(argument, complex):
        return {"complex": [repr(argument.real), repr(argument.imag)]}
    if isinstance(argument, (list, tuple)):
        return [argument_to_data(a, number) for a in argument]
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    for name, kind in _TORCH_VALUES.items():
        if isinstance(argument, kind):
            return {name: str(argument).removeprefix("torch.")}
    raise NotPlain(f"an argument that is a {type(argument).__name__}")


def argument_from_data(data: Any, nodes: Sequence[fx.Node], symbols: dict[str, Any]) -> Any:
    if data is None or isinstance(data, (bool, str, int, float)):
        return data
    if isinstance(data, list):
        return [argument_from_data(a, nodes, symbols) for a in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise Damaged("an argument that is none")
    ((kind, value),) = data.items()
    if kind == "node":
        return _at(nodes, value)
    if kind == "size":
        expr = size_from_data(value, symbols)
        return int(expr) if isinstance(expr, int) or expr.is_number else Size(expr)
    if kind == "float":
        return float(value)
    if kind == "complex":
        return complex(*map(float, value))
    if kind == "device":
        return torch.device(value)
    found = getattr(torch, value, None) if kind in _TORCH_VALUES else None
    if not isinstance(found, _TORCH_VALUES.get(kind, ())):
        raise Damaged(f"an unknown {kind} {value!r}")
    return found


def one_line(text: Any) -> str:
    """A name or source line: they stand in comments of the C++ that is built."""
    if not isinstance(text, str) or not text.isprintable() or "\\" in text:
        raise Damaged("a name that is none")
    return text


def _at(nodes: Sequence[fx.Node], number: Any) -> fx.Node:
    if type(number) is not int or not 0 <= number < len(nodes):
        raise Damaged("a value that no call gives")
    return nodes[number]


# -- operators -----------------------------------------------------------------------------------------------


def target_to_data(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if not isinstance(target, torch._ops.OpOverload):
        raise NotPlain(f"{getattr(target, '__name__', target)}, which is no operator of torch")
    return str(target)


def target_from_data(name: Any) -> Any:
    """The operator of this name, which must change nothing."""
    if name == "getitem":
        return operator.getitem
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 3 or not all(map(_IDENTIFIER.match, parts)):
        raise Damaged("a call of something that is no operator")
    found: Any = torch.ops
    try:
        for part in parts:
            found = getattr(found, part)
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise Damaged(f"the operator {name}, which this torch ({torch.__version__}) does not have")
    if found._schema.is_mutable:
        raise Damaged(f"the operator {name}, which changes what it is given")
    return found


def runnable(target: Any) -> Any:
    """What runs a call by itself: copies are left out of graphs, so that a view may be none of what it reads."""
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    return torch.ops.aten.reshape.default if target in views else target


# -- graphs --------------------------------------------------------------------------------------------------


def graph_to_data(
    step: StepGraph, hints: dict[str, int], devices: dict[fx.Node, torch.device],
    inner: Callable[[fx.Node], tuple[int, Any]],
) -> dict[str, Any]:  # fmt: skip
    """hints: a size that each symbol may have.  devices: where inputs are.
    inner: of a call of another loop the place of its key among the arguments, and data that stands for it."""
    numbers: dict[fx.Node, int] = {}
    inputs: list[Any] = []
    calls: list[Any] = []
    lines: dict[str, int] = {}

    def data_of(argument: Any) -> Any:
        return argument_to_data(argument, numbers.__getitem__)

    for node in [n for n in step.graph.nodes if n.op == "placeholder"]:
        value = node.meta["val"]
        device = devices.get(node, value.device)
        numbers[node] = len(numbers)
        inputs.append([node.name, [size_to_data(s) for s in value.shape], data_of(value.dtype), str(device)])
    for node in step.graph.nodes:
        if node.op == "call_function":
            place, key = inner(node)
            arguments = [key if i == place else data_of(a) for i, a in enumerate(node.args)]
            line = lines.setdefault(node.meta.get("line", ""), len(lines))
            call = [target_to_data(node.target), arguments, line]
            numbers[node] = len(numbers)
            calls.append([*call, {k: data_of(v) for k, v in node.kwargs.items()}] if node.kwargs else call)
        elif node.op not in ("placeholder", "output"):
            raise NotPlain(f"a node of kind {node.op}")
    roles = {name: [None if n is None else numbers[n] for n in getattr(step, name)] for name in ROLES}
    return {
        "batch": None if step.batch is None else str(step.batch),
        "symbols": [[str(s), *place, hints[str(s)]] for s, place in step.symbols.items()],
        "inputs": inputs, "calls": calls, "lines": list(lines), "roles": {k: v for k, v in roles.items() if v},
    }  # fmt: skip


class Reader:
    """Reads a graph. `graph`: the StepGraph; `symbols`: by the names in the data; `env`: with the conditions on sizes
    that its calls rely on."""

    def __init__(self, data: dict[str, Any], inner: Callable[[Any], Any]):
        self.inner = inner
        self.env = ShapeEnv(duck_shape=False, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.mode = FakeTensorMode(shape_env=self.env)
        self.symbols: dict[str, sympy.Symbol] = {}
        self.lines = [one_line(line) for line in data["lines"]]
        places = {}
        for name, kind, index, dim, hint in data["symbols"]:
            symbol = self._symbol(int(hint))
            self.symbols[name] = symbol
            places[symbol] = (str(kind), int(index), int(dim))
        self.fx = fx.Graph()
        self.nodes: list[fx.Node] = []
        for given in data["inputs"]:
            self._input(*given)
        with self.mode, enable_python_dispatcher(), torch.no_grad():
            for made in data["calls"]:
                self._call(*made)
        roles: dict[str, Any] = {name: [self._role(n) for n in data["roles"].get(name, [])] for name in ROLES}
        batch = None if data["batch"] is None else self.symbols[data["batch"]]
        self.graph = StepGraph(graph=self.fx, batch=batch, symbols=places, **roles)

    def _role(self, number: Any) -> fx.Node | None:
        return None if number is None else _at(self.nodes, number)

    def _symbol(self, hint: int) -> sympy.Symbol:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        with torch.no_grad():
            fake = self.mode.from_tensor(torch.empty(hint, device="meta"), symbolic_context=context)
        size: Any = fake.shape[0]
        return size.node.expr

    def _size(self, data: Any) -> Any:
        expr = size_from_data(data, self.symbols)
        return expr if isinstance(expr, int) else self.env.create_symintnode(sympy.sympify(expr), hint=None)

    def _input(self, name: str, shape: list[Any], dtype: Any, device: str) -> None:
        if not _IDENTIFIER.match(name):
            raise Damaged("an input without a name")
        with self.mode:
            value = torch.empty(
                [self._size(s) for s in shape], dtype=argument_from_data(dtype, (), {}), device=torch.device(device)
            )
        node = self.fx.placeholder(name)
        node.meta.update(val=value, line="")
        self.nodes.append(node)

    def _call(self, target: str, arguments: list[Any], line: int, named: dict[str, Any] | None = None) -> None:
        function = target_from_data(target)
        args = tuple(self.inner(a) if _is_loop(a) else self._argument(a) for a in arguments)
        kwargs = {k: self._argument(v) for k, v in (named or {}).items()}
        if not all(map(_IDENTIFIER.match, kwargs)):
            raise Damaged("an argument without a name")
        node = self.fx.call_function(function, args, kwargs)
        value = runnable(function)(*map(self._value, args), **{k: self._value(v) for k, v in kwargs.items()})
        node.meta.update(val=value, line=self.lines[line])
        self.nodes.append(node)

    def _argument(self, data: Any) -> Any:
        return argument_from_data(data, self.nodes, self.symbols)

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return argument.meta["val"]
        if isinstance(argument, Size):
            return self.env.create_symintnode(argument.expr, hint=None)
        return [self._value(a) for a in argument] if isinstance(argument, (list, tuple)) else argument


def _is_loop(data: Any) -> bool:
    return isinstance(data, dict) and list(data) == ["loop"]


