"""Words that a name made of a user's must not be: those of C++, of the kernels' headers, and of what emit*.py write."""

from __future__ import annotations

import functools
import re
from pathlib import Path

# The headers of all backends: a name stands in a loop's text, which each of them may compile.
SHARED = [Path(__file__).parent / "kernels" / name for name in ("linalg.h", "largest.h")]
HEADERS = sorted(Path(__file__).parents[1].glob("*/kernels/*.h"))

# A word, or a text in quotes, in which there are none: extern "C".
WORD = re.compile(r'"[^"]*"|\b[A-Za-z_]\w*')
REMARK = re.compile(r"[ \t]*//[^\n]*")

_CPP = """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
    continue decltype default delete do double else enum explicit export extern false float for friend goto if inline
    int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public register
    return short signed sizeof static struct switch template this throw true try typedef typeid typename union unsigned
    using virtual void volatile wchar_t while xor xor_eq main linux unix NAN INFINITY"""
_EMITTED = """Call Scratch prelude steploop_run run_tile run_tiles call scratch team tiles tile pointers numbers memory
    old batch start stop down tile_rows threads first pack ahead sizes offsets resets fault relax spin row0 rows here p
    n i m r t at from end loaded load_rows save_rows take_tiles join_team inside inside_from_end step where now next
    early used make_early together given count active half block to me free pow bytes padded packed packed_size
    aligned_alloc Work int8_t int16_t int32_t u8 i64 visibility __attribute__ float_products double_products members
    whole row s w steps take give_back each_weight kPointers kNumbers f F
    bf16_products f16_products"""


def words(text: str) -> set[str]:
    """The words of a C++ text, outside remarks and quotes."""
    return {word for word in WORD.findall(REMARK.sub("", text)) if not word.startswith('"')}


@functools.cache
def reserved() -> frozenset[str]:
    """Of the headers' words all but single letters, which are variables inside their functions."""
    own = {*_CPP.split(), *_EMITTED.split()}
    headers = set().union(*(words(path.read_text()) for path in HEADERS))
    return frozenset(own | {word for word in headers if len(word) > 1})
