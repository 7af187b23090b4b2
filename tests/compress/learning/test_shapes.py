"""A model whose parts are models: cut out exactly, learned, searched and ranked, on a model trained here."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.small_models import Small, train_small
from danlu.artifact import CARD
from danlu.compress.learning.shapes import Device, evolve, find_shape, kendall
from danlu.compress.learning.supernet import part_model, put_in_order, save_part, sizes, workload
from danlu.compress.learning.tuning import Tuning, row_losses
from danlu.compress.quantizing.quantizer import quantize_model
from danlu.data.stream import Batch
from danlu.device.workload import Workload
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, StoredModel
from danlu.model.config import ModelConfig
from danlu.model.gguf import keys_bytes
from danlu.model.loss import linear_cross_entropy
from danlu.model.transformer import Decoder
from danlu.train.objective import Words
from danlu.train.objectives.elastic import Elastic, block_weights, kept_layers, part_config, part_weights, parts_of
from danlu.train.recipe import ElasticSettings
from tests.compress.short import TEXT
from tests.device.test_clock import profile

WHOLE = ModelConfig(
    vocab_size=61, width=32, layers=4, heads=4, kv_heads=2, head_width=8, feedforward_width=48, context=32, tied=True
)
ASKED = ElasticSettings(layers=(2,), heads=(2,), channels=(16, 32), width=(16,))


def whole(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(WHOLE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def batch(rows: int = 3, length: int = 12) -> Batch:
    tokens = torch.randint(61, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    places = torch.arange(length).expand(rows, -1)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, length, dtype=torch.int32), places)


def test_order_changes_nothing_but_what_stands_first() -> None:
    model = whole()
    said = model.logits(model(batch().tokens))
    put_in_order(model)
    torch.testing.assert_close(model.logits(model(batch().tokens)), said, rtol=1e-4, atol=1e-4)
    down = model.get_parameter("blocks.2.feedforward.down.weight")
    weight = down.norm(dim=0) * model.get_parameter("blocks.2.feedforward.up.weight").norm(dim=1)
    assert (weight.diff() <= 1e-5).all() and weight[0] > 1.5 * weight[-1]


def test_a_part_is_the_whole_without_what_was_left_out() -> None:
    """Zeros where the rest stands, as far as that can be had: heads and channels; the norms are those of the width."""
    model, parts = whole(), parts_of(WHOLE, ElasticSettings(heads=(2,), channels=(16,)))
    small = part_model(model, parts[0])
    assert sizes(parts[0]) == (4, 2, 16, 32) and sizes(parts[-1]) == sizes(WHOLE)
    with torch.no_grad():
        for layer in range(4):
            model.get_parameter(f"blocks.{layer}.feedforward.down.weight")[:, 16:] = 0
            model.get_parameter(f"blocks.{layer}.attention.output.weight")[:, 16:] = 0
    tokens = batch().tokens
    torch.testing.assert_close(small.logits(small(tokens)), model.logits(model(tokens)), rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_layers_are_spread_evenly(count: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(1, count))
    kept = kept_layers(count, part)
    assert len(set(kept)) == part and kept == sorted(kept) and kept[0] == 0
    assert part == 1 or kept[-1] == count - 1


def test_the_whole_its_smallest_part_and_another_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = whole().train(), batch()
    parts = parts_of(WHOLE, ASKED)
    assert len(parts) == 2 * 2 * 3 * 2 and block_weights(parts[0]) == min(map(block_weights, parts))
    drawn = parts[5]
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(5))
    loss = Elastic(Words(), ASKED)(model, data)
    torch.testing.assert_close(loss.sum, Words()(model, data).sum)
    said = model.logits(model(data.tokens)).detach()
    expected = torch.zeros(())
    for part in (parts[0], drawn):
        small = part_model(model, part)
        other = small.logits(small(data.tokens)).log_softmax(-1)
        expected = expected + torch.nn.functional.kl_div(other, said.log_softmax(-1), log_target=True, reduction="sum")
    assert isinstance(loss.penalty, torch.Tensor)
    torch.testing.assert_close(loss.penalty.float(), expected, rtol=1e-4, atol=1e-4)
    loss.penalty.backward()
    gone = model.get_parameter("blocks.1.feedforward.up.weight").grad
    assert gone is None or not gone[32:].any()  # no channel beyond those of the two parts, and no left out layer
    first = model.get_parameter("blocks.0.feedforward.up.weight").grad
    assert first is not None and first[:16, :16].any() and not first[32:].any()
    assert Elastic(Words(), ASKED)(model.eval(), data).penalty == 0.0


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_kendalls_tau_counts_neighbours_to_be_swapped(order: list[int]) -> None:
    left, swaps = list(order), 0
    for _ in left:
        for place in range(len(left) - 1):
            if left[place] > left[place + 1]:
                left[place], left[place + 1] = left[place + 1], left[place]
                swaps += 1
    assert kendall(range(6), order) == pytest.approx(1 - 2 * swaps / 15)


def test_evolution_finds_the_best_and_never_leaves_the_limits() -> None:
    asked = ElasticSettings(layers=(1, 2, 3), heads=(2,), channels=(8, 16, 24, 32, 40), width=(8, 16, 24))
    parts = parts_of(WHOLE, asked)
    limit = 4 * block_weights(parts[len(parts) // 2])
    allowed = [part for part in parts if 4 * block_weights(part) <= limit]
    assert 16 < len(allowed) < len(parts)
    looked: list[ModelConfig] = []

    def loss(part: ModelConfig) -> float:
        looked.append(part)
        return abs(part.feedforward_width - 24) / 8 + abs(part.layers - 2) + abs(part.width - 16) / 8

    found = evolve(allowed, loss, seed=3)
    best = min(map(loss, allowed))
    assert min(each.loss for each in found) == best
    assert len(found) == len({each.part for each in found}) < len(allowed) and set(looked) <= set(allowed)
    assert [each.part for each in evolve(allowed, loss, seed=3)] == [each.part for each in found]


def test_what_a_device_is_asked() -> None:
    asked = workload(WHOLE, "q8_0")
    assert len(asked.matrices) == 4 * 7 + 1 and (asked.layers, asked.attention, asked.words) == (4, 32, 61)
    apart = workload(replace(WHOLE, tied=False), "q8_0")
    assert len(apart.matrices) == 4 * 7 + 1, "a token reads one row of an embedding that is not the head"
    with pytest.raises(DanluError, match="a speed is that of a device"):
        Device(speed=10.0)
    with pytest.raises(DanluError, match="weights cannot be rounded to q9") as problem:
        Device("q9")
    assert "known: q8_0, q6_k" in str(problem.value)


@pytest.mark.parametrize("type", ["q4_0", "q4_k"])
@pytest.mark.parametrize("width", [96, 48])
def test_what_is_told_is_what_is_written(small: Checkpoint, type: str, width: int, tmp_path: Path) -> None:
    """The head has its own type; rows of 96 get stand-ins for K-types, 256 channels fill them, rows of 48 nothing."""
    part = part_config(small.config, 1, 3, 256, width)
    cut = save_part(small, part, tmp_path / "part")
    file = Path(quantize_model(cut, type, TEXT, tmp_path / "part.gguf", 4096).path)
    device = Device(type, keys=keys_bytes(small.config, small.tokenizer))
    assert device.size(cut.config) == pytest.approx(file.stat().st_size, rel=1e-3)
    asked, wanted = Workload.of_file(file), workload(cut.config, type)
    assert Counter(asked.matrices) == Counter(wanted.matrices)
    assert replace(asked, matrices=()) == replace(wanted, matrices=())


def test_a_device_allows_what_keeps_to_its_memory_and_speed(small: Checkpoint) -> None:
    parts = parts_of(small.config, ElasticSettings(layers=(1,), channels=(64, 128)))
    known = Device("q4_0", profile=profile(), keys=1000)
    sizes, rates = [known.size(part) for part in parts], [known.rate(part) for part in parts]
    assert len(parts) == 6 and sorted(set(sizes)) == sizes and sorted(set(rates), reverse=True) == rates
    work = workload(parts[2], "q4_0")
    assert rates[2] == pytest.approx(1 / profile().seconds_for(work)) and {"q4_0", "q8_0"} == {
        matrix.type for matrix in work.matrices
    }
    for number in range(len(parts)):
        small_enough, fast_enough = (
            [part for part in parts if device.allows(part)]
            for device in (replace(known, memory=sizes[number]), replace(known, speed=rates[number]))
        )
        assert small_enough == fast_enough == list(parts[: number + 1])
        assert replace(known, memory=sizes[number], speed=rates[0]).allows(parts[0])
        assert replace(known, memory=sizes[0], speed=rates[number]).allows(parts[number]) is (number == 0)
    assert not replace(known, keys=1100, memory=sizes[0]).allows(parts[0]), "words take room too"
    with pytest.raises(DanluError, match="rows of 48 numbers do not fill blocks of q4_0 and stay f32"):
        known.allows(part_config(small.config, 1, 3, 256, 48))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"layers": (5,)}, "layers 5 cannot be had: the model has 4"),
        ({"heads": (3,)}, "heads 3 cannot be had: the model has 4"),
        ({"width": (30,)}, "width 30 cannot be had"),
        ({"channels": (48,)}, "every size named is the model's own"),
    ],
)
def test_parts_that_cannot_be(asked: dict[str, tuple[int, ...]], told: str) -> None:
    with pytest.raises(DanluError, match=told):
        parts_of(WHOLE, ElasticSettings(**asked))


# --- From a text to a shape -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shapes")
    (home / "text.txt").write_text("the furnace turns ore into silver, slowly and surely; " * 900, encoding="utf-8")
    small = Small(layers=2, width=32, heads=4, kv_heads=2, channels=64, context=32)
    train_small(small, home / "text.txt", 40, home / "base")
    return home


def test_a_shape_is_found_and_taught(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Checkpoint.open(base / "base" / "model")
    asked = ElasticSettings(layers=(1,), channels=(16, 32))
    tuning = Tuning((str(base / "text.txt"),), 30, 8, 16, 5e-3, heldout=0.1, heldout_from="end")
    limit = Device("q8_0").size(model.config) - 1
    found = find_shape(model, asked, Device(memory=limit), tuning, tmp_path, finalists=2, teaching_steps=15)
    assert len(found.candidates) == 5  # all but the whole
    taught = [each for each in found.candidates if each.taught is not None]
    assert len(taught) == 2 and all(each.taught < each.loss for each in taught if each.taught is not None)
    assert taught[0].taught == min(each.taught for each in taught if each.taught is not None)
    config = StoredModel.open(tmp_path / "model").config
    assert config == taught[0].part and Device("q8_0").size(taught[0].part) <= limit
    card = json.loads((tmp_path / CARD).read_text())
    assert card["figures"]["bytes"] == {"value": Device("q8_0").size(config), "unit": "byte", "by": "weights as q8_0"}
    assert "reads no vocabulary without merges" in capsys.readouterr().err
    assert card["inputs"] == {"model": model.digest} and card["figures"]["looked_at"]["value"] == 5
    assert card["figures"]["loss"]["value"] == taught[0].taught
    # A part of what was trained to have parts is better than the same part of the model that it came from.
    plain = model.load()
    put_in_order(plain)
    net = Checkpoint.open(tmp_path / "supernet").load()
    smallest, data = parts_of(net.config, asked)[0], _rows(model, base)
    before, after = (row_losses(part_model(each, smallest), data).mean for each in (plain, net))
    assert after < 0.8 * before
    again = find_shape(model, asked, Device(memory=limit), tuning, tmp_path, finalists=2, teaching_steps=15)
    assert again.plain()["candidates"] == found.plain()["candidates"]
    with pytest.raises(DanluError, match="made with other settings: search"):
        find_shape(model, asked, Device(memory=limit - 500), tuning, tmp_path, finalists=2, teaching_steps=15)


def _rows(model: Checkpoint, home: Path) -> list[Batch]:
    ids = model.tokenizer.encode((home / "text.txt").read_text(encoding="utf-8"))[-8 * 16 - 1 :]
    tokens, targets = (torch.tensor(part).view(8, 16) for part in (ids[:-1], ids[1:]))
    return [Batch(tokens, targets, torch.ones(8, 16, dtype=torch.int32), torch.arange(16).expand(8, -1))]


def test_limits_that_nothing_meets(base: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(base / "base" / "model")
    with pytest.raises(DanluError, match="no shape keeps to the limits: the smallest has"):
        find_shape(model, ElasticSettings(layers=(1,)), Device(memory=1000), Tuning(("absent",), 1), tmp_path / "out")


def test_weights_of_a_part_are_views_of_the_wholes() -> None:
    model = whole()
    part = parts_of(WHOLE, ASKED)[0]
    weights = part_weights(dict(model.named_parameters()), WHOLE, part)
    whole_up = model.get_parameter("blocks.3.feedforward.up.weight")
    assert weights["blocks.1.feedforward.up.weight"].data_ptr() == whole_up.data_ptr()
    said = linear_cross_entropy(torch.ones(2, 16), weights["embedding.tokens.weight"], torch.tensor([1, 2]))
    said.backward()
    gradient = model.embedding.tokens.weight.grad
    assert gradient is not None and gradient[:, :16].any() and not gradient[:, 16:].any()
