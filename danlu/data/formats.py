"""How rows are laid out: alpaca, sharegpt, OpenAI messages, prompt and completion, or plain text.

The layout is found from the first rows, or taken from the settings; either way it is said which columns are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from danlu.data.example import BadRow, Example, Message, Row
from danlu.data.settings import Source
from danlu.errors import DanluError

LOOKED_AT = 20  # rows that decide the layout of a file

# The names columns usually have, tried in this order, upper and lower case alike. Required columns first.
NAMES: dict[str, tuple[dict[str, tuple[str, ...]], ...]] = {
    "messages": ({"messages": ("messages", "conversations", "conversation")},),
    "sharegpt": ({"messages": ("conversations", "conversation", "messages")},),
    "alpaca": ({"prompt": ("instruction",), "completion": ("output",)},),
    "prompt-completion": tuple(
        {"prompt": (prompt,), "completion": (completion,)}
        for prompt, completion in (
            ("prompt", "completion"),
            ("prompt", "response"),
            ("question", "answer"),
            ("question", "response"),
            ("query", "response"),
            ("query", "answer"),
            ("instruction", "response"),
            ("input", "output"),
            ("problem", "solution"),
            ("user", "assistant"),
            ("问题", "回答"),
            ("问题", "答案"),
        )
    ),
    "text": ({"text": ("text", "content", "document")},),
}
OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"system": ("system", "system_prompt")},
    "sharegpt": {"system": ("system", "system_prompt")},
    "alpaca": {"input": ("input",), "system": ("system",), "history": ("history",)},
    "prompt-completion": {"system": ("system", "system_prompt"), "history": ("history",)},
    "text": {},
}
SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


@dataclass(frozen=True)
class Layout:
    """A format and the columns it reads.

    Attributes:
        format: one of FormatName but auto.
        columns: what a column is for -> its name (or number) in the rows.
        unused: columns of the first rows that are not read.
    """

    format: str
    columns: dict[str, str | int]
    unused: tuple[str, ...] = ()

    def example(self, row: Row) -> Example:
        """What the model learns from a row. Raises BadRow where a field is missing, of a wrong type, or empty."""
        if isinstance(row.value, BadRow):
            raise row.value
        if not isinstance(row.value, dict):
            raise BadRow("wrong type", f"the row is {_kind(row.value)}, not an object with named fields")
        origin = row.origin
        if "group" in self.columns:
            group = _field(row.value, self.columns["group"])
            origin = replace(origin, group=str(group))
        if self.format == "text":
            return Example(origin, text=_text(row.value, self.columns["text"]))
        return Example(origin, messages=MESSAGES[self.format](row.value, self.columns))

    def __str__(self) -> str:
        used = ", ".join(
            str(column) if column == role else f"{role} from {_named(column)}" for role, column in self.columns.items()
        )
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.format} ({used}{unused})"


def detect(rows: Sequence[Row], source: Source, name: str) -> Layout:
    """The layout of a file.

    Args:
        rows: its first rows; unreadable ones are passed over.
        source: what the settings say of format and columns, which wins over what is found.
        name: the file, for errors.

    Raises DanluError where the rows fit no known format, or not the one asked for.
    """
    values = [row.value for row in rows if isinstance(row.value, dict)]
    if not values:  # nothing to tell from; every row is refused with its own reason
        return Layout("text", {"text": "text"})
    tried = [layout for one in _candidates(source) if (layout := _layout(one, values, dict(source.columns)))]
    best = max(tried, key=lambda layout: _fits(layout, rows), default=None)  # the first of equals
    if best is None or (source.format != "auto" and not _fits(best, rows)):
        raise _unknown(values, source, name)
    return best


def _candidates(source: Source) -> list[str]:
    if source.format != "auto":
        return [source.format]
    if "prompt" in source.columns:
        return ["alpaca"] if "input" in source.columns else ["prompt-completion"]
    return list(NAMES)


def _layout(format_: str, values: Sequence[dict[Any, Any]], given: dict[Any, str | int]) -> Layout | None:
    """The format with its columns filled in from the settings and the usual names, or None if one is not there."""
    present = list(dict.fromkeys(key for value in values for key in value))
    spelled = {str(key).casefold(): key for key in reversed(present)}
    for required in NAMES[format_]:
        wanted = {**required, **{role: () for role in given}, **OPTIONAL[format_]}
        columns = {role: given.get(role, _known(names, spelled)) for role, names in wanted.items()}
        found = {role: column for role, column in columns.items() if column is not None}
        if set(required) <= set(found) and all(column in present for column in found.values()):
            if set(given) - set(required) - set(OPTIONAL[format_]) - {"group"}:
                return None  # the settings name a column this format has no use for
            unused = tuple(str(key) for key in present if key not in found.values())
            return Layout(format_, found, unused)
    return None


def _known(names: tuple[str, ...], spelled: dict[str, Any]) -> Any:
    return next((spelled[name] for name in names if name in spelled), None)


def _fits(layout: Layout, rows: Sequence[Row]) -> int:
    """How many of the rows make an example."""
    count = 0
    for row in rows:
        try:
            layout.example(row)
        except BadRow:
            continue
        count += 1
    return count


def _unknown(values: Sequence[dict[Any, Any]], source: Source, name: str) -> DanluError:
    columns = ", ".join(str(key) for key in dict.fromkeys(key for value in values for key in value))
    named = [str(column) for column in source.columns.values() if all(column not in value for value in values)]
    if named:
        return DanluError(f"there is no column {named[0]}", where=name, fix=f"the columns are {columns}")
    if source.format != "auto":
        needs = " or ".join(" and ".join(names[0] for names in one.values()) for one in NAMES[source.format][:3])
        return DanluError(
            f"the rows are not {source.format}: that takes {needs}, and they have {columns}",
            where=name,
            fix="leave out format to have it found, or name the columns",
        )
    return DanluError(
        f"the rows fit no known format ({', '.join(NAMES)}); their columns are {columns}",
        where=name,
        fix="say which column is which:  columns: {prompt: QUESTION, completion: ANSWER}",
    )


# --- From a row to messages ---------------------------------------------------------------------------------------


def _messages(row: dict[Any, Any], columns: dict[str, str | int]) -> list[Message]:
    """OpenAI: [{"role": "user", "content": "..."}, ...]; content may be a list of text parts."""
    return _turns(row, columns, "role", "content")


def _sharegpt(row: dict[Any, Any], columns: dict[str, str | int]) -> list[Message]:
    """ShareGPT: [{"from": "human", "value": "..."}, ...]."""
    return _turns(row, columns, "from", "value")


def _turns(row: dict[Any, Any], columns: dict[str, str | int], role_key: str, content_key: str) -> list[Message]:
    turns = _field(row, columns["messages"])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("wrong type", f"{_named(columns['messages'])} is {_kind(turns)}, not a list of messages")
    if not turns:
        raise BadRow("empty", f"{_named(columns['messages'])} holds no message")
    made = [_turn(turn, role_key, content_key) for turn in turns]
    return [*_system(row, columns), *made] if made[0]["role"] != "system" else made


def _turn(turn: dict[Any, Any], role_key: str, content_key: str) -> Message:
    speaker = _field(turn, role_key)
    if not isinstance(speaker, str):
        raise BadRow("wrong type", f"{_named(role_key)} is {_kind(speaker)}, not text")
    if speaker.casefold() not in SPEAKERS:
        raise BadRow("unknown role", f"{speaker!r} is none of {', '.join(SPEAKERS)}")
    content = _field(turn, content_key)
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise BadRow("wrong type", f"{_named(content_key)} is {_kind(content)}, not text")
    return {"role": SPEAKERS[speaker.casefold()], "content": content}


def _part(part: Any) -> str:
    """The text of one part of a message of several parts."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise BadRow("wrong type", f"a part of the message is {kind}; only text can be learned from")


def _alpaca(row: dict[Any, Any], columns: dict[str, str | int]) -> list[Message]:
    """Alpaca: instruction, an optional input on its own paragraph, output; optional system and history."""
    question = _text(row, columns["prompt"])
    added = _optional_text(row, columns, "input")
    return _pair(row, columns, f"{question}\n\n{added}" if added else question)


def _prompt_completion(row: dict[Any, Any], columns: dict[str, str | int]) -> list[Message]:
    """Prompt and completion as text, or each as a list of messages."""
    prompt, completion = _field(row, columns["prompt"]), _field(row, columns["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        both = {"messages": [*prompt, *completion]}
        return [*_system(row, columns), *_messages(both, {"messages": "messages"})]
    return _pair(row, columns, _text(row, columns["prompt"]))


def _pair(row: dict[Any, Any], columns: dict[str, str | int], question: str) -> list[Message]:
    answer = _text(row, columns["completion"])
    return [
        *_system(row, columns),
        *_history(row, columns),
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _system(row: dict[Any, Any], columns: dict[str, str | int]) -> list[Message]:
    text = _optional_text(row, columns, "system")
    return [{"role": "system", "content": text}] if text else []


def _history(row: dict[Any, Any], columns: dict[str, str | int]) -> list[Message]:
    """Earlier turns as [[question, answer], ...]."""
    turns = row.get(columns["history"]) if "history" in columns else None
    if turns is None or turns == "":
        return []
    pairs = isinstance(turns, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in turns)
    if not pairs or not all(isinstance(text, str) for pair in turns for text in pair):
        raise BadRow("wrong type", f"{_named(columns['history'])} is no list of [question, answer] pairs")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in turns for role, text in zip(roles, pair, strict=True)]


def _field(row: dict[Any, Any], column: str | int) -> Any:
    value = row.get(column)
    if value is None:
        raise BadRow(
            "missing field", f"there is no {_named(column)}" if column not in row else f"{_named(column)} is null"
        )
    return value


def _text(row: dict[Any, Any], column: str | int) -> str:
    value = _field(row, column)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{_named(column)} is {_kind(value)}, not text")
    return value


def _optional_text(row: dict[Any, Any], columns: dict[str, str | int], role: str) -> str:
    column = columns.get(role)
    return _text(row, column) if column is not None and row.get(column) is not None else ""


def _named(column: str | int) -> str:
    return f"column {column}" if isinstance(column, int) else f"'{column}'"


def _kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


MESSAGES: dict[str, Callable[[dict[Any, Any], dict[str, str | int]], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
}
