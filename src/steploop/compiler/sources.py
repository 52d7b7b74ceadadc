"""The user's source lines: what a node remembers of where it comes from, and the text around those lines."""

from __future__ import annotations

import ast
import linecache
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from .reads import USER, kind_of_file
from .refusals import is_user_file

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_RECIPES = os.path.join(_OURS, "recipes") + os.sep  # programs such as users write
_MARGIN = 3  # lines shown around one whose function is not found
_LONGEST = 120  # lines of a function that are shown


class Line(str):
    """ "file.py:14", the innermost line of a step that led to a call of torch.

    places: (whole file name, line) of that line and of those that called it, innermost first, as far out as the step
            itself. Text alone is written to files: it holds no path of this machine.
    """

    places: tuple[tuple[str, int], ...] = ()


def line_of_frame(frame: FrameType | None) -> str:
    """The Line of a frame inside a running step; "" where no line of a user's file called it."""
    places: list[tuple[str, int]] = []
    while frame is not None:
        name = frame.f_code.co_filename
        if is_user_file(name):
            places.append((name, frame.f_lineno))
        elif places and name.startswith(_HERE):
            break  # what runs the step
        frame = frame.f_back
    if not places:
        return ""
    line = Line(f"{os.path.basename(places[0][0])}:{places[0][1]}")
    line.places = tuple(places)
    return line


def is_library(file: str) -> bool:
    """Whether a file is one of an installed package, ours among them."""
    if file.startswith(_OURS):
        return not file.startswith(_RECIPES)
    return kind_of_file(file) != USER


def caller_of(line: str) -> str:
    """The innermost line of the user's own code that led to a Line; the line itself where there is none."""
    own = [(file, number) for file, number in getattr(line, "places", ()) if not is_library(file)]
    return f"{os.path.basename(own[0][0])}:{own[0][1]}" if own else str(line)


@dataclass
class Source:
    """A function's text. file: its short name.  name: "Cell.step".  first: the number of its first line."""

    file: str
    name: str
    first: int
    lines: list[str]
    library: bool  # no code of the user's: an installed package, or one of our own layers


@dataclass
class Sources:
    """The functions that some lines are in, each once, in the order in which they are met."""

    found: list[Source] = field(default_factory=list)
    _numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    _functions: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)

    def places(self, line: str) -> list[list[int]]:
        """[number of a Source, line in the file] for a line and for what called it, innermost first."""
        found = []
        for file, number in getattr(line, "places", ()):
            source = self._source(file, number)
            if source is not None and [source, number] not in found:
                found.append([source, number])
        return found

    def _source(self, file: str, number: int) -> int | None:
        text = linecache.getlines(file)
        if not 0 < number <= len(text):
            return None
        if file not in self._functions:
            self._functions[file] = list(_functions("".join(text)))
        around = [f for f in self._functions[file] if f[0] <= number <= f[1]]
        default = (max(1, number - _MARGIN), min(len(text), number + _MARGIN), "")
        first, last, name = max(around, default=default)  # the innermost begins last
        if last - first > _LONGEST:
            first = max(first, number - _LONGEST // 2)
            last = min(last, first + _LONGEST)
        key = (file, first)
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            lines = [line.rstrip("\n") for line in text[first - 1 : last]]
            short = os.path.basename(file)
            self.found.append(Source(short, name, first, lines, is_library(file)))
        return self._numbers[key]


def _functions(text: str) -> Iterable[tuple[int, int, str]]:
    """(first line, last line, "Class.function") of every function in a file."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    stack: list[tuple[Any, str]] = [(tree, "")]
    while stack:
        node, path = stack.pop()
        name = path
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{path}.{node.name}" if path else node.name
            if not isinstance(node, ast.ClassDef):
                yield node.lineno, node.end_lineno or node.lineno, name
        stack.extend((child, name) for child in ast.iter_child_nodes(node))
