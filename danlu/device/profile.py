"""What was measured of a device, in a file that travels, and how long a model will take there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from danlu.artifact import library_version, write_json
from danlu.console import warn
from danlu.device.stack import bytes_per_weight
from danlu.device.workload import Matrix, Workload
from danlu.errors import DanluError
from danlu.settings import Settings

ENGINE = "llama-cpp-python"
AGAIN = "danlu device probe --out device.json"
DECODE = 1  # tokens computed together in decoding
READ = 512  # tokens of a prompt computed together
DEPTH = 128  # tokens in the cache where nothing else is said


class Rate(Settings):
    """How long a matrix takes.

    Attributes:
        type: its number format. columns: of its rows.
        batch: tokens computed together.
        seconds: for each of its numbers, whatever the batch.
    """

    type: str
    columns: int = Field(gt=0)
    batch: int = Field(gt=0)
    seconds: float = Field(gt=0)


class Rest(Settings):
    """What a step takes beside matrices.

    Attributes:
        batch: tokens computed together.
        layer: seconds a layer. step: seconds a step.
    """

    batch: int = Field(gt=0)
    layer: float = Field(ge=0)
    step: float = Field(ge=0)


class CacheRate(Settings):
    """How long looking at keys and values takes.

    Attributes:
        type: their number format.
        batch: tokens computed together.
        seconds: for each token of the batch, token looked at, layer, and feature of the heads.
    """

    type: str
    batch: int = Field(gt=0)
    seconds: float = Field(ge=0)


class DeviceProfile(Settings):
    """What was measured of a device.

    Attributes:
        engine: version of llama-cpp-python. processor, instructions: what it ran on.
        threads: that computed.
        memory: bytes of RAM. bandwidth: bytes read from it a second.
        matrices, rest, caches: what takes time.
        word: seconds to choose among the vocabulary, for each word.
        seconds: that measuring took.
    """

    engine: str
    processor: str
    instructions: tuple[str, ...]
    threads: int = Field(gt=0)
    memory: int = Field(gt=0)
    bandwidth: float = Field(gt=0)
    matrices: tuple[Rate, ...] = Field(min_length=1)
    rest: tuple[Rest, ...] = Field(min_length=1)
    caches: tuple[CacheRate, ...] = Field(min_length=1)
    word: float = Field(ge=0)
    seconds: float = Field(ge=0)

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """Read one. Warns where it was made with another version of the engine than the one here.

        Raises DanluError where it is no profile.
        """
        try:
            made = cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DanluError(f"cannot be read: {error.strerror}", where=path, fix=f"make one: {AGAIN}") from None
        except (UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
            about = str(error).splitlines()[0]
            raise DanluError(f"is no device profile: {about}", where=path, fix=f"make one: {AGAIN}") from None
        here = library_version(ENGINE)
        if made.engine != here:
            warn(f"{path} was measured with {ENGINE} {made.engine}, and {here} is here: speeds may differ. {AGAIN}")
        return made

    def save(self, path: Path) -> None:
        """Write it, aside and renamed."""
        write_json(path, self.plain())

    @property
    def types(self) -> tuple[str, ...]:
        """Number formats of matrices that were measured."""
        return tuple(dict.fromkeys(rate.type for rate in self.matrices))

    def knows(self, caches: Sequence[str]) -> bool:
        """Whether looking at keys and values was measured in each of these formats."""
        return {rate.type for rate in self.caches} >= set(caches)

    def matrix_seconds(self, matrix: Matrix, batch: int = DECODE) -> float:
        """Seconds that a matrix takes in a step.

        Between measured numbers of columns the time of a number is a line over their inverse: so much for each number
        and so much for each row.

        Raises DanluError where its format, or the batch, was not measured.
        """
        known = sorted((rate.columns, rate.seconds) for rate in self.matrices if _is(rate, matrix.type, batch))
        if not known:
            what = f"says nothing of {matrix.type} with {batch:,} tokens at once; it knows {', '.join(self.types)}"
            raise DanluError(what, where="the device profile", fix=f"measure again: {AGAIN}")
        inverse = [1 / columns for columns, _ in reversed(known)]
        each = float(np.interp(1 / matrix.columns, inverse, [seconds for _, seconds in reversed(known)]))
        return matrix.rows * matrix.columns * each

    def rest_seconds(self, workload: Workload, batch: int = DECODE, depth: float = DEPTH, cache: str = "f16") -> float:
        """Seconds of a step beside matrices, `depth` tokens being looked at. Raises DanluError as `matrix_seconds`."""
        rest = next((rest for rest in self.rest if rest.batch == batch), None)
        looking = next((rate for rate in self.caches if rate.type == cache and rate.batch == batch), None)
        if rest is None or looking is None:
            what = f"says nothing of a cache of {cache} with {batch:,} tokens at once"
            raise DanluError(what, where="the device profile", fix=f"measure again: {AGAIN}")
        looked = batch * depth * workload.layers * workload.attention
        return rest.step + rest.layer * workload.layers + self.word * workload.words + looking.seconds * looked

    def seconds_for(self, workload: Workload, batch: int = DECODE, depth: float = DEPTH, cache: str = "f16") -> float:
        """Seconds of a step of `batch` tokens. Raises DanluError as `matrix_seconds`."""
        matrices = sum(self.matrix_seconds(matrix, batch) for matrix in workload.matrices)
        return matrices + self.rest_seconds(workload, batch, depth, cache)

    def reads(self, workload: Workload, cache: str = "f16") -> bool:
        """Whether all that `prompt_seconds` needs was measured."""
        types = {matrix.type for matrix in workload.matrices}
        known = {rate.type for rate in self.matrices if rate.batch == READ}
        looked = any(rate.type == cache and rate.batch == READ for rate in self.caches)
        return types <= known and looked and any(rest.batch == READ for rest in self.rest)

    def prompt_seconds(self, workload: Workload, cache: str = "f16") -> float:
        """Seconds of reading `READ` tokens into an empty cache. A word is chosen behind the last alone, so the head
        takes what it takes in decoding. Raises DanluError as `matrix_seconds`."""
        head = [matrix for matrix in workload.matrices if matrix.rows == workload.words]
        others = replace(workload, matrices=tuple(matrix for matrix in workload.matrices if matrix not in head))
        last = sum(self.matrix_seconds(matrix) for matrix in head)
        return last + self.seconds_for(others, READ, READ / 2, cache)


def _is(rate: Rate, type: str, batch: int) -> bool:
    return rate.type == type and rate.batch == batch


def summary(profile: DeviceProfile) -> list[dict[str, str]]:
    """A line a number format: nanoseconds of a number in decoding, by columns, and gigabytes read a second there."""
    lines = []
    for type in profile.types:
        rates = [rate for rate in profile.matrices if _is(rate, type, DECODE)]
        read = bytes_per_weight(type) / min(rate.seconds for rate in rates) / 1e9
        each = ", ".join(f"{rate.seconds * 1e9:.4f} ({rate.columns:,})" for rate in rates)
        lines.append({"type": type, "nanoseconds": each, "bandwidth": f"{read:.1f}"})
    return lines
