"""Text <-> token ids, and conversations -> text, with the checkpoint's own vocabulary and chat template."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from danlu import gguf_vocabulary
from danlu.artifact import canonical, write_aside, write_json
from danlu.errors import DanluError
from danlu.gguf_header import Header, read_header

ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")  # as in bos_token
GGUF_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unknown": "unk",
    "padding": "pad",
    "seperator": "sep",
}  # sic, the specification


class UnknownCharacter(DanluError):
    """A text holds a character that has no token, in a vocabulary where nothing stands for such.

    Attributes:
        text: which of the texts that were given, from 0.
        place: of the character in it, from 0.
    """

    def __init__(self, character: str, text: int, place: int, where: Path) -> None:
        self.text, self.place = text, place
        what = f"the character {character!r} (U+{ord(character):04X}) is not in the vocabulary"
        super().__init__(what, where=where, fix="leave it out of the text, or take a vocabulary that has it")


class Tokenizer:
    """A checkpoint's tokenizer.

    Whatever encodes raises `UnknownCharacter` for the first character that has no token, where none stands for it.

    Attributes:
        vocab_size: every id is below it. The model's embedding may have more rows.
        bos_id, eos_id, pad_id, mask_id, unk_id: ids of the special tokens, None where the checkpoint has none.
        special_ids: ids of all tokens that are no text.
        stop_ids: at these generation ends: end of text, and what ends a turn.
        where: the file or directory it was read from, named in errors.
        adds_bos: whether the model expects every text to begin with `bos_id`; `encode` leaves that to the caller.
        chat_template: the Jinja source, None where the checkpoint has none.
    """

    def __init__(self, document: dict[str, Any], config: dict[str, Any], stop_ids: frozenset[int], where: Path) -> None:
        """Wrap a tokenizer.

        Args:
            document: the content of tokenizer.json.
            config: the content of tokenizer_config.json, chat template included.
            stop_ids: ids at which generation ends, beyond what `config` and `gguf_vocabulary.TURN_ENDS` name.
            where: named in errors.
        """
        self._json = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        self._config = config
        self.where = where
        self._backend = self._make_backend()
        self._special = {f"{role}_token": text for role in ROLES if (text := _text(config.get(f"{role}_token")))}
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.bos_id, self.eos_id, self.pad_id, self.mask_id, self.unk_id = (
            vocab.get(self._special.get(f"{role}_token", "")) for role in ("bos", "eos", "pad", "mask", "unk")
        )
        self.special_ids = frozenset(token["id"] for token in document["added_tokens"] if token.get("special"))
        known = {
            token["id"] for token in document["added_tokens"] if token["content"] in gguf_vocabulary.TURN_ENDS
        } | stop_ids
        self.stop_ids = frozenset(known if self.eos_id is None else known | {self.eos_id})
        self.adds_bos = self.bos_id is not None and _adds_bos(document, config, self._special["bos_token"])
        self.chat_template = _text_or_none(config.get("chat_template"))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read the tokenizer of a Hugging Face directory or of a .gguf file.

        Raises DanluError where there is none, where it is damaged, or where a GGUF's pre-tokenizer is not known.
        """
        if path.is_dir():
            return _from_directory(path)
        return _from_gguf(read_header(path))

    @property
    def document(self) -> dict[str, Any]:
        """The content of its tokenizer.json, a copy."""
        copied: dict[str, Any] = json.loads(self._json)
        return copied

    @property
    def config(self) -> dict[str, Any]:
        """The content of its tokenizer_config.json, chat template included, a copy."""
        return copy.deepcopy(self._config)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides how text becomes ids."""
        known = {
            "tokenizer": self._json,
            "special": self._special,
            "stop_ids": sorted(self.stop_ids),
            "adds_bos": self.adds_bos,
            "chat_template": self.chat_template,
        }
        return hashlib.sha256(canonical(known).encode()).hexdigest()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. With `special`, text such as <|im_end|> becomes that token; otherwise it stays text."""
        with self.unknown_named([text]):
            return list(self._encoder(special).encode(text, add_special_tokens=False).ids)

    def encode_input(self, text: str) -> list[int]:
        """Token ids of a text as an encoder reads it: between what its tokenizer.json puts around, [CLS] and [SEP]."""
        with self.unknown_named([text]):
            return list(self.complete_backend.encode(text, add_special_tokens=True).ids)

    def encode_batch(self, texts: list[str], special: bool = True) -> list[list[int]]:
        """Token ids of many texts, on all cores."""
        with self.unknown_named(texts):
            found = self._encoder(special).encode_batch_fast(texts, add_special_tokens=False)
        return [list(one.ids) for one in found]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters [start, end) of `text` it stands for, leading space included.

        Tokens that share the bytes of one character all name that character.
        """
        with self.unknown_named([text]):
            found = self._backend.encode(text, add_special_tokens=False)
        return list(found.ids), list(found.offsets)

    def id_of(self, token: str) -> int | None:
        """The id of one token as it stands in the vocabulary."""
        return self._backend.token_to_id(token)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids. An unfinished UTF-8 character becomes U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def render(self, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        """A conversation as the text the model was trained on, by the checkpoint's own template.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": str}, ...].
            generation_prompt: end with what opens the assistant's next turn.

        Raises DanluError where the checkpoint has no chat template or the template refuses the conversation.
        """
        template = self._template
        try:
            return template(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special,
            )
        except Exception as error:  # the template is the checkpoint's program and may fail in any way
            raise DanluError(f"the chat template refuses this conversation: {error}", where=self.where) from None

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        transformers and llama.cpp's converter read them. tokenizer_class is the one that takes tokenizer.json as it
        stands: others rebuild parts of it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in self._config.items() if name not in ("chat_template", "auto_map")}
        config = kept | self._special | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.adds_bos}
        write_aside(directory / "tokenizer.json", self._json)
        write_json(directory / "tokenizer_config.json", config)
        write_json(directory / "special_tokens_map.json", self._special)
        if self.chat_template is not None:
            write_aside(directory / "chat_template.jinja", self.chat_template)

    def gguf_metadata(self, vocab_size: int) -> dict[str, Any]:
        """All `tokenizer.*` metadata of a GGUF file, without that prefix; arrays as lists.

        Args:
            vocab_size: rows of the model's embedding.

        Raises DanluError where GGUF has no name for what this tokenizer does.
        """
        made = gguf_vocabulary.vocabulary(json.loads(self._json), vocab_size, self.where)
        facts = {f"ggml.{name}": value for name, value in made.items()}
        for name, role in GGUF_ROLES.items():
            number = self._backend.token_to_id(self._special.get(f"{role}_token", ""))
            if number is not None:
                facts[f"ggml.{name}_token_id"] = number
        facts["ggml.add_bos_token"] = self.adds_bos
        facts["ggml.add_eos_token"] = False
        if self.chat_template is not None:
            facts["chat_template"] = self.chat_template
        return facts

    @cached_property
    def _template(self) -> Callable[..., str]:
        if self.chat_template is None:
            raise DanluError(
                "has no chat template, so conversations cannot be rendered",
                where=self.where,
                fix='use an instruction-tuned checkpoint, or plain {"text": ...} examples',
            )
        return _compile(self.chat_template, self.where)

    @cached_property
    def _plain_backend(self) -> Backend:
        """Takes the text of special tokens as text. A second one, as the switch is not safe to turn between threads."""
        backend = self._make_backend()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def complete_backend(self) -> Backend:
        """Puts around a text what the checkpoint's own tokenizer does."""
        backend = Backend.from_str(self._json)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @contextmanager
    def unknown_named(self, texts: Sequence[str]) -> Iterator[None]:
        """Within it, an error of the library about one of these texts becomes an `UnknownCharacter`, which names it."""
        try:
            yield
        except Exception as error:  # the library raises bare Exception
            found = self._first_unknown(texts)
            if found is None:
                raise DanluError(f"the text cannot be tokenized: {error}", where=self.where) from None
            raise found from None

    def _first_unknown(self, texts: Sequence[str]) -> UnknownCharacter | None:
        known: set[str] = set()
        for number, text in enumerate(texts):
            for place, character in enumerate(text):
                if character in known:
                    continue
                try:
                    self._plain_backend.encode(character, add_special_tokens=False)
                except Exception:
                    return UnknownCharacter(character, number, place, self.where)
                known.add(character)
        return None

    def _encoder(self, special: bool) -> Backend:
        return self._backend if special else self._plain_backend

    def _make_backend(self) -> Backend:
        try:
            backend = Backend.from_str(self._json)
        except Exception as error:  # the library raises bare Exception
            raise DanluError(f"the tokenizer is damaged: {error}", where=self.where) from None
        # Some files cut or pad every text, or add tokens to it; here the caller decides.
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        return backend


def _text(token: object) -> str | None:
    """A special token is written as its text or as {"content": text}."""
    return _text_or_none(token.get("content") if isinstance(token, dict) else token)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _adds_bos(document: dict[str, Any], config: dict[str, Any], bos: str) -> bool:
    """What tokenizer_config.json says, or else whether tokenizer.json's template begins with the token."""
    said = config.get("add_bos_token")
    if isinstance(said, bool):
        return said
    step = document.get("post_processor") or {}
    steps = step.get("processors", [step])
    return any(
        first.get("SpecialToken", {}).get("id") == bos
        for processor in steps
        if processor.get("type") == "TemplateProcessing"
        for first in processor["single"][:1]
    )


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        old = next((name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (path / name).is_file()), None)
        fix = "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) makes one"
        raise DanluError(f"has no tokenizer.json{f', only {old}' if old else ''}", where=path, fix=fix)
    document = read_json(file)
    if "model" not in document or not isinstance(document.get("added_tokens"), list):
        raise DanluError("is no tokenizer.json: it has no model or no added_tokens", where=file)
    config = {**_read_optional(path / "special_tokens_map.json"), **_read_optional(path / "tokenizer_config.json")}
    config["chat_template"] = _directory_template(path, config)
    stops = _read_optional(path / "generation_config.json").get("eos_token_id")
    ids = stops if isinstance(stops, list) else [stops]
    return Tokenizer(document, config, frozenset(number for number in ids if isinstance(number, int)), path)


def _directory_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the template in the configuration; of several the one named default."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return _text_or_none(found)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DanluError where it cannot be read as one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DanluError(f"cannot be read as JSON: {error}", where=path) from None
    if not isinstance(value, dict):
        raise DanluError("should hold a JSON object", where=path)
    return value


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _from_gguf(header: Header) -> Tokenizer:
    document = gguf_vocabulary.tokenizer_json(header)
    tokens = header.need_all("tokenizer.ggml.tokens", str)
    ids = {name: header.find(f"tokenizer.ggml.{name}_token_id", int) for name in (*GGUF_ROLES, "eot", "eom")}
    for name, number in ids.items():
        if number is not None and not 0 <= number < len(tokens):
            raise DanluError(f"the {name} token is id {number:,} of only {len(tokens):,}", where=header.path)
    config: dict[str, Any] = {
        f"{role}_token": tokens[number] for name, role in GGUF_ROLES.items() if (number := ids[name]) is not None
    }
    config["add_bos_token"] = gguf_vocabulary.adds_bos(header)
    config["chat_template"] = header.find("tokenizer.chat_template", str)
    if config["add_bos_token"] and ids["bos"] is not None:
        document["post_processor"] = _begin_with(config["bos_token"], ids["bos"])
    stops = frozenset(number for name in ("eos", "eot", "eom") if (number := ids[name]) is not None)
    return Tokenizer(document, config, stops, header.path)


def _begin_with(bos: str, number: int) -> dict[str, Any]:
    """tokenizer.json's way of saying that every text begins with a token."""
    first, text, second = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        *({"Sequence": {"id": s, "type_id": 0}} for s in "AB"),
    )
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def _compile(source: str, where: Path) -> Callable[..., str]:
    """A chat template -> a function, under the conventions of Hugging Face.

    The template comes with the checkpoint and is not trusted: it runs in Jinja's sandbox and cannot change what it
    is given.
    """
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says; it changes nothing in the text."""

        tags = {"generation"}  # noqa: RUF012  # the base class declares it so

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes <, > and &, which models never saw.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source).render
    except jinja2.TemplateSyntaxError as error:
        raise DanluError(f"line {error.lineno} of the chat template: {error.message}", where=where) from None
