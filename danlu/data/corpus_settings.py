"""Settings of a corpus to pre-train on: which texts, which vocabulary, what is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from danlu.data.settings import Source
from danlu.settings import Settings, Share

BYTES = 256  # symbols of a byte-level vocabulary before any merge
WORDPIECE_SPECIAL = 5  # [PAD], [UNK], [CLS], [SEP] and [MASK]


class VocabularySettings(Settings):
    """How text becomes tokens: a vocabulary learned from the corpus, or that of a checkpoint."""

    kind: Literal["characters", "bytes", "bpe", "wordpiece", "from"] = Field(
        "bpe",
        description="each character or byte of the corpus, merged bytes (GPT), pieces of words (BERT), or the"
        " vocabulary of a checkpoint",
    )
    size: int | None = Field(
        None,
        gt=0,
        description="tokens, special ones included (bpe, wordpiece); with characters, the most frequent are kept and"
        " the others become <unk>; default all of them",
    )
    base: Path | None = Field(
        None, description="a Hugging Face directory or .gguf file whose vocabulary is used (from)"
    )
    special: tuple[Literal["bos", "eos", "pad", "mask"], ...] = Field(
        ("eos",),
        description="special tokens that are added: begin and end of a text, padding, mask (characters, bytes, bpe);"
        " wordpiece has its own",
    )
    sentinels: int = Field(
        0, ge=0, le=10_000, description="tokens <extra_id_0>, <extra_id_1> ... that stand for spans, as in T5"
    )
    lowercase: bool = Field(False, description="capital letters and accents go (wordpiece)")
    minimum_frequency: int = Field(2, ge=1, description="rarer pairs are not merged (bpe, wordpiece)")
    learn_characters: int = Field(
        10_000_000,
        ge=1_000_000,
        description="merges are learned from an even sample of the corpus of at most so many characters",
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> VocabularySettings:
        if (self.base is not None) != (self.kind == "from"):
            raise ValueError("base names the checkpoint for kind: from, and belongs to no other kind")
        if self.kind in ("bytes", "from") and self.size is not None:
            raise ValueError(f"a vocabulary of kind {self.kind} has the size it has; leave out size")
        if self.kind in ("from", "wordpiece") and self.special != ("eos",):
            raise ValueError(f"a vocabulary of kind {self.kind} has special tokens of its own; leave out special")
        if self.kind == "from" and self.sentinels:
            raise ValueError("a checkpoint's vocabulary is used as it is; leave out sentinels")
        if self.lowercase and self.kind != "wordpiece":
            raise ValueError("lowercase belongs to kind: wordpiece; the other kinds keep the text as it is")
        if len(set(self.special)) != len(self.special):
            raise ValueError("special names a token twice")
        self._has_room()
        return self

    def _has_room(self) -> None:
        least = {"bpe": BYTES + len(self.special), "wordpiece": WORDPIECE_SPECIAL + 1}.get(self.kind)
        if least is None:
            return
        if self.size is None:
            raise ValueError(f"a vocabulary of kind {self.kind} needs a size, say 8192")
        if self.size < least + self.sentinels:
            raise ValueError(f"size {self.size} is too small: {least + self.sentinels} is the least")


class CorpusSettings(Settings):
    """Which texts are learned from, in which tokens, and what of them is held out."""

    sources: tuple[Source, ...] = Field(min_length=1, description="where the texts come from, one or more")
    vocabulary: VocabularySettings = Field(description="how text becomes tokens")
    heldout: Share = Field(0.05, ge=0, lt=1, description="share of the text kept back to measure with, say 5%")
    heldout_from: Literal["documents", "end"] = Field(
        "documents",
        description="what is held out: documents, chosen by a hash of their text, or the last characters of each file",
    )
    shard_tokens: int = Field(2**27, ge=1, description="tokens a file holds at most")

    @field_validator("sources", mode="before")
    @classmethod
    def _one_source_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path | dict | Source) else value

    @field_validator("sources")
    @classmethod
    def _sources_are_text(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        for source in sources:
            if source.format not in ("auto", "text") or set(source.columns) - {"text"}:
                raise ValueError(f"{source.path}: a corpus is plain text; name no columns but text")
            if source.split is not None:
                raise ValueError(f"{source.path}: split is not read here; heldout says what is held out")
        return sources

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _bare_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def beside(self, folder: Path) -> CorpusSettings:
        """The same settings with relative file paths starting at `folder`."""
        base = self.vocabulary.base
        located = None if base is None else folder / base.expanduser()
        return self.model_copy(
            update={
                "sources": tuple(source.beside(folder) for source in self.sources),
                "vocabulary": self.vocabulary.model_copy(update={"base": located}),
            }
        )
