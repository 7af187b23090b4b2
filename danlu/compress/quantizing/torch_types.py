"""A loaded model in few bits for torch itself: linear layers by torchao, weights alone or their inputs too.

The head and the embedding stay as they are. For serving, GGUF is faster on processors; this is for what runs in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch

from danlu.artifact import Figures, figure
from danlu.errors import need_extra
from danlu.evaluate.bootstrap import interval
from danlu.evaluate.divergence import divergence
from danlu.model.checkpoint import Checkpoint
from danlu.model.transformer import Decoder, Encoder

TorchType = Literal["int8", "int8-inputs", "int4", "fp8"]
GROUP = 32  # columns that share a step in int4
ROW = 256  # tokens of a row that is compared


def _int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_inputs() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _fp8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


TYPES: dict[TorchType, Callable[[], Any]] = {
    "int8": _int8,
    "int8-inputs": _int8_inputs,
    "int4": _int4,
    "fp8": _fp8,
}


def to_few_bits(model: Decoder | Encoder, kind: TorchType) -> None:
    """Put a model's linear layers into few bits, in place.

    Args:
        model: in fp32 or bf16.
        kind: "int8", weights in whole rows; "int8-inputs", inputs too, token by token as they come; "int4", weights in
            groups of 32; "fp8", weights as floats of 8 bits.

    Raises DanluError where torchao is missing.
    """
    _need_torchao()
    from torchao.quantization import quantize_

    quantize_(model, TYPES[kind]())


def measure(checkpoint: Checkpoint, kind: TorchType, text: str) -> Figures:
    """What few bits lose on a text, and the bytes of all weights.

    The text's whole rows of 256 tokens are compared, each by itself.

    Raises DanluError where torchao is missing.
    """
    _need_torchao()
    from torchao.utils import get_model_size_in_bytes

    model = checkpoint.load()
    ids = checkpoint.tokenizer.encode(text, special=False)
    rows = torch.tensor(ids[: max(len(ids) // ROW, 1) * ROW]).view(-1, min(ROW, len(ids)))
    with torch.no_grad():
        before = [model.logits(model(row[None])) for row in rows]
        to_few_bits(model, kind)
        lost = [divergence(old, model.logits(model(row[None]))) for old, row in zip(before, rows, strict=True)]
    sums, counts = [float(each.sum()) for each in lost], [each.numel() for each in lost]
    return {
        "memory": figure(get_model_size_in_bytes(model), "byte", by="of all weights"),
        "divergence": interval(sums, counts).figure("nat/token", f"to fp32, of {rows.numel():,} tokens"),
    }


def _need_torchao() -> None:
    if find_spec("torchao") is None:
        raise need_extra("torchao", "float8")
