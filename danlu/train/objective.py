"""What is minimised: functions from a model and a batch to a sum and a count, so that means survive any cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.data.labelled import LabelBatch
from danlu.data.pairs import PairBatch
from danlu.data.stream import IGNORED, Batch
from danlu.errors import DanluError
from danlu.model.config import EncoderDecoderConfig, ModelConfig
from danlu.model.head import LabelHead, WordHead
from danlu.model.loss import linear_cross_entropy
from danlu.model.mixture import Routing, router_penalty
from danlu.model.transformer import Decoder, Embedded, Encoder, EncoderDecoder, Model


@dataclass(frozen=True)
class Loss:
    """A loss before division.

    Attributes:
        sum: in nat, a scalar to call backward on.
        count: targets that it sums over.
        penalty: what else is minimised with it, times `count`; no part of the loss that is reported.
    """

    sum: Tensor
    count: int
    penalty: Tensor | float = 0.0


Objective = Callable[[Any, Any], Loss]  # from a model and one of its batches


class StackObjective(ABC):
    """An objective of Danlu's own models, in two halves, so that a pipeline can cut between them.

    Attributes:
        whole: a batch must not be cut into micro-batches, because its rows are compared with one another.
    """

    whole: ClassVar[bool] = False

    @abstractmethod
    def hidden(self, model: Any, batch: Any, x: Tensor | None = None, routes: list[Routing] | None = None) -> Tensor:
        """Hidden states after the last norm.

        Args:
            x: [B, T, width], hidden states from an earlier stage of a pipeline, in the place of the embedded input.
            routes: where routers note what they did.
        """

    @abstractmethod
    def score(self, model: Any, hidden: Tensor, batch: Any) -> Tensor:
        """The sum of the losses of a batch's targets, a float64 scalar."""

    def __call__(self, model: Any, batch: Any) -> Loss:
        """Both halves and, with a mixture, the losses on its routers (see `danlu.model.mixture`)."""
        routes: list[Routing] = []
        hidden = self.hidden(model, batch, routes=routes)
        return Loss(self.score(model, hidden, batch), batch.count, routing_penalty(model, routes, batch))


@dataclass(frozen=True)
class Words(StackObjective):
    """Cross-entropy of words: the next one, hidden ones, or those of an answer, as the batch's targets say.

    A batch may have `weights`, fp32 in the targets' shape, which multiply losses; the count stays that of the targets.

    Attributes:
        smoothing: share of each target's probability that is given to all words alike (arXiv:1512.00567).
        z: weight of the logits' squared log-sum-exp, which becomes part of the loss (arXiv:2204.02311).
    """

    smoothing: float = 0.0
    z: float = 0.0

    def hidden(
        self,
        model: Model,
        batch: Batch | PairBatch,
        x: Tensor | None = None,
        routes: list[Routing] | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """[B, T, width], of what is written where an encoder reads and a decoder writes.

        Args: states: where a model of one stack notes its stream before the first and after each block.
        """
        first = batch.tokens if x is None else x
        if isinstance(batch, PairBatch):
            if not isinstance(model, EncoderDecoder):
                raise DanluError("rows of two sides need a model that reads one and writes the other", fix="take a T5")
            return model(
                first, batch.written, segments=batch.segments, written_segments=batch.written_segments, routes=routes
            )
        if not isinstance(model, Decoder | Encoder):
            raise DanluError("rows of one side need a model of one stack", fix="take a decoder or an encoder")
        return model(first, positions=batch.positions, segments=batch.segments, routes=routes, hidden=states)

    def score(self, model: Model, hidden: Tensor, batch: Batch | PairBatch) -> Tensor:
        """In nat."""
        head, weight = word_head(model)
        return linear_cross_entropy(
            head.features(hidden).flatten(0, 1),
            weight,
            batch.targets.flatten(),
            head.bias,
            smoothing=self.smoothing,
            z=self.z,
            weights=word_weights(batch),
        )


next_token = Words()


class Labelling(StackObjective):
    """The first half of what judges rows by a head that has no words: labels, spans and values."""

    def hidden(
        self, model: Model, batch: LabelBatch, x: Tensor | None = None, routes: list[Routing] | None = None
    ) -> Tensor:
        """[B, T, width]."""
        first = batch.inputs if x is None else x
        if isinstance(model, Encoder):
            return model(first, types=batch.types, segments=batch.segments, routes=routes)
        if not isinstance(model, Decoder) or batch.types is not None:
            raise DanluError("rows with labels need a model of one stack, and rows of two texts an encoder")
        return model(first, segments=batch.segments, routes=routes)


@dataclass(frozen=True)
class Labels(Labelling):
    """Cross-entropy of the label of each row or of each token; labels may be probabilities (see mixup).

    Attributes:
        weights: of each class, which multiply losses as in torch's cross-entropy; the count stays that of the labels.
        smoothing: share of each label's probability that is given to all classes alike (arXiv:1512.00567).
        z: weight of the logits' squared log-sum-exp, which becomes part of the loss (arXiv:2204.02311).
    """

    weights: tuple[float, ...] | None = None
    smoothing: float = 0.0
    z: float = 0.0

    def score(self, model: Model, hidden: Tensor, batch: LabelBatch) -> Tensor:
        """In nat."""
        logits = label_logits(model, hidden, batch)
        return weighted_sum(self.losses(logits, batch.labels), batch.weights)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each label, fp32 in the shape of whole-numbered labels, else [B]; 0 where a label is -100.

        Args: logits: [B, classes] or [B, T, classes]; labels: int64 [B] or [B, T], or float [B, classes].
        """
        soft = labels.is_floating_point()
        flat, wanted = logits.float().flatten(0, -2), labels.to(torch.float32) if soft else labels.flatten()
        weight = None if self.weights is None else torch.tensor(self.weights, device=logits.device)
        losses = F.cross_entropy(flat, wanted, weight, reduction="none", label_smoothing=self.smoothing)
        if self.z:
            learned = 1.0 if soft else (wanted != IGNORED).float()
            losses = losses + self.z * flat.logsumexp(-1).square() * learned
        return losses if soft else losses.view(labels.shape)


@dataclass(frozen=True)
class Spans(Labelling):
    """Cross-entropy of where an answer starts and where it ends among a row's tokens (arXiv:1810.04805).

    Padding is no place where it could.
    """

    def score(self, model: Model, hidden: Tensor, batch: LabelBatch) -> Tensor:
        """In nat; start and end are two targets."""
        logits = label_logits(model, hidden, batch).float()
        if batch.segments is not None:
            logits = logits.masked_fill(batch.segments[..., None] == 0, float("-inf"))
        return weighted_sum(F.cross_entropy(logits, batch.labels, reduction="none"), batch.weights)


@dataclass(frozen=True)
class Regression(Labelling):
    """The square of the error, its mean over a row's outputs."""

    def score(self, model: Model, hidden: Tensor, batch: LabelBatch) -> Tensor:
        """In the square of the labels' unit."""
        values = label_logits(model, hidden, batch).float()
        wanted = batch.labels.view(len(values), -1).float()
        if wanted.shape != values.shape:
            what = f"the model has {values.shape[1]} outputs, but a row has {wanted.shape[1]} values"
            raise DanluError(what, where="regression")
        return weighted_sum((values - wanted).square().mean(-1), batch.weights)


def word_head(model: Model) -> tuple[WordHead, Tensor]:
    """The head that makes words, and what it multiplies by. Raises DanluError where the model has another, or none."""
    if not isinstance(model, Embedded) or not isinstance(model.head, WordHead):
        raise DanluError("this objective needs a model with a head of words", fix="take one whose task is words")
    return model.head, model.head_weight


def label_logits(model: Model, hidden: Tensor, batch: LabelBatch) -> Tensor:
    """What the head of labels says, [B, outputs] or [B, T, outputs]. Raises DanluError where the model has another."""
    if not isinstance(model, Embedded) or not isinstance(model.head, LabelHead):
        raise DanluError("this objective needs a model with a head of labels", fix="take one whose task is labels")
    return model.head(hidden, batch.segments, batch.inputs)


def word_weights(batch: Batch | PairBatch) -> Tensor | None:
    """What the losses of a batch's targets are multiplied by, flat."""
    return None if batch.weights is None else batch.weights.flatten()


def weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """float64, of losses times weights of their shape."""
    return (losses if weights is None else losses * weights).sum(dtype=torch.float64)


def routing_penalty(model: Any, routes: Sequence[Routing] | None, batch: Any) -> Tensor | float:
    """The weighted losses on the routers of a batch, summed over its rows as often as they have targets.

    They are the mean over all layers with a mixture, of which a stage of a pipeline notes only its own.
    """
    if not routes:
        return 0.0
    made: list[Tensor] = []
    config, counts = model.config, _row_counts(batch)
    parts: list[tuple[ModelConfig, Tensor | None]]
    if isinstance(config, EncoderDecoderConfig):
        parts = [(config.encoder, batch.segments), (config.decoder, batch.written_segments)]
    else:
        assert isinstance(config, ModelConfig)
        parts = [(config, batch.segments)]
    layers = [sum(stack.has_experts(layer) for layer in range(stack.layers)) for stack, _ in parts]
    noted = [list(routes)] if len(parts) == 1 else [list(routes[: layers[0]]), list(routes[layers[0] :])]
    for (stack, segments), own in zip(parts, noted, strict=True):
        if own and stack.experts is not None:
            real = None if segments is None else segments != 0
            made.append(router_penalty(own, stack.experts, counts, real, getattr(model, "ring", None)))
    return torch.stack(made).sum() / sum(layers)


def _row_counts(batch: Any) -> Tensor:
    """Targets of each row of a batch, int64 [B]."""
    if not isinstance(batch, LabelBatch):
        return (batch.targets != IGNORED).sum(-1)
    labels = batch.labels
    if labels.is_floating_point():
        return torch.ones(len(labels), dtype=torch.int64, device=labels.device)
    return (labels != IGNORED).view(len(labels), -1).sum(-1)
