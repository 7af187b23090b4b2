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

from danlu.artifact import CARD, Figures, check_parent, code_version, inventory, make_card, peak_memory, write_json
from danlu.compress.walk import Walk
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, StoredModel, save_checkpoint
from danlu.model.config import ModelConfig
from danlu.model.stored import Make, without_memory
from danlu.settings import read_share
from danlu.tokenizer import Tokenizer
from danlu.train.precision import choose_precision

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}  # of stored weights


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


def start_walk(source: Source, rows: Tensor) -> Walk:
    """Calibration rows, int64 [rows, T], before the first block; blocks multiply in the faster of bf16 and fp32.

    What is pruned is computed in fp32 all the same.
    """
    return Walk(source.config, source.makers, rows, choose_precision("auto")[0])


@dataclass
class Shelf:
    """Weights on disk, in fp32, so that none has to stay in memory until all are made.

    Attributes:
        folder: where they lie.
        weights: by their names in the model.
    """

    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path) -> Shelf:
        """An empty one in a new folder."""
        folder.mkdir()
        return cls(folder)

    def keep(self, name: str, weight: Tensor) -> None:
        """Put a weight aside."""
        file = self.folder / f"{name}.bin"
        weight.detach().contiguous().numpy().tofile(file)
        self.weights[name] = torch.from_numpy(np.memmap(file, np.float32, "r+", shape=tuple(weight.shape)))

    def keep_others(self, source: Source) -> None:
        """Put aside, as they are, all weights that were not yet."""
        for name, make in source.makers.items():
            if name not in self.weights:
                self.keep(name, make())

    def source(self, config: ModelConfig) -> Source:
        """What lies here, as something to go on from."""
        return Source(config, {name: weight.clone for name, weight in self.weights.items()})


def read_part(text: str) -> float:
    """A share as users write it, 50% or 0.5, as a number. Raises DanluError where it is no share of something."""
    try:
        part = float(str(read_share(text)))
    except ValueError:
        part = 0.0
    if not 0 < part < 1:
        raise DanluError(f"{text} is no part of something", where="--share", fix="say 50%, or 0.5")
    return part


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is under way, gone at the end. Raises DanluError where it cannot be there."""
    check_parent(out)
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

    @property
    def words(self) -> str:
        """What was measured, in a line."""
        told = {name: about for name, about in self.figures.items() if "value" in about}
        return ", ".join(f"{name} {about['value']:,.4g} {about['unit']}" for name, about in told.items())


@dataclass(frozen=True)
class Making:
    """What a product is made from and by.

    Attributes:
        kind: of product, on its card.
        module: of danlu that makes it, as in "compress/pruning/sparse".
        settings: what was asked for.
        checkpoint: what it starts from.
        started: time.monotonic() when the work began.
    """

    kind: str
    module: str
    settings: dict[str, Any]
    checkpoint: Checkpoint | StoredModel
    started: float = field(default_factory=time.monotonic)

    def write(self, config: ModelConfig, shelf: Shelf, tokenizer: Tokenizer, out: Path, dtype: torch.dtype) -> None:
        """Write what lies on a shelf as a Hugging Face directory that transformers loads.

        Raises DanluError where the disk refuses, or no architecture of Hugging Face computes this model.
        """
        model = without_memory(config)
        model.load_state_dict({name: shelf.weights[name] for name in model.state_dict()}, assign=True)
        save_checkpoint(model.eval(), tokenizer, out, dtype)

    def sign(self, out: Path, figures: Figures) -> Product:
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
        return Product(out, figures)
