"""A hook of mkdocs: pages of the site that are no files in docs/.

Where a page links to a file of the repository outside docs/, the site gets a page that shows the file. In docs/ the
link is what it is on disk, `../examples/tagger.py`; on the site it leads to `source/examples/tagger.md`. A link to a
file that is not there is left as it is, so that mkdocs warns of it.

Each notebook becomes a page beside it, without outputs; the notebook itself can be downloaded.
"""

import json
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
LANGUAGES = {".py": "python", ".sh": "sh", ".json": "json", ".toml": "toml"}


def _outside(target: str, folder: Path) -> Path | None:
    """The file of the repository that a link from `folder` leads to, as a path from the root; None inside docs/."""
    path = (folder / target).resolve()
    if path.is_relative_to(DOCS) or not path.is_relative_to(ROOT) or not path.is_file():
        return None
    return path.relative_to(ROOT)


def _page_of(source: Path) -> str:
    return f"source/{source.with_suffix('.md')}"


def _shown(source: Path) -> str:
    text = (ROOT / source).read_text()
    if source.suffix == ".md":
        return text
    return f"# {source}\n\n````{LANGUAGES.get(source.suffix, 'text')}\n{text}````\n"


def _read(notebook: Path) -> str:
    """A notebook as Markdown. Links between notebooks lead to their pages."""
    name = notebook.name
    shown = [f"Download: <a href='{name}' download>{name}</a>"]
    for cell in json.loads(notebook.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            shown.append(f"```python\n{text}\n```")
        else:
            shown.append(text.replace(".ipynb)", ".md)"))
    shown[0], shown[1] = shown[1], shown[0]  # the title first
    return "\n\n".join(shown) + "\n"


def on_files(files, config):
    for notebook in sorted(DOCS.rglob("*.ipynb")):
        page = notebook.relative_to(DOCS).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=_read(notebook)))
    sources = set()
    for file in [file for file in files.documentation_pages() if not file.generated_by]:
        page = DOCS / file.src_uri
        found = (_outside(match[2], page.parent) for match in LINK.finditer(page.read_text()))
        sources |= {source for source in found if source is not None}
    for source in sorted(sources):
        made = File.generated(config, _page_of(source), content=_shown(source))
        made.inclusion = made.inclusion.NOT_IN_NAV
        files.append(made)
    return files


def on_page_markdown(markdown, page, config, files):
    folder = (DOCS / page.file.src_uri).parent

    def renamed(match):
        source = _outside(match[2], folder)
        if source is None:
            return match[0]
        here = Path(page.file.src_uri).parent
        return match[1] + Path(os.path.relpath(_page_of(source), here)).as_posix()

    return LINK.sub(renamed, markdown)
