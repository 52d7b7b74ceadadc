"""The code in README and docs runs; what they point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: p.name
)
def test_python_of_a_page_runs_from_top_to_bottom(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    # One file name for the whole page: steploop reports lines of the page as the user's.
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})


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
            command = line.split()[:2] if line.startswith("train") else line.split()[:1]
            offered = steploop(*command, "--help").out
            for option in re.findall(r"--[a-z-]+", line):
                assert option in offered, f"{page.name}: steploop {line}"


def test_the_example_runs(steploop, capsys):
    ran = steploop("explain", ROOT / "examples" / "tagger.py")
    assert ran.code == 0, ran.err
    assert "tagger.py:" in ran.out
