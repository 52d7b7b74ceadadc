"""The code in README and docs runs; what they point to is there; the site builds without a warning."""

import collections
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import steploop as sl
from steploop import dispatch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# How the code of a page runs. Most of the time would go into compiling, so only the first two pages have native loops,
# and these, whose many loops are of kinds that the oracle tests compare with the plain loop anyway, run by that one.
# The others are captured and run without native code. `--long`: all of them run as they would for a reader.
NATIVE = {"README.md", "start.md"}
PLAIN = {
    "attention.md", "legacy.md", "memory.md", "search.md", "steps.md", "porting/returnn.md", "porting/torch-nn.md",
    "porting/torchrl.md", "tasks/rl.md", "tasks/search.md", "tasks/speech.md",
}  # fmt: skip


def name_of(page: Path) -> str:
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).as_posix()


@pytest.mark.filterwarnings("ignore:steploop runs loops without native code")
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if not request.config.getoption("--long"):
        if name_of(page) not in NATIVE:
            monkeypatch.setenv("STEPLOOP_CXX", "no-compiler-for-pages")
        if name_of(page) in PLAIN:
            run_by_the_plain_loop(monkeypatch)
    if page.name == "legacy.md":
        write_tf1_checkpoint(Path("translate.npz"))
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    # One file name for the whole page: steploop reports lines of the page as the user's.
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})


def run_by_the_plain_loop(monkeypatch):
    run = dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda program, call, *_: run(program, call, "reference"))
    monkeypatch.setattr(dispatch, "stream_step", lambda *_: None)


def write_tf1_checkpoint(path):
    """What the TF1 script of docs/legacy.md saves: two layers of 32 units, 40 and 30 labels, embeddings of 16."""
    scope = "embedding_attention_seq2seq"
    decoder = f"{scope}/embedding_attention_decoder/attention_decoder"
    shapes = {
        f"{scope}/rnn/embedding_wrapper/embedding": (40, 16),
        f"{scope}/embedding_attention_decoder/embedding": (30, 16),
        f"{decoder}/kernel": (16 + 32, 16), f"{decoder}/bias": (16,),
        f"{decoder}/AttnW_0": (1, 1, 32, 32), f"{decoder}/AttnV_0": (32,),
        f"{decoder}/Attention_0/kernel": (2 * 32, 32), f"{decoder}/Attention_0/bias": (32,),
        f"{decoder}/output_projection_wrapper/kernel": (32, 30), f"{decoder}/output_projection_wrapper/bias": (30,),
        f"{decoder}/AttnOutputProjection/kernel": (30 + 32, 30), f"{decoder}/AttnOutputProjection/bias": (30,),
    }  # fmt: skip
    for cells in (f"{scope}/rnn/embedding_wrapper", f"{decoder}/output_projection_wrapper"):
        for layer, inputs in enumerate((16, 32)):
            gru = f"{cells}/multi_rnn_cell/cell_{layer}/gru_cell"
            shapes |= {f"{gru}/gates/kernel": (inputs + 32, 64), f"{gru}/gates/bias": (64,)}
            shapes |= {f"{gru}/candidate/kernel": (inputs + 32, 32), f"{gru}/candidate/bias": (32,)}
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape, dtype=np.float32) * 0.1 for name, shape in shapes.items()}
    slots = {f"{name}/{slot}": array for name, array in arrays.items() for slot in ("Adam", "Adam_1")}
    np.savez(path, **arrays, **slots, beta1_power=0.9, beta2_power=0.99, global_step=7)


def test_the_conversion_in_the_docs_works(steploop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tf1_checkpoint(Path("translate.npz"))
    (line,) = re.findall(r"^steploop (convert tf1 .*)$", (ROOT / "docs" / "legacy.md").read_text(), re.MULTILINE)
    ran = steploop(*shlex.split(line))
    assert ran.code == 0, ran.err
    assert Path("translate.safetensors").exists() and "EmbeddingAttentionSeq2Seq" in ran.out


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_menu():
    """Each page of docs/, and each notebook, is named once in mkdocs.yml; and nothing else is."""
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r"([\w./-]+\.md)\b", re.sub(r"#.*", "", menu))
    made = [page.relative_to(DOCS).with_suffix(".md").as_posix() for page in DOCS.rglob("*.ipynb")]
    assert sorted(named) == sorted([*map(name_of, PAGES[1:]), *made])


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -c constraints.txt -e '.[docs]'")
    # Not --quiet: it hides warnings from --strict as well.
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "site"
    for page in ("start.html", "porting/returnn.html", "notebooks/start.html", "source/examples/recall.html"):
        assert (site / page).exists(), page
    api = (site / "api" / "core.html").read_text()
    assert "last_output" in api and "PreparedScan" not in api


def test_commands_exist(steploop):
    for page in PAGES:
        for command in re.findall(r"^\s*steploop (\w+(?: charlm)?)", page.read_text(), re.MULTILINE):
            ran = steploop(*command.split(), "--help")
            assert ran.code == 0, f"{page.name}: steploop {command}"


def test_options_exist(steploop):
    """Each option that a page shows for a command is one of that command's."""
    for page in PAGES:
        for line in re.findall(r"steploop (\w+[^\n`]*?--[^\n`#]*)", page.read_text()):
            command = line.split()[: 2 if line.startswith(("train", "convert", "evaluate")) else 1]
            offered = steploop(*command, "--help").out
            for option in re.findall(r"--[a-z-]+", line):
                assert option in offered, f"{page.name}: steploop {line}"


def test_the_example_runs(steploop, capsys):
    ran = steploop("explain", ROOT / "examples" / "tagger.py")
    assert ran.code == 0, ran.err
    assert "tagger.py:" in ran.out


# What the README's tables show, made from real plans and docs/benchmarks.md; to renew: python tests/cli/test_docs.py
def shown() -> dict:
    sys.path.insert(0, str(ROOT / "examples"))
    from tagger import Tagger

    return {
        "`Tagger` above": Tagger(8, 32, 5),
        "`sl.nn.GRUCell`": sl.nn.GRUCell(8, 32),
        "`sl.nn.LSTMCell`": sl.nn.LSTMCell(8, 32),
        "`sl.nn.LayerNormLSTMCell`": sl.nn.LayerNormLSTMCell(8, 32),
        "2 GRU cells in a `Stack`": sl.nn.Stack(sl.nn.GRUCell(8, 32), sl.nn.GRUCell(32, 32)),
    }


# They compute nothing: another view of the same numbers, or a copy.
VIEWS = {
    "t",
    "view",
    "slice",
    "split",
    "cat",
    "expand",
    "unsqueeze",
    "squeeze",
    "permute",
    "transpose",
    "select",
}


def names(ops) -> str:
    counts = collections.Counter(op.name for op in ops if op.name not in VIEWS)
    return ", ".join(name + (f" x{count}" if count > 1 else "") for name, count in counts.items()) or "-"


def table() -> str:
    lines = [
        "| step | | in a loop, step by step | out of it, all steps at once |",
        "| --- | --- | --- | --- |",
    ]
    for name, step in shown().items():
        forward = sl.Loop(step, backend="eager").plan(torch.randn(20, 4, 8))
        for way, plan in (("forward", forward), ("backward", forward.backward)):
            inside = "; ".join(names(loop.ops) for loop in plan.loops)
            outside = names([*plan.before, *plan.after])
            lines.append(f"| {name if way == 'forward' else ''} | {way} | {inside} | {outside} |")
    return "\n".join(lines)


def benchmarks() -> dict[str, dict[str, list[str]]]:
    """The tables of docs/benchmarks.md: by heading and by the first cell of a row, the other cells without ratios."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in (ROOT / "docs" / "benchmarks.md").read_text().splitlines():
        if line.startswith("## "):
            rows = found[line[3:]] = {}
        elif line.startswith("| ") and found:
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[first] = [re.sub(r" \([\d.]+\)$", "", cell) for cell in cells]
    return found


# What the README shows of it: its own words, the heading there, the column, and who is in the row.
PEERS = ("steploop", "eager loop", "torch.nn", "JAX scan")
NUMBERS = [
    ("LSTM", "LSTM", 1, PEERS),
    ("a user's LSTM with peepholes, GELU and a third state", "A step that nobody wrote as a layer", 1, PEERS),
    ("a user's layer-norm LSTM with resets", "User-written layer-norm LSTM with resets", 1, PEERS),
    ("a decoder with attention and input feeding", "Attention decoder with input feeding", 1, PEERS),
    ("LSTM, lengths between 1 and T (torch.nn: padded)", "Ragged batches", 1, ("steploop", "", "torch.nn, padded", "")),
    ("one step of an LSTM as a stream, B=1", "One streamed step", 0, ("steploop", "", "torch.nn.LSTMCell", "JAX scan")),
]


def numbers() -> str:
    known = benchmarks()
    lines = ["| | steploop | Python loop | torch.nn | JAX scan |", "| --- | ---: | ---: | ---: | ---: |"]
    for words, heading, column, row in NUMBERS:
        cells = [known[heading][peer][column] if peer and peer in known[heading] else "" for peer in row]
        lines.append(f"| {words} | **{cells[0]}** | {' | '.join(cells[1:])} |")
    return "\n".join(lines)


MADE = {"plan": table, "numbers": numbers}


def marked(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- {name}:begin.*?-->\n)(.*?)(<!-- {name}:end -->)", re.DOTALL)


@pytest.mark.parametrize("name", MADE)
def test_the_tables_in_the_readme_are_what_plans_and_benchmarks_say(name):
    written = marked(name).search(PAGES[0].read_text())
    assert written.group(2).rstrip("\n") == MADE[name](), "to renew it: python tests/cli/test_docs.py"


if __name__ == "__main__":
    text = PAGES[0].read_text()
    for name, made in MADE.items():
        text = marked(name).sub(lambda found, made=made: f"{found[1]}{made()}\n{found[3]}", text)
    PAGES[0].write_text(text)
