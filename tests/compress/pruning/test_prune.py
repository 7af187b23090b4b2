"""Zeros where they belong, fewer heads, channels, features and layers: each smaller model stays near the one it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.compress.compensate import Inputs
from danlu.compress.pruning.fitted import drop_columns, refitted
from danlu.compress.pruning.sparse import (
    Sparsity,
    lowest,
    prune_weights,
    read_pattern,
    read_sparsity,
    zero_by_inputs,
    zero_by_magnitude,
    zero_compensated,
)
from danlu.compress.pruning.structured import Shape, check_shape, shrink
from danlu.compress.quality import cut, loss_change, pieces_for
from danlu.data.corpus_settings import VocabularySettings
from danlu.data.vocabulary import learn_vocabulary
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.config import Experts, ModelConfig, Rotary
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder
from tests.compress.short import OTHER, TEXT, divergence, logits

TOKENS = 4096


def correlated(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs that go together, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -0.7, columns)[torch.randperm(columns, generator=generator)]
    mixing = torch.randn(columns, columns, generator=generator) * scales
    return torch.randn(count, columns, generator=generator) @ mixing


# --- Zeros ----------------------------------------------------------------------------------------------------------


def test_masks_are_those_of_a_plain_reference() -> None:
    weight, inputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), correlated(50, 8)
    by_size = sorted((abs(float(weight[row, column])), row, column) for row in range(6) for column in range(8))
    expected = weight.clone()
    for _, row, column in by_size[:24]:
        expected[row, column] = 0
    assert torch.equal(zero_by_magnitude(weight, Sparsity("magnitude", 0.5)), expected)

    norms = [float(inputs[:, column].norm()) for column in range(8)]
    expected = weight.clone()
    for row in range(6):
        ranked = sorted(range(8), key=lambda column: abs(float(weight[row, column])) * norms[column])
        expected[row, ranked[:6]] = 0
    assert torch.equal(zero_by_inputs(weight, Sparsity("wanda", 0.75), inputs.T @ inputs), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 4), (2, 4), (4, 8)]), st.sampled_from(["wanda", "sparsegpt"]))
def test_patterns_hold_in_every_group(seed: int, pattern: tuple[int, int], method: str) -> None:
    weight, inputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)), correlated(99, 32, seed)
    sparsity, products = Sparsity(method, pattern=pattern), inputs.T @ inputs
    if method == "wanda":
        made = zero_by_inputs(weight, sparsity, products)
        assert torch.equal(made[made != 0], weight[made != 0]), "what stays is as it was"
    else:
        made = zero_compensated(weight, sparsity, Inputs(products))
    zeros = (made.unflatten(1, (-1, pattern[1])) == 0).sum(-1)
    assert (zeros == pattern[0]).all()


@given(st.integers(1, 30), st.integers(1, 20), st.floats(0.05, 0.95))
def test_the_share_is_exact_even_among_equals(rows: int, columns: int, share: float) -> None:
    same, sparsity = torch.ones(rows, columns), Sparsity("magnitude", share)
    assert lowest(same, sparsity, by_row=False).sum() == round(share * (rows * columns))
    assert (lowest(same, sparsity, by_row=True).sum(1) == round(share * columns)).all()


def test_making_up_for_zeros_beats_looking_at_inputs_beats_looking_at_sizes() -> None:
    inputs = correlated(2048, 256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    products = inputs.T @ inputs

    def lost(made: torch.Tensor) -> float:
        return float(((made - weight) @ inputs.T).square().sum())

    for pattern in (None, (2, 4)):
        size, seen, made_up = (Sparsity(method, 0.5, pattern) for method in ("magnitude", "wanda", "sparsegpt"))
        losses = [
            lost(zero_compensated(weight, made_up, Inputs(products.clone()))),
            lost(zero_by_inputs(weight, seen, products)),
            lost(zero_by_magnitude(weight, size)),
        ]
        assert losses[0] < 0.7 * losses[1] and losses[1] < 0.9 * losses[2]


def test_a_real_models_order_its_file_and_its_card(short: Checkpoint, tmp_path: Path) -> None:
    apart = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        calibration = None if method == "magnitude" else TEXT
        made = prune_weights(short, Sparsity(method, 0.6), calibration, tmp_path / method, TOKENS)
        apart[method] = divergence(short, Checkpoint.open(made.path))
    assert 0 < apart["sparsegpt"] < apart["wanda"] < apart["magnitude"]
    pruned, original = (each.load().state_dict() for each in (Checkpoint.open(made.path), short))
    for name, weight in pruned.items():
        zeros = float((weight == 0).float().mean())
        if name.startswith("blocks.") and weight.dim() > 1:
            assert zeros == pytest.approx(0.6, abs=0.01), name
        else:
            assert torch.equal(weight, original[name]), name
    card = json.loads((made.path / "card.json").read_text())
    assert card["kind"] == "prune" and card["inputs"] == {"model": short.digest}
    assert card["figures"]["zeros"]["value"] == pytest.approx(0.6, abs=0.01)
    assert {file.name for file in tmp_path.iterdir()} == {"magnitude", "wanda", "sparsegpt"}, "nothing else is left"


def test_what_cannot_be_pruned_is_said(short: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="did you mean sparsegpt"):
        Sparsity("sparsegtp")
    with pytest.raises(DanluError, match="share of 1"):
        Sparsity(share=1.0)
    assert read_pattern("1:4") == (3, 4)
    assert read_sparsity("wanda", None, "2:4") == Sparsity("wanda", 0.5, (2, 4))
    assert read_sparsity("wanda", "30%", None) == Sparsity("wanda", 0.3)
    with pytest.raises(DanluError, match="how many zeros"):
        read_sparsity("wanda", "30%", "2:4")
    for wrong in ("0", "100%", "much"):
        with pytest.raises(DanluError, match="no part of something"):
            read_sparsity("wanda", wrong, None)
    for wrong in ("4:2", "2:2", "0:4", "half"):
        with pytest.raises(DanluError, match="no pattern"):
            read_pattern(wrong)
    with pytest.raises(DanluError, match="groups of 7"):
        prune_weights(short, Sparsity(pattern=(3, 7)), TEXT, tmp_path / "out")
    with pytest.raises(DanluError, match="looks at a text"):
        prune_weights(short, Sparsity("wanda"), None, tmp_path / "out")
    with pytest.raises(DanluError, match="4,096 are needed"):
        prune_weights(short, Sparsity("wanda"), OTHER[:500], tmp_path / "out")
    with pytest.raises(DanluError, match="no such directory"):
        prune_weights(short, Sparsity("magnitude"), None, tmp_path / "absent" / "out")
    assert not list(tmp_path.iterdir())


# --- Fewer heads, channels, features, layers ------------------------------------------------------------------------


def test_columns_that_others_can_make_up_for_go_first() -> None:
    inputs = torch.randn(4096, 12, generator=torch.Generator().manual_seed(3))
    inputs[:, 5] = inputs[:, 2] + inputs[:, 8]  # nothing of its own
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
    kept, fitted = drop_columns(weight, inputs.T @ inputs, 1, 11)
    assert len({2, 5, 8} & set(kept.tolist())) == 2
    lost = (fitted @ inputs[:, kept].T - weight @ inputs.T).square().sum() / (weight @ inputs.T).square().sum()
    assert lost < 0.01


def test_refitting_is_least_squares() -> None:
    inputs, weight = correlated(999, 10, 4), torch.randn(3, 10, generator=torch.Generator().manual_seed(4))
    columns = torch.tensor([0, 1, 4, 7])
    ours = refitted(weight, inputs.T @ inputs, columns)
    theirs = torch.linalg.lstsq(inputs[:, columns], inputs @ weight.T).solution.T

    def lost(made: torch.Tensor) -> float:
        return float((made @ inputs[:, columns].T - weight @ inputs.T).square().sum())

    assert lost(theirs) <= lost(ours) < 1.05 * lost(theirs), "but for the damping"
    assert lost(ours) < lost(weight[:, columns])


@pytest.mark.parametrize("shape", [Shape(heads=6, channels=336), Shape(width=504)], ids=["inner", "width"])
def test_a_smaller_real_model_is_nearer_than_the_first_of_everything(
    short: Checkpoint, tmp_path: Path, shape: Shape
) -> None:
    made = shrink(short, shape, TEXT, tmp_path / "out", TOKENS)
    smaller = Checkpoint.open(made.path)
    assert made.figures["parameters"]["value"] == sum(weight.numel() for weight in smaller.load().parameters())
    assert made.figures["parameters"]["value"] < made.figures["parameters_before"]["value"]
    assert divergence(short, smaller) < 0.6 * divergence(short, plainly(short, shape, tmp_path / "plain"))


def plainly(checkpoint: Checkpoint, shape: Shape, out: Path) -> Checkpoint:
    """The first heads, channels or features, and nothing made up for."""
    model, config = checkpoint.load(), checkpoint.config
    width = shape.width or config.width
    smaller = replace(check_shape(config, shape), width=width)
    made = Decoder(smaller)
    for name, weight in made.state_dict().items():
        weight.copy_(model.state_dict()[name][tuple(slice(0, size) for size in weight.shape)])
    save_checkpoint(made, checkpoint.tokenizer, out)
    return Checkpoint.open(out)


def test_all_at_once_leaves_a_model_that_learns_exports_and_loads_in_transformers(
    short: Checkpoint, tmp_path: Path
) -> None:
    made = shrink(short, Shape(1, 6, 256, 384), TEXT, tmp_path / "out", TOKENS)
    smaller = Checkpoint.open(made.path)
    config = smaller.config
    assert (config.layers, config.heads, config.kv_heads, config.head_width) == (1, 6, 2, 64)
    assert (config.feedforward_width, config.width) == (256, 384)
    assert [made.figures["layers"][layer]["kept"] for layer in ("0", "1")].count(True) == 1

    model = smaller.load()
    write_gguf(model, smaller.tokenizer, tmp_path / "out.gguf")
    again = Checkpoint.open(tmp_path / "out.gguf")
    assert torch.equal(logits(again), logits(smaller))
    transformers = pytest.importorskip("transformers")
    tokens = torch.tensor(smaller.tokenizer.encode(TEXT, special=False)[:1024]).view(8, 128)
    with torch.inference_mode():
        expected = transformers.AutoModelForCausalLM.from_pretrained(made.path)(tokens).logits
        assert torch.allclose(model.logits(model(tokens)), expected, atol=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        said = model.train().logits(model(tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(said.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_shapes_that_cannot_be_had_name_the_nearest(short: Checkpoint, tmp_path: Path) -> None:
    def refusal(shape: Shape) -> str:
        with pytest.raises(DanluError) as problem:
            shrink(short, shape, TEXT, tmp_path / "out")
        return str(problem.value)

    assert "name 3 or 6" in refusal(Shape(heads=5))
    assert "name 3" in refusal(Shape(heads=2))
    assert "name 1 to 512" in refusal(Shape(channels=0)) and "name 1 to 2" in refusal(Shape(layers=3))
    assert "name --layers" in refusal(Shape())
    assert "name 504 or 513" in refusal(Shape(width=512)), "transformers wants a multiple of the 9 heads"
    norms = replace(short.config, norm="layer")
    with pytest.raises(DanluError, match="RMSNorm"):
        check_shape(norms, Shape(width=64))
    assert not list(tmp_path.iterdir())


def test_of_a_mixture_goes_what_can(tmp_path: Path) -> None:
    tokenizer = learn_vocabulary(VocabularySettings(kind="bytes"), [])
    torch.manual_seed(0)
    experts = Experts(4, 2, 48, normalised=True, balance=0.001)
    shape = {"width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_width": 8, "feedforward_width": 48}
    config = ModelConfig(tokenizer.vocab_size, context=64, experts=experts, positions=Rotary(1e6), **shape)
    save_checkpoint(Decoder(config), tokenizer, tmp_path / "mixture")
    mixture = Checkpoint.open(tmp_path / "mixture")
    weights = Checkpoint.open(prune_weights(mixture, Sparsity("magnitude", pattern=(2, 4)), None, tmp_path / "a").path)
    for name, weight in weights.load().state_dict().items():
        half = name.startswith("blocks.") and weight.dim() > 1 and "router" not in name
        assert float((weight == 0).float().mean()) == (0.5 if half else 0), name
    with pytest.raises(DanluError, match="each expert sees other tokens"):
        prune_weights(mixture, Sparsity("wanda"), TEXT, tmp_path / "b")
    with pytest.raises(DanluError, match="each expert sees other tokens"):
        shrink(mixture, Shape(channels=16), TEXT, tmp_path / "b")
    smaller = Checkpoint.open(shrink(mixture, Shape(layers=2, heads=2), TEXT, tmp_path / "c", TOKENS).path).config
    assert smaller == replace(config, layers=2, heads=2, kv_heads=1)


# --- Loss on a text -------------------------------------------------------------------------------------------------


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 40))
def test_pieces_are_the_text(text: str, characters: int) -> None:
    pieces = cut(text, characters)
    assert "".join(pieces) == text and all(0 < len(piece) <= characters for piece in pieces)


def test_the_loss_before_and_after_is_that_of_the_models(short: Checkpoint, tmp_path: Path) -> None:
    made = prune_weights(short, Sparsity("magnitude", 0.7), None, tmp_path / "out")
    figures = loss_change(short, Checkpoint.open(made.path), OTHER)
    piece = pieces_for(OTHER, short)[0]
    ids = torch.tensor([short.tokenizer.bos_id, *short.tokenizer.encode(piece, special=False)])
    model = short.load()
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model.logits(model(ids[None, :-1]))[0], ids[1:], reduction="sum")
    alone = loss_change(short, short, piece)
    assert alone["loss_before"]["value"] == pytest.approx(float(loss) / len(piece.encode()), rel=1e-5)
    assert alone["loss_rise"]["value"] == 0
    before, after = (figures[name]["value"] for name in ("loss_before", "loss_after"))
    assert figures["loss_rise"]["value"] == pytest.approx(after / before - 1)
    assert figures["loss_rise"]["low"] < figures["loss_rise"]["value"] < figures["loss_rise"]["high"]
