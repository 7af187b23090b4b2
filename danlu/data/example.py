"""The nouns of this room: a row as a source gives it, an example as the model learns it, and a row refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}
PREVIEW = 200  # characters of a refused row that are kept beside the reason


class BadRow(Exception):
    """Why a row cannot be learned from.

    Args:
        kind: the reason in a few fixed words; rows are counted by it.
        detail: what exactly is wrong with this row.
        raw: what was read, where the row has no value to show.
    """

    def __init__(self, kind: str, detail: str, raw: str = "") -> None:
        self.kind, self.detail, self.raw = kind, detail, raw[: PREVIEW + 1]
        super().__init__(f"{kind}: {detail}")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: the file as its user named it, the line (in Parquet, the row) counted from 1, and its group.

    Rows of one group are never split between training and held-out data.
    """

    file: str
    line: int
    group: str | None = None

    def plain(self) -> dict[str, Any]:
        return {"file": self.file, "line": self.line, "group": self.group}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: its value, or the BadRow that says why it could not even be read."""

    origin: Origin
    value: Any


@dataclass(frozen=True, slots=True)
class Example:
    """What the model learns from: either a chat (`messages`) or a plain text (`text`), and where it came from."""

    origin: Origin
    messages: list[Message] = field(default_factory=list)
    text: str = ""

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    def wording(self) -> str:
        """What is compared when looking for copies: everything said, without the system's part."""
        return (
            "\n".join(one["content"] for one in self.messages if one["role"] != "system")
            if self.messages
            else self.text
        )

    def plain(self) -> dict[str, Any]:
        """As one line of train.jsonl."""
        content = {"messages": self.messages} if self.messages else {"text": self.text}
        return {**content, "origin": self.origin.plain()}

    @classmethod
    def read(cls, line: str | bytes) -> Example:
        """The example a line of train.jsonl holds."""
        value = json.loads(line)
        return cls(Origin(**value["origin"]), value.get("messages", []), value.get("text", ""))


def preview(value: object) -> str:
    """The beginning of a refused row, always printable."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return printable(text if len(text) <= PREVIEW else f"{text[:PREVIEW]}...")


def printable(text: str) -> str:
    """Text whose undecodable bytes and half surrogates are spelled out, so that it can be written anywhere."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
