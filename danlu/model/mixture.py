"""A mixture of experts: a router sends each token to a few of many feed-forwards.

Tokens are sorted by expert, so that each expert is a few large matrix products over its own tokens; without a
capacity nothing is dropped and nothing is padded (arXiv:2211.15841).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.model.config import Experts, ModelConfig
from danlu.model.feedforward import ACTIVATIONS, FeedForward
from danlu.model.ring_attention import Ring


@dataclass(frozen=True)
class Routing:
    """What one layer's router did with N tokens.

    Attributes:
        logits: fp32 [N, experts], with a gradient.
        experts: int64 [N, chosen], the experts of each token, the likeliest first.
        taken: bool [N, chosen]; False where the expert was full and the token passed it by.
        rows: of the batch that the tokens came in; N / rows each.
    """

    logits: Tensor
    experts: Tensor
    taken: Tensor
    rows: int = 1

    def load(self) -> Tensor:
        """Tokens that each expert took, int64 [experts]."""
        return torch.bincount(self.experts[self.taken], minlength=self.logits.shape[1])

    def dropped(self) -> int:
        """Choices that were passed by."""
        return int((~self.taken).sum())


def joined(routes: Sequence[Routing]) -> Routing:
    """What a layer's router did with parts of a batch's rows, as with all of them at once."""
    if len(routes) == 1:
        return routes[0]
    return Routing(
        torch.cat([route.logits for route in routes]),
        torch.cat([route.experts for route in routes]),
        torch.cat([route.taken for route in routes]),
        sum(route.rows for route in routes),
    )


class Bank(nn.Module):
    """Linear layers of one shape, one an expert: weight [experts, out, in], bias [experts, out] or None."""

    def __init__(self, count: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # as nn.Linear starts
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """[N, in], the first `sizes[0]` rows for the first expert and so on -> [N, out]."""
        return bank_linear(x, sizes, self.weight, self.bias)


def bank_linear(x: Tensor, sizes: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a bank computes: [N, in] sorted by expert, weight [experts, out, in], bias [experts, out] -> [N, out]."""
    biases = [None] * len(sizes) if bias is None else bias.unbind(0)
    parts = zip(x.split(list(sizes)), weight.unbind(0), biases, strict=True)
    made = [F.linear(part, matrix, added) for part, matrix, added in parts if len(part)]
    return made[0] if len(made) == 1 else torch.cat(made)


class BankFeedForward(nn.Module):
    """The experts of a layer: feed-forwards whose layers are banks."""

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        count, width, inner, bias = experts.count, config.width, experts.width, config.feedforward_bias
        self.gate = Bank(count, width, inner, bias) if config.gated else None
        self.up = Bank(count, width, inner, bias)
        self.down = Bank(count, inner, width, bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """[N, width] sorted by expert -> the same shape."""
        if not len(x):
            # No tokens: nothing to compute, but the weights' gradient is zero, and not absent as if they were frozen.
            return x + sum(weight.sum() for weight in self.parameters()) * 0
        if x.device.type != "cpu":
            return self._feed(x, sizes)
        # Expert after expert: what lies between two products of one fits in a CPU's cache, of all it does not.
        parts = enumerate(x.split(list(sizes)))
        alone = [(part, [len(part) if number == e else 0 for e in range(len(sizes))]) for number, part in parts]
        return torch.cat([self._feed(part, counts) for part, counts in alone if len(part)])

    def _feed(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x, sizes)), sizes)
        return self.down(self.activation(self.gate(x, sizes)) * self.up(x, sizes), sizes)


# What computes the experts of sorted tokens, [N, width] and how many each expert gets -> [N, width].
Compute = Callable[[Tensor, Sequence[int]], Tensor]
Exchange = Callable[[BankFeedForward], Compute]


class Mixture(nn.Module):
    """The feed-forward of a block as a mixture: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.settings = experts
        self.router = nn.Linear(config.width, experts.count, bias=False)
        self.experts = BankFeedForward(config, experts)
        self.shared = FeedForward(config, experts.shared_width) if experts.shared_width else None
        self.shared_gate = nn.Linear(config.width, 1, bias=False) if experts.shared_gate else None
        self.exchange: Exchange | None = None  # where the experts are shared out over processes

    def forward(self, x: Tensor, routes: list[Routing] | None = None) -> Tensor:
        """Args: routes: where to note what the router did, for the losses on it and for statistics."""
        tokens = x.flatten(0, -2)
        weights, route = self.route(x)
        if routes is not None:
            routes.append(route)
        mixed = self._mix(tokens, weights, route)
        if self.shared is not None:
            common = self.shared(tokens)
            if self.shared_gate is not None:
                common = torch.sigmoid(self.shared_gate(tokens)) * common
            mixed = mixed + common
        return mixed.view(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Routing]:
        """The weights of the chosen experts, [B * T, chosen] in x's dtype, and the choice."""
        settings = self.settings
        asked = x.flatten(0, -2)
        if self.training and settings.jitter:
            asked = asked * torch.empty_like(asked).uniform_(1 - settings.jitter, 1 + settings.jitter)
        if settings.exact_router:
            logits = F.linear(asked.float(), self.router.weight.float())
        else:
            logits = self.router(asked).float()
        weights, experts = logits.softmax(-1).topk(settings.chosen, dim=-1)
        if settings.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), Routing(logits, experts, self._taken(experts, x.shape[-2]), len(x))

    def _taken(self, experts: Tensor, length: int) -> Tensor:
        """Which choices find room, if each expert takes so many tokens of a row, the earliest first."""
        room = self._room(length)
        if room is None:
            return torch.ones_like(experts, dtype=torch.bool)
        rows = F.one_hot(experts, self.settings.count).view(-1, length * self.settings.chosen, self.settings.count)
        place = (rows.cumsum(1) * rows).sum(-1)  # from 1, among the row's choices of the same expert
        return (place <= room).view(experts.shape)

    def _room(self, length: int) -> int | None:
        settings = self.settings
        if settings.capacity_factor is not None:
            return math.ceil(settings.capacity_factor * length * settings.chosen / settings.count)
        return settings.capacity

    def _mix(self, tokens: Tensor, weights: Tensor, route: Routing) -> Tensor:
        """The weighted sum of what the chosen experts make of each token, [N, width]."""
        choices = route.experts.flatten()
        kept = route.taken.flatten().nonzero()[:, 0] if self._room(1) is not None else None
        if kept is not None:
            choices = choices[kept]
        order = choices.argsort(stable=True)
        sizes = choices.bincount(minlength=self.settings.count)
        if kept is not None:
            order = kept[order]
        source = order // self.settings.chosen
        compute = self.experts if self.exchange is None else self.exchange(self.experts)
        made = compute(tokens[source], sizes.tolist()) * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, source, made)


def router_penalty(
    routes: Sequence[Routing], experts: Experts, counts: Tensor, real: Tensor | None = None, ring: Ring | None = None
) -> Tensor:
    """The weighted losses on routers, summed over rows as often as they have targets, and over layers. A scalar.

    Of each row and layer: experts * sum over experts of (share of choices) * (mean probability), which is 1 at perfect
    balance times `chosen` (arXiv:2101.03961, equation 4); and the mean square of the router's log-sum-exp, which keeps
    logits small (arXiv:2202.08906). Taken row by row, they do not depend on how a batch is cut into micro-batches and
    processes.

    Args:
        routes: of some layers.
        counts: [rows], targets of each row; with a ring, of this process's places.
        real: bool [rows, T], False for padding, which counts for nothing; None for no padding.
        ring: the processes that the rows are cut over; each then gets its part of the sum.
    """
    totals = torch.ones_like(counts) if real is None else real.sum(-1)
    if real is None:
        totals = totals * (len(routes[0].logits) // routes[0].rows)
    totals, counts = _over(ring, totals), _over(ring, counts)
    each = counts / totals.clamp(min=1)
    penalty = torch.zeros((), device=counts.device)
    for route in routes:
        logits = route.logits.unflatten(0, (route.rows, -1))
        here = torch.ones_like(logits[..., :1]) if real is None else real[..., None].to(logits.dtype)
        if experts.balance:
            chosen = F.one_hot(route.experts, experts.count).sum(1).unflatten(0, (route.rows, -1))
            share = _over(ring, (chosen * here).sum(1)) / totals.clamp(min=1)[:, None]
            probability = (logits.softmax(-1) * here).sum(1)
            penalty = penalty + experts.balance * experts.count * ((share * probability).sum(-1) * each).sum()
        if experts.z:
            square = logits.logsumexp(-1, keepdim=True).square() * here
            penalty = penalty + experts.z * (square.sum((1, 2)) * each).sum()
    return penalty


def _over(ring: Ring | None, x: Tensor) -> Tensor:
    """The sum over the processes of a ring; without gradient."""
    if ring is None:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, group=ring.group)
    return x
