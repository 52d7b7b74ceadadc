"""The page of a plan, in a browser: it renders, its console is empty, clicks and keys work, names are only names."""

from __future__ import annotations

import html
import json
import linecache
import re
import shutil
import subprocess

import pytest
import torch

import steploop as sl

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")

HOSTILE = '"><img src=x onerror="hacked=1"><script>hacked=1</script>'
SOURCE = """\
import torch
from torch import nn
import steploop as sl

class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4 + 5, 5), nn.Linear(5, 2)
        self.h = sl.State(5)
        setattr(self, NAME, sl.State(5))

    def step(self, x):
        '''</script><script>hacked=1</script> &lt;'''
        mixed = self.mix(torch.cat([x, self.h.prev], -1))   # <img src=x onerror="hacked=1">
        self.h.next = torch.tanh(mixed)
        getattr(self, NAME).next = getattr(self, NAME).prev * 0.5 + self.h.next
        return self.head(self.h.next) + getattr(self, NAME).next[:, :2]
"""


@pytest.fixture(scope="module")
def page():
    """The page of a step whose class, file and state have hostile names; with times."""
    name = HOSTILE.replace(".", "")
    file = f"/somewhere/{HOSTILE.replace('/', '')}.py"
    linecache.cache[file] = (len(SOURCE), None, SOURCE.splitlines(True), file)
    scope = {"__name__": "made", "NAME": name}
    exec(compile(SOURCE, file, "exec"), scope)
    scope["Cell"].__name__ = HOSTILE
    return sl.Loop(scope["Cell"](), backend="eager").profile(torch.randn(6, 3, 4)).to_dict()


def browse(text, tmp_path, script):
    """What a script finds in a page: it puts keys and values into `found`. The page's own errors are added."""
    before = """<script>var found = {}, errors = [];
        addEventListener("error", e => errors.push(String(e.message)), true);
        for (const kind of ["error", "warn"]) console[kind] = (...told) => errors.push(told.join(" "));</script>"""
    after = f"""<script>try {{ {script} }} catch (error) {{ errors.push(String(error)); }}
        found.errors = errors; found.hacked = typeof hacked;
        document.body.innerHTML = ""; document.body.textContent = "RESULT" + JSON.stringify(found) + "END";</script>"""
    path = tmp_path / "page.html"
    head = "<!doctype html><html lang=en><meta charset=utf-8>"
    assert text.startswith(head)
    path.write_text(text.replace(head, head + before, 1).replace("</html>", after + "</html>"), encoding="utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    ran = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    told = re.search(r"RESULT(.*)END", ran.stdout, re.DOTALL)
    assert told, ran.stdout[-2000:] + ran.stderr[-2000:]
    return json.loads(html.unescape(told.group(1)))


def rendered(page):
    from steploop.view.page import render

    return render(page)


@in_a_browser
def test_it_renders_and_clicks_light_up_both_sides(page, tmp_path):
    found = browse(
        rendered(page),
        tmp_path,
        """
        const one = (selector) => document.querySelector(selector), all = (s) => [...document.querySelectorAll(s)];
        const hot = (kind) => all(`#forward ${kind}.hot`).map((e) => e.dataset.at);
        const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility === "visible";
        const line = (text) => all("#forward .ln[data-at]").find((e) => e.textContent.includes(text));
        found.lanes = all("#forward .lane > h2").filter(shown).map((e) => e.firstChild.textContent);
        found.cards = all("#forward .lane").map((lane) => lane.querySelectorAll(".card").length);
        const marks = (e) => [...e.querySelectorAll(".on")].map((i) => i.className);
        found.coloured = all("#forward .ln[data-at]").map(marks);
        found.dark = getComputedStyle(document.body).backgroundColor;

        const card = one("#forward .lane.before .card"), more = card.querySelector(".more");
        card.dispatchEvent(new MouseEvent("mouseenter"));
        found.hovered = hot(".ln");
        card.dispatchEvent(new MouseEvent("mouseleave"));
        found.left = [...hot(".ln"), ...hot(".card")];
        found.folded = shown(more);
        card.click();
        card.dispatchEvent(new MouseEvent("mouseleave"));
        found.clicked = hot(".ln");
        found.unfolded = shown(more);
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
        found.escaped = [...hot(".ln"), ...hot(".card")];

        line("mixed = ").click();
        found.of_the_line = all("#forward .card.hot").map((e) => e.closest(".lane").classList[1]);
        line("mixed = ").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
        found.released = hot(".card");

        found.first = [shown(one("#forward")), shown(one("#backward"))];
        all(".tabs button")[1].click();
        found.second = [shown(one("#forward")), shown(one("#backward"))];
        found.times = all(".bar i").length;
        one(".theme").click();
        found.other = getComputedStyle(document.body).backgroundColor;
        found.scripts = document.scripts.length; found.images = document.images.length;
        found.title = document.title; found.heading = one("h1").textContent;
        found.state = all("#forward .states code").map((e) => e.textContent);
        found.summaries = all("#forward .source summary").map((e) => e.textContent);
        found.network = all("link, img, iframe, [src]").length;
        """,
    )
    assert found["errors"] == [] and found["hacked"] == "undefined"
    assert found["lanes"] == ["Before", "Loops", "After"]
    before, loops, after = found["cards"]
    assert before >= 1 and loops >= 2 and after >= 1
    assert ["before on", "inloop on"] in found["coloured"] and ["after on"] in found["coloured"]
    assert len(found["hovered"]) == 1 and found["left"] == [] and found["clicked"] == found["hovered"]
    assert not found["folded"] and found["unfolded"] and found["escaped"] == []
    assert found["of_the_line"] == ["before", "inloop"] and found["released"] == []
    assert found["first"] == [True, False] and found["second"] == [False, True]
    assert found["times"] >= 6 and found["dark"] != found["other"]
    # Names are shown as they are, and are nothing but names.
    assert found["heading"] == HOSTILE and found["title"] == f"{HOSTILE}: plan"
    assert HOSTILE.replace(".", "") in found["state"] and any("<img" in text for text in found["summaries"])
    assert (found["scripts"], found["images"], found["network"]) == (3, 0, 0)  # its own, and the two of this test


@in_a_browser
def test_a_page_of_a_notebook_is_whole_inside_its_frame(page, tmp_path):
    from steploop.view.page import in_a_frame

    frame = in_a_frame(page).replace("sandbox=", "data-was=")  # so that the test may look inside
    text = f"<!doctype html><html lang=en><meta charset=utf-8><body>{frame}</body></html>"
    script = """
        const inner = new DOMParser().parseFromString(document.querySelector("iframe").srcdoc, "text/html");
        found.heading = inner.querySelector("h1").textContent;
        found.cards = inner.querySelectorAll(".card").length;
    """
    found = browse(text, tmp_path, script)
    assert found["heading"] == HOSTILE and found["cards"] > 3 and found["hacked"] == "undefined"


def test_every_text_of_the_users_is_escaped(page):
    """Without a browser: what is hostile stands nowhere in the page as it is."""
    text = rendered(page)
    assert HOSTILE not in text and "<img" not in text
    assert len(re.findall("<script", text)) == len(re.findall("</script", text)) == 1
    assert not re.search(r"https?://", text)


def test_a_kernels_source_is_there_and_folded_away():
    from steploop.view.page import render

    plan = sl.Loop(sl.nn.RNNCell(3, 4), backend="eager").plan(torch.randn(5, 2, 3)).to_dict()
    plan["loops"][0]["kernel"] = "void run() { a < b; }\n"
    text = render(plan)
    assert "<details class=kernel><summary>source of its kernel, 1 line</summary>" in text
    assert "void run() { a &lt; b; }" in text
