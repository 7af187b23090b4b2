"""How weights start, decided by a scheme, a seed and each weight's own name alone.

| scheme | matrices | from |
|---|---|---|
| xavier | uniform, variance 2 / (in + out) | Glorot and Bengio 2010, the normalised form |
| he | normal, variance 2 / in | arXiv:1502.01852 |
| normal | truncated normal, std 0.02; what a block adds to the stream / sqrt(updates) | Radford et al. 2019 (GPT-2) |
| mup | normal, variance 1 / in; what leaves the width 1 / in^2 | arXiv:2203.03466, tables 3 and 8 |

Embeddings (of words, places, kinds, distances, and the class token) are truncated normal, with std 1 in mup and 0.02 in
the other schemes; norms start as doing nothing, and biases at 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from danlu.errors import DanluError, one_of
from danlu.model.config import AnyConfig, EncoderDecoderConfig, ModelConfig, PairConfig
from danlu.model.head import WordHead
from danlu.model.mixture import Bank
from danlu.model.norm import BatchNorm, RMSNorm
from danlu.model.position import RelativeBias
from danlu.model.stored import Make, stacks
from danlu.model.transformer import EncoderPair, Model, Stack

Scheme = Literal["xavier", "he", "normal", "mup"]
# What a weight is to the width of the model: a table of vectors of this width, or a matrix into it ("input"), within it
# ("hidden"; "residual" where a block adds the output to the stream), or out of it, to a fixed number ("output").
Role = Literal["norm", "bias", "temperature", "embedding", "input", "hidden", "residual", "output"]
STD = 0.02
PIECE = 2**20  # numbers of a truncated normal that are drawn at once
RUNNING = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}  # starts of what is no weight
CUT = 3.0  # truncated normals end at so many times the std of the whole one


def initialize(model: Model, scheme: Scheme, seed: int) -> None:
    """Overwrite every weight with its start, and running means and variances with theirs.

    Args: model: without adapters, on any device, in any dtype; scheme, seed and errors: see `starts`.
    """
    makers = starts(model, scheme, seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(makers[name]())


def starts(model: Model, scheme: Scheme, seed: int) -> dict[str, Make]:
    """What makes the start of each weight, by its name, fp32; of running means and variances as well.

    Each is drawn on the CPU from the seed and its name alone: the same on every device, in whatever order, and
    whichever others there are. Experts of a bank are matrices of their own.

    Args:
        model: whole, without adapters; only its names and shapes matter, so it may be on the meta device.
        scheme: see the head of this file.
        seed: the same seed gives the same bits.

    Raises DanluError where the scheme is not known, a weight of the model is not, or the scheme is "mup" and the model
    was not made of `mup_config`.
    """
    if scheme not in get_args(Scheme):
        raise DanluError(f"{scheme} is no scheme", where="initialize", fix=one_of(scheme, get_args(Scheme)))
    if scheme == "mup" and mup_config(model.config) != model.config:
        what = "the model's attention, embedding and head are not scaled as muP asks"
        raise DanluError(what, where="initialize", fix="make it of mup_config(config)")
    makers: dict[str, Make] = {
        name: Start(name, weight.shape, role, scheme, _constant(model, module, role), _updates(model, name), seed)
        for name, module, weight, role in _weights(model)
    }
    for name, buffer in model.named_buffers():
        makers[name] = partial(torch.full, buffer.shape, RUNNING[name.rpartition(".")[2]], dtype=buffer.dtype)
    return makers


@dataclass(frozen=True)
class Start:
    """How one weight starts.

    Attributes:
        constant: what all of it is; None where chance decides.
        updates: how many times the blocks of its stack add to the stream.
    """

    name: str
    shape: torch.Size
    role: Role
    scheme: Scheme
    constant: float | None
    updates: int
    seed: int

    def __call__(self) -> Tensor:
        """The whole weight, fp32, on the CPU."""
        start = torch.empty(self.shape, dtype=torch.float32)
        generator = torch.Generator().manual_seed(_number(self.seed, self.name))
        if self.constant is not None:
            start.fill_(self.constant)
        elif self.role == "embedding":
            _truncated(start, 1.0 if self.scheme == "mup" else STD, generator)
        else:
            _matrix(start, self.scheme, self.role, self.updates, generator)
        return start


def _constant(model: Model, module: nn.Module, role: Role) -> float | None:
    """What all of a weight starts as; None where chance decides."""
    if role == "norm":
        return 0.0 if isinstance(module, RMSNorm) and module.plus_one else 1.0
    if role == "temperature":
        assert isinstance(model, EncoderPair)
        return model.config.logit_scale
    return 0.0 if role == "bias" else None


def mup_config(config: AnyConfig) -> AnyConfig:
    """The same model with the scales that muP asks for (arXiv:2203.03466, definition 4.1 and table 8).

    Scores of attention are multiplied by 1 / head_width, a head that shares the embedding's weight by 1 / width, and
    the embedding by 1. Most architectures of Hugging Face have no place for these scales: `danlu.model.scales` moves
    them into weights.
    """
    if isinstance(config, EncoderDecoderConfig):
        return replace(config, encoder=_mup_stack(config.encoder), decoder=_mup_stack(config.decoder))
    if isinstance(config, PairConfig):
        return replace(config, text=_mup_stack(config.text), image=_mup_stack(config.image))
    return _mup_stack(config)


def _mup_stack(config: ModelConfig) -> ModelConfig:
    shared = config.tied and config.head is not None and config.head.task == "words"
    head_scale = 1 / config.width if shared else config.head_scale
    return replace(config, attention_scale=1 / config.head_width, embedding_scale=1.0, head_scale=head_scale)


def mup_multipliers(model: Model, base_width: int) -> dict[str, float]:
    """What the learning rate of every weight is multiplied by under Adam, so that the best one does not depend on the
    width (arXiv:2203.03466, table 3): base_width / width for matrices that the width goes into, 1 for the others.

    Args:
        model: its inner widths (of heads together, of feed-forwards) are the same multiples of its width as in the
            narrow model.
        base_width: of the narrow model that the learning rate was found with.

    Raises DanluError where the model has two widths, or base_width is less than 1.
    """
    widths = {config.width for config in stacks(model.config)}
    if len(widths) > 1:
        what = (
            f"the model has stacks of widths {' and '.join(map(str, sorted(widths)))}; one base width serves one width"
        )
        raise DanluError(what, where="mup_multipliers")
    if base_width < 1:
        raise DanluError(f"base_width is {base_width}; it must be at least 1", where="mup_multipliers")
    ratio = base_width / widths.pop()
    inside = ("hidden", "residual", "output")
    return {name: ratio if role in inside else 1.0 for name, _, _, role in _weights(model)}


def _weights(model: Model) -> Iterator[tuple[str, nn.Module, nn.Parameter, Role]]:
    """Every weight with its name, its module, and what it is."""
    for path, module in model.named_modules():
        for kind, weight in module.named_parameters(recurse=False):
            name = f"{path}.{kind}" if path else kind
            yield name, module, weight, _role(name, module)


def _role(name: str, module: nn.Module) -> Role:
    path, _, kind = name.rpartition(".")
    part = path.rpartition(".")[2]
    if kind == "bias":
        return "bias"
    if isinstance(module, RMSNorm | nn.LayerNorm | BatchNorm):
        return "norm"
    if isinstance(module, nn.Embedding | RelativeBias) or kind == "class_token":
        return "embedding"
    if isinstance(module, nn.Conv2d):
        return "input"
    if kind == "logit_scale":
        return "temperature"
    if isinstance(module, WordHead) or part in ("router", "shared_gate"):
        return "output"
    if isinstance(module, nn.Linear | Bank):
        if part in ("output", "down"):
            return "residual" if "blocks." in path else "output"
        return "hidden"
    raise DanluError(f"how {name} starts is not known", where="initialize", fix="add adapters afterwards")


def _updates(model: Model, name: str) -> int:
    """How many times the blocks of a weight's stack add to the stream, which makes its variance grow."""
    stack = model.get_submodule(name.partition("blocks.")[0].rstrip(".")) if "blocks." in name else None
    return stack.config.layers * (3 if stack.config.cross else 2) if isinstance(stack, Stack) else 1


def _number(seed: int, name: str) -> int:
    """A seed for one weight, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def _matrix(start: Tensor, scheme: Scheme, role: Role, updates: int, generator: torch.Generator) -> None:
    """Fill a matrix [out, in], one of every expert [experts, out, in], or a kernel [out, in, height, width]."""
    kernel = start.dim() == 4
    outputs = start.shape[0] if kernel else start.shape[-2]
    inputs = start[0].numel() if kernel else start.shape[-1]
    if scheme == "xavier":
        bound = math.sqrt(6 / (inputs + outputs))
        start.uniform_(-bound, bound, generator=generator)
    elif scheme == "he":
        start.normal_(0, math.sqrt(2 / inputs), generator=generator)
    elif scheme == "normal":
        _truncated(start, STD / math.sqrt(updates) if role == "residual" else STD, generator)
    else:
        start.normal_(0, 1 / inputs if role == "output" else 1 / math.sqrt(inputs), generator=generator)


def _truncated(start: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with a normal that is cut on both sides and has this std after the cut."""
    inside = math.erf(CUT / math.sqrt(2))
    density = math.exp(-(CUT**2) / 2) / math.sqrt(2 * math.pi)
    whole = std / math.sqrt(1 - 2 * CUT * density / inside)
    for piece in start.view(-1).split(PIECE):  # the library's way takes several times the memory of what it fills
        nn.init.trunc_normal_(piece, 0.0, whole, -CUT * whole, CUT * whole, generator=generator)
