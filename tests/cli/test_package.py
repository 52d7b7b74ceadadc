"""The package as others get it: built, unpacked beside nothing but what it requires, used from another folder."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BUILD = """
import os, sys
from setuptools import build_meta
out = sys.argv[1]
sdist = build_meta.build_sdist(out)
import tarfile
with tarfile.open(os.path.join(out, sdist)) as archive:
    archive.extractall(out, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(out)
os.chdir(os.path.join(out, sdist.removesuffix(".tar.gz")))
print(build_meta.build_wheel(out))
"""

USE = """
import sys
import torch
import steploop as sl
from steploop.cli import main
from cell import Cell

torch.manual_seed(0)
loop, xs = sl.Loop(Cell(3, 4), backend="eager"), torch.randn(5, 2, 3)
outputs, state = loop(xs)
outputs.sum().backward()
loop.plan(xs).save_html("plan.html")
print("from", sl.__file__)
main(["explain", "cell.py:Cell", "--init", "3, 4", "--input", "5,2,3", "--backend", "eager"])
"""

CELL = """
import torch, steploop as sl
from torch import nn

class Cell(sl.Step):
    def __init__(self, inputs, units):
        super().__init__()
        self.w, self.h = nn.Linear(inputs + units, units), sl.State(units)

    def step(self, x):
        self.h.next = torch.tanh(self.w(torch.cat([x, self.h.prev], -1)))
        return self.h.next
"""


def run(*arguments: object, cwd: Path, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def required_by(names: list[str]) -> set[str]:
    """The distributions that these need, and those that they need in turn; what is not installed is left out."""
    found: set[str] = set()
    while names:
        name = re.split(r"[^\w.-]", names.pop(), maxsplit=1)[0].lower().replace("_", "-")
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            names += [line for line in requires if "extra ==" not in line]
    return found


def only(names: set[str], folder: Path) -> Path:
    """A folder with links to the files of these distributions, and to nothing else."""
    folder.mkdir()
    for name in names:
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(file.locate()).parents[len(file.parts) - 1] / top)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that was made of it."""
    folder, source = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("source") / "steploop"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "runs", "build", "dist", "golden")
    shutil.copytree(ROOT, source, ignore=ignore)  # the build leaves files beside what it builds
    run("-c", BUILD, folder, cwd=source)
    return folder


def test_the_package_works_in_an_empty_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    needed = only(required_by(["torch", "numpy", "typer"]), tmp_path / "needed")
    assert not any((needed / name).exists() for name in ("lightning", "matplotlib", "scipy", "safetensors"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "cell.py").write_text(CELL)
    (elsewhere / "use.py").write_text(USE)
    # -S: without the packages of the environment that the tests run in
    path = os.pathsep.join(map(str, (tmp_path / "installed", needed)))
    told = run("-S", "use.py", cwd=elsewhere, PYTHONPATH=path)
    assert f"from {tmp_path / 'installed'}" in told and "cell.py:" in told
    assert "cell.py" in (elsewhere / "plan.html").read_text()


def test_what_is_packed(built):
    (wheel,) = built.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    for file in source.rglob("*"):
        name = file.relative_to(source).as_posix()
        if file.is_file() and "__pycache__" not in name and ".egg-info" not in name:
            assert name in packed, f"{name} is not in the wheel: [tool.setuptools.package-data]"
    assert not any(name.startswith("tests") for name in packed)
    (unpacked,) = (path for path in built.iterdir() if path.is_dir())
    for name in ("CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "constraints.txt", "tests/conftest.py"):
        assert (unpacked / name).is_file(), f"{name} is not in the sdist: MANIFEST.in"


def test_the_version_is_the_same_everywhere():
    """The wheel's comes from pyproject.toml."""
    import steploop

    named = [
        re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
        for file, pattern in (("pyproject.toml", r'^version = "(.*)"'), ("CITATION.cff", r"^version: (.*)"))
    ]
    assert {match and match[1] for match in named} == {steploop.__version__}
    assert f"\n## {steploop.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_python_without_docstrings_and_assertions():
    """`python -OO`: every module can be imported, and a loop runs, forward and backward."""
    program = (
        "import importlib, pkgutil, torch, steploop as sl\n"
        "for module in pkgutil.walk_packages(sl.__path__, 'steploop.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "xs = torch.randn(3, 2, 4, requires_grad=True)\n"
        "sl.Loop(sl.nn.GRUCell(4, 5), backend='eager')(xs)[0].sum().backward()\n"
        "assert False\n"
        "print(xs.grad.shape == xs.shape)\n"
    )
    ran = subprocess.run([sys.executable, "-OO", "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "True\n", ran.stderr
