"""Copies of examples: exact ones, and near ones by MinHash (Broder 1997) and locality-sensitive hashing.

Hashes only propose pairs; the wording itself decides, by the share of word triples two examples have in common
(Jaccard similarity), so nothing is left out because of a collision. All hashes lie on disk, sorted apart a part at a
time; in memory there are 9 bytes an example.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from danlu.data.permutation import mix
from danlu.data.split import digest
from danlu.errors import need_extra

PERMUTATIONS = 64  # hashes in a MinHash signature
WEIGHTS = (0.1, 0.9)  # proposing a pair too many costs a comparison, one too few leaves a copy: lean to too many
SHINGLE = 3  # words, or characters where words are not spaced
PARTS = 64  # files the hashes are spread over; one at a time is in memory: 2.5 bytes an example
BLOCK = 2**16  # examples whose proposed pairs are in memory at a time
KEPT, EXACT, NEAR = 0, 1, 2

# A word is a run of letters or digits; a character of a script that puts no blanks between words stands alone, and so
# does each sign, for 3 + 4 is not 3 - 4.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")

HASHED = np.dtype([("key", "<u8"), ("row", "<i8")])
PAIR = np.dtype([("row", "<i8"), ("earlier", "<i8")])
Hashes = npt.NDArray[np.uint32]


def shingles(text: str) -> Hashes:
    """Hashes of every three neighbouring words, [n] uint32; of all words where there are fewer; empty for no words."""
    words = [zlib.crc32(word.encode()) for word in WORD.findall(text.casefold())]
    if not words:
        return np.empty(0, dtype=np.uint32)
    hashes = np.array(words, dtype=np.uint64)
    width = min(SHINGLE, len(words))
    joined = hashes[width - 1 :].copy()
    for distance in range(1, width):
        joined += mix(hashes[width - 1 - distance : len(hashes) - distance] + np.uint64(distance << 32))
    return (mix(joined) >> np.uint64(32)).astype(np.uint32)


def similarity(one: Hashes, other: Hashes) -> float:
    """Jaccard similarity of two sets of shingles: shared / all."""
    first, second = set(one.tolist()), set(other.tolist())
    both = len(first & second)
    return both / (len(first) + len(second) - both) if first or second else 0.0


class CopyFinder:
    """Finds, for every example, the first one it is a copy of.

    Args:
        directory: an empty place for its files.
        near: look for near copies too, not only for exact ones.
        threshold: the similarity from which an example is a near copy.

    Raises DanluError where near copies are asked for and datasketch is not installed.
    """

    def __init__(self, directory: Path, near: bool, threshold: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._threshold = threshold
        self._signer = _Signer(threshold) if near else None
        self._parts = [directory / f"hashes-{number}" for number in range(PARTS)]
        self._count = 0

    def add(self, wordings: list[str]) -> None:
        """Take in the next examples' wordings, in order."""
        rows = np.arange(self._count, self._count + len(wordings))
        found = [_records(np.array([digest(text) for text in wordings], dtype=np.uint64), rows)]
        if self._signer is not None:
            found.extend(self._signer.records(wordings, rows))
        self._count += len(wordings)
        records = np.concatenate(found)
        part = records["key"] >> np.uint64(64 - PARTS.bit_length() + 1)
        order = np.argsort(part, kind="stable")
        for number, chunk in enumerate(np.split(records[order], np.searchsorted(part[order], np.arange(1, PARTS)))):
            with self._parts[number].open("ab") as file:
                file.write(chunk.tobytes())

    def leaders(self, wording: Callable[[int], str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Who copies whom.

        Args:
            wording: the text of an example, by its number.

        Returns: (int64 [n], the number of the example each is a copy of, its own for one that is kept;
        uint8 [n], KEPT, EXACT or NEAR). Examples are judged in order: one is left out only if it equals an earlier
        one, or is near to an earlier one that is itself kept.
        """
        leader = np.arange(self._count, dtype=np.int64)
        kind = np.zeros(self._count, dtype=np.uint8)
        near = lru_cache(maxsize=8192)(lambda row: shingles(wording(row)))
        for row, earlier in self._proposals():
            text = wording(row)
            same = next((other for other in earlier if wording(other) == text), None)
            if same is not None:
                leader[row], kind[row] = leader[same], EXACT
                continue
            for other in dict.fromkeys(leader[earlier].tolist()) if self._signer is not None else ():
                if similarity(near(other), near(row)) >= self._threshold:
                    leader[row], kind[row] = other, NEAR
                    break
        return leader, kind

    def _proposals(self) -> Iterator[tuple[int, list[int]]]:
        """(row, earlier rows it may be a copy of), rows ascending."""
        for part in filter(Path.exists, self._parts):
            pairs = _pairs(np.fromfile(part, dtype=HASHED))
            blocks = pairs["row"] // BLOCK
            for number in np.unique(blocks):
                with (self._directory / f"pairs-{number}").open("ab") as file:
                    file.write(pairs[blocks == number].tobytes())
        for number in range(-(-self._count // BLOCK)):
            proposed = self._directory / f"pairs-{number}"
            if proposed.exists():
                pairs = np.unique(np.fromfile(proposed, dtype=PAIR))
                rows, begins = np.unique(pairs["row"], return_index=True)
                for row, earlier in zip(rows.tolist(), np.split(pairs["earlier"], begins[1:]), strict=True):
                    yield row, earlier.tolist()


class _Signer:
    """MinHash signatures cut into bands: examples equal in one band are proposed as a pair."""

    def __init__(self, threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise need_extra("datasketch", "data") from None
        index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=WEIGHTS)
        self._bands: list[tuple[int, int]] = index.hashranges
        self._sign: Any = MinHash.generator

    def records(self, wordings: list[str], rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[Any]]:
        """One record an example and band; none for an example without words."""
        hashes = [shingles(text).tolist() for text in wordings]
        worded = np.array([bool(one) for one in hashes], dtype=bool)
        signed = self._sign([one for one in hashes if one], num_perm=PERMUTATIONS, hashfunc=int)
        values = [one.hashvalues for one in signed]
        if not values:
            return
        signatures = np.stack(values).astype(np.uint64)
        for band, (begin, end) in enumerate(self._bands):
            key = np.full(len(signatures), band + 1, dtype=np.uint64)
            for column in range(begin, end):
                key = mix(key ^ signatures[:, column])
            yield _records(key, rows[worded])


def _records(keys: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    made = np.empty(len(keys), dtype=HASHED)
    made["key"], made["row"] = keys, rows
    return made


def _pairs(records: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Proposals among records in order of rows: rows with an equal key, each with the one before it and with the first.

    So there are at most two a record, however many rows meet in one bucket.
    """
    records = records[np.argsort(records["key"], kind="stable")]
    keys, rows = records["key"], records["row"]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = keys[1:] != keys[:-1]
    first = rows[np.maximum.accumulate(np.where(starts, np.arange(len(rows)), 0))] if len(rows) else rows
    later = np.flatnonzero(~starts)
    made = np.empty(2 * len(later), dtype=PAIR)
    made["row"] = np.concatenate([rows[later], rows[later]])
    made["earlier"] = np.concatenate([rows[later - 1], first[later]])
    return made
