"""Programs that torch.export saved: in another process, where their steps were never seen, they compute what the plain
loop does, values and gradients, at sizes of all kinds one after the other."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from export_cases import CASES, HIDDEN, INPUT, XS, Calls, Case, Cell, Flat, plain, sequences
from load_exports import check, gradients
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import steploop as sl
from steploop.compiler.traced_calls import exported

HERE = Path(__file__).parent


def export(case: Case) -> torch.export.ExportedProgram:
    with torch.set_grad_enabled(case.training):
        return torch.export.export(case.model, case.calls[0], dynamic_shapes=case.dynamic, strict=case.strict)


def expected(case: Case) -> list[dict]:
    """What the plain loop gives for the calls of a case. (In float64 for bfloat16, in which it would itself add up
    gradients with large errors.)"""
    model, low = plain(case.model), any(p.dtype == torch.bfloat16 for p in case.model.parameters())
    return [_expected_of(model.double() if low else model, inputs, case.training, low) for inputs in case.calls]


def _expected_of(model: nn.Module, inputs: tuple, training: bool, low: bool) -> dict:
    leaves, spec = pytree.tree_flatten(inputs)
    inner = [t.double() if low else t.clone() for t in leaves]
    inner = [t.requires_grad_() if t.is_floating_point() else t for t in inner]
    outputs = [o for o in pytree.tree_leaves(model(*pytree.tree_unflatten(inner, spec))) if o is not None]
    found = None
    if training:
        names: dict[torch.Tensor, list[str]] = {t: [str(i)] for i, t in enumerate(inner) if t.requires_grad}
        for name, weight in model.named_parameters(remove_duplicate=False):
            names.setdefault(weight, []).append(name)
        found = gradients(outputs, {" + ".join(all_of_it): t for t, all_of_it in names.items()})
        found = {name: value.bfloat16() if low else value for name, value in found.items()}
    outputs = [o.detach().bfloat16() if low and o.dtype == torch.float64 else o.detach() for o in outputs]
    return {"inputs": inputs, "outputs": outputs, "gradients": found}


def loaded(folder: Path) -> dict[str, str]:
    """What went wrong in another process with each program of a folder."""
    command = [sys.executable, HERE / "load_exports.py", folder]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, str]:
    """What went wrong with each case."""
    folder, found = tmp_path_factory.mktemp("exported"), {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        try:
            case = make()
            torch.save(expected(case), folder / f"{name}.pt")
            torch.export.save(export(case), folder / f"{name}.pt2")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return {**loaded(folder), **found}


@pytest.mark.parametrize("name", CASES)
def test_a_program_in_another_process(report, name):
    assert not report[name], report[name]


# -- what becomes of a program ---------------------------------------------------------------------------------


def reloaded(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def texts_of(program: torch.export.ExportedProgram) -> list[str]:
    return [n.args[1] for n in program.graph.nodes if n.target is torch.ops.steploop.loop.default]


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return export(small())


def small() -> Case:
    torch.manual_seed(0)
    return Case(Calls(sl.Loop(Flat(Cell()), backend="eager")), sequences(), XS)


def test_a_model_exported_twice_gives_one_text(program):
    assert texts_of(program) == texts_of(export(small()))


def test_decompositions_and_torch_compile(program):
    calls = expected(small())
    check(program.run_decompositions().module(), calls)
    compiled = torch.compile(program.module(), backend="aot_eager", dynamic=True)
    check(compiled, calls[:1] + calls[4:6])


@pytest.mark.long
def test_a_package_of_aotinductor_in_another_process(tmp_path):
    case = replace(small(), training=False)
    torch.save(expected(case), tmp_path / "package.pt")
    program = export(case)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    assert loaded(tmp_path) == {"package": ""}


def test_a_state_goes_from_one_call_to_the_next():
    case = CASES["a_state"]()
    module, (xs, state) = reloaded(export(case)), case.calls[0]
    whole, final = case.model(xs, state)
    first, between = module(xs[:2], state)
    second, found = module(xs[2:], dict(between))
    torch.testing.assert_close(torch.cat([first["h"], second["h"]]), whole["h"])
    torch.testing.assert_close(found["h"], final["h"])
    assert isinstance(found, sl.States)


def test_dropout_in_training_is_fresh_at_every_step_and_call():
    loop = sl.Loop(sl.nn.Dropout(0.5), backend="eager")
    module, xs = reloaded(torch.export.export(Calls(loop), (torch.ones(6, 4, 32),))), torch.ones(6, 4, 32)
    a, b = module(xs)[0], module(xs)[0]
    assert set(a.unique().tolist()) == {0.0, 2.0} and not torch.equal(a, b)
    assert not any(torch.equal(a[0], other) for other in a[1:])


# -- sizes and tensors that it does not hold for -----------------------------------------------------------------


class By(sl.Step):
    """Multiplies by what a function makes of one step's input."""

    def __init__(self, function: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.function, self.h = function, sl.State(init=0.0)

    def step(self, x):
        self.h.next = self.h.prev * 0.5 + x.sum(-1) * self.function(x)
        return self.h.next


LOOKS = {
    "one row or more": lambda x: 2.0 if x.shape[0] > 1 else 0.5,
    "a size as a number": lambda x: 1.0 / max(x.shape[0] - 1, 1),
    "features, one or more": lambda x: 2.0 if x.shape[-1] == 1 else 0.5,
    "features, few or many": lambda x: 2.0 if x.shape[-1] > 4 else 0.5,
    "features as a number": lambda x: float(x.shape[-1] ** 2),
    "a mean over rows": lambda x: x.mean(0).sum() + x.shape[-1],
    "another axis": lambda x: x.unflatten(-1, (x.shape[-1] // 2, 2)).sum((1, 2)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_size_that_a_step_looks_at_is_right_or_refused(look):
    model = Calls(sl.Loop(By(LOOKS[look]), backend="eager"))
    dynamic = ({0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO},)
    module = reloaded(torch.export.export(model, (torch.randn(4, 3, 6),), dynamic_shapes=dynamic))
    right = 0
    for sizes in [(4, 3, 6), (4, 1, 6), (1, 3, 6), (2, 2, 2), (3, 4, 1), (2, 1, 1), (2, 5, 3), (2, 2, 8), (4, 3, 6)]:
        xs = torch.randn(sizes)
        try:
            found = module(xs)[0]
        except (sl.InputError, AssertionError) as error:  # torch's own says which input, and why
            assert "exported" in str(error) or "Guard failed" in str(error), error
            continue
        torch.testing.assert_close(found, plain(model)(xs)[0], msg=lambda text, s=sizes: f"{s}: {text}")
        right += 1
    assert right >= 2


def test_other_tensors_are_refused(program):
    (text,) = texts_of(program)
    weights = [p.detach() for p in small().model.parameters()]

    def run(xs, h, weights):
        return torch.ops.steploop.loop([xs, h, *weights], text, *xs.shape[:2])

    xs, h = torch.randn(5, 3, 2), torch.zeros(3, 3)
    assert len(run(xs, h, weights)) == 2
    for wrong in [
        (torch.randn(5, 3, 4), h, weights), (xs, torch.zeros(4, 3), weights), (xs, h, weights[::-1]),
        (xs.double(), h, weights), (xs, h.int(), weights),
    ]:  # fmt: skip
        with pytest.raises(sl.InputError, match="other tensors than it is given"):
            run(*wrong)


def test_gradients_that_were_not_exported():
    case = small()
    values = reloaded(export(replace(case, training=False)))
    for weight in values.parameters():
        weight.requires_grad_()
    with pytest.raises(sl.UnsupportedError, match="exported for values only"):
        values(*case.calls[0])[0].sum().backward()
    case.model.loop.step.cell.w.bias.requires_grad_(False)
    frozen = reloaded(export(case))
    frozen.get_parameter("loop.step.cell.w.bias").requires_grad_()
    with pytest.raises(sl.UnsupportedError, match="requires a gradient that was not exported"):
        frozen(*case.calls[0])[0].sum().backward()


# -- damaged and hostile texts -----------------------------------------------------------------------------------


def packed(data: Any) -> str:
    """Data as a text with a right digest."""
    content = zlib.compress(data if isinstance(data, bytes) else json.dumps(data).encode())
    return f"steploop-loop 1 {hashlib.sha256(content).hexdigest()[:32]} {base64.b64encode(content).decode()}"


def unpacked(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text.split(" ")[3])))


def test_a_damaged_text(program):
    (text,) = texts_of(program)
    assert exported(packed(unpacked(text))).trace.graph.xs
    random = Random(0)
    for at in [*range(20), *random.sample(range(len(text)), 150)]:
        changed = text[:at] + chr(ord(text[at]) ^ (1 << random.randrange(7))) + text[at + 1 :]
        with pytest.raises((sl.DataError, sl.UnsupportedError), match="export"):
            exported(changed)
    for cut in ["", text[:10], text[:60], text[:-1], text[:-40], text + "=", text + " ", text * 2]:
        with pytest.raises(sl.DataError, match="copy its file whole"):
            exported(cut)


def changes(data: dict) -> Iterator[tuple[str, dict]]:
    """Data that no export wrote, and where they differ."""

    def change(where: str, *path: Any, to: Any) -> tuple[str, dict]:
        changed = part = copy.deepcopy(data)
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = to
        return f"{where}: {to!r}"[:80], changed

    for name in [
        "__import__", "os.system.default", "builtins.eval.default", "aten.no_such_thing.default", "aten.add_.Tensor",
        "aten.add", "aten.__class__.mro", "load_library.x.y", "aten.add.Tensor; import os", "steploop.loop.default",
        "aten.__dict__.keys", None, 3, ["aten", "add", "Tensor"],
    ]:  # fmt: skip
        yield change("operator", "graph", "calls", 0, 0, to=name)
    for size in [
        ["__import__", "os"], ["eval", "1"], ["Pow", 10, ["Pow", 10, 10]], ["Pow", 10, 10**10], ["Lambda", "s0", 1],
        ["PowByNatural", 2, 1 << 40], 10**30, "os", "__import__('os')", [], {}, 1.5, None, -4, [["Add"], 1],
    ]:  # fmt: skip
        yield change("size", "graph", "inputs", 0, 1, 0, to=size)
        yield change("condition", "conditions", to=[size])
    for argument in [{"node": 10**6}, {"node": -1}, {"node": "x"}, {"dtype": "load"}, {"eval": "1"}, {"size": "os"},
                     {"device": "nowhere"}, {"loop": 0}, {"float": "__import__"}, {}]:  # fmt: skip
        yield change("argument", "graph", "calls", 0, 1, 0, to=argument)
    for name in ["__import__('os')", "a b", "x\ny", "", None]:
        yield change("input", "graph", "inputs", 0, 0, to=name)
    for line in ["a\n#include <evil>", "a\\\nb", None]:
        yield change("line", "graph", "lines", 0, to=line)
        yield change("state", "facts", "state_names", 0, to=line)
    yield change("option", "options", "backend", to="os")
    yield change("option", "options", "on_masked", to="never")
    yield change("option", "options", "more", to=1)
    yield change("layout", "layout", "xs", to=7)
    yield change("role", "graph", "roles", "outputs", to=[10**6])
    yield change("role", "graph", "roles", "nexts", to=[])
    yield change("role", "graph", "roles", "grad_captured", to=[0])
    for key in data:
        if key != "made by":
            yield key, {k: v for k, v in data.items() if k != key}


def test_hostile_texts(program, monkeypatch):
    (text,) = texts_of(program)
    data = unpacked(text)
    for where, changed in [*changes(data), *((repr(d), d) for d in (None, [], 3, "x", {"text": text[:-1]}))]:
        try:
            exported(packed(changed))
        except sl.DataError:
            continue
        pytest.fail(f"it is read: {where}")
    with pytest.raises(sl.DataError):
        exported(packed(b"[" * 100_000))
    monkeypatch.setattr("steploop.compiler.exported._LARGEST", 1 << 16)
    with pytest.raises(sl.DataError, match="much too large"):
        exported(packed(b'"' + b"a" * (1 << 20) + b'"'))


def test_another_format(program):
    (text,) = texts_of(program)
    with pytest.raises(sl.UnsupportedError, match="another format"):
        exported(text.replace("steploop-loop 1", "steploop-loop 2", 1))


# -- what can't hold a loop ------------------------------------------------------------------------------------


def models() -> dict[str, nn.Module]:
    return {
        "loop": sl.Loop(Flat(Cell())), "step": Flat(Cell()), "in a model": Calls(sl.Loop(Flat(Cell()))),
        "lstm": Calls(sl.nn.LSTM(INPUT, HIDDEN)), "both": sl.nn.Bidirectional(Flat(Cell()), Flat(Cell())),
        "memory": sl.memory.CumSum(),
    }  # fmt: skip


OTHERS = {
    "torch.jit.script": lambda model, xs: torch.jit.script(model),
    "torch.jit.trace": lambda model, xs: torch.jit.trace(model, (xs,)),
    "torch.onnx, TorchScript": lambda model, xs: torch.onnx.export(model, (xs,), io.BytesIO(), dynamo=False),
    "torch.fx": lambda model, xs: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", OTHERS)
def test_what_cannot_hold_a_loop_says_so(way):
    for name, model in models().items():
        try:
            OTHERS[way](model, torch.randn(5, 3, INPUT))
        except sl.SteploopError as error:
            assert "torch.export.export" in str(error), (name, error)
            continue
        pytest.fail(f"{name}: no error")


@pytest.mark.filterwarnings("ignore")
def test_onnx_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(sl.UnsupportedError, match="ONNX has no operator that runs a Loop"):
        export(small())
