"""Small language models for benches and tests, trained from a text within seconds or minutes by `danlu train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Vocabulary = str | Mapping[str, Any]


@dataclass(frozen=True)
class Small:
    """A Llama, its embedding the head too.

    Attributes:
        layers, width, heads, kv_heads, channels: blocks, features of the stream, heads, inner features.
        context: positions.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    channels: int
    context: int

    @property
    def shape(self) -> dict[str, Any]:
        """As keys of config.json."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.channels,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
        }


def train_small(
    small: Small, text: Path, steps: int, out: Path, *, vocabulary: Vocabulary = "bytes", **settings: Any
) -> Path:
    """Train one on a text whose last tenth is held out, in OUT; the directory of the model.

    Args:
        settings: of the recipe, in place of batch 8 x 16, a learning rate of 1e-2 and measuring at the end.
    """
    from danlu.train.recipe import TrainRecipe
    from danlu.train.start import start

    recipe: dict[str, Any] = {
        "name": "base",
        "model": {"architecture": "LlamaForCausalLM", "shape": small.shape},
        "data": {
            "sources": str(text.resolve()),
            "vocabulary": vocabulary,
            "heldout": 0.1,
            "heldout_from": "end",
        },
        "batch": {"rows": 8, "window": 16},
        "steps": steps,
        "optimizer": {"learning_rate": 1e-2},
        "precision": "fp32",
        "compile": "off",
        "checkpoints": {"every": steps},
        "validation": {"every": steps, "rows": 16},
    }
    start(TrainRecipe.model_validate(recipe | settings), out, plan=None, steps=None)
    return out / "model"
