"""Labels, places, values, pairs and teachers: the same numbers as transformers' and as the plain formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from danlu.data.labelled import LabelBatch
from danlu.data.pairs import ImageTexts, TextPairs
from danlu.data.stream import IGNORED, Batch
from danlu.errors import DanluError
from danlu.model import loss as module
from danlu.model.config import Head, ModelConfig
from danlu.model.transformer import Decoder, Encoder
from danlu.train.objective import Labels, Regression, Spans, StackObjective, Words
from danlu.train.objectives.contrastive import Contrastive, ImageText
from danlu.train.objectives.distillation import Distillation
from tests.model.zoo import WORDS, Twin, inputs, twin

SHAPE = {
    "vocab_size": 50,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "kv_heads": 2,
    "head_width": 8,
    "feedforward_width": 24,
}
PLAIN = ModelConfig(**SHAPE, context=32, causal=False)
WEIGHTS = (0.5, 1.0, 2.0, 1.5, 0.1)


def encoder(head: Head | None, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(replace(PLAIN, head=head))


def rows(labels: Tensor, seed: int = 0, words: int = 50, length: int = 12) -> LabelBatch:
    """A row for each label, with padding behind some of them."""
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, words, (len(labels), length), generator=chance)
    lengths = torch.randint(length // 2, length + 1, (len(labels), 1), generator=chance)
    return LabelBatch(tokens, labels, (torch.arange(length) < lengths).int())


def same_as(loss: Tensor, theirs: Tensor, made: Twin) -> None:
    torch.testing.assert_close(loss.float(), theirs, atol=1e-6, rtol=1e-5)
    loss.backward()
    theirs.backward()
    ours, reference = made.ours.embedding.tokens.weight.grad, made.theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


# --- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["bert sequence", "roberta sequence", "bert tokens", "roberta tokens"])
def test_the_loss_of_labels_is_transformers(case: str, tmp_path: Path) -> None:
    made = twin(case, tmp_path)
    chance = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (6, 12) if "tokens" in case else (6,), generator=chance)
    batch = rows(labels, words=WORDS)
    assert batch.segments is not None
    if "tokens" in case:
        batch = replace(batch, labels=torch.where(batch.segments > 0, labels, IGNORED))
    theirs = made.theirs(batch.inputs, attention_mask=batch.segments.long(), labels=batch.labels).loss
    loss = Labels()(made.ours, batch)
    assert loss.count == (6 if "sequence" in case else int(batch.segments.sum()))
    same_as(loss.sum / loss.count, theirs, made)


def test_images_have_labels_too(tmp_path: Path) -> None:
    made = twin("vit", tmp_path)
    labels = torch.tensor([3, 0, 4])
    batch = LabelBatch(inputs(made.ours)["pixel_values"], labels)
    loss = Labels()(made.ours, batch)
    theirs = made.theirs(pixel_values=batch.inputs, labels=labels).loss
    torch.testing.assert_close((loss.sum / loss.count).float(), theirs, atol=1e-6, rtol=1e-5)
    assert batch.size == batch.count == 3


@pytest.mark.parametrize("case", ["bert span", "roberta span"])
def test_the_loss_of_answers_places_is_transformers(case: str, tmp_path: Path) -> None:
    made = twin(case, tmp_path)
    batch = rows(torch.tensor([[1, 4], [0, 0], [5, 5], [2, 3]]), words=WORDS)
    batch = replace(batch, segments=torch.ones_like(batch.inputs, dtype=torch.int32))
    kinds = {}
    if "roberta" not in case:
        batch = replace(batch, types=(torch.arange(12) > 3).long().expand(4, -1))
        kinds = {"token_type_ids": batch.types}
    start, end = batch.labels.unbind(-1)
    theirs = made.theirs(batch.inputs, start_positions=start, end_positions=end, **kinds).loss
    loss = Spans()(made.ours, batch)
    assert loss.count == 8
    same_as(loss.sum / loss.count, theirs, made)


def test_an_answer_never_lies_in_padding() -> None:
    model, batch = encoder(Head("span", outputs=2)), rows(torch.tensor([[1, 4], [0, IGNORED]]))
    assert batch.segments is not None
    longer = LabelBatch(F.pad(batch.inputs, (0, 8)), batch.labels, F.pad(batch.segments, (0, 8)))
    torch.testing.assert_close(Spans()(model, longer).sum, Spans()(model, batch).sum)
    assert batch.count == 3


def test_the_loss_of_values_is_transformers(tmp_path: Path) -> None:
    made = twin("bert sequence", tmp_path)
    made.theirs.config.problem_type = "regression"
    batch = rows(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), words=WORDS)
    assert batch.segments is not None
    theirs = made.theirs(batch.inputs, attention_mask=batch.segments.long(), labels=batch.labels).loss
    loss = Regression()(made.ours, batch)
    assert loss.count == 6
    same_as(loss.sum / loss.count, theirs, made)


def test_values_need_as_many_outputs() -> None:
    with pytest.raises(DanluError, match="the model has 2 outputs, but a row has 1 values"):
        Regression()(encoder(Head("sequence", outputs=2, pool="first")), rows(torch.zeros(3)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_class_weights_smoothing_and_z_equal_the_plain_formula(
    smoothing: float, weights: tuple[float, ...] | None
) -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, IGNORED, 2])
    known = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    plain = F.cross_entropy(logits, labels, known, reduction="sum", label_smoothing=smoothing)
    plain = plain + 0.03 * logits.logsumexp(-1)[labels != IGNORED].square().sum()
    ours = Labels(weights, smoothing, z=0.03).losses(logits, labels)
    torch.testing.assert_close(ours.sum(dtype=torch.float64), plain, rtol=1e-6, atol=0)
    one, other = (torch.autograd.grad(loss, logits)[0] for loss in (ours.sum(), plain))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    likely = F.one_hot(labels.clamp(min=0), 5).float()
    soft = Labels(weights, smoothing, z=0.03).losses(logits, likely)
    torch.testing.assert_close(soft[labels >= 0], ours[labels >= 0])


def test_weights_of_rows_multiply_their_losses() -> None:
    model = encoder(Head("sequence", outputs=3, pool="first"))
    batch = rows(torch.tensor([0, 2, 1]))
    weighted = replace(batch, weights=torch.tensor([0.0, 2.0, 0.0]))
    alone = Labels()(model, batch.split(3)[1])
    loss = Labels()(model, weighted)
    torch.testing.assert_close(loss.sum, 2 * alone.sum)
    assert loss.count == 3


CUTS: dict[str, tuple[StackObjective, Head]] = {
    "rows": (Labels(WEIGHTS, 0.1, 0.01), Head("sequence", outputs=5, pool="first", dense="tanh")),
    "likely": (Labels(), Head("sequence", outputs=5, pool="mean")),
    "tokens": (Labels(smoothing=0.1), Head("tokens", outputs=5)),
    "spans": (Spans(), Head("span", outputs=2)),
    "values": (Regression(), Head("sequence", outputs=3, pool="mean")),
    "taught": (
        Distillation(Labels(z=0.1), encoder(Head("tokens", outputs=5), 3), 3.0, 0.4),
        Head("tokens", outputs=5),
    ),
}


def labels_for(case: str, count: int, chance: torch.Generator) -> Tensor:
    if case in ("tokens", "taught"):
        labels = torch.randint(0, 5, (count, 12), generator=chance)
        return torch.where(torch.rand(count, 12, generator=chance) < 0.3, IGNORED, labels)
    if case == "spans":
        return torch.randint(0, 6, (count, 2), generator=chance)
    if case == "values":
        return torch.randn(count, 3, generator=chance)
    if case == "likely":
        return torch.rand(count, 5, generator=chance).softmax(-1)
    return torch.randint(0, 5, (count,), generator=chance)


@pytest.mark.parametrize("case", CUTS)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), parts=st.integers(1, 6))
@settings(max_examples=12, deadline=None)
def test_the_mean_is_the_same_however_a_batch_is_cut(case: str, seed: int, count: int, parts: int) -> None:
    objective, head = CUTS[case]
    model, chance = encoder(head), torch.Generator().manual_seed(seed)
    batch = rows(labels_for(case, count, chance), seed)
    whole, wholes = evaluate(objective, model, [batch])
    pieces, gradient = evaluate(objective, model, batch.split(min(parts, count)))
    assert not objective.whole
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wholes, rtol=1e-4, atol=1e-5)


def evaluate(objective: StackObjective, model: Encoder, parts: list[LabelBatch]) -> tuple[Tensor, Tensor]:
    """The mean loss and its gradient at the words."""
    losses = [objective(model, part) for part in parts]
    mean = sum((loss.sum for loss in losses), torch.zeros(())) / max(sum(loss.count for loss in losses), 1)
    [gradient] = torch.autograd.grad(mean, [model.embedding.tokens.weight])
    return mean.detach(), gradient


def test_rows_of_two_texts_need_an_encoder() -> None:
    batch = replace(rows(torch.zeros(2, dtype=torch.int64)), types=torch.zeros(2, 12, dtype=torch.int64))
    decoder = Decoder(replace(PLAIN, causal=True, head=Head("sequence", outputs=2, pool="last")))
    with pytest.raises(DanluError, match="rows of two texts an encoder"):
        Labels()(decoder, batch)
    assert Labels()(decoder, replace(batch, types=None)).count == 2
    with pytest.raises(DanluError, match="needs a model with a head of labels"):
        Labels()(encoder(Head()), batch)


# --- Pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["clip", "clip first"])
def test_the_loss_of_images_and_texts_is_transformers(case: str, tmp_path: Path) -> None:
    made = twin(case, tmp_path)
    batch = inputs(made.ours)
    tokens, pixels = batch["input_ids"][:2], batch["pixel_values"]
    theirs = made.theirs(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
    objective = ImageText()
    loss = objective(made.ours, ImageTexts(tokens, torch.ones_like(tokens, dtype=torch.int32), pixels))
    torch.testing.assert_close((loss.sum / loss.count).float(), theirs, atol=1e-6, rtol=1e-5)
    loss.sum.backward()
    theirs.backward()
    torch.testing.assert_close(made.ours.logit_scale.grad / 2, made.theirs.logit_scale.grad, atol=1e-5, rtol=1e-4)
    assert objective.whole
    with pytest.raises(DanluError, match="cannot be cut into a pipeline"):
        objective.hidden(made.ours, None, torch.zeros(1))


def text_pairs(count: int = 6) -> TextPairs:
    sides = [rows(torch.zeros(count), seed) for seed in (1, 2)]
    tokens, segments = (torch.stack([getattr(side, name) for side in sides], 1) for name in ("inputs", "segments"))
    return TextPairs(tokens, segments)


@pytest.mark.parametrize("symmetric", [False, True])
def test_texts_find_their_partners(symmetric: bool) -> None:
    model, batch = encoder(None), text_pairs()
    vectors = []
    for side in (0, 1):
        segments = batch.segments[:, side]
        hidden = model(batch.tokens[:, side], segments=segments)
        mean = torch.stack([row[mask > 0].mean(0) for row, mask in zip(hidden, segments, strict=True)])
        vectors.append(F.normalize(mean, dim=-1))
    cosines = vectors[0] @ vectors[1].T / 0.1
    plain = F.cross_entropy(cosines, torch.arange(6), reduction="sum")
    if symmetric:
        plain = (plain + F.cross_entropy(cosines.T, torch.arange(6), reduction="sum")) / 2
    loss = Contrastive(temperature=0.1, symmetric=symmetric)(model, batch)
    torch.testing.assert_close(loss.sum.float(), plain, rtol=1e-5, atol=1e-5)
    assert loss.count == 6 and Contrastive.whole


def test_the_models_own_head_may_make_the_vector() -> None:
    batch, objective = text_pairs(), Contrastive(pool=None)
    model = encoder(Head("embedding", pool="first"))
    expected = Contrastive(pool="first")(model, batch).sum
    torch.testing.assert_close(objective(model, batch).sum, expected)
    with pytest.raises(DanluError, match="no head that makes one vector"):
        objective(encoder(None), batch)


# --- Teachers -------------------------------------------------------------------------------------------------------


def words_batch() -> Batch:
    tokens = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(6))
    targets = tokens.roll(-1, 1)
    targets[:, ::4] = IGNORED
    return Batch(tokens, targets, torch.ones(3, 12, dtype=torch.int32), torch.arange(12).expand(3, -1))


def test_a_teacher_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 16 * 50)
    config = replace(PLAIN, causal=True)
    torch.manual_seed(5)
    pupil, teacher = Decoder(config), Decoder(replace(config, width=24, layers=1, dropout=0.5))
    objective, batch = Distillation(Words(), teacher, temperature=2.0, alpha=0.3), words_batch()
    loss = objective(pupil, batch)
    said, known = (model.logits(model(batch.tokens)).flatten(0, 1) for model in (pupil, teacher))
    learned = batch.targets.flatten() != IGNORED
    soft = F.kl_div((said / 2).log_softmax(-1), (known / 2).softmax(-1), reduction="none").sum(-1)[learned].sum() * 4
    hard = F.cross_entropy(said, batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.sum.float(), 0.3 * soft + 0.7 * hard, rtol=1e-5, atol=1e-5)
    (loss.sum + 0.0).backward()
    assert pupil.embedding.tokens.weight.grad is not None
    assert all(weight.grad is None for weight in teacher.parameters()) and not teacher.training
    only_hard = Distillation(Words(), teacher, alpha=0.0)(pupil, batch)
    torch.testing.assert_close(only_hard.sum.float(), hard, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft_labels", [False, True])
def test_a_teacher_of_labels(soft_labels: bool) -> None:
    head = Head("sequence", outputs=4, pool="first")
    pupil, teacher = encoder(head, 1), encoder(head, 2)
    labels = torch.tensor([0, IGNORED, 3, 1])
    batch = rows(F.one_hot(labels.clamp(min=0), 4).float() if soft_labels else labels)
    said, known = (
        model.logits(model(batch.inputs, segments=batch.segments), batch.segments) for model in (pupil, teacher)
    )
    learned = slice(None) if soft_labels else labels != IGNORED
    soft = F.kl_div((said / 3).log_softmax(-1), (known / 3).softmax(-1), reduction="none").sum(-1)[learned].sum() * 9
    hard = F.cross_entropy(said, batch.labels, reduction="sum")
    loss = Distillation(Labels(), teacher, temperature=3.0, alpha=0.6)(pupil, batch)
    torch.testing.assert_close(loss.sum.float(), 0.6 * soft + 0.4 * hard, rtol=1e-5, atol=1e-5)


def test_teachers_that_cannot_teach_are_refused() -> None:
    pupil: nn.Module = Decoder(replace(PLAIN, causal=True))
    teacher = Decoder(replace(PLAIN, causal=True, vocab_size=60))
    with pytest.raises(DanluError, match="the model has 50 words, its teacher 60"):
        Distillation(Words(), teacher)(pupil, words_batch())
    with pytest.raises(DanluError, match="temperature 0"):
        Distillation(Words(), teacher, temperature=0)
