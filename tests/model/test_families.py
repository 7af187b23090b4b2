"""Every family computes what transformers computes, and its files go both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from danlu.model.checkpoint import StoredModel, save_checkpoint
from danlu.model.families.known import FAMILIES, family_for
from danlu.model.transformer import Decoder, EncoderDecoder
from tests.model.zoo import BERTS, CASES, DECODERS, PAIRED, Twin, compute, inputs, output, twin

DEEP = 1e-4  # for T5, whose logits are some thirty times as large as the others'


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twin]:
    return {case: twin(case, tmp_path_factory.mktemp("zoo") / "hf") for case in CASES}


def near(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def tolerance(case: str) -> float:
    return DEEP if case in PAIRED else 1e-5


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_transformers(twins: dict[str, Twin], case: str, tmp_path: Path) -> None:
    made = twins[case]
    batch = inputs(made.ours)
    theirs, ours = output(made.theirs(**batch)), compute(made.ours, batch)
    near(ours, theirs, tolerance(case))

    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)) / theirs.numel() ** 0.5
    for model, made_output in ((made.theirs, theirs), (made.ours, ours)):
        model.zero_grad()
        made_output.backward(upstream)
    # Gradients go through the same files as weights: names, fused tensors and experts are then the same.
    for name, gradient in saved_gradients(made, tmp_path).items():
        known = our_gradients(made)[name]
        torch.testing.assert_close(known, gradient, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def saved_gradients(made: Twin, path: Path) -> dict[str, Tensor]:
    """Transformers' gradients under the names of its files."""
    with torch.no_grad():
        kept = {name: weight.detach().clone() for name, weight in made.theirs.named_parameters()}
        for weight in made.theirs.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        made.theirs.save_pretrained(path)
        for name, weight in made.theirs.named_parameters():
            weight.copy_(kept[name])
    return load_file(path / "model.safetensors")


def our_gradients(made: Twin) -> dict[str, Tensor]:
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in made.ours.named_parameters()
    }
    return {name: place.put(parts) for name, place, parts in made.stored.family.names.outward(gradients)}


@pytest.mark.parametrize("case", CASES)
def test_saving_and_loading_change_no_bit(twins: dict[str, Twin], case: str, tmp_path: Path) -> None:
    made = twins[case]
    save_checkpoint(made.ours, None, tmp_path / "ours")
    again = StoredModel.open(tmp_path / "ours")
    assert (again.config, again.family.architecture) == (made.stored.config, made.stored.family.architecture)
    weights = again.load().state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in made.ours.state_dict().items())

    theirs = type(made.theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype=torch.float32)
    batch = inputs(made.ours)
    with torch.no_grad():
        assert torch.equal(output(theirs.eval()(**batch)), output(made.theirs(**batch)))


@pytest.mark.parametrize("case", [*DECODERS, *BERTS])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(twins: dict[str, Twin], case: str) -> None:
    made = twins[case]
    ids = inputs(made.ours, rows=2, length=17)["input_ids"]
    alone = compute(made.ours, {"input_ids": ids})
    pad = torch.full((2, 4), 0 if "roberta" not in case else 1)
    ones = torch.ones(2, 17, dtype=torch.int32)
    for left in (True, False):
        padded = torch.cat((pad, ids) if left else (ids, pad), 1)
        segments = torch.cat((pad * 0, ones) if left else (ones, pad * 0), 1).int()
        positions = (segments.cumsum(1) - 1).clamp(min=0)
        found = compute(made.ours, {"input_ids": padded}, segments=segments, positions=positions)
        if found.dim() == 3:
            found = found[:, 4:] if left else found[:, :17]
        near(found, alone, 2e-5)


@pytest.mark.parametrize("case", [*DECODERS, "bert words", "roberta words"])
@torch.no_grad()
def test_packed_rows_equal_separate_rows(twins: dict[str, Twin], case: str) -> None:
    model = twins[case].ours
    ids = inputs(model, rows=1, length=30)["input_ids"]
    apart = torch.cat([compute(model, {"input_ids": part}) for part in ids.split([13, 17], 1)], 1)
    segments = torch.tensor([[1] * 13 + [2] * 17], dtype=torch.int32)
    positions = torch.tensor([[*range(13), *range(17)]])
    near(compute(model, {"input_ids": ids}, segments=segments, positions=positions), apart, 2e-5)


@pytest.mark.parametrize("case", PAIRED)
@torch.no_grad()
def test_an_encoders_padding_is_not_seen_by_its_decoder(twins: dict[str, Twin], case: str) -> None:
    model = twins[case].ours
    batch = inputs(model)
    alone = compute(model, batch)
    padded = {**batch, "input_ids": torch.cat((batch["input_ids"], torch.zeros(3, 5, dtype=torch.int64)), 1)}
    segments = (torch.arange(26) < 21).int().expand(3, -1)
    near(compute(model, padded, segments=segments), alone, DEEP)


@pytest.mark.parametrize("case", [*DECODERS, *PAIRED])
@torch.no_grad()
def test_cached_in_pieces_equals_uncached(twins: dict[str, Twin], case: str) -> None:
    if case == "switch full":
        pytest.skip("a capacity counts the tokens of a row, which pieces do not know")
    model = twins[case].ours
    batch = inputs(model)
    if isinstance(model, EncoderDecoder):
        memory, ids = model.encode(batch["input_ids"]), batch["decoder_input_ids"]
        cache = model.new_cache(3, 16)
        pieces = [model.decode(part, memory, cache=cache) for part in ids.split([4, 1, 1, 5], 1)]
        whole = model.decode(ids, memory)
    else:
        assert isinstance(model, Decoder)
        ids, cache = batch["input_ids"], model.new_cache(3, 32)
        pieces = [model(part, cache=cache) for part in ids.split([9, 1, 1, 10], 1)]
        whole = model(ids)
    near(torch.cat(pieces, 1), whole, tolerance(case))


@pytest.mark.parametrize("case", [*DECODERS, *PAIRED])
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit(twins: dict[str, Twin], case: str) -> None:
    model = twins[case].ours
    batch = inputs(model)
    name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    before = compute(model, batch)
    batch[name][:, 8] = (batch[name][:, 8] + 1) % 90
    after = compute(model, batch)
    # An expert that is sent other tokens rounds the same ones a little differently.
    near(after[:, :8], before[:, :8], 2e-6)
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_rows_of_a_batch_know_nothing_of_each_other(twins: dict[str, Twin], case: str) -> None:
    model = twins[case].ours
    batch = inputs(model)
    whole = compute(model, batch)
    turned = compute(model, {name: rows.flip(0) for name, rows in batch.items()})
    near(turned.flip(0) if "clip" not in case else turned.flip(0, 1), whole, tolerance(case))


@pytest.mark.parametrize("case", [*DECODERS, *BERTS, *PAIRED])
@pytest.mark.parametrize("length", [1, 64])
@torch.no_grad()
def test_one_token_and_the_longest_input(twins: dict[str, Twin], case: str, length: int) -> None:
    made = twins[case]
    batch = inputs(made.ours, rows=1, length=length)
    near(compute(made.ours, batch), output(made.theirs(**batch)), tolerance(case))


def test_every_family_has_a_case() -> None:
    cases = {kind.__name__ for kind, _ in CASES.values()}
    assert cases == {family.architecture for family in FAMILIES}


@pytest.mark.parametrize("case", CASES)
def test_a_family_expresses_its_own_configurations(twins: dict[str, Twin], case: str) -> None:
    stored = twins[case].stored
    assert family_for(stored.config) == stored.family
