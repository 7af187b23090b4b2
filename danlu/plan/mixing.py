"""How long the part of a layer takes in which tokens see each other: attention of every kind, and state spaces."""

from __future__ import annotations

import numpy as np

from danlu.plan.jobs import Column, Jobs
from danlu.plan.layers import attention_share, second_length, seen_share, state_features, value_width
from danlu.plan.products import Times, linear_time, product_time, scaled, unnarrowed


def attention_time(jobs: Jobs, c: dict[str, float]) -> Times:
    """Seconds forward and backward of scores, softmax and their product with the values, on average over the layers."""
    jobs = unnarrowed(jobs)
    most = np.where(jobs.uneven > 0, 1 - 0.5 * jobs.causal / jobs.context, seen_share(jobs))
    forward, back = scores_time(jobs, jobs.length, most, c)
    share = attention_share(jobs)
    forward, back = share * forward, share * back
    if jobs.cross.any():
        aside = scores_time(jobs, second_length(jobs), np.ones(1), c)
        forward, back = forward + jobs.cross * aside[0], back + jobs.cross * aside[1]
    return forward, back


def scores_time(jobs: Jobs, seen: Column, share: Column, c: dict[str, float]) -> Times:
    """The same of one layer whose queries see `seen` tokens, that share of the pairs being needed at all."""
    heads = jobs.heads / jobs.tensor * jobs.micro_rows
    local, values = jobs.length / jobs.context, value_width(jobs)
    plain = product_time(local, seen, jobs.head_width, heads, jobs, c)
    plain = plain + product_time(local, values, seen, heads, jobs, c)
    # Fused softmax of Megatron takes blocks of 4 rows of heads; else it is made of several plain kernels.
    passes = np.where(heads % 4 == 0, 6, 24)
    moved = heads * local * seen * passes * c["scores"] / (jobs.memory_rate * c["memory"])
    flash = 4 * heads * local * seen * ((jobs.head_width + values) / 2) * share / (jobs.peak * c["gemm"] * 0.6)
    forward = np.where(jobs.flash > 0, flash, plain + moved)
    back = np.where(jobs.flash > 0, 2.5 * flash, 2 * plain + 1.5 * moved)
    return forward, back


def mixing_times(jobs: Jobs, c: dict[str, float]) -> list[Times]:
    """Seconds of matrices before and after the scores, and of state spaces, each on average over the layers."""
    share = attention_share(jobs)
    made = [scaled(share, part) for part in projection_times(jobs, c)]
    if jobs.cross.any():
        made += [scaled(jobs.cross, part) for part in _cross_times(jobs, c)]
    if jobs.state_layers.any():
        made.append(scaled(jobs.state_layers / jobs.layers, state_time(jobs, c)))
    return made


def projection_times(jobs: Jobs, c: dict[str, float]) -> list[Times]:
    """Seconds of the matrices into queries, keys and values, and of the one out of a layer with attention."""
    one = np.ones(1)
    queries, keys = jobs.heads * jobs.head_width, 2 * jobs.kv_heads * jobs.head_width
    into = linear_time(jobs.tokens, jobs.width, (queries + keys) / jobs.tensor, one, jobs, c)
    if jobs.key_rank.any():
        latent = _latent_time(jobs, c)
        into = np.where(jobs.key_rank > 0, latent[0], into[0]), np.where(jobs.key_rank > 0, latent[1], into[1])
    values = jobs.heads * value_width(jobs)
    return [into, linear_time(jobs.tokens, values / jobs.tensor, jobs.width, one, jobs, c)]


def _latent_time(jobs: Jobs, c: dict[str, float]) -> Times:
    """Of latent attention: what squeezes is held whole by every tensor process, what widens is cut by heads."""
    one, narrowed = np.ones(1), np.where(jobs.query_rank > 0, jobs.query_rank, jobs.width)
    mine = jobs.tokens / np.where(jobs.sequence > 0, jobs.tensor, 1)
    heads = jobs.heads / jobs.tensor
    parts = (
        linear_time(mine, jobs.width, jobs.query_rank + jobs.key_rank + jobs.turned, one, jobs, c),
        linear_time(jobs.tokens, narrowed, heads * jobs.head_width, one, jobs, c),
        linear_time(
            jobs.tokens, jobs.key_rank, heads * (jobs.head_width - jobs.turned + value_width(jobs)), one, jobs, c
        ),
    )
    return parts[0][0] + parts[1][0] + parts[2][0], parts[0][1] + parts[1][1] + parts[2][1]


def _cross_times(jobs: Jobs, c: dict[str, float]) -> list[Times]:
    """Of attention to a second stack: queries and output are of this stack's tokens, keys and values of the other's."""
    one, queries = np.ones(1), jobs.heads * jobs.head_width / jobs.tensor
    keys = 2 * jobs.kv_heads * jobs.head_width / jobs.tensor
    others = jobs.micro_rows * second_length(jobs) / jobs.context
    return [
        linear_time(jobs.tokens, jobs.width, queries, one, jobs, c),
        linear_time(jobs.tokens, queries, jobs.width, one, jobs, c),
        linear_time(others, jobs.width, keys, one, jobs, c),
    ]


def state_time(jobs: Jobs, c: dict[str, float]) -> Times:
    """Seconds forward and backward of a layer with a state space (Mamba-2, arXiv:2405.21060).

    Matrices in and out; between them the convolution and the norm move each number once in and once out. The scan
    takes 7 operations for a feature and a number of its state, in small products of pieces of a row, which at best
    reach a quarter of the rate that attention does. Backward it costs two and a half times as much, for states are
    made again.
    """
    one = np.ones(1)
    inner, convolved = state_features(jobs)
    into = linear_time(jobs.tokens, jobs.width, (inner + convolved + jobs.state_heads) / jobs.tensor, one, jobs, c)
    out = linear_time(jobs.tokens, inner / jobs.tensor, jobs.width, one, jobs, c)
    local = jobs.tokens / jobs.tensor
    moved = local * (3 * convolved + 4 * inner) * jobs.weight_bytes * c["norms"] / (jobs.memory_rate * c["memory"])
    operations = local * 7 * inner * jobs.state_width * c["scores"]
    scanned = operations / (unnarrowed(jobs).peak * c["gemm"] * 0.15)
    return into[0] + out[0] + moved + scanned, into[1] + out[1] + 2 * moved + 2.5 * scanned
