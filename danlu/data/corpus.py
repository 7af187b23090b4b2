"""A corpus on disk: texts as one long line of tokens in memory-mapped files, and windows cut out of it.

Whatever the size of a corpus, writing and reading it take a fixed amount of memory.
"""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from danlu.artifact import Figures, figure, hash_file, sync, write_json
from danlu.console import progress, say, warn
from danlu.data.build import REJECTED, SIDES, Rejections
from danlu.data.clean import valid
from danlu.data.corpus_settings import CorpusSettings
from danlu.data.example import BadRow, Origin, preview
from danlu.data.formats import LOOKED_AT, detect
from danlu.data.permutation import key_of, shuffled
from danlu.data.settings import Side, Source
from danlu.data.sources import read
from danlu.data.split import BUCKETS, bucket
from danlu.data.stream import IGNORED, Batch
from danlu.data.vocabulary import learn_vocabulary
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer, UnknownCharacter

INDEX = "index.json"
VERSION = 1
TOKENIZER = "tokenizer"
TEXT_ENDINGS = (".txt", ".md", ".txt.gz", ".md.gz")  # a file of these is one text; of others, each row is
PASSAGE = 16_000  # characters; a longer text is tokenized in passages of at most this length
TOGETHER = 2**18  # characters tokenized at a time
SPILLED = 2**16  # document starts held back before they are written
MAPPED = 256  # files mapped at a time: each takes a file handle, of which a process has few
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Ids = npt.NDArray[np.int64]


# --- Reading texts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A passage of a text, or all of it; `first` and `last` say whether the text begins and ends with it."""

    origin: Origin
    text: str
    first: bool
    last: bool


def read_pieces(sources: Iterable[Source], reject: Callable[[Origin, BadRow, str], None]) -> Iterator[Piece]:
    """The texts of the sources, passage by passage, in order.

    Args:
        sources: files of text, of which each is one text, or of rows, of which each is one. What follows the last
            blank line of a text and is blank itself is no part of it.
        reject: is told of rows that hold no text: where, why, and how it begins. A text with a passage that is not
            UTF-8 goes on as another text behind it.

    Raises DanluError where a file is missing or cannot be read, or its rows have no text.
    """
    for source in sources:
        for name, rows in read(source):
            texts = _texts(name, rows, source, reject)
            if name.lower().endswith(TEXT_ENDINGS):
                yield from _whole(texts)
            else:
                yield from (piece for origin, text in texts if text for piece in _passages(origin, text))


def _texts(name: str, rows: Iterator[Any], source: Source, reject: Callable[..., None]) -> Iterator[tuple[Origin, str]]:
    """The text of every row with where it stands; a refused one is an empty text."""
    head = list(itertools.islice(rows, LOOKED_AT))
    if not head:
        return
    layout = detect(head, source.model_copy(update={"format": "text"}), name)
    for row in itertools.chain(head, rows):
        try:
            text = valid(layout.example(row).text)
            if not text:
                raise BadRow("empty", "there is no text")
        except BadRow as bad:
            reject(row.origin, bad, preview(bad.raw or ("" if row.value is bad else row.value)))
            text = ""
        yield row.origin, text


def _whole(texts: Iterator[tuple[Origin, str]]) -> Iterator[Piece]:
    """The passages of a file as one text, which breaks only where one was refused."""
    before: Piece | None = None
    for origin, text in texts:
        if before is not None:
            yield replace(before, last=not text)
        before = Piece(origin, text, before is None or before.last, last=False) if text else None
    if before is not None:
        yield replace(before, last=True)


def _passages(origin: Origin, text: str) -> Iterator[Piece]:
    """One text in passages, cut behind a line's end, before a blank, or else anywhere."""
    begin = 0
    while begin < len(text):
        end = min(begin + PASSAGE, len(text))
        if end < len(text):
            middle = begin + PASSAGE // 2
            line, blank = text.rfind("\n", middle, end) + 1, text.rfind(" ", middle, end)
            end = line if line > middle else blank if blank > middle else end
        yield Piece(origin, text[begin:end], begin == 0, end == len(text))
        begin = end


# --- Writing ------------------------------------------------------------------------------------------------------


def build_corpus(settings: CorpusSettings, out: Path) -> Figures:
    """Fill `out` with a corpus: files of tokens, document starts, tokenizer/, rejected.jsonl and, last, index.json.

    The index makes it a corpus: what a killed run leaves behind has none, cannot be opened, and is written anew.

    Args:
        settings: which texts, in which tokens.
        out: a directory; it is made if it is not there.

    Returns the figures: vocabulary, rejected rows and, of each side, texts, tokens, characters and unknown tokens.
    Raises DanluError where `out` holds anything else, a corpus included, there is no text to learn from or hold out, a
    character is not in the vocabulary, or the disk is full. `out` then holds nothing of it.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / INDEX).exists() or set(out.iterdir()) - set(_ours(out)):
        held = "a corpus already" if (out / INDEX).exists() else "other files"
        raise DanluError(f"holds {held}", where=out, fix="choose another directory, or delete this one")
    _clear(out)
    try:
        return _build(settings, out)
    except OSError as error:
        _clear(out)
        if error.errno not in FULL:
            raise
        raise DanluError(f"the corpus cannot be written: {error.strerror}", where=out, fix="make room there") from None
    except BaseException:
        _clear(out)
        raise


def _build(settings: CorpusSettings, out: Path) -> Figures:
    tokenizer = _vocabulary(settings)
    say(f"corpus: {tokenizer.vocab_size:,} tokens in the vocabulary ({settings.vocabulary.kind})")
    cuts = _cuts(settings) if settings.heldout and settings.heldout_from == "end" else None
    begin, end = frame(tokenizer)
    with closing(Rejections(out / REJECTED)) as rejections, ExitStack() as stack:
        writers = {side: TokenWriter(out, side, tokenizer.vocab_size, settings.shard_tokens) for side in SIDES}
        for writer in writers.values():
            stack.callback(writer.close)
        with progress("corpus: tokenizing", None, "characters") as tick:
            for chunk in _chunks(_sided(read_pieces(settings.sources, rejections.add), settings, cuts)):
                for (side, piece), ids in zip(chunk, _encode(tokenizer, [piece for _, piece in chunk]), strict=True):
                    writers[side].add(piece, ids, begin, end, tokenizer.unk_id)
                tick.advance(sum(len(piece.text) for _, piece in chunk))
        sides = {side: writer.finish() for side, writer in writers.items()}
        _check(settings, sides)
        rejected = dict(rejections.counts)
    if rejected:
        warn(f"corpus: {sum(rejected.values()):,} rows hold no text and stand in {REJECTED}: {rejected}")
    tokenizer.save(out / TOKENIZER)
    about = {"size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    sync(out)
    write_json(out / INDEX, {"version": VERSION, "vocabulary": about, "sides": sides, "rejected": rejected})
    sync(out)
    return _figures(about, sides, rejected)


class TokenWriter:
    """Writes one side of a corpus: SIDE-00000.bin and so on, little-endian uint16 or uint32, and SIDE-documents.bin.

    Args:
        out: the corpus.
        side: whose tokens.
        vocab_size: decides the type: 65,536 tokens fit into uint16.
        shard_tokens: tokens a file holds at most.
    """

    def __init__(self, out: Path, side: Side, vocab_size: int, shard_tokens: int) -> None:
        self._out, self._side, self._shard_tokens = out, side, shard_tokens
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._shards: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._starts = (out / f"{side}-documents.bin").open("wb")
        self._waiting: list[int] = []
        self._counts: Counter[str] = Counter(tokens=0, documents=0, characters=0, unknown=0)

    def add(self, piece: Piece, ids: Sequence[int], begin: list[int], end: list[int], unknown: int | None) -> None:
        """Append a piece in its tokens: `begin` stands before a text, `end` behind; `unknown` is counted."""
        if piece.first:
            self._waiting.append(self._counts["tokens"])
            self._counts["documents"] += 1
            if len(self._waiting) >= SPILLED:
                self._write_starts()
        tokens = np.array([*(begin if piece.first else []), *ids, *(end if piece.last else [])], dtype=self._dtype)
        self._counts["tokens"] += len(tokens)
        self._counts["characters"] += len(piece.text)
        self._counts["unknown"] += 0 if unknown is None else list(ids).count(unknown)
        while len(tokens):
            tokens = self._append(tokens)

    def close(self) -> None:
        """Let go of what is still open, finished or not."""
        for file in (self._file, self._starts):
            if file is not None:
                file.close()

    def finish(self) -> dict[str, Any]:
        """Make all durable; returns this side's part of the index."""
        self._write_starts()
        self._close_shard()
        _finish(self._starts)
        starts = self._out / f"{self._side}-documents.bin"
        return {
            **self._counts,
            "dtype": self._dtype.name,
            "shards": self._shards,
            "starts": {"file": starts.name, "sha256": hash_file(starts)},
        }

    def _append(self, tokens: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
        """Write what the open file has room for; returns the rest."""
        if self._file is None:
            name = f"{self._side}-{len(self._shards):05d}.bin"
            self._file = (self._out / name).open("wb")
            self._shards.append({"file": name, "tokens": 0})
        shard = self._shards[-1]
        fitting = tokens[: self._shard_tokens - shard["tokens"]]
        self._file.write(fitting.tobytes())
        shard["tokens"] += len(fitting)
        if shard["tokens"] == self._shard_tokens:
            self._close_shard()
        return tokens[len(fitting) :]

    def _close_shard(self) -> None:
        if self._file is not None:
            _finish(self._file)
            self._shards[-1]["sha256"] = hash_file(self._out / self._shards[-1]["file"])
            self._file = None

    def _write_starts(self) -> None:
        self._starts.write(np.array(self._waiting, dtype="<i8").tobytes())
        self._waiting = []


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and behind every text of a corpus.

    The token that begins a text where the model expects one, and the one that ends it; where a vocabulary has no such
    end, what it puts around an encoder's input: [CLS] and [SEP].
    """
    around = tokenizer.encode_input("")
    if tokenizer.eos_id is None and len(around) == 2:
        return around[:1], around[1:]
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return begin, [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def _ignore(origin: Origin, bad: BadRow, shown: str) -> None:
    """Rows are counted when they are written; the passes before that only look."""


def _vocabulary(settings: CorpusSettings) -> Tokenizer:
    """What the corpus is tokenized with."""
    with progress("corpus: reading for the vocabulary", None, "characters") as tick:

        def texts() -> Iterator[str]:
            for piece in read_pieces(settings.sources, _ignore):
                tick.advance(len(piece.text))
                yield piece.text

        return learn_vocabulary(settings.vocabulary, texts())


def _cuts(settings: CorpusSettings) -> dict[str, int]:
    """The character of each file that what is held out begins with."""
    lengths: Counter[str] = Counter()
    for piece in read_pieces(settings.sources, _ignore):
        lengths[piece.origin.file] += len(piece.text)
    return {file: int(length * (1 - settings.heldout)) for file, length in lengths.items()}


def _sided(
    pieces: Iterable[Piece], settings: CorpusSettings, cuts: dict[str, int] | None
) -> Iterator[tuple[Side, Piece]]:
    """Each piece with its side; one that a cut goes through becomes two texts, one on each side."""
    held = False
    seen: Counter[str] = Counter()
    for piece in pieces:
        if cuts is None:
            held = bucket(piece.text) < settings.heldout * BUCKETS if piece.first else held
            yield "heldout" if held else "train", piece
        else:
            file = piece.origin.file
            yield from _cut(piece, cuts[file] - seen[file])
            seen[file] += len(piece.text)


def _cut(piece: Piece, border: int) -> Iterator[tuple[Side, Piece]]:
    """What of a piece lies before the border, at this character of it, and what behind."""
    length = len(piece.text)
    if border > 0:
        yield "train", replace(piece, text=piece.text[:border], last=piece.last or border <= length)
    if border < length:
        yield "heldout", replace(piece, text=piece.text[max(border, 0) :], first=piece.first or border >= 0)


def _chunks(sided: Iterable[tuple[Side, Piece]]) -> Iterator[list[tuple[Side, Piece]]]:
    """Pieces some at a time, so that all cores are busy and memory stays small."""
    chunk: list[tuple[Side, Piece]] = []
    characters = 0
    for side, piece in sided:
        chunk.append((side, piece))
        characters += len(piece.text)
        if characters >= TOGETHER:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer: Tokenizer, pieces: list[Piece]) -> list[list[int]]:
    """Token ids of each piece; text that looks like a special token stays text."""
    try:
        return tokenizer.encode_batch([piece.text for piece in pieces], special=False)
    except UnknownCharacter as unknown:
        piece = pieces[unknown.text]
        line = piece.origin.line + piece.text.count("\n", 0, unknown.place)
        fix = "learn the vocabulary from this text too, or give it a size: others then become <unk>"
        raise DanluError(unknown.what, where=f"{piece.origin.file}:{line}", fix=fix) from None


def _check(settings: CorpusSettings, sides: dict[Side, dict[str, Any]]) -> None:
    """Refuse to go on with nothing to learn from, or nothing to measure on where that was asked for."""
    where = ", ".join(source.path for source in settings.sources)
    if not sides["train"]["tokens"]:
        raise DanluError("there is no text to train on", where=where)
    if settings.heldout and not sides["heldout"]["tokens"]:
        what = f"nothing could be held out of {sides['train']['documents']:,} texts"
        fix = "take the last part of each file: heldout_from: end in a recipe, --heldout-from end in a command"
        raise DanluError(what, where=where, fix=fix)
    for side, about in sides.items():
        if about["unknown"]:
            share = about["unknown"] / about["tokens"]
            warn(f"corpus: {about['unknown']:,} tokens of {side} ({share:.3%}) are unknown to the vocabulary")


def _figures(about: dict[str, Any], sides: dict[Side, dict[str, Any]], rejected: dict[str, int]) -> Figures:
    named = {"documents": "texts", "tokens": "tokens", "characters": "characters", "unknown": "tokens"}
    counted = {f"{side}_{name}": figure(sides[side][name], unit) for side in sides for name, unit in named.items()}
    return {
        "vocabulary": figure(about["size"], "tokens"),
        **counted,
        "rejected": figure(sum(rejected.values()), "rows"),
    }


def _ours(out: Path) -> list[Path]:
    """What is written here."""
    names = [f"{side}-{part}.bin" for side in SIDES for part in ("[0-9]*", "documents")]
    return [file for name in (*names, REJECTED, INDEX, f".{INDEX}.*", TOKENIZER) for file in out.glob(name)]


def _clear(out: Path) -> None:
    for place in _ours(out):
        shutil.rmtree(place) if place.is_dir() else place.unlink()


def _finish(file: IO[bytes]) -> None:
    file.close()
    sync(Path(file.name))


# --- Reading tokens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """A finished corpus: its place and the content of its index."""

    path: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Raises DanluError where there is no finished corpus, or a file of it is missing or cut."""
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            what = "is no finished corpus: it has no readable index.json"
            raise DanluError(what, where=path, fix="build it again") from None
        if not isinstance(index, dict) or index.get("version") != VERSION:
            raise DanluError(f"is no corpus of version {VERSION}", where=path / INDEX, fix="build it again")
        corpus = cls(path, index)
        for name, size, _ in corpus._files():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes, the index says {size:,}"
                raise DanluError(what, where=path / name, fix="build the corpus again")
        return corpus

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What its texts were tokenized with."""
        return Tokenizer.load(self.path / TOKENIZER)

    def side(self, side: Side) -> Tokens:
        """The tokens of train or heldout."""
        about = self.index["sides"][side]
        shards = [self._array(one, about["dtype"], one["tokens"]) for one in about["shards"]]
        return Tokens(tuple(shards), self._array(about["starts"], "int64", about["documents"]))

    def verify(self) -> None:
        """Compare all files with the checksums in the index; raises DanluError naming the first that differs."""
        for name, _, sha256 in self._files():
            if hash_file(self.path / name) != sha256:
                what = "differs from its checksum in the index"
                raise DanluError(what, where=self.path / name, fix="build the corpus again")
        if self.tokenizer.fingerprint != self.index["vocabulary"]["fingerprint"]:
            what = "is another tokenizer than the one this corpus was made with"
            raise DanluError(what, where=self.path / TOKENIZER, fix="build the corpus again")

    def _array(self, about: dict[str, Any], dtype: str, count: int) -> FlatArray:
        return FlatArray(self.path / about["file"], dtype, count, about["sha256"])

    def _files(self) -> Iterator[tuple[str, int, str]]:
        """(name, bytes, SHA-256) of each file of tokens and of document starts."""
        for about in self.index["sides"].values():
            width = np.dtype(about["dtype"]).itemsize
            yield from ((one["file"], one["tokens"] * width, one["sha256"]) for one in about["shards"])
            yield about["starts"]["file"], about["documents"] * 8, about["starts"]["sha256"]


@dataclass(frozen=True)
class FlatArray:
    """Numbers in a file, one behind the other, little-endian; `sha256` tells it from another file of that name."""

    path: Path
    dtype: str
    count: int
    sha256: str

    def mapped(self) -> np.memmap:
        """The numbers, [count], read from disk where they are looked at."""
        return _map(self)


@dataclass(frozen=True)
class Tokens:
    """One long line of tokens over several files.

    Attributes:
        shards: uint16 or uint32, the line cut into files.
        documents: int64, where each text begins in the line, the first at 0.
    """

    shards: tuple[FlatArray, ...]
    documents: FlatArray

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def at(self, places: Ids) -> Ids:
        """The tokens that stand at these places of the line, int64, as many and in the same shape."""
        shards = np.searchsorted(self._ends, places, side="right")
        found = np.empty_like(places)
        for number in np.unique(shards).tolist():
            here, shard = shards == number, self.shards[number]
            found[here] = shard.mapped()[places[here] - (self._ends[number] - shard.count)]
        return found

    @cached_property
    def _ends(self) -> Ids:
        return np.cumsum([shard.count for shard in self.shards], dtype=np.int64)


@lru_cache(maxsize=MAPPED)
def _map(array: FlatArray) -> np.memmap:
    return np.memmap(array.path, dtype=np.dtype(array.dtype).newbyteorder("<"), mode="r", shape=(array.count,))


# --- Rows ---------------------------------------------------------------------------------------------------------


class Crops:
    """Windows cut one behind the other out of a line of tokens, whose borders lie elsewhere in every epoch.

    The line is closed to a ring and cut open at a place that changes with the epoch. Each token is the target once an
    epoch, but for the very first, which nothing stands before; the last window is filled up with padding. A window's
    last target is the token behind it. Where the line's end meets its beginning, one text does not see the other.

    Args:
        tokens: the line.
        window: tokens a row.
        seed: decides, with the number of the epoch, the borders and the order; None keeps both the same in all epochs,
            from the beginning to the end, as is right for measuring.
        cross_documents: tokens see those of the texts before theirs in the same window, as in GPT; otherwise each text
            is a segment of its own, and its first token is no target.

    Raises DanluError where the line is shorter than a window and the token behind it.
    """

    def __init__(self, tokens: Tokens, window: int, seed: int | None, cross_documents: bool = True) -> None:
        if window < 1:
            raise DanluError(f"a window of {window} tokens holds nothing", fix="use 1 or more")
        if len(tokens) <= window:
            what = f"{len(tokens):,} tokens are fewer than a window of {window:,} and the one behind it"
            raise DanluError(what, where=tokens.documents.path.parent, fix="add text, or shorten the window")
        self.tokens, self.window, self.seed, self.cross_documents = tokens, window, seed, cross_documents
        self._targets = len(tokens) - 1
        self._starts = np.zeros(1, dtype=np.int64) if cross_documents else tokens.documents.mapped()

    def __len__(self) -> int:
        """Rows an epoch."""
        return -(-self._targets // self.window)

    def batch(self, draws: Ids) -> Batch:
        """The rows of these draws, counted from 0 over all epochs: [B, window]."""
        epochs, rows = shuffled(draws, len(self), self.seed)
        columns = np.arange(self.window)
        distances = rows[:, None] * self.window + columns  # from where the ring is cut open
        places = (self._opened(epochs)[:, None] + distances) % self._targets
        held = distances < self._targets
        texts = np.searchsorted(self._starts, places, side="right") - 1
        following = self._starts[np.minimum(texts + 1, len(self._starts) - 1)]
        begins = self._starts[texts] == places
        begins[:, 0] = True
        tokens = np.where(held, self.tokens.at(places), 0)
        targets = np.where(held & (following != places + 1), self.tokens.at(places + 1), IGNORED)
        segments = np.where(held, begins.cumsum(axis=1), 0).astype(np.int32)
        positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
        return Batch(*map(torch.from_numpy, (tokens, targets, segments, positions)))

    def _opened(self, epochs: Ids) -> Ids:
        """Where the ring is cut open in each of these epochs, int64 [B]."""
        if self.seed is None:
            return np.zeros_like(epochs)
        met, which = np.unique(epochs, return_inverse=True)
        return np.array([key_of(self.seed, int(epoch), 1) % self._targets for epoch in met], dtype=np.int64)[which]
