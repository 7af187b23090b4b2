"""Bytes a weight of what an optimizer keeps: masters, moments, an average."""

from __future__ import annotations

import numpy as np

from danlu.plan.adapters import layer_adapters
from danlu.plan.counts import of_model, weights
from danlu.plan.jobs import Jobs
from danlu.plan.shapes import Shape

EIGHT_BIT_BLOCKS = (64, 32, 16)  # values of a row that share a scale, as in danlu.train.optimizing.adam8


def state_bytes(
    model: Shape,
    rule: str,
    *,
    momentum: bool = False,
    eight_bit: bool = False,
    average: bool = False,
    fp32: bool = False,
) -> float:
    """Bytes a weight, on average over a model of one stack.

    Args:
        model: its columns.
        rule: as `optimizer.name` in a recipe of `danlu train`.
        momentum: whether sgd and rmsprop have one.
        eight_bit: Adam's moments of matrices are bytes (`optimizer.state: 8bit`).
        average: a running average of the weights is kept (`optimizer.ema`).
        fp32: the model computes with the masters themselves.
    """
    jobs = of_model(model)
    counted = weights(jobs)
    total, norms = float(counted.total[0]), float((jobs.layers * jobs.vectors)[0])
    vectors = norms + float(jobs.ends[0])
    inner = float((counted.dense + counted.sparse)[0]) - norms  # matrices of blocks
    moments = {
        "sgd": 4.0 * momentum, "adagrad": 4.0, "rmsprop": 4.0 + 4.0 * momentum, "adam": 8.0, "adamw": 8.0,
        "muon": (4 * inner + 8 * (total - inner)) / total,
        "adafactor": 4 * (vectors + _edges(jobs)) / total,
    }[rule]  # fmt: skip
    block = next((size for size in EIGHT_BIT_BLOCKS if model["width"] % size == 0), None)
    if eight_bit and block is not None:
        moments = ((2 + 8 / block) * (total - vectors) + 8 * vectors) / total
    return (0.0 if fp32 else 4.0) + moments + 4.0 * average


def _edges(jobs: Jobs) -> float:
    """Rows and columns of all matrices, of which Adafactor keeps a mean each: as many as adapters of rank 1 have."""
    dense, banks = layer_adapters(jobs.but(rank=1, adapted_attention=1, adapted_feedforward=1))
    ends = (2 - jobs.tied) * (jobs.width + jobs.vocab) + np.where(jobs.positions > 0, jobs.width + jobs.positions, 0)
    return float((jobs.layers * (dense + banks) + ends)[0])
