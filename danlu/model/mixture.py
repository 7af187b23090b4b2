"""A mixture of experts: a router sends each token to a few of many feed-forwards.

Tokens are sorted by expert, so that each expert is a few large matrix products over its own tokens; without a
capacity nothing is dropped and nothing is padded (arXiv:2211.15841).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.model.config import Experts, ModelConfig
from danlu.model.feedforward import ACTIVATIONS, FeedForward


@dataclass(frozen=True)
class Routing:
    """What one layer's router did with N tokens.

    Attributes:
        logits: fp32 [N, experts], with a gradient.
        experts: int64 [N, chosen], the experts of each token, the likeliest first.
        taken: bool [N, chosen]; False where the expert was full and the token passed it by.
    """

    logits: Tensor
    experts: Tensor
    taken: Tensor

    def load(self) -> Tensor:
        """Tokens that each expert took, int64 [experts]."""
        return torch.bincount(self.experts[self.taken], minlength=self.logits.shape[1])

    def dropped(self) -> int:
        """Choices that were passed by."""
        return int((~self.taken).sum())


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


class Mixture(nn.Module):
    """The feed-forward of a block as a mixture: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.settings = experts
        self.router = nn.Linear(config.width, experts.count, bias=False)
        self.experts = BankFeedForward(config, experts)
        self.shared = FeedForward(config, experts.shared_width) if experts.shared_width else None
        self.shared_gate = nn.Linear(config.width, 1, bias=False) if experts.shared_gate else None

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
        return weights.to(x.dtype), Routing(logits, experts, self._taken(experts, x.shape[-2]))

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
        sizes = choices.bincount(minlength=self.settings.count).tolist()
        if kept is not None:
            order = kept[order]
        if not len(order):
            return torch.zeros_like(tokens)
        source = order // self.settings.chosen
        made = self.experts(tokens[source], sizes) * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, source, made)


def balance_loss(routes: Sequence[Routing], experts: Experts) -> Tensor:
    """experts * sum of (share of choices) * (mean probability), over all layers at once; 1 at perfect balance times
    `chosen` (arXiv:2101.03961, equation 4, for several chosen experts as Hugging Face computes it). A scalar."""
    logits = torch.cat([route.logits for route in routes])
    choices = torch.cat([route.experts for route in routes])
    share = F.one_hot(choices, experts.count).float().mean(0).sum(0)
    return experts.count * (share * logits.softmax(-1).mean(0)).sum()


def z_loss(routes: Sequence[Routing]) -> Tensor:
    """The mean square of each router's log-sum-exp, which keeps logits small (arXiv:2202.08906). A scalar."""
    return torch.cat([route.logits for route in routes]).logsumexp(-1).square().mean()
