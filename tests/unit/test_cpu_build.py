"""Building and keeping kernels: whatever happens to cache or compiler, nothing wrong is ever loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import warnings

import pytest
import torch
from cpu_loops import assert_same, make_case

from steploop.backends import cpu
from steploop.backends.cpu import build as building
from steploop.errors import BuildError

TEXT = 'extern "C" __attribute__((visibility("default"))) int answer() {{ return {}; }}\n'
_count = 0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for every test."""
    monkeypatch.setenv("STEPLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "_loaded", {})
    building._trial.cache_clear()
    return tmp_path / "cache"


def fresh() -> tuple[str, int]:
    """A kernel nobody built before, and its answer."""
    global _count
    _count += 1
    return TEXT.format(_count), _count


def compiler_that(tmp_path, monkeypatch, body: str, name: str = "cxx"):
    """A compiler that does `body` first; "$@" are its arguments."""
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("STEPLOOP_CXX", str(path))
    return path


def small_case():
    def step(xs, constants, states):
        return [states[0].clone()], [(states[0] * 0.5 + xs[0]).tanh()]

    return make_case(step, [torch.randn(4, 5, 20)], [torch.randn(5, 20)])


def test_kept_and_private(cache):
    text, wanted = fresh()
    assert building.build(text).answer() == wanted
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (library,) = cache.glob("*.so")
    before = library.stat().st_mtime_ns
    building._loaded.clear()
    assert building.build(text).answer() == wanted
    assert library.stat().st_mtime_ns == before
    assert not list(cache.glob(".build-*"))


def test_damaged_library_is_built_anew(cache):
    text, wanted = fresh()
    building.build(text)
    (library,) = cache.glob("*.so")
    replacement = cache / "replacement"
    replacement.write_bytes(b"half a library")
    os.replace(replacement, library)
    building._loaded.clear()
    assert building.build(text).answer() == wanted
    assert ctypes.CDLL(str(library))


def test_killed_build_leaves_nothing_that_is_loaded(cache, tmp_path, monkeypatch):
    text, wanted = fresh()
    script = (
        "import sys, os; from steploop.backends.cpu import build as b\n"
        "real = b._compile\n"
        "def killed(source, library, using): library.write_bytes(b'half'); os._exit(9)\n"
        "b._compile = killed\n"
        "b.build(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, text], env=os.environ)
    assert done.returncode == 9 and not list(cache.glob("*.so"))
    assert building.build(text).answer() == wanted


def test_two_processes_at_once(cache):
    text, wanted = fresh()
    script = "import sys; from steploop.backends.cpu.build import build; print(build(sys.argv[1]).answer())"
    both = [subprocess.Popen([sys.executable, "-c", script, text], stdout=subprocess.PIPE) for _ in range(2)]
    assert [int(p.communicate()[0]) for p in both] == [wanted] * 2
    assert len(list(cache.glob("*.so"))) == 1 and not list(cache.glob(".build-*"))


def test_folder_that_can_not_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEPLOOP_CACHE", str(tmp_path / "file" / "cache"))
    text, wanted = fresh()
    assert building.build(text).answer() == wanted


def test_folder_of_somebody_else(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not building._private(cache)


def test_folder_open_to_others_is_closed(cache):
    cache.mkdir()
    cache.chmod(0o777)
    building.build(fresh()[0])
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_full_folder(cache, tmp_path, monkeypatch):
    real = shutil.which("g++") or shutil.which("c++")
    body = f'case "$*" in *{cache}*) echo "No space left on device" >&2; exit 1;; esac\nexec {real} "$@"'
    compiler_that(tmp_path, monkeypatch, body)
    text, wanted = fresh()
    assert building.build(text).answer() == wanted
    assert not list(cache.glob("*.so"))


def test_another_compiler_builds_anew(cache, tmp_path, monkeypatch):
    real = shutil.which("g++") or shutil.which("c++")
    text, wanted = fresh()
    building.build(text)
    version = 'case "$1" in --version) echo "another compiler 99"; exit 0;; esac'
    compiler_that(tmp_path, monkeypatch, f'{version}\nexec {real} "$@"')
    assert building.build(text).answer() == wanted
    assert len(list(cache.glob("*.so"))) == 2


@pytest.mark.parametrize("arch", ["-march=x86-64", "-march=haswell", "-march=no-such-cpu"])
def test_other_cpus(arch, monkeypatch):
    if arch == "-march=haswell" and "avx2" not in building.cpu():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setenv("STEPLOOP_ARCH", arch)
    assert_same(small_case(), rtol=1e-5, atol=1e-6)


def test_products_without_avx512(monkeypatch):
    import test_cpu_loops

    monkeypatch.setenv("STEPLOOP_ARCH", "-march=x86-64")
    assert_same(test_cpu_loops.lstm(37, batch=11), test_cpu_loops.lengths_of(11), rtol=1e-5, atol=1e-5)


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("STEPLOOP_CXX", "no-such-compiler")
    cpu._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="without native code"):
        ((reason, _),) = cpu.reasons_against(small_case().loop)
    assert "no-such-compiler" in reason and "install" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.reasons_against(small_case().loop)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
        building.build(fresh()[0])
    assert "install" in cpu.doctor()["compiler"]


def test_compiler_that_can_not_compile(tmp_path, monkeypatch):
    body = 'case "$1" in --version) echo broken 1; exit 0;; esac\necho "no headers" >&2; exit 1'
    compiler_that(tmp_path, monkeypatch, body)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ((reason, _),) = cpu.reasons_against(small_case().loop)
    assert "could not compile" in reason and "no headers" in reason


def test_doctor():
    told = cpu.doctor()
    assert told["builds"] == "yes" and told["cache"] == str(building.folder())
    assert "-O3" in told["flags"] and told["compiler"] and told["threads"]
