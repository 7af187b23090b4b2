"""What is minimised: words, next, hidden or written; the same numbers as transformers', however a batch is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from danlu.data.pairs import PairBatch
from danlu.data.stream import IGNORED, Batch
from danlu.errors import DanluError
from danlu.model import loss as module
from danlu.model.config import EncoderDecoderConfig, Experts, ModelConfig
from danlu.model.embedding import Received
from danlu.model.loss import Taught, linear_cross_entropy, linear_distillation
from danlu.model.mixture import Routing, router_penalty
from danlu.model.transformer import Decoder, Encoder, EncoderDecoder
from danlu.train.objective import Words, next_token
from tests.model.zoo import WORDS, twin

SHAPE = {
    "vocab_size": 50,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_width": 8,
    "feedforward_width": 24,
}
PLAIN = ModelConfig(**SHAPE, context=32)


@dataclass(frozen=True)
class Weighted(Batch):
    """A batch whose targets have weights."""

    weights: Tensor | None = None


def batch(seed: int = 0, rows: int = 2) -> Batch:
    tokens = torch.randint(0, 50, (rows, 12), generator=torch.Generator().manual_seed(seed))
    segments = torch.ones(rows, 12, dtype=torch.int32)
    return Batch(tokens, tokens.roll(-1, 1), segments, torch.arange(12).expand(rows, -1))


def random_batch(seed: int, rows: int) -> Weighted:
    """Padding behind some rows, a few targets that are not learned, and a weight for each."""
    chance = torch.Generator().manual_seed(seed)
    plain = batch(seed, rows)
    segments = (torch.arange(12) < torch.randint(1, 13, (rows, 1), generator=chance)).int()
    learned = (torch.rand(rows, 12, generator=chance) < 0.6) & (segments > 0)
    targets = torch.where(learned, plain.targets, IGNORED)
    return Weighted(plain.tokens, targets, segments, plain.positions, torch.rand(rows, 12, generator=chance))


# --- Mixtures -------------------------------------------------------------------------------------------------------


def test_losses_on_routers_are_minimised_but_not_reported() -> None:
    experts = Experts(4, 2, 12, balance=0.5, z=0.25)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, context=32, experts=experts))
    loss = next_token(model, batch())
    routes: list[Routing] = []
    logits = model.logits(model(batch().tokens, routes=routes))
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch().targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.sum.float(), plain, rtol=1e-5, atol=1e-4)
    counts = (batch().targets != IGNORED).sum(-1)
    expected = router_penalty(routes, experts, counts, batch().segments != 0) / len(routes)
    assert isinstance(loss.penalty, torch.Tensor)
    torch.testing.assert_close(loss.penalty, expected, rtol=1e-5, atol=1e-5)
    loss.penalty.backward()
    assert all(block.feedforward.router.weight.grad.any() for block in model.blocks)


def test_a_model_without_a_mixture_has_no_penalty() -> None:
    assert next_token(Decoder(PLAIN), batch()).penalty == 0.0


def test_both_stacks_routers_are_minimised() -> None:
    experts = Experts(4, 1, 12, balance=0.5)
    config = ModelConfig(**SHAPE, context=32, experts=experts, head=None, causal=False)
    model = EncoderDecoder(
        EncoderDecoderConfig(config, ModelConfig(**SHAPE, context=32, experts=experts, cross=True, tied=True))
    )
    penalty = next_token(model, pair_batch(0, 2)).penalty
    assert isinstance(penalty, Tensor)
    penalty.backward()
    assert all(stack.blocks[1].feedforward.router.weight.grad.any() for stack in (model.encoder, model.decoder))


# --- Parity ---------------------------------------------------------------------------------------------------------


def pair_batch(seed: int, rows: int, words: int = 50) -> PairBatch:
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, words, (rows, 9), generator=chance)
    targets = torch.randint(3, words, (rows, 6), generator=chance)
    sides = [(torch.arange(side) < torch.randint(2, side + 1, (rows, 1), generator=chance)).int() for side in (9, 6)]
    written = torch.cat((torch.zeros(rows, 1, dtype=torch.int64), targets[:, :-1]), 1)
    return PairBatch(tokens, sides[0], written, sides[1], torch.where(sides[1] > 0, targets, IGNORED))


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert words", "roberta words"])
def test_the_loss_of_words_is_transformers(case: str, tmp_path: Path) -> None:
    made = twin(case, tmp_path)
    chance = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, WORDS, (4, 15), generator=chance)
    segments = (torch.arange(15) < torch.tensor([[15], [9], [12], [4]])).int()
    targets = torch.where((torch.rand(4, 15, generator=chance) < 0.4) & (segments > 0), tokens, IGNORED)
    if isinstance(made.ours, Decoder):  # transformers moves the labels of decoders itself
        targets[:, 0] = IGNORED
        learned = F.pad(targets[:, 1:], (0, 1), value=IGNORED)
    else:
        learned = targets
    theirs = made.theirs(input_ids=tokens, attention_mask=segments.long(), labels=targets).loss
    loss = Words()(made.ours, Batch(tokens, learned, segments, torch.arange(15).expand(4, -1)))
    same_as(loss.sum / loss.count, theirs, made.ours.embedding.tokens.weight, made.theirs.get_input_embeddings().weight)


@pytest.mark.parametrize("case", ["t5", "flan-t5", "t5 uneven"])
def test_the_loss_of_answers_is_transformers(case: str, tmp_path: Path) -> None:
    made = twin(case, tmp_path)
    rows = pair_batch(4, 5, WORDS)
    theirs = made.theirs(input_ids=rows.tokens, attention_mask=rows.segments.long(), labels=rows.targets).loss
    loss = Words()(made.ours, rows)
    assert loss.count == rows.count == int(rows.written_segments.sum())
    same_as(loss.sum / loss.count, theirs, made.ours.embedding.tokens.weight, made.theirs.shared.weight)


def same_as(ours: Tensor, theirs: Tensor, weight: Tensor, their_weight: Tensor) -> None:
    torch.testing.assert_close(ours.float(), theirs, atol=1e-5, rtol=1e-5)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(weight.grad, their_weight.grad, atol=1e-5, rtol=1e-4)


def plain_loss(logits: Tensor, targets: Tensor, smoothing: float, z: float, weights: Tensor | None = None) -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
    losses = losses + z * logits.logsumexp(-1).square() * (targets != IGNORED)
    return (losses if weights is None else losses * weights).sum()


@pytest.fixture
def head() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight and bias in fp64, targets and their weights."""
    chance = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*size, generator=chance).double() for size in ((70, 24), (300, 24), (300,)))
    targets = torch.randint(0, 300, (70,), generator=chance)
    targets[::9] = IGNORED
    return hidden, weight / 4, bias, targets, torch.rand(70, generator=chance)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 16 * 300)
    monkeypatch.setattr(module, "PART_LOGITS", 3 * 300)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.1), (1.0, 0.0)])
def test_smoothing_z_and_weights_equal_plain_autograd(
    head: tuple[Tensor, ...], smoothing: float, z: float, weighted: bool
) -> None:
    hidden, weight, bias, targets, weights = head
    exact = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    chosen = weights if weighted else None
    plain = plain_loss(exact[0] @ exact[1].T + exact[2], targets, smoothing, z, chosen)
    ours = [tensor.float().requires_grad_() for tensor in (hidden, weight, bias)]
    loss = linear_cross_entropy(ours[0], ours[1], targets, ours[2], smoothing=smoothing, z=z, weights=chosen)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    (plain / 7).backward()
    (loss / 7).backward()
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=2e-6)


def test_weights_of_one_change_no_bit(head: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, weights = (
        tensor.float() if tensor.is_floating_point() else tensor for tensor in head
    )
    found = []
    for chosen in (None, torch.ones_like(weights)):
        own = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        loss = linear_cross_entropy(own[0], own[1], targets, own[2], weights=chosen)
        loss.backward()
        found.append((loss, *(tensor.grad for tensor in own)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("temperature", "alpha", "smoothing"), [(1.0, 1.0, 0.0), (3.0, 0.3, 0.0), (0.5, 0.7, 0.1)])
def test_distillation_equals_the_plain_formula(
    head: tuple[Tensor, ...], temperature: float, alpha: float, smoothing: float
) -> None:
    hidden, weight, bias, targets, weights = head
    chance = torch.Generator().manual_seed(8)
    teacher = [torch.randn(*size, generator=chance).double() for size in ((70, 12), (300, 12), (300,))]
    exact = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    known = ((teacher[0] @ teacher[1].T + teacher[2]) / temperature).softmax(-1)
    soft = F.kl_div((logits / temperature).log_softmax(-1), known, reduction="none").sum(-1) * temperature**2
    soft = (soft * weights * (targets != IGNORED)).sum()
    plain = alpha * soft + (1 - alpha) * plain_loss(logits, targets, smoothing, 0.02, weights)
    ours = [tensor.float().requires_grad_() for tensor in (hidden, weight, bias)]
    taught = Taught(*(tensor.float() for tensor in teacher))
    loss = linear_distillation(
        ours[0], ours[1], targets, ours[2], taught, temperature, alpha, smoothing=smoothing, z=0.02, weights=weights
    )
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    plain.backward()
    loss.backward()
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=2e-5)


# --- Cuts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    reader = ModelConfig(**SHAPE, context=32, head=None, causal=False)
    writer = ModelConfig(**SHAPE, context=32, cross=True, tied=True)
    return {
        "decoder": Decoder(PLAIN),
        "encoder": Encoder(replace(PLAIN, causal=False)),
        "both": EncoderDecoder(EncoderDecoderConfig(reader, writer)),
    }


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 6),
    parts=st.integers(1, 6),
    kind=st.sampled_from(["decoder", "encoder", "both"]),
)
@settings(max_examples=40, deadline=None)
def test_the_mean_is_the_same_however_a_batch_is_cut(
    models: dict[str, nn.Module], seed: int, rows: int, parts: int, kind: str
) -> None:
    model, objective = models[kind], Words(smoothing=0.1, z=0.01)
    whole = pair_batch(seed, rows) if kind == "both" else random_batch(seed, rows)
    cut = [type(whole)(*piece) for piece in pieces(whole, min(parts, rows))]
    results = []
    for group in ([whole], cut):
        model.zero_grad()
        losses = [objective(model, part) for part in group]
        sum(loss.sum for loss in losses).backward()
        assert sum(loss.count for loss in losses) == whole.count
        results.append((sum(loss.sum for loss in losses).detach(), model.embedding.tokens.weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def pieces(whole: Batch | PairBatch, parts: int) -> list[tuple[Tensor | None, ...]]:
    columns = [getattr(whole, name) for name in whole.__dataclass_fields__]
    cut = [[None] * parts if column is None else column.tensor_split(parts) for column in columns]
    return list(zip(*cut, strict=True))


def test_a_pipeline_may_cut_before_the_first_block(models: dict[str, nn.Module]) -> None:
    """Hidden states in the place of the embedding give the same loss, and a gradient to hand back."""
    model, rows = models["decoder"], random_batch(4, 3)
    assert isinstance(model, Decoder)
    x = model.embedding(rows.tokens, rows.positions).detach().requires_grad_()
    whole = next_token(model, rows).sum
    embedding, model.embedding = model.embedding, Received(None)
    try:
        hidden = next_token.hidden(model, rows, x)
        total = next_token.score(model, hidden, rows)
    finally:
        model.embedding = embedding
    assert torch.equal(total, whole)
    total.backward()
    assert x.grad is not None and x.grad.any()


def test_models_and_rows_that_do_not_go_together_are_refused(models: dict[str, nn.Module]) -> None:
    with pytest.raises(DanluError, match="two sides need a model that reads one"):
        next_token(models["decoder"], pair_batch(0, 2))
    with pytest.raises(DanluError, match="one side need a model of one stack"):
        next_token(models["both"], batch())
    with pytest.raises(DanluError, match="needs a model with a head of words"):
        next_token(Decoder(replace(PLAIN, head=None)), batch())
