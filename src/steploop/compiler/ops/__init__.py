"""What the compiler knows of operations: `table` holds the rows, the other files make them."""

from . import create, index, network, pointwise, products, reduce, shapes  # noqa: F401  (they fill the table)
