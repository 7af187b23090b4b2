"""What every example goes through before it counts: one spelling of the same text, and the checks it must pass."""

from __future__ import annotations

import re
import unicodedata

from danlu.data.example import BadRow, Example, Message
from danlu.data.settings import DataSettings

# Control characters but tab and newline, and the byte order mark: invisible, and never meant to be learned.
INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
RAW_BYTE = re.compile("[\udc80-\udcff]")  # how a reader keeps a byte that is not UTF-8


def clean(example: Example, system: str | None = None) -> Example:
    """The example in one spelling, with a system message where the settings give one and the chat has none.

    Unicode is composed (NFC), line ends become a newline, control characters and outer blanks go.
    Raises BadRow where the text is not valid Unicode.
    """
    if not example.is_chat:
        return Example(example.origin, text=_spell(example.text))
    messages = [{"role": one["role"], "content": _spell(one["content"])} for one in example.messages]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Example(example.origin, messages=messages)


def check(example: Example, settings: DataSettings) -> None:
    """Raise BadRow, with the reason, for an example nothing can be learned from or that the settings exclude."""
    if example.is_chat:
        _check_chat(example.messages, settings.minimum_characters)
    elif not example.text:
        raise BadRow("empty", "there is no text")
    elif len(example.text) < settings.minimum_characters:
        raise _too_short("the text", example.text, settings.minimum_characters)
    length = len(example.wording())
    if settings.maximum_characters is not None and length > settings.maximum_characters:
        limit = settings.maximum_characters
        raise BadRow("too long", f"it has {length:,} characters, maximum_characters is {limit:,}")


def _spell(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", valid(text))
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return INVISIBLE.sub("", text).strip()


def valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raw = RAW_BYTE.search(text)
        if raw:
            detail = f"byte 0x{ord(raw.group()) - 0xDC00:02x} at character {raw.start() + 1}"
        else:
            detail = f"half a surrogate pair at character {error.start + 1}"
        raise BadRow("bad UTF-8", detail) from None
    return text


def _check_chat(messages: list[Message], minimum: int) -> None:
    for message in messages:
        if not message["content"] and message["role"] != "system":
            raise BadRow("empty", f"the {message['role']}'s message is empty")
    if messages[-1]["role"] != "assistant":
        raise BadRow("no answer", f"the chat ends with the {messages[-1]['role']}, so there is no answer to learn")
    for message in messages:
        if message["role"] == "assistant" and len(message["content"]) < minimum:
            raise _too_short("the answer", message["content"], minimum)


def _too_short(what: str, text: str, minimum: int) -> BadRow:
    return BadRow("too short", f"{what} has {len(text):,} characters, minimum_characters is {minimum:,}")
