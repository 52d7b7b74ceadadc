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

import steploop as sl
from steploop.backends import cpu
from steploop.backends.cpu import build as building
from steploop.backends.native import cache as keeping
from steploop.compiler import capture_store
from steploop.errors import BuildError

TEXT = 'extern "C" __attribute__((visibility("default"))) int answer() {{ return {}; }}\n'
_count = 0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for every test."""
    monkeypatch.setenv("STEPLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "_libraries", {})
    building._trial.cache_clear()
    keeping._warn_once.cache_clear()
    yield tmp_path / "cache"
    building._trial.cache_clear()  # other files' tests find what this machine can do


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
    building._libraries.clear()
    assert building.build(text).answer() == wanted
    assert library.stat().st_mtime_ns == before
    assert not list(cache.glob(".build-*"))


DAMAGES = {
    "empty": lambda whole: b"",
    "first page": lambda whole: whole[:4096],
    "half": lambda whole: whole[: len(whole) // 2],
    "one byte less": lambda whole: whole[:-1],
    "one bit": lambda whole: whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
    "no library": lambda whole: b"half a library",
    "longer": lambda whole: whole + b"more",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_library_is_built_anew(cache, damage):
    text, wanted = fresh()
    building.build(text)
    (library,) = cache.glob("*.so")
    replace_file(library, DAMAGES[damage](library.read_bytes()))
    assert answer_elsewhere(text) == wanted
    assert ctypes.CDLL(str(library)) and keeping.is_whole(library)


def test_another_library_is_built_anew(cache):
    (text, wanted), (other, _) = fresh(), fresh()
    building.build(text)
    (library,) = cache.glob("*.so")
    building.build(other)
    (another,) = set(cache.glob("*.so")) - {library}
    replace_file(library, another.read_bytes())
    assert answer_elsewhere(text) == wanted


@pytest.mark.parametrize("change", ["no hash", "binary hash", "link", "open to others"])
def test_a_library_that_may_not_be_ours_is_built_anew(cache, tmp_path, change):
    text, wanted = fresh()
    building.build(text)
    (library,) = cache.glob("*.so")
    if change == "no hash":
        library.with_suffix(".sha256").unlink()
    elif change == "binary hash":
        library.with_suffix(".sha256").write_bytes(b"\xff\xfe")
    elif change == "link":
        elsewhere = tmp_path / "elsewhere.so"
        os.replace(library, elsewhere)
        library.symlink_to(elsewhere)
    else:
        library.chmod(0o666)
    before = library.lstat().st_ino
    assert answer_elsewhere(text) == wanted
    assert library.lstat().st_ino != before and keeping.is_whole(library)


def replace_file(path, data: bytes) -> None:
    """Another file of this name: the one that was there may be mapped into this process."""
    replacement = path.with_name("replacement")
    replacement.write_bytes(data)
    os.replace(replacement, path)


def answer_elsewhere(text: str) -> int:
    """What a new process gets of a kernel."""
    script = "import sys; from steploop.backends.cpu.build import build; print(build(sys.argv[1]).answer())"
    done = subprocess.run([sys.executable, "-c", script, text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


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
    assert len(list(cache.glob(".build-*"))) == 1
    assert building.build(text).answer() == wanted
    assert not list(cache.glob(".build-*"))


def test_a_build_under_way_is_left_alone(cache):
    assert keeping.is_safe(cache)
    with keeping.building_in(cache) as work:
        building.build(fresh()[0])
        assert work.exists()
        os.utime(work, (0, 0))  # a folder of so long ago belongs to no build, whatever locks say
        building.build(fresh()[0])
        assert not work.exists()


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
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert not keeping.is_safe(cache)


def plant(cache, text: str, number: int):
    """Puts a library with another answer, and a hash that fits it, where that of `text` is looked for."""
    building.build(text)
    (library,) = cache.glob("*.so")
    building.build(TEXT.format(number))
    (planted,) = set(cache.glob("*.so")) - {library}
    replace_file(library, planted.read_bytes())
    library.with_suffix(".sha256").write_bytes(planted.with_suffix(".sha256").read_bytes())
    building._libraries.clear()
    return library


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702, 0o1777])
def test_folder_open_to_others_is_not_used(cache, mode):
    text, wanted = fresh()
    library = plant(cache, text, 1000 + mode)
    planted = library.read_bytes()
    cache.chmod(mode)
    with pytest.warns(UserWarning, match="others may write to it.*STEPLOOP_CACHE"):
        assert building.build(text).answer() == wanted
    assert stat.S_IMODE(cache.stat().st_mode) == mode and library.read_bytes() == planted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert building.build(fresh()[0])


def test_a_link_to_a_folder_is_followed_if_it_is_ours(cache, tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    cache.symlink_to(real)
    building.build(fresh()[0])
    assert list(real.glob("*.so"))


def test_no_folder_of_its_own_where_the_cache_works(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping.tempfile, "tempdir", str(tmp_path))
    keeping._own_folder.cache_clear()
    building.build(fresh()[0])
    assert not list(tmp_path.glob("steploop-*"))


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


class Sums(sl.Step):
    """A loop that is known as a whole: it runs as it stands only where there are resets."""

    def __init__(self):
        super().__init__()
        self.total = sl.State(3)

    def step(self, x):
        self.total.next = self.total.prev + x
        return self.total.next


@pytest.fixture
def no_luck(monkeypatch):
    """No kernel of a loop can be built, though others can."""
    compile = building._compile

    def failing(source, library, using):
        if "steploop_run" in source.read_text():
            raise BuildError("no luck today")
        compile(source, library, using)

    monkeypatch.setattr(building, "_compile", failing)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_kernel_that_can_not_be_built(backend, no_luck):
    loop, xs = sl.Loop(Sums(), backend=backend), torch.randn(5, 2, 3)
    resets = torch.rand(5, 2) < 0.4
    if backend == "cpu":
        with pytest.raises(BuildError, match="no luck"):
            loop(xs, resets=resets)
    else:
        expected, _ = sl.Loop(Sums(), backend="reference")(xs, resets=resets)
        with pytest.warns(UserWarning, match="runs without native code") as caught:
            torch.testing.assert_close(loop(xs, resets=resets)[0], expected)
        assert [w.filename for w in caught if "native" in str(w.message)] == [__file__]


def test_a_plan_says_that_a_kernel_could_not_be_built(no_luck):
    """Also where the loop took in what stands around it, and another program than the plan's was to be built."""
    loop, xs = sl.Loop(sl.nn.LayerNormLSTMCell(3, 19)), torch.randn(5, 2, 3)
    with pytest.warns(UserWarning, match="runs without native code"):
        loop(xs)
    planned = loop.plan(xs).loops[0]
    assert planned.backend == "eager"
    assert any("no luck today" in reason for reason in planned.reasons)


class Halves(sl.Step):
    """Ends by itself; also a model of labels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.h, self.done = sl.State(3), sl.State(init=False, dtype=torch.bool)

    def step(self, x):
        self.h.next = torch.tanh(self.h.prev @ self.weight + x.unsqueeze(1))
        self.done.next = self.done.prev
        return self.h.next


FIRST_CALLS = {
    "a loop": lambda step: sl.Loop(step)(torch.randn(4, 2)),
    "a loop that ends by itself": lambda step: sl.Loop(step, until="done")(torch.randn(4, 2)),
    "a stream": lambda step: sl.Loop(step).stream(2)(torch.randn(2)),
    "a search": lambda step: sl.search.greedy(step, start=1, end=0, max_steps=3, batch_size=2),
    "a scan": lambda step: sl.scan(lambda h, x: (torch.tanh(h + x), h), torch.randn(2, 3), torch.randn(4, 2, 3)),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", list(FIRST_CALLS))
def test_what_no_kernel_can_do_without_is_begun_before_a_step_is_captured(name, gradients, monkeypatch):
    """The libraries of products are built while Python traces the step."""
    before = capture_store.captured
    at = []
    monkeypatch.setattr(cpu.Cpu, "prepare", lambda self, dtypes: at.append(capture_store.captured))
    with torch.set_grad_enabled(gradients):
        FIRST_CALLS[name](Halves())
    assert at and at[0] == before
