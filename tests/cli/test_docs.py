"""The code in README and docs runs; what they point to is there."""

import collections
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import steploop as sl

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: p.name
)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.name == "legacy.md":
        write_tf1_checkpoint(Path("translate.npz"))
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    # One file name for the whole page: steploop reports lines of the page as the user's.
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


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


# What the README's table shows, made from real plans: `python tests/cli/test_docs.py` prints it.
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


def test_the_table_in_the_readme_is_what_the_plans_say():
    written = re.search(r"<!-- plan:begin.*?-->\n(.*?)\n<!-- plan:end -->", PAGES[0].read_text(), re.DOTALL)
    assert written.group(1) == table(), "to renew it: python tests/cli/test_docs.py"


if __name__ == "__main__":
    print(table())
