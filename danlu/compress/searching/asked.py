"""What a search is given, and the texts that it is fitted to, compared on and certified on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf

from danlu.artifact import canonical, hash_file
from danlu.compress.apart import check_apart
from danlu.compress.quantizing.formats.known import FORMATS
from danlu.compress.quantizing.mixes import matrices
from danlu.compress.quantizing.quantizer import calibration_rows
from danlu.compress.searching.sensitivity import formats
from danlu.compress.searching.settings import Preference, SearchSettings
from danlu.device.engine import CACHES
from danlu.device.measure import Document
from danlu.device.profile import DeviceProfile
from danlu.device.settings import Target
from danlu.device.stack import fills
from danlu.device.task import Asked as Question
from danlu.device.task import questions_of
from danlu.device.texts import documents_of
from danlu.device.workload import Matrix, Workload
from danlu.errors import DanluError, one_of
from danlu.gguf_header import read_header
from danlu.model.checkpoint import Checkpoint

KEPT_APART = 0.15  # of the calibration text, its end: candidates are compared on it, and nothing is fitted to it
# What is kept for going on depends on these settings; on the others it does not.
KEPT_SETTINGS = {
    "context", "threads", "gradient_tokens", "calibration_tokens", "refining_passes", "tuning_steps", "chosen_tokens",
}  # fmt: skip
KEPT_FORM = 3  # of what is kept for going on: what another version kept is left aside, not misread


@dataclass(frozen=True)
class Asked:
    """What a search is given.

    Attributes:
        checkpoint: the original.
        target: what is asked. settings: how much is done for it.
        calibration, heldout: texts.
        task: a file of questions, or None.
        profile: of another device, or None for this one.
    """

    checkpoint: Checkpoint
    target: Target
    settings: SearchSettings
    calibration: str
    heldout: str
    task: Path | None
    profile: DeviceProfile | None

    @property
    def digest(self) -> str:
        """Of all that what is kept for going on depends on."""
        parts = {
            "model": self.checkpoint.digest,
            "calibration": hashlib.sha256(self.calibration.encode()).hexdigest(),
            "profile": self.profile and self.profile.plain(),
            "settings": self.settings.model_dump(mode="json", include=KEPT_SETTINGS),
            "types": self.types,
            "form": KEPT_FORM,
        }
        return canonical_digest(parts)[:12]

    @cached_property
    def ingredients(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Settings and inputs, by digest, of the card; files as they are when this is first asked for."""
        texts = {"calibration": self.calibration, "heldout": self.heldout}
        inputs = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        inputs |= {} if self.task is None else {"task": hash_file(self.task)}
        inputs |= {} if self.profile is None else {"profile": canonical_digest(self.profile.plain())}
        settings = {"target": self.target.plain(), "search": self.settings.plain()}
        return settings, {"model": self.checkpoint.digest, **inputs}

    @property
    def limits(self) -> str:
        """Of what is asked of the file: what was made for other limits tells of costs, and is no try at these."""
        return canonical_digest({"target": self.target.model_dump(mode="json"), "prefer": self.prefer})[:12]

    @property
    def types(self) -> tuple[str, ...]:
        """Number formats that are tried: those that were named; where none were, the usual ones and those that the
        model's own file holds, which lose nothing."""
        settings = self.settings
        if "types" in settings.model_fields_set:
            return settings.types
        return tuple(dict.fromkeys([*settings.types, *own_types(self.checkpoint)]))

    @property
    def wanted_caches(self) -> tuple[str, ...]:
        """Number formats of keys and values that were named; where none were, the usual ones, and F16 alone where no
        memory is limited, as others win nothing else."""
        named = "caches" in self.settings.model_fields_set
        return self.settings.caches if named or self.target.memory is not None else CACHES[:1]

    @property
    def caches(self) -> tuple[str, ...]:
        """Those of them whose blocks the model's heads fill."""
        return tuple(cache for cache in self.wanted_caches if fills(cache, self.checkpoint.config.head_width))

    def may_hold(self, cache: str) -> bool:
        """Whether a file that holds keys and values so may be chosen: where formats of them were named, no other."""
        return "caches" not in self.settings.model_fields_set or cache in self.caches

    @property
    def context(self) -> int:
        """Tokens that keys and values are held for."""
        return min(self.settings.context, self.checkpoint.config.context)

    @property
    def prefer(self) -> Preference:
        """What is bettered within the limits."""
        limited = self.target.memory or self.target.speed or self.target.file_size
        return self.settings.prefer or ("best" if limited else "smallest")


def own_types(checkpoint: Checkpoint) -> list[str]:
    """The number formats that matrices are stored in, of those that are known; none for a directory."""
    if not checkpoint.path.is_file():
        return []
    kinds = {gguf.GGMLQuantizationType(tensor.type).name.lower() for tensor in read_header(checkpoint.path).tensors}
    return sorted(kinds & set(FORMATS))


def check(asked: Asked) -> None:
    """Raise DanluError for what can be known to be wrong before any work: texts, formats of keys and values, a profile
    that does not know what this model needs."""
    _check_caches(asked)
    check_apart(asked.calibration, asked.heldout)
    heldout_documents(asked)
    calibration_rows(asked.checkpoint, parts(asked.calibration)[0], asked.settings.calibration_tokens)
    if asked.profile is not None:
        _check_profile(asked, asked.profile)


def _check_caches(asked: Asked) -> None:
    where, width = "--caches", asked.checkpoint.config.head_width
    for cache in asked.settings.caches:
        if cache not in CACHES:
            raise DanluError(f"keys and values cannot be held as {cache}", where=where, fix=one_of(cache, CACHES))
    left = [cache for cache in asked.wanted_caches if cache not in asked.caches]
    if left and "caches" in asked.settings.model_fields_set:
        what = f"heads of {width} numbers do not fill blocks of {left[0]}, so keys and values cannot be held so"
        fix = f"name {' or '.join(cache for cache in CACHES if fills(cache, width))}"
        raise DanluError(what, where=where, fix=fix)


def _check_profile(asked: Asked, profile: DeviceProfile) -> None:
    """A profile must know the model's matrices, keys and values; smaller models are made of the same formats."""
    for columns in {shape[-1] for shape in matrices(asked.checkpoint).values()}:
        for form in formats(asked.types, columns):
            profile.matrix_seconds(Matrix(form, 1, columns))
    for cache in asked.caches:
        profile.rest_seconds(Workload((), 1, 1, 1), cache=cache)


def questions(asked: Asked) -> list[Question]:
    """Of the user's own task; none where there is no file. Raises DanluError where it holds none."""
    if asked.task is None:
        return []
    return questions_of(asked.task, asked.checkpoint.tokenizer, asked.checkpoint.config.context)


def heldout_documents(asked: Asked) -> list[Document]:
    """What the certificate is measured on."""
    settings, tokenizer = asked.settings, asked.checkpoint.tokenizer
    return documents_of(asked.heldout, tokenizer, settings.heldout_tokens, "--heldout", asked.context)


def parts(calibration: str) -> tuple[str, str]:
    """What rounding is fitted to, and what candidates are compared on."""
    place = round(len(calibration) * (1 - KEPT_APART))
    return calibration[:place], calibration[place:]


def canonical_digest(value: object) -> str:
    """SHA-256 of JSON-ready values."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
