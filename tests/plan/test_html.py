"""`danlu plan --html`: one page that holds all of the answer, and nothing that comes from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from danlu.cli import app
from danlu.figures import show_amount
from danlu.plan.describe import ask, find
from danlu.plan_page import parts_of, render

VOID = {"meta", "br", "img", "input", "link", "hr"}
ANSWER = find(ask("llama-3.1-8b", "16xh100", 4096, "1M", "bf16"), 10**12)


class Page(HTMLParser):
    """What a browser would see of a page; fails where elements do not close in the order in which they open."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return "".join(self.text)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in leaves(each)]
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, list) else [value]


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = Page(render(ANSWER, "llama-3.1-8b on 16xh100"))
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    for _, attributes in page.seen:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
    style = "".join(page.text)
    assert "@import" not in style and not re.search(r"url\((?!#)", style)


def test_every_figure_of_the_answer_stands_on_it() -> None:
    words = Page(render(ANSWER, "llama")).words
    for leaf in leaves(ANSWER):
        assert json.dumps(leaf, ensure_ascii=False).strip('"') in words
    shown, best = words.partition("All figures")[0], ANSWER["plan"]
    for amount in (best["seconds"], best["gib"], best["low"], best["high"], ANSWER["room"], ANSWER["run"]["hours"]):
        assert show_amount(amount) in shown
    for each in (*ANSWER["runners_up"], *ANSWER["pareto"], *ANSWER["changes"]):
        assert each["plan"] in shown and show_amount(each["seconds"]) in shown and show_amount(each["gib"]) in shown
    for parts in (best["times"], best["memory"]):
        for part in parts_of(parts):
            assert part.name in shown and show_amount(part.amount) in shown
    assert ANSWER["command"] in shown


@pytest.mark.parametrize("kind", ["times", "memory"])
def test_a_bar_is_cut_as_the_sum_is(kind: str) -> None:
    parts = list(parts_of(ANSWER["plan"][kind]))
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert sum(part.amount for part in parts) == pytest.approx(ANSWER["plan"][kind]["total"])
    assert len({part.tone for part in parts}) == len(parts)


@pytest.mark.parametrize("name", ["通义千问 32B 🐉", "<script>alert('1')</script>", 'a"b & c', "\u202eevil\x00"])
def test_names_survive_and_do_nothing(name: str) -> None:
    page = Page(render(ANSWER | {"command": f"danlu train {name}"}, name))
    assert "script" not in {tag for tag, _ in page.seen}
    shown = "".join("\ufffd" if each in "\u202e\x00" else each for each in name)
    assert page.words.count(shown) >= 3  # title, head line, command
    assert "\u202e" not in page.words and "\x00" not in page.words


def test_the_command_writes_it_beside_what_it_prints(tmp_path: Path) -> None:
    out = tmp_path / "方案.html"
    words = ["plan", "--model", "llama-2-7b", "--gpus", "8xh100", "--html", str(out), "--json"]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    answer, page = json.loads(ended.output), Page(out.read_text(encoding="utf-8"))
    assert answer["plan"]["plan"] in page.words and "llama-2-7b" in page.words
    assert [each.name for each in tmp_path.iterdir()] == [out.name]
