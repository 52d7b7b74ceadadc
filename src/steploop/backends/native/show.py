"""The loop language as text: for people, and for golden files."""

from __future__ import annotations

from .emit_expressions import size_text
from .fuse import Fused, Nest
from .language import (
    Buffer,
    Const,
    Dim,
    Expr,
    Iota,
    Load,
    Nested,
    Op,
    Product,
    Reduce,
    Routine,
    Scan,
    Scatter,
    Statement,
    same,
)

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
          "eq": "==", "ne": "!=", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}  # fmt: skip


def show(plan: Fused) -> str:
    """One row's program: its values, then phase by phase the products and the nests."""
    program = plan.program
    lines = [_declared("input", b) for b in program.inputs]
    lines += [_declared("state", b) for b in program.prevs]
    if plan.early:
        lines += ["for some steps ahead", *(f"  {_product(p)}" for p in plan.early)]
    for number, phase in enumerate(plan.phases):
        lines.append(f"phase {number}")
        lines += [f"  {_product(p)}" for p in phase.products]
        for nest in phase.nests:
            lines += _nest(nest)
    lines += [f"keep {b.name}: {_type(b)}" for b in program.kept]
    return "\n".join(lines) + "\n"


def _declared(word: str, b: Buffer) -> str:
    how = {"step": "per step", "once": "the same at every step", "prev": ""}[b.place]
    notes = ", ".join(n for n in (how, "" if b.rows else "for all rows") if n)
    return f"{word} {b.name}: {_type(b)}{f'  ({notes})' if notes else ''}"


def _type(b: Buffer) -> str:
    return f"{str(b.dtype).removeprefix('torch.')}[{', '.join(map(_size, b.shape))}]"


def _size(size: Dim) -> str:
    return size_text(size).strip("()")


def _product(p: Product) -> str:
    rows = "" if same(p.left.shape[0], 1) else f" for {_size(p.left.shape[0])} rows"
    right = f"{p.right.buffer.name}[{_size(p.right.shape[0])} x {_size(p.right.shape[1])}]"
    return f"{p.target.buffer.name} = {_whole(p.left)} @ {right}{rows}{_at(p)}"


def _whole(load: Load) -> str:
    return load.buffer.name + ("" if same(load.offset, 0) else f"[{_size(load.offset)}:]")


def _at(statement: Statement) -> str:
    return f"    # {statement.line}" if statement.line else ""


def _nest(nest: Nest) -> list[str]:
    kept = len(nest.shape) - nest.reduced
    axes = ", ".join(f"{'sum ' if a >= kept else ''}i{a} < {_size(n)}" for a, n in enumerate(nest.shape))
    head = f"  for {axes}:" if axes else "  once:"
    if nest.across:
        head += "  # vectors along the axis that stays"
    return [head, *(f"    {_statement(s, nest)}" for s in nest.statements)]


def _statement(s: Nested, nest: Nest) -> str:
    if isinstance(s, Routine):
        operands = ", ".join(map(_place, s.operands))
        return f"{_place(s.target)} = {s.name}<{', '.join(map(str, s.options))}>({operands}){_at(s)}"
    value = expression(s.value)
    if isinstance(s, Reduce):
        text = f"{_place(s.target)} = {s.kind}({value})"
    elif isinstance(s, Scan):
        text = f"{_place(s.target)} = running {s.kind}({value})"
    elif isinstance(s, Scatter):
        text = f"{_place(s.target)} {'+=' if s.add else '='} {value}"
    else:
        text = (
            f"{_place(s.target)} = {value}"
            if id(s) not in nest.silent
            else f"let {_place(s.target)} = {value}"
        )
    return text + _at(s)


def _place(load: Load | Iota) -> str:
    terms = [f"{expression(e)}*{_size(step)}" for e, step in getattr(load, "at", ())]
    for axis, stride in enumerate(load.strides):
        if not same(stride, 0):
            terms.append(f"i{axis}" if same(stride, 1) else f"i{axis}*{_size(stride)}")
    if not same(load.offset, 0) or not terms:
        terms.append(_size(load.offset))
    inside = " + ".join(terms)
    return f"{load.buffer.name}[{inside}]" if isinstance(load, Load) else f"({inside})"


def expression(expr: Expr) -> str:
    if isinstance(expr, Const):
        return str(expr.value)
    if not isinstance(expr, Op):
        return _place(expr)
    args = [expression(a) for a in expr.args]
    if expr.name in _SIGNS:
        return f"({args[0]} {_SIGNS[expr.name]} {args[1]})"
    name = str(expr.dtype).removeprefix("torch.") if expr.name == "cast" else expr.name
    return f"{name}({', '.join(args)})"


__all__ = ["expression", "show"]
