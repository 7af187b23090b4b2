"""What to learn from, and how it is cleaned, split and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from danlu.settings import Settings, Share

HUB = "hub:"
PYTHON_DOCS = "python-docs"

FormatName = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"]
Column = Literal["messages", "prompt", "input", "completion", "system", "history", "text", "group"]
Side = Literal["train", "heldout"]


class Source(Settings):
    """One place rows come from. In a recipe a bare string is enough: `sources: [rows.jsonl]`."""

    path: str = Field(min_length=1, description="a file, a directory, a glob, hub:OWNER/NAME, or python-docs")
    format: FormatName = Field("auto", description="how rows are laid out; auto looks at the first rows and says so")
    columns: dict[Column, str | int] = Field(
        default_factory=dict,
        description="which column is which, by name, or by number from 1 in a table without header",
    )
    split: Side | None = Field(None, description="put all rows of this source on one side: train or heldout")
    limit: int | None = Field(None, gt=0, description="read only the first rows, at most this many")
    _home: Path | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @field_validator("path", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("columns")
    @classmethod
    def _columns_make_an_example(cls, columns: dict[Column, str | int]) -> dict[Column, str | int]:
        given = set(columns) - {"group"}
        if given and not (given == {"text"} or "messages" in given or {"prompt", "completion"} <= given):
            raise ValueError("name the columns for prompt and completion, or for messages, or for text")
        if any(isinstance(column, int) and column < 1 for column in columns.values()):
            raise ValueError("columns are numbered from 1")
        return columns

    @property
    def is_hub(self) -> bool:
        return self.path.startswith(HUB)

    @property
    def is_python_docs(self) -> bool:
        return self.path == PYTHON_DOCS

    def beside(self, folder: Path) -> Source:
        """The same source with a relative file path starting at `folder`, say the recipe's own."""
        if self.is_hub or self.is_python_docs:
            return self
        located = self.model_copy(update={"path": str(folder / Path(self.path).expanduser())})
        located._home = folder
        return located

    def name_of(self, file: Path) -> str:
        """How a file is named in records: from the folder that paths start at, where it lies in there."""
        inside = self._home is not None and file.is_relative_to(self._home)
        return str(file.relative_to(self._home)) if inside and self._home is not None else str(file)


class DataSettings(Settings):
    """Which rows are learned from, and how they are cleaned, split and packed."""

    sources: tuple[Source, ...] = Field(min_length=1, description="where the rows come from, one or more")
    heldout: Share = Field(0.05, ge=0, lt=1, description="share of the examples kept back to measure with, say 5%")
    window: int = Field(512, ge=8, le=2**20, description="tokens a row; what is served later may be longer")
    system: str | None = Field(None, min_length=1, description="a system message for chats that bring none")
    deduplicate: Literal["near", "exact", "none"] = Field(
        "near", description="which copies of an example are left out: near includes exact"
    )
    similarity: Share = Field(
        0.8, ge=0.5, le=1, description="two examples sharing this much of their wording are near duplicates"
    )
    minimum_characters: int = Field(1, ge=1, description="shorter answers and texts are rejected")
    maximum_characters: int | None = Field(None, gt=0, description="longer examples are rejected, whatever the window")

    @field_validator("sources", mode="before")
    @classmethod
    def _one_source_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path | dict | Source) else value

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> DataSettings:
        if self.maximum_characters is not None and self.maximum_characters < self.minimum_characters:
            raise ValueError("maximum_characters is below minimum_characters")
        return self

    def beside(self, folder: Path) -> DataSettings:
        """The same settings with relative file paths starting at `folder`."""
        return self.model_copy(update={"sources": tuple(source.beside(folder) for source in self.sources)})
