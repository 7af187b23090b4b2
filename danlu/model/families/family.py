"""A family of models as data: how its config.json and its weights' names translate into ours, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from danlu.errors import DanluError
from danlu.model.config import AnyConfig
from danlu.model.families.fields import Fields
from danlu.model.names import Names, Table


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: its class in transformers, as in config.json.
        model_type: its short name in config.json.
        read: config.json -> our configuration.
        write: our configuration -> the architecture's part of config.json. What it cannot express may be left out.
        weights: the names of its weights in safetensors.
        prefix: what some files leave out before their names, and some put there.
        unread: endings of names that stand in some files and nobody reads, since they can be computed.
        others: beginnings of names that belong to other heads than the architecture's own.
        gguf: its name in GGUF, where llama.cpp computes it.
        gguf_weights: the names of its weights there.
        accepts: which configurations of the architecture are meant, where names differ between them.
        neighbours: GGUF pairs neighbouring features for rotary positions, where Hugging Face pairs the two halves.
    """

    architecture: str
    model_type: str
    read: Callable[[Fields], AnyConfig]
    write: Callable[[Any], dict[str, Any]]
    weights: Table
    prefix: str = ""
    unread: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    gguf: str | None = None
    gguf_weights: Table = field(default_factory=dict)
    accepts: Callable[[Mapping[str, Any]], bool] = lambda hf: True
    neighbours: bool = False

    @property
    def names(self) -> Names:
        """The names of its weights in safetensors, both ways."""
        return Names(self.weights)

    @property
    def gguf_names(self) -> Names:
        """The names of its weights in GGUF, both ways."""
        return Names(self.gguf_weights)

    def config(self, hf: Mapping[str, Any], where: Path | None = None) -> AnyConfig:
        """config.json -> our configuration.

        Raises DanluError where a key is missing, malformed, or asks for a computation that Danlu does not do.
        """
        fields = Fields(hf, where)
        config = self.read(fields)
        fields.finish()
        return config

    def file(self, config: AnyConfig) -> dict[str, Any]:
        """Our configuration -> config.json."""
        return {"architectures": [self.architecture], "model_type": self.model_type, **self.write(config)}

    def expresses(self, config: AnyConfig) -> bool:
        """Whether nothing is lost by writing this configuration as this family."""
        try:
            written = self.file(config)
            return self.accepts(written) and self.config(written) == config
        except (AttributeError, TypeError, AssertionError, DanluError):  # a configuration of another body
            return False
