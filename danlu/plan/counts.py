"""What a model is made of: weights of each part, and of each stage of a pipeline. Counts are exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from danlu.plan.adapters import used_adapters
from danlu.plan.jobs import DEFAULTS, Column, Jobs
from danlu.plan.layers import (
    attention_weights,
    expert_input,
    second,
    second_length,
    seen_share,
    state_features,
    state_weights,
    value_width,
)


@dataclass(frozen=True)
class Weights:
    """Numbers of a whole model: of one layer's parts, and of what stands before and after the layers.

    Attributes:
        attention, state, feedforward: of a layer that has one: matrices of attention, a state space, a feed-forward.
        experts, router, shared: of a layer with a mixture: its experts, what chooses them, and what every token passes.
        norms: of a layer, on average: norms, biases, gates.
        embedding, head: before and after the layers.
        ahead: of a block that predicts a token beyond the next one, its experts left out.
        layers, attention_layers, state_layers, dense_layers, expert_layers, blocks: how many there are of each.
        second: of a second stack, where any of these models has one.
    """

    attention: Column
    state: Column
    feedforward: Column
    experts: Column
    router: Column
    shared: Column
    norms: Column
    embedding: Column
    head: Column
    ahead: Column
    layers: Column
    attention_layers: Column
    state_layers: Column
    dense_layers: Column
    expert_layers: Column
    blocks: Column
    second: Weights | None = None

    @property
    def mixing(self) -> Column:
        """Of attention and state space of a layer, on average."""
        return (self.attention_layers * self.attention + self.state_layers * self.state) / self.layers

    @property
    def dense(self) -> Column:
        """Of the layers, without the experts."""
        blocks = self.layers * (self.mixing + self.norms) + self.dense_layers * self.feedforward
        blocks = blocks + self.expert_layers * (self.router + self.shared) + self.blocks * self.ahead
        return blocks if self.second is None else blocks + self.second.dense

    @property
    def sparse(self) -> Column:
        """Of all experts of the layers."""
        own = (self.expert_layers + self.blocks) * self.experts
        return own if self.second is None else own + self.second.sparse

    @property
    def total(self) -> Column:
        """Of the model."""
        return self.dense + self.sparse + self.embedding + self.head


def weights(jobs: Jobs) -> Weights:
    """Of all jobs."""
    matrices = 2 + jobs.gated
    attention, feedforward = attention_weights(jobs), matrices * jobs.width * jobs.feedforward
    router = jobs.width * jobs.experts
    shared = jobs.width * (matrices * jobs.shared_width + 2 * jobs.expert_input)
    behind = np.where(jobs.experts > 0, router + shared, feedforward)
    return Weights(
        attention=attention,
        state=state_weights(jobs),
        feedforward=feedforward,
        experts=matrices * expert_input(jobs) * jobs.experts * jobs.expert_width,
        router=router,
        shared=shared,
        norms=jobs.vectors,
        embedding=jobs.width * (jobs.vocab + jobs.positions),
        head=jobs.ends + jobs.width * jobs.vocab * (1 - jobs.tied),
        ahead=2 * jobs.width**2 + attention + behind,
        layers=jobs.layers,
        attention_layers=jobs.layers - jobs.without_attention,
        state_layers=jobs.state_layers,
        dense_layers=jobs.layers - jobs.expert_layers - jobs.without_feedforward,
        expert_layers=jobs.expert_layers,
        blocks=jobs.ahead_blocks,
        second=weights(second(jobs)) if jobs.second_layers.any() else None,
    )


def of_model(model: Mapping[str, float]) -> Jobs:
    """A model as a job whose other columns mean nothing."""
    return Jobs.of(**({each.name: 1.0 for each in fields(Jobs)} | DEFAULTS | dict(model)))


def total_weights(model: Mapping[str, float]) -> float:
    """Of a model, from the columns that describe it."""
    return float(weights(of_model(model)).total[0])


def operations(jobs: Jobs, half: bool) -> Column:
    """Floating-point operations of a step, over all accelerators, with nothing computed again.

    Each matrix takes 6 for a weight and token: 2 forward and 4 backward. Scores and their product with the values take
    6 for a pair of tokens and a feature of query and value; of causal attention half the pairs count where `half`, and
    those within its window. A state space takes 21 for a token, a feature and a number of its state (NVIDIA's count).
    """
    rows = jobs.data * jobs.micro_batches * jobs.micro_rows
    whole = rows * jobs.length * _token_operations(jobs, half)
    if jobs.second_layers.any():
        whole = whole + rows * second_length(jobs) * _token_operations(second(jobs), half)
    return whole


def _token_operations(jobs: Jobs, half: bool) -> Column:
    """Of a token of one stack."""
    counted, further = weights(jobs), jobs.ahead
    chosen = counted.experts * jobs.chosen / np.maximum(jobs.experts, 1)
    matrices = counted.layers * counted.mixing + counted.dense_layers * counted.feedforward
    matrices = matrices + counted.expert_layers * (chosen + counted.router + counted.shared)
    matrices = matrices + further * (counted.ahead + chosen) + (1 + further) * jobs.width * jobs.outputs
    # Keys and values of the second stack are made of its tokens, of which there may be more or fewer.
    aside, keys = jobs.cross * second_length(jobs), 2 * jobs.width * jobs.kv_heads * jobs.head_width
    matrices = matrices + counted.layers * keys * (aside / jobs.length - jobs.cross)
    pairs = jobs.length * np.where(half, seen_share(jobs), 1.0) + aside
    features = (counted.attention_layers + further) * jobs.heads * (jobs.head_width + value_width(jobs)) / 2
    scanned = jobs.state_layers * state_features(jobs)[0] * jobs.state_width
    # Frozen matrices take 4: they have no gradient.
    own = np.where(jobs.rank > 0, 4, 6) * matrices + 6 * jobs.layers * used_adapters(jobs)
    return own + 12 * pairs * features + 21 * scanned


def stage_layers(jobs: Jobs, stage: Column | float = 0.0) -> Column:
    """Layers that a process holds at one place of the pipeline, 0 being the first.

    An even cut gives the fullest. A cut by cost weighs the head as so many layers as it has weights, and ends a stage
    where its share of the whole is reached.
    """
    even = jobs.chunks * np.ceil(jobs.layers / (jobs.pipeline * jobs.chunks))
    # A last stage that predicts several tokens has so much to do that it gets only what the others leave.
    rest = np.clip(jobs.layers - (jobs.pipeline - 1) * even, 0, even)
    even = np.where((jobs.ahead > 0) & (np.asarray(stage) == jobs.pipeline - 1), rest, even)
    counted = weights(jobs)
    layer = counted.mixing + counted.feedforward
    whole = jobs.layers + jobs.width * jobs.vocab / layer

    def before(place: Column | float) -> Column:
        return np.minimum(np.ceil(whole * place / jobs.pipeline - 1e-9), jobs.layers)

    end = np.where(np.asarray(stage) == jobs.pipeline - 1, jobs.layers, before(np.asarray(stage) + 1))
    return np.where(jobs.balanced > 0, end - before(np.asarray(stage)), even)


def layers_before_last(jobs: Jobs) -> tuple[Column, Column]:
    """Layers of the fullest stage but the last, and of all stages but the last together."""
    even = stage_layers(jobs)
    if not jobs.balanced.any():
        return even, (jobs.pipeline - 1) * even
    fullest = even
    for stage in range(1, int(jobs.pipeline.max()) - 1):
        fullest = np.where(stage < jobs.pipeline - 1, np.maximum(fullest, stage_layers(jobs, float(stage))), fullest)
    cut = jobs.layers - stage_layers(jobs, jobs.pipeline - 1)
    balanced = jobs.balanced > 0
    return np.where(balanced, fullest, even), np.where(balanced, cut, (jobs.pipeline - 1) * even)


def idle_stages(jobs: Jobs) -> Column:
    """Stages that a cut by cost leaves without a layer or the head, of each job: such a pipeline cannot run."""
    idle = np.zeros(len(jobs))
    for stage in range(int(jobs.pipeline.max()) - 1):
        before_last = stage < jobs.pipeline - 1
        idle = idle + (before_last & (stage_layers(jobs, float(stage)) < 1))
    return idle
