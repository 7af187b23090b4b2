"""Settings of the text to learn from: one corpus, or several by weight that share a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from danlu.data.corpus_settings import CorpusSettings
from danlu.data.settings import Source
from danlu.settings import Settings


class WeightedSources(Settings):
    """One corpus of several."""

    sources: tuple[Source, ...] = Field(min_length=1, description="where its texts come from, one or more")
    weight: float | None = Field(
        None,
        gt=0,
        description="its share of the rows, to any sum; by default all corpora are gone through equally often",
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _one_source_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path | dict | Source) else value


class TextSettings(CorpusSettings):
    """Which texts are learned from, in which tokens: `sources` of one corpus, or `corpora` with weights."""

    sources: tuple[Source, ...] = Field((), description="where the texts come from, one or more")
    corpora: dict[str, WeightedSources] = Field(
        {},
        description="in place of sources: several corpora by name, mixed by weight, in one vocabulary learned of all",
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> TextSettings:
        if bool(self.sources) == bool(self.corpora):
            raise ValueError("name either sources, of one corpus, or corpora, several with weights")
        self._sources_are_text(self.all_sources)
        if len({part.weight is None for part in self.corpora.values()}) > 1:
            raise ValueError("give each corpus a weight, or none")
        if any(not name.replace("-", "").replace("_", "").isalnum() for name in self.corpora):
            raise ValueError("names of corpora are letters, digits, - and _")
        return self

    @property
    def weights(self) -> dict[str, float] | None:
        """Of the corpora by name; None for their sizes."""
        given = {name: part.weight for name, part in self.corpora.items() if part.weight is not None}
        return given or None

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """Of all corpora, in their order."""
        return self.sources or tuple(source for part in self.corpora.values() for source in part.sources)

    def one(self, sources: tuple[Source, ...], vocabulary: Path | None = None) -> CorpusSettings:
        """The settings of one corpus.

        Args: vocabulary: a directory whose vocabulary is used; None for the settings' own.
        """
        plain = self.model_dump(exclude={"corpora", "sources"})
        if vocabulary is not None:
            plain["vocabulary"] = {"kind": "from", "base": vocabulary}
        return CorpusSettings(sources=sources, **plain)

    def beside(self, folder: Path) -> TextSettings:
        """The same settings with relative file paths starting at `folder`."""
        located = {
            name: part.model_copy(update={"sources": tuple(source.beside(folder) for source in part.sources)})
            for name, part in self.corpora.items()
        }
        base = self.vocabulary.base
        vocabulary = self.vocabulary.model_copy(update={"base": base and folder / base.expanduser()})
        sources = tuple(source.beside(folder) for source in self.sources)
        return self.model_copy(update={"sources": sources, "corpora": located, "vocabulary": vocabulary})
