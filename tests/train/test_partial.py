"""Tuning a part of a model: adapters beside it, or weights chosen by name. The rest stays bit for bit as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.peft import load_adapter
from danlu.train.settings import TuneSettings
from danlu.train.stage import prepare, tune
from danlu.train.state import Checkpoints

BASE: dict[str, Any] = {
    "steps": 6,
    "batch_rows": 4,
    "rank": 4,
    "learning_rate": 5e-3,
    "checkpoint_steps": 2,
    "precision": "fp32",
    "compile": "off",
}
LAST = {"method": "partial", "train": ("blocks.1.*", "norm.*"), "freeze": ("*.key.weight",)}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Checkpoint:
    return Checkpoint.open(tiny_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 packed rows of 32 tokens, easy to learn by heart."""
    train = tmp_path_factory.mktemp("data") / "train"
    train.mkdir()
    tokens = np.random.default_rng(0).integers(0, 40, (8, 32), dtype=np.int32)
    segments = np.ones((8, 32), dtype=np.int32)
    for name, array in {"tokens": tokens, "segments": segments, "trained": segments > 0}.items():
        np.save(train / f"{name}.npy", array)
    return train.parent


def run(base: Checkpoint, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return tune(TuneSettings(**{**BASE, **changes}), base, data, out, seed=7)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("changes", "learned"),
    [
        ({"train": ("*norm*",)}, lambda name: "norm" in name),
        ({"freeze": ("embedding.*", "blocks.0.*")}, lambda name: "embed" not in name and "layers.0." not in name),
        (LAST, lambda name: ("layers.1." in name or name == "model.norm.weight") and "k_proj" not in name),
    ],
    ids=["train", "freeze", "both"],
)
def test_only_the_chosen_weights_change(base, data, tmp_path, changes, learned, precision):
    figures = run(base, data, tmp_path / "out", **{**changes, "method": "partial", "precision": precision})
    assert figures["loss_last"]["value"] < figures["loss_first"]["value"]
    before, after = weights(base.path), weights(tmp_path / "out" / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if learned(name)}
    assert figures["trainable_weights"]["value"] == sum(before[name].numel() for name in changed)
    assert not (tmp_path / "out" / "adapter").exists()


def test_what_learns_starts_in_fp32_and_what_is_frozen_in_the_dtype_of_the_computation(base):
    model = prepare(TuneSettings(**BASE, **LAST), base, torch.bfloat16, seed=0)
    for weight in model.parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_saved_adapter_on_the_base_is_the_saved_model(base, data, tmp_path, method):
    figures = run(base, data, tmp_path / "out", method=method)
    assert figures["method"] == method and figures["loss_last"]["value"] < figures["loss_first"]["value"]
    model = base.load()
    load_adapter(model, tmp_path / "out" / "adapter")
    tokens = torch.randint(0, 1000, (2, 20))
    merged = Checkpoint.open(tmp_path / "out").load()
    with torch.no_grad():
        found, expected = model.logits(model(tokens)), merged.logits(merged(tokens))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    said = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert said["use_dora"] == (method == "dora")


def test_dora_learns_the_lengths_of_rows_too(base, data, tmp_path):
    for method in ("lora", "dora"):
        run(base, data, tmp_path / method, method=method)
    tensors = {
        method: load_file(tmp_path / method / "adapter" / "adapter_model.safetensors") for method in ("lora", "dora")
    }
    lengths = {name for name in tensors["dora"] if name.endswith("magnitude_vector")}
    assert tensors["dora"].keys() - tensors["lora"].keys() == lengths and len(lengths) == 7 * base.config.layers
    stored = weights(base.path)
    for name in lengths:
        start = stored[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")].norm(dim=1)
        assert not torch.equal(tensors["dora"][name], start)
        torch.testing.assert_close(tensors["dora"][name], start, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("changes", [{"method": "dora", "dropout": 0.1}, LAST], ids=["dora", "partial"])
def test_an_interrupted_run_ends_with_the_same_bits(base, data, tmp_path, monkeypatch, changes):
    run(base, data, tmp_path / "straight", **changes)
    save = Checkpoints.save

    def power_cut(self, step, tensors, extra, score=None):
        save(self, step, tensors, extra, score)
        self.wait()
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "broken", **changes)
    run(base, data, tmp_path / "broken", **changes)
    one, two = weights(tmp_path / "straight" / "model"), weights(tmp_path / "broken" / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "partial"}, "method partial needs train or freeze"),
        ({"train": ("*",)}, "train choose weights for method partial; method is lora"),
        ({"method": "full", "train": ("*",), "freeze": ("*",)}, "train and freeze choose .* method is full"),
    ],
)
def test_settings_without_an_effect_are_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        TuneSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": ("*.attn.*",)}, r"no weight is named like \*\.attn\.\*\n.*blocks\.\*\.attention\.key\.weight"),
        ({"freeze": ("block.0.*",)}, r"no weight is named like block\.0\.\*"),
        ({"train": ("norm.*",), "freeze": ("*",)}, "nothing is left to learn"),
    ],
)
def test_globs_that_choose_nothing_are_refused(base, data, tmp_path, changes, told):
    with pytest.raises(DanluError, match=told):
        run(base, data, tmp_path / "out", method="partial", **changes)
