"""Kinds of layers: which parts a layer has on average, and the weights of latent attention and of state spaces."""

from __future__ import annotations

import numpy as np

from danlu.plan.jobs import KINDS, Column, Jobs

OWN = (
    "width", "heads", "kv_heads", "head_width", "feedforward", "gated", "causal", "vectors", "expert_layers",
)  # fmt: skip


def second(jobs: Jobs) -> Jobs:
    """The second stack as jobs of their own, cut as the first; embedding and head count with the first.

    A job without one has a single layer without weights instead, so that sums over both stacks hold for all rows.
    """
    columns = {name: getattr(jobs, f"second_{name}") for name in OWN}
    none = dict.fromkeys((*KINDS, "vocab", "outputs", "positions", "ends"), 0.0)
    layers = np.maximum(jobs.second_layers, 1)
    return jobs.but(**(none | columns), layers=layers, length=second_length(jobs), tied=1)


def second_length(jobs: Jobs) -> Column:
    """Tokens of a row of the second stack."""
    return np.where(jobs.second_length > 0, jobs.second_length, jobs.length)


def attention_share(jobs: Jobs) -> Column:
    """Of the layers, those with attention."""
    return (jobs.layers - jobs.without_attention) / jobs.layers


def plain_share(jobs: Jobs) -> Column:
    """Of the layers, those with a feed-forward that is no mixture."""
    return (jobs.layers - jobs.expert_layers - jobs.without_feedforward) / jobs.layers


def halves(jobs: Jobs) -> Column:
    """Parts of a layer that are added to the residual stream, each with a norm before it.

    Attention and a feed-forward make two; of models whose layers hold only one of attention, state space and
    feed-forward it is one.
    """
    return 2 - (jobs.without_attention - jobs.state_layers + jobs.without_feedforward) / jobs.layers


def blocks_ahead(jobs: Jobs) -> Column:
    """Blocks that predict tokens beyond the next one, counted in layers: each has attention and a feed-forward."""
    return jobs.ahead * 2 / halves(jobs)


def expert_input(jobs: Jobs) -> Column:
    """Features of a token that an expert sees."""
    return np.where(jobs.expert_input > 0, jobs.expert_input, jobs.width)


def value_width(jobs: Jobs) -> Column:
    """Features of a head's value."""
    return np.where(jobs.value_width > 0, jobs.value_width, jobs.head_width)


def seen_share(jobs: Jobs) -> Column:
    """Of all pairs of a row's tokens, those that attention computes, on average over the layers that have one."""
    whole = 1 - 0.5 * jobs.causal
    near = np.minimum(jobs.window / jobs.length, 1)
    windowed = near * (1 - 0.5 * near)  # a band below the diagonal
    share = jobs.window_layers / np.maximum(jobs.layers - jobs.without_attention, 1)
    return whole + share * (windowed - whole)


def attention_weights(jobs: Jobs) -> Column:
    """Matrices of a layer with attention.

    Latent attention squeezes queries through `query_rank` features, and keys with values through `key_rank`; the turned
    part of the keys is made of the stream for all heads at once. Attention to a second stack has matrices like its own.
    """
    plain = jobs.width * jobs.head_width * 2 * (jobs.heads + jobs.kv_heads) * (1 + jobs.cross)
    queries, values = jobs.heads * jobs.head_width, jobs.heads * value_width(jobs)
    squeezed = jobs.width * jobs.query_rank + np.where(jobs.query_rank > 0, jobs.query_rank, jobs.width) * queries
    keys = jobs.width * (jobs.key_rank + jobs.turned)
    keys = keys + jobs.key_rank * (queries - jobs.heads * jobs.turned + values)
    return np.where(jobs.key_rank > 0, squeezed + keys + values * jobs.width, plain)


def state_features(jobs: Jobs) -> tuple[Column, Column]:
    """Of a state space (Mamba-2): the features it works on, and those its convolution passes over."""
    inner = jobs.state_heads * jobs.state_head_width
    return inner, inner + 2 * jobs.state_groups * jobs.state_width


def state_weights(jobs: Jobs) -> Column:
    """Of a layer with a state space, the norm before it left out.

    Matrices in and out, the convolution with its bias, three numbers a head, and the norm before the matrix out.
    """
    inner, convolved = state_features(jobs)
    matrices = jobs.width * (2 * inner + convolved + jobs.state_heads)
    return matrices + convolved * (jobs.state_kernel + 1) + 3 * jobs.state_heads + inner
