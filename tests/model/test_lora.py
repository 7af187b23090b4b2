"""Adapters: they start as nothing, merge exactly, and PEFT reads what is saved."""

from __future__ import annotations

import pytest
import torch

from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.lora import adapters, add_lora, merge_lora
from danlu.model.peft import save_adapter

OPTIONS = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "seed": 3}
TARGETS = ("blocks.*.attention.*", "blocks.*.feedforward.*")


def adapted(path, targets=TARGETS):
    model = Checkpoint.open(path).load()
    names = add_lora(model, targets=targets, **OPTIONS)
    return model, names


def randomise(model):
    torch.manual_seed(5)
    for _, adapter in adapters(model):
        adapter.lora_up.data.normal_(0, 0.1)


@torch.no_grad()
def test_starts_as_its_base_and_merges_exactly(tiny_model):
    tokens = torch.randint(0, 1000, (2, 20))
    plain = Checkpoint.open(tiny_model).load()
    model, names = adapted(tiny_model)
    assert len(names) == 7 * model.config.layers
    assert torch.equal(model(tokens), plain(tokens))
    randomise(model)
    before = model(tokens)
    assert not torch.allclose(before, plain(tokens), atol=1e-3)
    merge_lora(model)
    assert not list(adapters(model))
    torch.testing.assert_close(model(tokens), before, atol=5e-6, rtol=1e-5)


def test_only_adapters_learn_and_the_seed_decides_their_start(tiny_model):
    (one, _), (two, _) = adapted(tiny_model), adapted(tiny_model)
    assert all(name.endswith(("lora_down", "lora_up")) for name, p in one.named_parameters() if p.requires_grad)
    for (_, a), (_, b) in zip(adapters(one), adapters(two), strict=True):
        assert torch.equal(a.lora_down, b.lora_down)


def test_a_glob_that_matches_nothing_is_refused(tiny_model):
    with pytest.raises(DanluError, match=r"blocks\.\*\.attn.*\n.*attention\.query"):
        adapted(tiny_model, targets=("blocks.*.attn.*",))


@torch.no_grad()
def test_peft_computes_the_same_from_the_saved_adapter(tiny_model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, _ = adapted(tiny_model)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", rank=4, alpha=8.0, dropout=0.0, base=str(tiny_model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = torch.randint(0, 1000, (2, 20))
    torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
