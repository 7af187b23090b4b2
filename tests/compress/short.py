"""A model small enough for tests whose weights and inputs are a trained model's: SmolLM2's first layers, a third of
their channels, and the words of a part of Python's language reference alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from pydoc_data import topics

import torch

from danlu.compress.product import Making, Shelf, Source
from danlu.compress.pruning.vocabulary import prune_vocabulary
from danlu.model.checkpoint import Checkpoint
from danlu.model.transformer import Decoder

LAYERS, CHANNELS = 2, 512
NAMES = sorted(topics.topics)
TEXT = "\n\n".join(topics.topics[name] for name in NAMES[::2])[:60_000]
OTHER = "\n\n".join(topics.topics[name] for name in NAMES[1::2])[:6_000]


def make_short(smollm2: Path, home: Path) -> Checkpoint:
    """The model, in an empty folder."""
    whole = Checkpoint.open(smollm2)
    (home / "shelf").mkdir()
    shelf = Shelf(home / "shelf")
    for name, make in Source.of(whole).makers.items():
        if not name.startswith("blocks.") or int(name.split(".")[1]) < LAYERS:
            weight = make()
            if "feedforward." in name:
                weight = weight[:, :CHANNELS] if "down" in name else weight[:CHANNELS]
            shelf.keep(name, weight)
    config = replace(whole.config, layers=LAYERS, feedforward_width=CHANNELS)
    making = Making("test", "compress/product", {}, whole)
    making.write(config, shelf, whole.tokenizer, home / "layers", torch.float32)
    prune_vocabulary(Checkpoint.open(home / "layers"), TEXT + OTHER, home / "short")
    return Checkpoint.open(home / "short")


def hidden(checkpoint: Checkpoint, text: str = OTHER) -> torch.Tensor:
    """What comes out of the last norm on a text, fp32 [tokens, width]."""
    ids = checkpoint.tokenizer.encode(text, special=False)[:1024]
    with torch.inference_mode():
        made = checkpoint.load()(torch.tensor(ids).view(-1, 256))
    return made.flatten(0, 1)


def logits(checkpoint: Checkpoint, text: str = OTHER) -> torch.Tensor:
    """Log-probabilities on a text, fp32 [tokens, words]."""
    model = checkpoint.load()
    assert isinstance(model, Decoder)
    with torch.inference_mode():
        return model.logits(hidden(checkpoint, text)).log_softmax(-1)


def divergence(reference: Checkpoint, other: Checkpoint) -> float:
    """Mean KL divergence in nat."""
    before, after = logits(reference), logits(other)
    return float((before.exp() * (before - after)).sum(-1).mean())
