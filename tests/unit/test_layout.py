"""Who may import whom, read from the source: lower parts know nothing of higher ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from where import WHERE, where_tested

import steploop

ROOT = Path(steploop.__file__).parent
TESTS = Path(__file__).parents[1]
FRONT = {
    "arguments", "call_sizes", "closed_over", "compare", "devices", "dispatch", "frame", "initial", "inputs", "kinds",
    "loop", "operation", "packed", "prepared", "scan", "replay", "share", "signature", "sizing", "state",
    "state_messages", "states", "step", "step_program", "stream", "strict_export", "torchscript", "tracebacks",
    "tracked", "tree", "until", "verify", "verify_runs", "verify_steps",
}  # fmt: skip
LIBRARY = {"memory", "nn", "search", "seq2seq"}
# What the modules of a part may import besides errors, tree, marks and their own part.
ALLOWED = {
    "errors": set(),
    "view": set(),
    "tree": set(),
    "marks": set(),
    "compiler": {"view", "backends.contract"},
    "backends": {"tree"}
    | {f"compiler.{name}" for name in "blocks choices ir ops printing program recording schedule span words".split()},
    "front": {"compiler", "backends"},
    "library": {"front", "compiler.program", "compiler.memory_operator", "compiler.largest", "backends.reference"},
    "recipes": {"public"},
    "cli": {"public", "library", "front", "recipes", "view", "backends", "compiler"},
}
# Of the front end only these know more of the compiler than the contract between the two.
KNOW_THE_COMPILER = {"dispatch", "operation", "sizing"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "public"


def imports_of(path: Path, whole: bool = True) -> set[str]:
    """The modules of this package that a file imports, in functions too; not `whole`: without those for types alone."""
    tree = ast.parse(path.read_text())
    lazy = {n for f in ast.walk(tree) if _for_types(f) for n in ast.walk(f)}
    found = set()
    for node in ast.walk(tree):
        if whole or node not in lazy:
            found |= _targets(node, path)
    return {f if f == "public" or _exists(f) else f.rpartition(".")[0] or "public" for f in found}


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def _targets(node: ast.AST, path: Path) -> set[str]:
    if isinstance(node, ast.ImportFrom) and node.level:
        base = path.parent
        for _ in range(node.level - 1):
            base = base.parent
        start = [*base.relative_to(ROOT).parts, *(node.module or "").split(".")]
        prefix = ".".join(p for p in start if p)
        return {f"{prefix}.{a.name}".lstrip(".") for a in node.names}
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    inside = [n for n in names if n.split(".")[0] == "steploop"]
    return {n.partition(".")[2] or "public" for n in inside}


def _exists(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def part_of(name: str) -> str:
    first = name.split(".")[0]
    if first in LIBRARY:
        return "library"
    return "front" if first in FRONT and first != "tree" else {"__main__": "cli"}.get(first, first)


FILES = [path for path in sorted(ROOT.rglob("*.py")) if name_of(path) not in ("public",)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports(path):
    name, part = name_of(path), part_of(name_of(path))
    for target in imports_of(path):
        allowed = {"errors", part, "tree", "marks"} | ALLOWED[part]
        ok = part_of(target) in allowed or any(target == a or target.startswith(f"{a}.") for a in allowed)
        assert ok, f"{name} (part {part}) must not import {target}"
        if part == "front" and target.startswith("compiler") and name not in KNOW_THE_COMPILER:
            assert target == "compiler.program", f"{name} must not import {target}"


LONG = {"backends.native.ops_pointwise"}  # a table: one row per operation


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_long(path):
    if name_of(path) not in LONG:
        assert len(path.read_text().splitlines()) <= 400, f"{name_of(path)}: two concepts, two files"


def test_no_module_is_imported_in_a_circle():
    graph = {name_of(path): imports_of(path, whole=False) - {name_of(path)} for path in FILES}
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_has_tests_somewhere(path):
    found = where_tested(name_of(path))
    assert found is not None, f"say in tests/where.py which test fails first when {name_of(path)} is broken"
    assert (TESTS / found).exists(), found


def test_nothing_is_said_of_modules_that_are_gone():
    names = {name_of(path) for path in FILES} | {name_of(path.parent / "__init__.py") for path in FILES}
    assert set(WHERE) <= names
