"""Whether a target can be met at all: said before the work, where it is known before the work."""

from __future__ import annotations

import gguf

from danlu.compress.presets.quantize import ggml_type
from danlu.compress.presets.settings import CompressSettings
from danlu.device.bandwidth import read_bandwidth
from danlu.device.settings import Target
from danlu.device.verdict import amount
from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.train.compiling import parameters

DOUBT = 1.5  # the bandwidth measured may be low by this factor: other programs read memory too
CACHED = 64e6  # bytes of weights that a large cache may hold, so that memory does not bound their speed


def check_target(settings: CompressSettings, target: Target, config: ModelConfig) -> None:
    """Raise DanluError where no candidate can meet the target, whatever is trained: exit code 2, before any work.

    The smallest conceivable file holds every matrix in the smallest format among the types; the process holds at
    least the file's bytes; and decoding reads them all for every token.
    """
    smallest = min(settings.types, key=_bytes_per_weight)
    embedding = 0 if config.tied else config.vocab_size * config.width  # of which a token reads one row
    weights = parameters(config) + embedding
    read, held = (count * _bytes_per_weight(smallest) for count in (parameters(config), weights))
    for name, limit in (("file_size", target.file_size), ("memory", target.memory)):
        if limit is not None and limit < held:
            raise DanluError(
                f"asks for {amount(limit, 'byte')}, but this model's {weights / 1e6:,.1f} million weights take "
                f"at least {amount(held, 'byte')} in {smallest}, the smallest of the types to try",
                where=f"target.{name}",
                fix="ask for more, add a smaller type to compress.types, or start from a smaller model",
            )
    if target.speed is None or read < CACHED:
        return
    ceiling = read_bandwidth(settings.threads) / read
    if target.speed > DOUBT * ceiling:
        raise DanluError(
            f"asks for {target.speed:,.0f} token/s, but reading the weights alone allows about {ceiling:,.0f} here: "
            f"{amount(read, 'byte')} a token in {smallest}",
            where="target.speed",
            fix="ask for less, add a smaller type to compress.types, or start from a smaller model",
        )


def _bytes_per_weight(file_type: str) -> float:
    """Of a file type's own number format."""
    block, size = gguf.GGML_QUANT_SIZES[ggml_type(file_type)]
    return size / block
