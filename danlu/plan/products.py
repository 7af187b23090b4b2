"""Matrix products: how long one takes, from an accelerator's multiprocessors, its memory and a few coefficients."""

from __future__ import annotations

import numpy as np

from danlu.plan.jobs import Column, Jobs

# Tiles of a matrix product that libraries choose among, and the share of the best rate a smaller one reaches.
TILES = ((256, 128, 1.0), (128, 128, 0.9), (128, 64, 0.75), (64, 64, 0.55))

Times = tuple[Column, Column]  # seconds forward and backward


def product_time(
    rows: Column, columns: Column, depth: Column, count: Column, jobs: Jobs, c: dict[str, float]
) -> Column:
    """Seconds of `count` matrix products [rows, depth] x [depth, columns] at once: the best tile, or memory."""
    aligned = np.where((columns % 8 > 0) | (depth % 8 > 0), c["unaligned"], 1.0)
    narrow = c["narrow"] ** np.log2(jobs.weight_bytes / jobs.gemm_bytes)  # lost with each halving
    best = np.full(np.broadcast(rows, columns, depth, count, jobs.peak).shape, np.inf)
    for height, breadth, share in TILES:
        tiles = np.ceil(rows / height) * np.ceil(columns / breadth) * count
        filled = tiles / jobs.units
        waves = c["waves"] * np.ceil(filled) + (1 - c["waves"]) * np.maximum(filled, 1)
        rate = jobs.peak / jobs.units * c["gemm"] * share * aligned * narrow
        best = np.minimum(best, waves * 2 * height * breadth * (depth + c["ramp"]) / rate)
    moved = jobs.gemm_bytes * (rows * depth + depth * columns) + jobs.weight_bytes * rows * columns
    return np.maximum(best, count * moved / (jobs.memory_rate * c["memory"]))


def linear_time(
    rows: Column, inputs: Column, outputs: Column, count: Column, jobs: Jobs, c: dict[str, float]
) -> tuple[Column, Column]:
    """Seconds forward and backward of `count` linear layers at once, over so many tokens each.

    Backward makes a gradient of the inputs and, where the layers learn, one of the weights.
    """
    forward = product_time(rows, outputs, inputs, count, jobs, c)
    learns = np.where(jobs.rank > 0, 0, product_time(inputs, outputs, rows, count, jobs, c))
    return forward, product_time(rows, inputs, outputs, count, jobs, c) + learns


def scaled(often: Column, part: Times) -> Times:
    """A part that comes so often, or only in a share of the layers."""
    return often * part[0], often * part[1]


def unnarrowed(jobs: Jobs) -> Jobs:
    """The same jobs with products of the activations' own precision, as attention and the head are computed."""
    return jobs.but(peak=jobs.peak * jobs.gemm_bytes / jobs.weight_bytes, gemm_bytes=jobs.weight_bytes)
