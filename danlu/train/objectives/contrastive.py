"""What belongs together lies closer than what does not: the rows of a batch are one another's negatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from danlu.data.pairs import ImageTexts, TextPairs
from danlu.errors import DanluError
from danlu.model.config import Head
from danlu.model.head import LabelHead, pool
from danlu.model.mixture import Routing
from danlu.model.transformer import Encoder, EncoderPair
from danlu.train.objective import StackObjective

Gather = Callable[[Tensor], tuple[Tensor, int]]  # own rows -> all processes' rows, with gradient, and the first own one
HIGHEST_SCALE = 100.0  # similarities are never multiplied by more (arXiv:2103.00020, section 2.5)


@dataclass(frozen=True)
class Contrastive(StackObjective):
    """Texts find their partners among all second texts of the batch (arXiv:1705.00652, arXiv:2104.08821).

    Attributes:
        temperature: cosines are divided by it.
        symmetric: second texts must find their partners, too; the loss is the mean of both.
        pool: how hidden states become one vector; None where the model's own head says so.
        gather: brings together the rows of all processes; None for one process.
    """

    whole: ClassVar[bool] = True

    temperature: float = 0.05
    symmetric: bool = False
    pool: Literal["first", "last", "mean"] | None = "mean"
    gather: Gather | None = None

    def hidden(
        self, model: Encoder, batch: TextPairs, x: Tensor | None = None, routes: list[Routing] | None = None
    ) -> Tensor:
        """[2 B, T, width], a pair's two texts one after the other."""
        first = batch.tokens.flatten(0, 1) if x is None else x
        return model(first, segments=batch.segments.flatten(0, 1), routes=routes)

    def score(self, model: Encoder, hidden: Tensor, batch: TextPairs) -> Tensor:
        """In nat, over this process's pairs."""
        segments, tokens = batch.segments.flatten(0, 1), batch.tokens.flatten(0, 1)
        if self.pool is not None:
            vectors = pool(hidden, Head("embedding", pool=self.pool), segments, tokens)
        elif isinstance(model.head, LabelHead):
            vectors = model.head(hidden, segments, tokens)
        else:
            raise DanluError("the model has no head that makes one vector of a text", fix="choose a pool")
        pairs = F.normalize(vectors.float(), dim=-1).unflatten(0, (-1, 2))
        return pair_loss(pairs, torch.tensor(1 / self.temperature, device=pairs.device), self.symmetric, self.gather)


@dataclass(frozen=True)
class ImageText(StackObjective):
    """Texts find their images among all images of the batch, and images their texts (CLIP, arXiv:2103.00020).

    Attributes:
        gather: brings together the rows of all processes; None for one process.
    """

    whole: ClassVar[bool] = True

    gather: Gather | None = None

    def hidden(
        self, model: EncoderPair, batch: ImageTexts, x: Tensor | None = None, routes: list[Routing] | None = None
    ) -> Tensor:
        """Vectors of length 1, [B, 2, features], the text's first. Raises DanluError within a pipeline."""
        if x is not None:
            raise DanluError("two encoders side by side cannot be cut into a pipeline", fix="leave out pipeline")
        return torch.stack((model.embed_text(batch.tokens, batch.segments), model.embed_image(batch.pixels)), 1)

    def score(self, model: EncoderPair, hidden: Tensor, batch: ImageTexts) -> Tensor:
        """In nat, over this process's pairs."""
        scale = model.logit_scale.float().clamp(max=math.log(HIGHEST_SCALE)).exp()
        return pair_loss(hidden.float(), scale, True, self.gather)


def pair_loss(pairs: Tensor, scale: Tensor, symmetric: bool, gather: Gather | None) -> Tensor:
    """The sum over own pairs of -log softmax(scale * first . seconds)[its own second], in nat, a float64 scalar.

    Args:
        pairs: fp32 [B, 2, features], vectors of length 1.
        scale: a scalar.
        symmetric: the mean of that and the same with first and second exchanged.
        gather: see `Contrastive`.
    """
    everyone, begin = (pairs, 0) if gather is None else gather(pairs)
    partners = torch.arange(begin, begin + len(pairs), device=pairs.device)
    ways = ((0, 1), (1, 0)) if symmetric else ((0, 1),)
    losses = [
        F.cross_entropy(scale * pairs[:, asking] @ everyone[:, asked].T, partners, reduction="none")
        for asking, asked in ways
    ]
    return torch.stack(losses).sum(dtype=torch.float64) / len(ways)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.begin, ctx.count = group, dist.get_rank(group) * len(rows), len(rows)
        everyone = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
        return everyone

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed[ctx.begin : ctx.begin + ctx.count], None


def gather_rows(group: dist.ProcessGroup | None = None) -> Gather:
    """A `gather` over the processes of a group, each of which holds equally many rows.

    The gradient of a row is the sum of what all processes' losses ask of it.
    """

    def gather(rows: Tensor) -> tuple[Tensor, int]:
        return _GatherRows.apply(rows, group), dist.get_rank(group) * len(rows)

    return gather
