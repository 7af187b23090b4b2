"""What pruning starts from and what it leaves: weights that are read one after another, kept on disk while they are
changed, and written as an ordinary directory with a card."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu.artifact import CARD, Figures, code_version, inventory, make_card, peak_memory, write_json
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.config import ModelConfig
from danlu.model.families.known import family_for
from danlu.model.stored import Make, without_memory
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """A decoder whose weights are read one by one, wherever they lie.

    Attributes:
        config: its shape.
        makers: read each weight, by its name, in fp32 and in memory of its own.
    """

    config: ModelConfig
    makers: Mapping[str, Make]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Source:
        """A checkpoint's."""
        return cls(checkpoint.config, checkpoint.model.makers(torch.float32))

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(weight.numel() for weight in without_memory(self.config).state_dict().values())


@dataclass
class Shelf:
    """Weights on disk, in fp32, so that none has to stay in memory until all are made.

    Attributes:
        folder: where they lie.
        weights: by their names in the model.
    """

    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, weight: Tensor) -> None:
        """Put a weight aside."""
        file = self.folder / f"{name}.bin"
        weight.detach().contiguous().numpy().tofile(file)
        self.weights[name] = torch.from_numpy(np.memmap(file, np.float32, "r+", shape=tuple(weight.shape)))

    def keep_others(self, source: Source, names: Mapping[str, str] | None = None) -> None:
        """Put aside, as they are, all weights that were not yet."""
        for name, make in source.makers.items():
            if name not in self.weights:
                self.keep(name, make())

    def source(self, config: ModelConfig) -> Source:
        """What lies here, as something to go on from."""
        return Source(config, {name: weight.clone for name, weight in self.weights.items()})


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is under way, gone at the end. Raises DanluError where there is no place for it."""
    if not out.parent.is_dir():
        raise DanluError("there is no such directory", where=out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".aside", dir=out.parent) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Product:
    """A directory that was written.

    Attributes:
        path: the directory.
        figures: what was measured about it, as on its card.
    """

    path: Path
    figures: Figures

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {"path": str(self.path), "figures": self.figures}


@dataclass(frozen=True)
class Recipe:
    """What a product is made from and by.

    Attributes:
        kind: of product, on its card.
        module: of danlu that makes it, as in "compress/sparse".
        settings: what was asked for.
        checkpoint: what it starts from.
        started: time.monotonic() when the work began.
    """

    kind: str
    module: str
    settings: dict[str, Any]
    checkpoint: Checkpoint
    started: float = field(default_factory=time.monotonic)

    def write(self, source: Source, tokenizer: Tokenizer, out: Path, figures: Figures, dtype: torch.dtype) -> Product:
        """Write a model as a Hugging Face directory with a card.json.

        Raises DanluError where the disk refuses, or no architecture of Hugging Face computes this model.
        """
        model = without_memory(source.config)
        assert isinstance(model, Decoder)
        weights = {name: source.makers[name]() for name in model.state_dict()}
        model.load_state_dict(weights, assign=True)
        save_checkpoint(model.eval(), tokenizer, out, dtype)
        self.sign(out, figures)
        return Product(out, figures)

    def sign(self, out: Path, figures: Figures) -> None:
        """Put the card beside what was written."""
        card = make_card(
            self.kind,
            self.settings,
            {"model": self.checkpoint.digest},
            code_version(self.module),
            figures,
            inventory(out),
            seconds=time.monotonic() - self.started,
            memory=peak_memory(),
            resumed=False,
        )
        write_json(out / CARD, card)


def check_expressible(config: ModelConfig) -> None:
    """Raise DanluError where no known architecture has this shape, before any work."""
    family_for(config)
