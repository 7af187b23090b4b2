"""The interpreter's own documentation as questions and answers: honest cuts, split by module, no side effects."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from danlu.data import python_docs
from danlu.data.build import build_data
from danlu.data.example import Row
from danlu.data.python_docs import Entry, example, summary
from danlu.data.settings import DataSettings
from danlu.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def pairs() -> list[Row]:
    return list(python_docs.rows())


def said(row: Row) -> tuple[str, str]:
    question, answer = row.value["messages"]
    return question["content"], answer["content"]


def test_there_are_thousands_and_most_are_short(pairs: list[Row]) -> None:
    assert len(pairs) > 5000
    assert len({row.origin.group for row in pairs}) > 150
    sizes = [sum(map(len, said(row))) for row in pairs]
    assert statistics.median(sizes) < 400 and max(sizes) < 1500
    assert all(question.strip() and answer.strip() for question, answer in map(said, pairs))


def test_known_pairs_are_there(pairs: list[Row]) -> None:
    found: dict[str, list[str]] = {}
    for row in pairs:
        found.setdefault(row.origin.group or "", []).append(" => ".join(said(row)))
    json_pairs = "\n".join(found["json"])
    assert "`json.dumps`" in json_pairs and "Serialize `obj` to a JSON formatted `str`." in json_pairs
    assert "`textwrap.wrap(text, width=70, **kwargs)`" in "\n".join(found["textwrap"])
    assert any("the `assert` statement" in pair for pair in found["topic assert"])
    assert any("`str.lower`" in pair and "lowercase" in pair for pair in found["builtins"])
    assert any("`heapq.heappush(heap, item)`" in pair for pair in found["heapq"])


def test_answers_are_the_librarys_own_words(pairs: list[Row]) -> None:
    """Sentences of an answer stand in a string of the file it names, blanks and markup aside."""

    def plain(text: str) -> str:
        return re.sub(r"[\s`]+|:\w+:`~?", "", text)

    def strings(file: Path) -> str:
        # As the interpreter reads them: a docstring written with escapes says what they stand for.
        nodes = ast.walk(ast.parse(file.read_bytes()))
        return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))

    checked = 0
    for row in pairs[::40]:
        file = Path(inspect.getfile(json)).parents[1] / row.origin.file.removeprefix("python-docs/")
        question, answer = said(row)
        if file.suffix == ".py" and question.startswith(("What does", "Explain what")):
            text = plain(strings(file))
            assert all(plain(paragraph).rstrip(".") in text for paragraph in answer.split("\n\n")), (file, answer)
            checked += 1
    assert checked > 20


def test_it_is_the_same_every_time_and_imports_nothing_odd(pairs: list[Row]) -> None:
    code = (
        "import sys, hashlib; from danlu.data import python_docs as docs;"
        "print(hashlib.sha256(repr(list(docs.rows())).encode()).hexdigest(), docs.fingerprint());"
        "print(*(name for name in ('antigravity', 'this', 'idlelib', 'turtle', 'tkinter') if name in sys.modules))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "1"}
    )
    here = hashlib.sha256(repr(pairs).encode()).hexdigest()
    assert other.stdout == f"{here} {python_docs.fingerprint()}\n\n"
    assert other.stderr == ""


def test_the_fingerprint_follows_interpreter_and_content(monkeypatch: pytest.MonkeyPatch) -> None:
    here = python_docs.fingerprint()
    assert here == python_docs.fingerprint()
    monkeypatch.setattr(sys, "version", "3.99.0")
    assert python_docs.fingerprint() != here
    monkeypatch.undo()
    monkeypatch.setattr(python_docs, "_sources", lambda: iter([("json", Path(json.__file__))]))
    assert python_docs.fingerprint() != here


def test_held_out_modules_are_never_trained_on(smollm: Tokenizer, tmp_path: Path) -> None:
    settings = DataSettings.model_validate({"sources": {"path": "python-docs", "limit": 2500}, "heldout": "10%"})
    figures = build_data(settings, smollm, tmp_path, seed=0)
    groups = []
    for side in ("train", "heldout"):
        rows = [json.loads(line) for line in (tmp_path / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()]
        groups.append({row["origin"]["group"] for row in rows})
        assert len(groups[-1]) == figures[side]["groups"]["value"]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
    assert figures["rejected"]["value"] <= 0.01 * figures["rows_read"]["value"]
    share = figures["heldout"]["examples"]["value"] / figures["examples_kept"]["value"]
    assert 0.05 < share <= 0.1


@pytest.mark.parametrize(
    ("doc", "name", "cut"),
    [
        ("range(stop) -> range object\nrange(start, stop)\n\nReturn numbers.\nIn order of size.", "range",
         "Return numbers. In order of size."),
        ("f(a,\n  b) -> (x,\n y)\n\nGive back both.", "m.f", "Give back both."),
        ("f(x) -- Make it so at once.", "f", "Make it so at once."),
        ("Do this now.\n\nArguments are:\n\n  a -- one\n", "", "Do this now."),
        ("Do this now.\n\n>>> f(1)\n2\n\nMore.", "", "Do this now."),
        ("It is so. For example, the lines\n\n  code", "", "It is so."),
        ("These are the parts:\n\n* one", "", "These are the parts."),
        ("- a list\n- only", "", ""),
        ("Too short", "", ""),
        ("Use :func:`~os.walk`  or ``x`` instead.", "", "Use `os.walk` or `x` instead."),
    ],
)  # fmt: skip
def test_cuts(doc: str, name: str, cut: str) -> None:
    assert summary(doc, name) == cut


def test_cuts_end_with_a_sentence() -> None:
    doc = "One sentence is here. " + "Another one follows it. " * 40
    made = summary(doc, size=100)
    assert made == ("One sentence is here. " + "Another one follows it. " * 3).strip()
    assert doc.startswith(made)


def test_the_first_example_is_shown() -> None:
    assert example("Do.\n\n    >>> f(1)\n    2\n    >>> f(2)\n    4\n\nThen.\n") == ">>> f(1)\n2\n>>> f(2)\n4"
    assert example("Do.") == example(">>> f()") == ""


def test_names_of_builtins_go_without_a_module() -> None:
    assert Entry("method", "builtins", "str.lower", "str.lower()", "", 1).path == "str.lower"
    assert Entry("method", "json", "J.d", "J.d(x)", "", 1).call == "json.J.d(x)"
