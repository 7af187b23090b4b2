"""What a model is made of: weights of each part, and of each stage of a pipeline. Counts are exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from danlu.plan.jobs import Column, Jobs


@dataclass(frozen=True)
class Weights:
    """Numbers of a whole model: of one layer's parts, and of what stands before and after the layers."""

    attention: Column
    feedforward: Column
    experts: Column
    router: Column
    norms: Column
    embedding: Column
    head: Column
    layers: Column
    expert_layers: Column

    @property
    def dense_layers(self) -> Column:
        """Layers with a plain feed-forward."""
        return self.layers - self.expert_layers

    @property
    def total(self) -> Column:
        """Of the model."""
        blocks = self.layers * (self.attention + self.norms) + self.dense_layers * self.feedforward
        return blocks + self.expert_layers * (self.experts + self.router) + self.embedding + self.head


def weights(jobs: Jobs) -> Weights:
    """Of all jobs."""
    matrices = 2 + jobs.gated
    return Weights(
        attention=jobs.width * jobs.head_width * 2 * (jobs.heads + jobs.kv_heads),
        feedforward=matrices * jobs.width * jobs.feedforward,
        experts=matrices * jobs.width * (jobs.experts * jobs.expert_width + jobs.shared_width),
        router=jobs.width * jobs.experts,
        norms=jobs.vectors,
        embedding=jobs.width * (jobs.vocab + jobs.positions),
        head=jobs.ends + jobs.width * jobs.vocab * (1 - jobs.tied),
        layers=jobs.layers,
        expert_layers=jobs.expert_layers,
    )


def total_weights(model: Mapping[str, float]) -> float:
    """Of a model, from the columns that describe it."""
    return float(weights(Jobs.of(**({each.name: 1.0 for each in fields(Jobs)} | dict(model)))).total[0])


def operations(jobs: Jobs, half: bool) -> Column:
    """Floating-point operations of a step, over all accelerators, with nothing computed again.

    Each matrix takes 6 for a weight and token: 2 forward and 4 backward. Scores and their product with the values take
    12 for a pair of tokens and a feature of the queries; of causal attention half the pairs count where `half`.
    """
    counted, mixture = weights(jobs), jobs.chosen * jobs.expert_width + jobs.shared_width
    sparse = jobs.expert_layers * ((2 + jobs.gated) * jobs.width * mixture + counted.router)
    matrices = jobs.layers * counted.attention + counted.dense_layers * counted.feedforward + sparse
    matrices = matrices + jobs.width * jobs.outputs
    pairs = jobs.layers * jobs.length * jobs.heads * jobs.head_width * np.where(half, 1 - 0.5 * jobs.causal, 1.0)
    tokens = jobs.data * jobs.micro_batches * jobs.micro_rows * jobs.length
    return tokens * (6 * matrices + 12 * pairs)


def stage_layers(jobs: Jobs, stage: Column | float = 0.0) -> Column:
    """Layers that a process holds at one place of the pipeline, 0 being the first.

    An even cut gives the fullest. A cut by cost weighs the head as so many layers as it has weights, and ends a stage
    where its share of the whole is reached.
    """
    even = jobs.chunks * np.ceil(jobs.layers / (jobs.pipeline * jobs.chunks))
    counted = weights(jobs)
    layer = counted.attention + counted.feedforward
    whole = jobs.layers + jobs.width * jobs.vocab / layer

    def before(place: Column | float) -> Column:
        return np.minimum(np.ceil(whole * place / jobs.pipeline - 1e-9), jobs.layers)

    end = np.where(np.asarray(stage) == jobs.pipeline - 1, jobs.layers, before(np.asarray(stage) + 1))
    return np.where(jobs.balanced > 0, end - before(np.asarray(stage)), even)


def idle_stages(jobs: Jobs) -> Column:
    """Stages that a cut by cost leaves without a layer or the head, of each job: such a pipeline cannot run."""
    idle = np.zeros(len(jobs))
    for stage in range(int(jobs.pipeline.max()) - 1):
        before_last = stage < jobs.pipeline - 1
        idle = idle + (before_last & (stage_layers(jobs, float(stage)) < 1))
    return idle
