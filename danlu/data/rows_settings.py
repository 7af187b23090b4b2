"""Settings of rows to learn from: which files on which side, how they are laid out, how long a row may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from danlu.data.corpus_settings import VocabularySettings
from danlu.settings import Settings

RowFormat = Literal["labelled", "tagged", "squad", "parallel", "pairs", "table"]
RowColumn = Literal["text", "second", "label", "words", "tags"]
# What each format can be learned for.
KINDS: dict[str, tuple[str, ...]] = {
    "labelled": ("classification", "regression"),
    "tagged": ("token_classification",),
    "squad": ("question_answering",),
    "parallel": ("sequence_to_sequence", "contrastive"),
    "pairs": ("sequence_to_sequence", "contrastive"),
}
# The columns that a table needs, and whether a second text may stand beside.
COLUMNS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("text", "label"): ("classification", "regression"),
    ("text", "second", "label"): ("classification", "regression"),
    ("words", "tags"): ("token_classification",),
    ("text", "second"): ("sequence_to_sequence", "contrastive"),
}
Files = tuple[str, ...]


class RowsSettings(Settings):
    """Which rows are learned from, which are held out, and which are for the very end."""

    train: Files = Field(min_length=1, description="files to learn from; of parallel text two, line by line")
    heldout: Files = Field((), description="files to measure on while training")
    test: Files = Field((), description="files to measure the finished model on, once")
    format: RowFormat = Field(
        description="labelled: lines of a label, a space and a text; tagged: a word, a tab and its tag a line, an empty"
        " line between sentences (CoNLL); squad: questions as SQuAD's files; parallel: two files whose lines belong"
        " together; pairs: lines of a text, a tab and another; table: .jsonl, .json, .csv, .tsv or .parquet with"
        " columns"
    )
    columns: dict[RowColumn, str | int] = Field(
        {},
        description="of a table, which column is which, by name, or by number from 1 where there is no header: text and"
        " label, perhaps second; words and tags; or text and second, read and written",
    )
    swap: bool = Field(False, description="of pairs: the second text comes first")
    encoding: str = Field("utf-8", description="of the files; tables are UTF-8")
    joiner: str = Field(
        " ", description="what stands between two words of tagged rows; empty where words are Chinese characters"
    )
    limit: int = Field(128, ge=4, description="tokens of a row at most, what the tokenizer puts around included")
    written: int | None = Field(
        None, ge=2, description="tokens of what is to be written at most, by default limit (sequence_to_sequence)"
    )
    truncate: bool = Field(False, description="cut longer rows, and say how many; otherwise they are an error")
    vocabulary: VocabularySettings | None = Field(
        None, description="how text becomes tokens, learned from the rows to train on; with a base the base's own"
    )

    @field_validator("train", "heldout", "test", mode="before")
    @classmethod
    def _one_file_is_a_list_of_one(cls, value: Any) -> Any:
        return (str(value),) if isinstance(value, str | Path) else value

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _bare_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _belongs_together(self) -> RowsSettings:
        if bool(self.columns) != (self.format == "table"):
            raise ValueError("columns belong to format: table, which needs them")
        if self.format == "table" and not self.kinds:
            raise ValueError("name the columns text and label (and second), words and tags, or text and second")
        if any(isinstance(column, int) and column < 1 for column in self.columns.values()):
            raise ValueError("columns are numbered from 1")
        if self.format == "parallel":
            for side in ("train", "heldout", "test"):
                if len(getattr(self, side)) not in (0, 2):
                    raise ValueError(f"{side}: parallel text lies in two files, what is read and what is written")
        if self.swap and "contrastive" not in self.kinds:
            raise ValueError("swap is for rows of two texts")
        if self.joiner != " " and "token_classification" not in self.kinds:
            raise ValueError("joiner is for tagged words")
        if self.written is not None and "sequence_to_sequence" not in self.kinds:
            raise ValueError("written is for rows of what is read and what is written")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The objectives that such rows are for; none where columns are missing."""
        if self.format != "table":
            return KINDS[self.format]
        return next((kinds for names, kinds in COLUMNS.items() if set(names) == set(self.columns)), ())

    def beside(self, folder: Path) -> RowsSettings:
        """The same settings with relative file paths starting at `folder`."""
        sides = {
            side: tuple(str(folder / Path(file).expanduser()) for file in getattr(self, side))
            for side in ("train", "heldout", "test")
        }
        vocabulary = self.vocabulary
        if vocabulary is not None and vocabulary.base is not None:
            vocabulary = vocabulary.model_copy(update={"base": folder / vocabulary.base.expanduser()})
        return self.model_copy(update={**sides, "vocabulary": vocabulary})
