"""Sentence embeddings: an encoder, a pool and a length of 1, as sentence-transformers' directories describe them.

Source: sentence-transformers' modules.json and Pooling (arXiv:1908.10084).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.console import warn
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel, find_checkpoint
from danlu.model.config import Head, ModelConfig
from danlu.model.head import pool
from danlu.model.transformer import Encoder
from danlu.tokenizer import Tokenizer, read_json

POOLS: dict[str, Literal["first", "mean", "last"]] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
KINDS = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class SentenceEncoder:
    """Texts -> vectors.

    Attributes:
        model: the encoder.
        tokenizer: its own.
        head: how hidden states become one vector: its `pool` and whether it is `normalised`.
        longest: tokens of a text at most, [CLS] and [SEP] included.
    """

    model: Encoder
    tokenizer: Tokenizer
    head: Head
    longest: int

    @classmethod
    def open(
        cls, ref: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> SentenceEncoder:
        """Load an encoder's directory. Without a modules.json the mean of the hidden states is taken, unscaled.

        Args:
            ref: anything that `find_checkpoint` knows.
            dtype, device: of the computation.

        Raises DanluError where the model is no encoder, or a step of its modules.json is not known.
        """
        path = find_checkpoint(ref)
        stored = StoredModel.open(path)
        if not isinstance(stored.config, ModelConfig) or stored.config.causal or not stored.config.vocab_size:
            what = f"is a {stored.family.architecture}; sentences need an encoder of text"
            raise DanluError(what, where=path, fix="name a BERT-like model")
        model = stored.load(dtype, device)
        assert isinstance(model, Encoder)
        settings = path / "sentence_bert_config.json"
        stated = read_json(settings).get("max_seq_length") if settings.is_file() else None
        longest = min(stated or stored.config.context, stored.config.context)
        return cls(model.eval(), Tokenizer.load(path), read_head(path), longest)

    @torch.inference_mode()
    def encode(self, texts: list[str], *, batch: int = 32, truncate: bool = False) -> Tensor:
        """Vectors of texts, fp32 [texts, width].

        Args:
            texts: in any language the model knows.
            batch: computed at once, of similar lengths.
            truncate: cut texts that are too long, and say how many; otherwise they are an error.

        Raises DanluError for a text of more than `longest` tokens, with both numbers.
        """
        rows = [self.tokenizer.encode_input(text) for text in texts]
        long = [number for number, row in enumerate(rows) if len(row) > self.longest]
        if long and not truncate:
            what = f"text {long[0] + 1} has {len(rows[long[0]]):,} tokens; the encoder reads {self.longest:,}"
            raise DanluError(what, where="sentence encoder", fix="cut it into passages, or ask for truncation")
        if long:
            warn(f"sentence encoder: {len(long)} of {len(texts)} texts were cut to {self.longest:,} tokens")
            rows = [[*row[: self.longest - 1], row[-1]] if len(row) > self.longest else row for row in rows]
        made = torch.empty(len(rows), self.model.config.width)
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            made[chosen] = self._vectors([rows[number] for number in chosen]).float().cpu()
        return made

    def _vectors(self, rows: list[list[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        longest = int(lengths.max())
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        segments = (torch.arange(longest, device=device) < lengths[:, None]).int()
        vectors = pool(self.model(tokens, segments=segments), self.head, segments, tokens)
        return F.normalize(vectors, dim=-1) if self.head.normalised else vectors


def read_head(path: Path) -> Head:
    """The pool and the scaling that modules.json asks for."""
    if not (path / "modules.json").is_file():
        return Head("embedding", pool="mean")
    steps = _steps(path / "modules.json")
    settings: dict[str, Any] = {}
    for kind, folder in steps:
        if kind not in KINDS:
            raise DanluError(f"the step {kind} is not known", where=path / "modules.json", fix=f"known: {KINDS}")
        if kind == "Pooling":
            settings = read_json(path / folder / "config.json")
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode") and on is True]
    if len(modes) != 1 or modes[0] not in POOLS:
        what = f"pools by {', '.join(modes) or 'nothing'}; one of {', '.join(POOLS)} is known"
        raise DanluError(what, where=path)
    return Head("embedding", pool=POOLS[modes[0]], normalised=any(kind == "Normalize" for kind, _ in steps))


def _steps(file: Path) -> list[tuple[str, str]]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        return [(str(step["type"]).rsplit(".", 1)[-1], str(step.get("path", ""))) for step in listed]
    except (OSError, ValueError, KeyError, TypeError):
        raise DanluError("is no list of steps", where=file) from None
