"""What a kernel finds wrong: it notes the check that failed and goes on, the caller of the kernel raises the error.

Indices outside their axis are put inside. Matrices without a solution give what they give.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.graph import size_at
from ...errors import DivisionError, OutsideError, SteploopError, message, singular
from .language import Check

DIVISION = "division"  # the operation of checks for zeros
_CALLED = {
    "index": "x[index]", "_unsafe_index": "x[index]", "index_put": "x[index] = ...",
    "_unsafe_index_put": "x[index] = ...", "scatter": "scatter or one_hot",
}  # fmt: skip
_FROM_END = frozenset(n for n in _CALLED if "index" in n)  # operations for which negative indices count from the end


def error(check: Check, sizes: dict[str, int]) -> SteploopError:
    """The error for a check that failed. sizes: the values of symbols."""
    if check.operation == DIVISION:
        return DivisionError(
            message(
                "a division of whole numbers by zero, which torch refuses as well",
                expected="divisors that are not 0",
                found="a 0, in a row that runs",
                at=check.line,
                fix="clamp the divisor, or divide numbers of a floating dtype",
            )
        )
    if check.operation.startswith("linalg."):
        return singular(check.operation, at=check.line)
    size = size_at(check.size, sizes)
    name = _CALLED.get(check.operation, check.operation)
    least = -size if check.operation in _FROM_END else 0
    return OutsideError(
        message(
            f"index out of range in {name}: the axis has size {size}",
            expected=f"indices from {least} to {size - 1}",
            found="an index outside, in a row that runs",
            at=check.line,
            fix="look at the values of the index tensor; clamp or mask those that stand for `nothing`",
        )
    )


def any_empty(checks: Sequence[Check], sizes: dict[str, int]) -> bool:
    """Whether an axis has no entries: then no index is right, and a kernel has nothing to read instead."""
    return any(size_at(check.size, sizes) == 0 for check in checks)
