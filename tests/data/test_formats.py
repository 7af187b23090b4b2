"""Layouts: detected from the rows and said; forced ones must fit; every refusal has its reason."""

from __future__ import annotations

from typing import Any

import pytest

from danlu.data.clean import check, clean
from danlu.data.example import BadRow, Example, Origin, Row
from danlu.data.formats import Layout, detect
from danlu.data.settings import DataSettings, Source
from danlu.errors import DanluError


def row(value: Any) -> Row:
    return Row(Origin("rows.jsonl", 1), value)


def found(*values: Any, **settings: Any) -> tuple[Layout, list[Any]]:
    """The layout of rows, and what each becomes: [(role, content), ...], a text, or the reason it is refused."""
    rows = [row(value) for value in values]
    layout = detect(rows, Source(path="rows.jsonl", **settings), "rows.jsonl")
    return layout, [outcome(layout, one) for one in rows]


def outcome(layout: Layout, one: Row) -> Any:
    try:
        example = clean(layout.example(one))
        check(example, DataSettings(sources=("rows.jsonl",)))  # type: ignore[arg-type]
    except BadRow as bad:
        return str(bad)
    return [(message["role"], message["content"]) for message in example.messages] or example.text


MESSAGES = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
CHAT = [("user", "问"), ("assistant", "答")]


@pytest.mark.parametrize(
    ("value", "said", "becomes"),
    [
        ({"messages": MESSAGES}, "messages (messages)", CHAT),
        ({"conversations": MESSAGES}, "messages (messages from 'conversations')", CHAT),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES], "id": 3},
            "messages (messages; not used: id)",
            [("system", "Be brief."), *CHAT],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]}, MESSAGES[1]]},
            "messages (messages)",
            CHAT,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}],
                "system": "Be brief.",
            },
            "sharegpt (messages from 'conversations', system)",
            [("system", "Be brief."), *CHAT],
        ),
        (
            {"instruction": "问", "input": "", "output": "答"},
            "alpaca (prompt from 'instruction', completion from 'output', input)",
            CHAT,
        ),
        (
            {"Instruction": "Add.", "Input": "1, 2", "Output": "3", "history": [["a", "b"]]},
            "alpaca (prompt from 'Instruction', completion from 'Output', input from 'Input', history)",
            [("user", "a"), ("assistant", "b"), ("user", "Add.\n\n1, 2"), ("assistant", "3")],
        ),
        ({"prompt": "问", "completion": "答"}, "prompt-completion (prompt, completion)", CHAT),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt-completion (prompt, completion)", CHAT),
        (
            {"question": "问", "answer": "答", "score": 1.5},
            "prompt-completion (prompt from 'question', completion from 'answer'; not used: score)",
            CHAT,
        ),
        ({"问题": "问", "回答": "答"}, "prompt-completion (prompt from '问题', completion from '回答')", CHAT),
        ({"text": "一段话", "label": 1}, "text (text; not used: label)", "一段话"),
    ],
)
def test_detected_and_said(value: Any, said: str, becomes: Any) -> None:
    layout, outcomes = found(value)
    assert str(layout) == said
    assert outcomes == [becomes]


def test_columns_by_name_and_number() -> None:
    layout, outcomes = found({"label": "1", "review": "好吃"}, columns={"prompt": "review", "completion": "label"})
    assert str(layout) == "prompt-completion (prompt from 'review', completion from 'label')"
    assert outcomes == [[("user", "好吃"), ("assistant", "1")]]
    layout, _ = found({1: "en", 2: "中"}, columns={"prompt": 1, "completion": 2})
    assert str(layout) == "prompt-completion (prompt from column 1, completion from column 2)"
    layout, _ = found({"q": "a", "ctx": "b", "a": "c"}, columns={"prompt": "q", "input": "ctx", "completion": "a"})
    assert layout.format == "alpaca"


def test_a_group_comes_with_the_row() -> None:
    value = {"question": "问", "answer": "答", "book": 7}
    layout = detect([row(value)], Source(path="x", columns={"group": "book"}), "x")
    assert layout.example(row(value)).origin.group == "7"


def test_most_rows_decide() -> None:
    layout, outcomes = found({"text": "x", "prompt": None, "completion": None}, {"text": "y"}, {"text": "z"})
    assert layout.format == "text" and outcomes == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("format_", "value", "reason"),
    [
        ("text", {"body": "x"}, "missing field: there is no 'text'"),
        ("text", {"text": None}, "missing field: 'text' is null"),
        ("text", {"text": 3}, "wrong type: 'text' is a number, not text"),
        ("text", {"text": True}, "wrong type: 'text' is true or false, not text"),
        ("text", {"text": " \n\u0000\ufeff"}, "empty: there is no text"),
        ("text", {"text": "a\udcff"}, "bad UTF-8: byte 0xff at character 2"),
        ("text", {"text": "a\ud800"}, "bad UTF-8: half a surrogate pair at character 2"),
        ("text", ["x"], "wrong type: the row is a list, not an object with named fields"),
        ("text", "x", "wrong type: the row is text, not an object with named fields"),
        ("alpaca", {"instruction": "a"}, "missing field: there is no 'output'"),
        ("alpaca", {"instruction": "", "output": "b"}, "empty: the user's message is empty"),
        ("alpaca", {"instruction": "a", "output": " "}, "empty: the assistant's message is empty"),
        ("alpaca", {"instruction": "a", "input": 4, "output": "b"}, "wrong type: 'input' is a number, not text"),
        ("messages", {"messages": "hi"}, "wrong type: 'messages' is text, not a list of messages"),
        ("messages", {"messages": []}, "empty: 'messages' holds no message"),
        ("messages", {"messages": [{"content": "a"}]}, "missing field: there is no 'role'"),
        ("messages", {"messages": [{"role": "user"}]}, "missing field: there is no 'content'"),
        ("messages", {"messages": [{"role": 1, "content": "a"}]}, "wrong type: 'role' is a number, not text"),
        (
            "messages",
            {"messages": MESSAGES[:1]},
            "no answer: the chat ends with the user, so there is no answer to learn",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, MESSAGES[1]]},
            "wrong type: a part of the message is image_url; only text can be learned from",
        ),
    ],
)
def test_refusals(format_: str, value: Any, reason: str) -> None:
    good = {
        "text": {"text": "x"},
        "alpaca": {"instruction": "a", "input": "", "output": "b"},
        "messages": {"messages": MESSAGES},
    }[format_]
    layout = detect([row(good)], Source(path="rows.jsonl", format=format_), "rows.jsonl")  # type: ignore[arg-type]
    assert outcome(layout, row(value)) == reason


def test_an_unknown_role_lists_the_known() -> None:
    layout, _ = found({"messages": MESSAGES})
    bad = outcome(layout, row({"messages": [{"role": "tool", "content": "a"}]}))
    assert bad.startswith("unknown role: 'tool' is none of system, developer, user, human, assistant")


@pytest.mark.parametrize(
    ("settings", "value", "message"),
    [
        (
            {},
            {"label": "1", "review": "x"},
            "fit no known format .*their columns are label, review\n  say which column",
        ),
        ({"format": "alpaca"}, {"question": "a", "answer": "b"}, "not alpaca: that takes instruction and output"),
        ({"format": "messages"}, {"messages": "no list"}, "not messages: that takes messages"),
        (
            {"columns": {"prompt": "qq", "completion": "a"}},
            {"q": "x", "a": "y"},
            "no column qq\n  the columns are q, a",
        ),
    ],
)
def test_rows_that_fit_nothing(settings: dict[str, Any], value: Any, message: str) -> None:
    with pytest.raises(DanluError, match=message):
        found(value, **settings)


def test_bounds_of_length() -> None:
    settings = DataSettings(sources=("x",), minimum_characters=3, maximum_characters=9)  # type: ignore[arg-type]

    def refusal(question: str, answer: str) -> str:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            check(Example(Origin("x", 1), chat), settings)
        except BadRow as bad:
            return str(bad)
        return ""

    assert refusal("q", "abc") == ""
    assert refusal("q", "ab") == "too short: the answer has 2 characters, minimum_characters is 3"
    assert refusal("question", "abc") == "too long: it has 12 characters, maximum_characters is 9"


def test_one_spelling() -> None:
    chat = [{"role": "user", "content": " cafe\u0301\r\nb\x07 "}, {"role": "assistant", "content": "\ufeff好\t!"}]
    cleaned = clean(Example(Origin("x", 1), chat), system="Be brief.")
    assert [message["content"] for message in cleaned.messages] == ["Be brief.", "café\nb", "好\t!"]
    assert clean(cleaned, system="Another.").messages == cleaned.messages
