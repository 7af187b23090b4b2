"""Adapters: they start as nothing, merge and unmerge exactly on every family, and go to PEFT and come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.lora import (
    LoraBank,
    LoraLinear,
    adaptable,
    adapters,
    add_lora,
    freeze,
    merge_lora,
    train_only,
    unmerge_lora,
)
from danlu.model.mixture import Bank
from danlu.model.peft import load_adapter, save_adapter

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from tests.model.zoo import DECODERS, Twin, compute, inputs, output, twin  # noqa: E402  # needs transformers

OPTIONS: dict[str, Any] = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "seed": 3}
FAMILIES = ["llama", "gemma3", "gpt2", "mixtral", "qwen2 moe", "bert words", "t5", "switch", "vit", "clip"]
MIXTURES = ["mixtral", "mixtral window", "qwen2 moe", "qwen3 moe"]
OTHERS = ["bert words", "bert sequence", "roberta tokens", "t5", "flan-t5", "switch", "vit", "vit body", "clip"]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The twin of a case, made once."""
    made: dict[str, Twin] = {}

    def get(case: str) -> Twin:
        if case not in made:
            made[case] = twin(case, tmp_path_factory.mktemp("twin") / "model")
        return made[case]

    return get


def fresh(pair: Twin) -> Any:
    return pair.stored.load().eval()


def adapted(pair: Twin, targets=("*",), **changes):
    model = fresh(pair)
    named = {**OPTIONS, **changes}
    add_lora(model, targets=[name for name in adaptable(model)] if targets == ("*",) else targets, **named)
    return model


@torch.no_grad()
def learn(model, size: float = 0.05):
    """Adapters as training might leave them."""
    torch.manual_seed(5)
    for _, adapter in adapters(model):
        adapter.lora_up.normal_(0, size)
        if adapter.lora_magnitude is not None:
            adapter.lora_magnitude.mul_(torch.empty_like(adapter.lora_magnitude).uniform_(0.8, 1.25))
    return model


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Within `tolerance` of the largest number, or of 1 where all are smaller."""
    worst = float((one - other).abs().max()) / max(1.0, float(other.abs().max()))
    assert worst <= tolerance, worst


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_adapters_start_as_nothing_and_merge_and_unmerge_exactly(twins, case, dora):
    pair = twins(case)
    batch = inputs(pair.ours)
    start = compute(fresh(pair), batch)
    model = adapted(pair, dora=dora)
    close(compute(model, batch), start, 0)
    before = compute(learn(model), batch)
    assert (before - start).abs().max() > 1e-3
    kept = merge_lora(model, keep=True)
    assert kept and not list(adapters(model))
    assert type(model).__name__ == type(pair.ours).__name__ and model.state_dict().keys() == pair.ours.state_dict().keys()
    close(compute(model, batch), before, 2e-6)
    unmerge_lora(model, kept)
    assert torch.equal(compute(model, batch), before)
    for _, adapter in adapters(model):
        adapter.lora_up.zero_()
        if adapter.lora_magnitude is not None:
            adapter.lora_magnitude.copy_(adapter.lengths())
    assert torch.equal(compute(model, batch), start)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_a_merged_layer_gives_the_adapters_output_to_a_millionth(dora):
    torch.manual_seed(0)
    model = nn.ModuleDict({"line": nn.Linear(48, 40), "bank": Bank(3, 48, 40, bias=True)})
    add_lora(model, targets=["*"], dora=dora, **OPTIONS)
    learn(model)
    x, sizes = torch.randn(32, 48), [20, 0, 12]
    before = model["line"](x), model["bank"](x, sizes)
    merge_lora(model)
    close(model["line"](x), before[0])
    close(model["bank"](x, sizes), before[1])


@torch.no_grad()
def test_merging_rounds_once_in_bf16_and_unmerging_gives_the_same_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32).bfloat16())
    start = model[0].weight.clone()
    add_lora(model, targets=["*"], **OPTIONS)
    learn(model)
    whole = start.float() + (model[0].lora_up * model[0].scale) @ model[0].lora_down
    kept = merge_lora(model, keep=True)
    assert torch.equal(model[0].weight, whole.bfloat16())
    unmerge_lora(model, kept)
    assert torch.equal(model[0].base.weight, start)


@torch.no_grad()
def test_every_expert_has_an_adapter_of_its_own():
    torch.manual_seed(0)
    bank = Bank(4, 12, 10, bias=True)
    lines = [nn.Linear(12, 10) for _ in range(4)]
    for expert, line in enumerate(lines):
        line.weight.copy_(bank.weight[expert])
        line.bias.copy_(bank.bias[expert])
    generator = torch.Generator()
    for dora in (False, True):
        whole = LoraBank(bank, 3, 6.0, 0.0, generator.manual_seed(1), dora)
        learn(whole)
        x, sizes = torch.randn(17, 12), [5, 0, 9, 3]
        parts = []
        for expert, rows in enumerate(x.split(sizes)):
            one = LoraLinear(lines[expert], 3, 6.0, 0.0, generator, dora)
            one.lora_down.copy_(whole.lora_down[expert])
            one.lora_up.copy_(whole.lora_up[expert])
            if dora:
                one.lora_magnitude.copy_(whole.lora_magnitude[expert])
            parts.append(one(rows))
        torch.testing.assert_close(whole(x, sizes), torch.cat(parts), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_doras_magnitude_is_the_length_of_every_row():
    torch.manual_seed(0)
    model = nn.ModuleDict({"line": nn.Linear(24, 16), "bank": Bank(3, 24, 16, bias=False)})
    add_lora(model, targets=["*"], dora=True, **OPTIONS)
    learn(model)
    for _, adapter in adapters(model):
        torch.testing.assert_close(adapter.weight.norm(dim=-1), adapter.lora_magnitude, atol=1e-6, rtol=1e-5)


def test_a_row_of_zeros_is_no_trouble_for_dora():
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].weight.data[2] = 0
    add_lora(model, targets=["*"], dora=True, **OPTIONS)
    made = model(torch.ones(2, 6))
    made.square().sum().backward()
    assert made.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", FAMILIES)
def test_only_adapters_learn_and_every_one_of_them_does(twins, case):
    pair = twins(case)
    model = learn(adapted(pair, dora=True))
    compute(model, inputs(pair.ours)).square().mean().backward()
    for name, parameter in model.named_parameters():
        own = name.rpartition(".")[2].startswith("lora_")
        assert parameter.requires_grad == own
        # One row of a batch may leave an expert without a token, and with one label a position bias without an effect.
        assert (parameter.grad is not None) == own
    assert sum(int(p.grad.abs().sum() > 0) for p in model.parameters() if p.grad is not None) > 0


def test_the_seed_decides_the_start(tiny_model):
    def start(seed):
        model = Checkpoint.open(tiny_model).load()
        add_lora(model, targets=["blocks.*"], **{**OPTIONS, "seed": seed})
        return torch.cat([adapter.lora_down.flatten() for _, adapter in adapters(model)])

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_dropout_hides_the_adapters_input_in_training_alone():
    torch.manual_seed(0)
    for layer, more in ((nn.Linear(64, 8), ()), (Bank(2, 64, 8, bias=False), ([3, 4],))):
        model = nn.ModuleDict({"layer": layer})
        add_lora(model, targets=["*"], **{**OPTIONS, "dropout": 0.5})
        x = torch.randn(7, 64)
        plain = model["layer"](x, *more)
        learn(model)
        assert not torch.equal(model["layer"](x, *more), model["layer"](x, *more))
        model["layer"].lora_up.data.zero_()
        torch.testing.assert_close(model["layer"](x, *more), plain)  # the base sees all of it
        learn(model.eval())
        assert torch.equal(model["layer"](x, *more), model["layer"](x, *more))


def test_a_glob_that_matches_nothing_is_refused(tiny_model):
    model = Checkpoint.open(tiny_model).load()
    with pytest.raises(DanluError, match=r"blocks\.\*\.attn.*\n.*the nearest is .*attention\.query"):
        add_lora(model, targets=("blocks.*.attn.*",), **OPTIONS)
    add_lora(model, targets=("*.query",), **OPTIONS)
    with pytest.raises(DanluError, match="has adapters already"):
        add_lora(model, targets=("*.query",), **OPTIONS)


# PEFT


@torch.no_grad()
def same_in_peft(pair: Twin, model: Any, directory: Path) -> None:
    """PEFT, and we from what we saved, compute the same as the model with adapters."""
    batch = inputs(pair.ours)
    before = compute(model, batch)
    assert (before - compute(pair.ours, batch)).abs().max() > 1e-4
    save_adapter(model, directory, base=str(pair.path))
    back = fresh(pair)
    assert sorted(load_adapter(back, directory)) == sorted(name for name, _ in fused(model))
    close(compute(back, batch), before, 2e-6)
    theirs = peft.PeftModel.from_pretrained(pair.theirs, directory).eval()
    try:
        close(output(theirs(**batch)), before, 5e-6)
    finally:
        theirs.unload()


def fused(model: Any) -> list[tuple[str, Any]]:
    """What comes back from PEFT: where one of GPT-2's query, key and value, or of gate and up, has an adapter, all do."""
    return list(adapters(model))


@pytest.mark.parametrize("case", DECODERS + OTHERS)
def test_peft_computes_the_same_from_saved_lora(twins, case, tmp_path):
    same_in_peft(twins(case), learn(adapted(twins(case))), tmp_path)


@pytest.mark.parametrize("case", [case for case in DECODERS if case not in MIXTURES] + OTHERS)
def test_peft_computes_the_same_from_saved_dora(twins, case, tmp_path):
    same_in_peft(twins(case), learn(adapted(twins(case), dora=True)), tmp_path)
