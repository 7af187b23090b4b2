"""Adapters: they start as nothing, merge and unmerge exactly on every family, and go to PEFT and come back."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from danlu.errors import DanluError
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
    assert (
        type(model).__name__ == type(pair.ours).__name__ and model.state_dict().keys() == pair.ours.state_dict().keys()
    )
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
        assert parameter.requires_grad == name.rpartition(".")[2].startswith("lora_")
        assert (float(parameter.grad.abs().sum()) > 0) if parameter.requires_grad else parameter.grad is None, name


def test_the_seed_decides_the_start(twins):
    def start(seed):
        model = fresh(twins("llama"))
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


def test_a_glob_that_matches_nothing_is_refused(twins):
    model = fresh(twins("llama"))
    with pytest.raises(DanluError, match=r"blocks\.\*\.attn.*\n.*the nearest is .*attention\.query"):
        add_lora(model, targets=("blocks.*.attn.*",), **OPTIONS)
    add_lora(model, targets=("*.query",), **OPTIONS)
    with pytest.raises(DanluError, match="has adapters already"):
        add_lora(model, targets=("*.query",), **OPTIONS)


# Weights chosen by name


def test_only_the_weights_learn_that_are_named(twins):
    model = fresh(twins("llama"))
    chosen = train_only(model, ["blocks.[12].*", "norm.*"])
    assert chosen == [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {name.split(".")[1] for name in chosen if name.startswith("blocks")} == {
        "1",
        "2",
    } and "norm.weight" in chosen
    frozen = freeze(model, ["*.query.weight"])
    assert len(frozen) == 3 and "blocks.0.attention.query.weight" in frozen
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert learning == [name for name in chosen if name not in frozen]


def test_frozen_weights_get_no_gradient_and_the_others_theirs(twins):
    pair = twins("mixtral")
    plain, partial = fresh(pair), fresh(pair)
    chosen = train_only(partial, ["blocks.0.feedforward.*", "*.value.weight"])
    for model in (plain, partial):
        compute(model, inputs(pair.ours)).square().mean().backward()
    whole = dict(plain.named_parameters())
    for name, weight in partial.named_parameters():
        assert (weight.grad is not None) == (name in chosen)
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, whole[name].grad)


@pytest.mark.parametrize("choose", [train_only, freeze])
def test_a_glob_without_a_weight_names_the_nearest(twins, choose):
    model = fresh(twins("llama"))
    with pytest.raises(
        DanluError, match=r"no weight is named like blocks\.0\.attention\.querry\.weight\n.*the nearest is .*query"
    ):
        choose(model, ["norm.weight", "blocks.0.attention.querry.weight"])
    assert all(weight.requires_grad for weight in model.parameters())


# To PEFT and back


@torch.no_grad()
def same_in_peft(pair: Twin, model: Any, directory: Path) -> list[str]:
    """PEFT, and we from what we saved, compute the same as the model with adapters; the layers that we then adapt."""
    batch = inputs(pair.ours)
    before = compute(model, batch)
    assert (before - compute(pair.ours, batch)).abs().max() > 1e-4
    save_adapter(model, directory, base=str(pair.path))
    back = fresh(pair)
    loaded = load_adapter(back, directory)
    close(compute(back, batch), before, 2e-6)
    theirs = peft.PeftModel.from_pretrained(deepcopy(pair.theirs), directory).eval()
    close(output(theirs(**batch)), before, 5e-6)
    return loaded


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT looks for them among modules alone
@pytest.mark.parametrize("case", DECODERS + OTHERS)
def test_peft_computes_the_same_from_saved_lora(twins, case, tmp_path):
    model = learn(adapted(twins(case)))
    assert sorted(same_in_peft(twins(case), model, tmp_path)) == sorted(name for name, _ in adapters(model))


@pytest.mark.parametrize("case", [case for case in DECODERS if case not in MIXTURES] + OTHERS)
def test_peft_computes_the_same_from_saved_dora(twins, case, tmp_path):
    same_in_peft(twins(case), learn(adapted(twins(case), dora=True)), tmp_path)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize(
    ("case", "targets", "more", "dora"),
    [
        ("gpt2", ["blocks.*.attention.key", "*.up"], ["query", "value"], False),
        ("gpt2", ["blocks.1.attention.key", "blocks.2.attention.value"], ["key", "query", "value"], True),
        ("mixtral", ["blocks.*.experts.up"], ["gate"], False),
        ("qwen3 moe", ["blocks.2.*.experts.gate", "blocks.*.router"], ["up"], False),
        ("qwen2 moe", ["*.experts.down", "*.shared.*"], [], False),
    ],
)
def test_what_is_one_layer_there_is_adapted_as_one(twins, case, targets, more, dora, tmp_path):
    model = learn(adapted(twins(case), targets, dora=dora), 0.5)
    own = {name for name, _ in adapters(model)}
    loaded = set(same_in_peft(twins(case), model, tmp_path))
    assert own <= loaded and {name.rpartition(".")[2] for name in loaded - own} <= set(more)


@torch.no_grad()
def test_doras_of_experts_come_back_though_peft_has_none(twins, tmp_path):
    pair = twins("mixtral")
    model = learn(adapted(pair, dora=True, dropout=0.1)).eval()
    save_adapter(model, tmp_path, base="x")
    back = fresh(pair)
    load_adapter(back, tmp_path)
    close(compute(back, inputs(pair.ours)), compute(model, inputs(pair.ours)), 2e-6)


def test_dora_learns_as_in_peft(twins, tmp_path):
    pair = twins("llama")
    model = learn(adapted(pair, dora=True))
    save_adapter(model, tmp_path, base="x")
    theirs = peft.PeftModel.from_pretrained(deepcopy(pair.theirs), tmp_path, is_trainable=True)
    batch = inputs(pair.ours)
    compute(model, batch).square().sum().backward()
    output(theirs(**batch)).square().sum().backward()
    own = model.get_submodule("blocks.1.feedforward.down")
    ours = {"lora_A": own.lora_down, "lora_B": own.lora_up, "lora_magnitude_vector": own.lora_magnitude}
    for part, weight in ours.items():
        (gradient,) = [p.grad for name, p in theirs.named_parameters() if f"layers.1.mlp.down_proj.{part}" in name]
        torch.testing.assert_close(weight.grad, gradient, atol=1e-3, rtol=1e-4)


TRAINED = {
    "llama": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.1.mlp.down_proj": 5}},
    "qwen2": {"target_modules": "all-linear", "use_rslora": True, "alpha_pattern": {"q_proj": 3}},
    "gemma3": {"target_modules": r".*\.1\..*(k|v)_proj", "init_lora_weights": "gaussian", "lora_dropout": 0.2},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "mixtral window": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight"]},
    "qwen3 moe": {"target_modules": ["k_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "bert words": {"target_modules": ["query", "dense"], "use_dora": True, "rank_pattern": {"query": 2}},
    "t5": {"target_modules": ["q", "wo"], "exclude_modules": ["decoder.block.1.layer.0.SelfAttention.q"]},
    "switch": {"target_modules": ["wi", "v"]},
    "vit": {"target_modules": ["q_proj", "fc1"]},
    "clip": {"target_modules": ["out_proj", "text_projection"]},
}


@pytest.mark.parametrize("case", TRAINED)
@torch.no_grad()
def test_what_peft_has_trained_computes_the_same_here(twins, case, tmp_path):
    pair = twins(case)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **TRAINED[case]})
    theirs = peft.get_peft_model(deepcopy(pair.theirs), config).eval()
    torch.manual_seed(0)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            weight.add_(torch.randn_like(weight) * 0.05)
    theirs.save_pretrained(tmp_path)
    expected = output(theirs(**inputs(pair.ours)))
    model = fresh(pair)
    load_adapter(model, tmp_path)
    found = compute(model, inputs(pair.ours))
    assert (found - compute(pair.ours, inputs(pair.ours))).abs().max() > 1e-4
    close(found, expected, 5e-6)
    assert all(name.rpartition(".")[2].startswith("lora_") for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def test_the_names_of_published_files_are_read_too(twins, tmp_path):
    """Each expert's adapter apart, as older versions of transformers and PEFT wrote them."""
    pair = twins("mixtral")
    theirs, tensors = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}.lora_{}.weight", {}
    torch.manual_seed(0)
    for layer in range(3):
        for expert in range(4):
            for matrix, inputs_, outputs in (("w1", 32, 48), ("w3", 32, 48), ("w2", 48, 32)):
                tensors[theirs.format(layer, expert, matrix, "A")] = torch.randn(3, inputs_) * 0.2
                tensors[theirs.format(layer, expert, matrix, "B")] = torch.randn(outputs, 3) * 0.05
    written(tmp_path, tensors, target_modules=["w1", "w2", "w3"])
    model = fresh(pair)
    assert len(load_adapter(model, tmp_path)) == 9
    wrapped = peft.PeftModel.from_pretrained(deepcopy(pair.theirs), tmp_path).eval()
    close(compute(model, inputs(pair.ours)), output(wrapped(**inputs(pair.ours))), 5e-6)
    del tensors[theirs.format(1, 2, "w3", "A")], tensors[theirs.format(1, 2, "w3", "B")]
    written(tmp_path, tensors, target_modules=["w1", "w2", "w3"])
    with pytest.raises(DanluError, match=r"blocks\.1\.feedforward\.experts\.up: only 3 of 4 experts have an adapter"):
        load_adapter(fresh(pair), tmp_path)


def written(directory: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none", **changes}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {f"{QUERY}.lora_A.weight": torch.ones(3, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 3)}


@pytest.mark.parametrize(
    ("settings", "tensors", "told"),
    [
        ({"peft_type": "IA3"}, {}, "is an adapter of type 'IA3'; only LORA is read"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save is \['lm_head'\], a form of LoRA that is not read"),
        ({"bias": "all"}, {}, "bias is 'all', a form of LoRA that is not read"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights is 'pissa', a form"),
        ({"r": "many"}, {}, "r is 'many'; it must be a whole number"),
        ({"lora_dropout": 1.5}, {}, "lora_dropout is 1.5; it must lie in"),
        ({"rank_pattern": {"(": 3}}, {}, r"\( is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, {}, "q_proj has rank 0; it must be a whole number from 1"),
        ({"alpha_pattern": {"q_proj": None}}, {}, "q_proj has alpha None; it must be a number"),
        ({"r": 4}, {}, r"q_proj: lora_A.weight has shape \[3, 32\]; with rank 4 it must be \[4, 32\]"),
        ({"use_dora": True}, {}, "q_proj.lora_magnitude_vector is missing"),
        ({}, {f"{QUERY}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector is no part of a LoRA adapter"),
        ({}, {f"{QUERY}.lora_B.weight": None}, "q_proj.lora_B.weight is missing"),
        ({}, {f"{QUERY}.lora_B.weight": torch.ones(16, 3)}, r"lora_B.weight has shape \[16, 3\]; .* \[32, 3\]"),
        (
            {},
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 96)},
            "is no part of a LoRA adapter",
        ),
        (
            {},
            {name.replace("rs.0", "rs.7"): tensor.clone() for name, tensor in GOOD.items()},
            r"layers\.7\.self_attn\.q_proj is no",
        ),
        (
            {},
            {name.replace("q_p", "qq_p"): tensor.clone() for name, tensor in GOOD.items()},
            r"(?s)qq_proj is no .* nearest .*q_proj",
        ),
    ],
)
def test_what_cannot_be_read_is_named_and_changes_nothing(twins, settings, tensors, told, tmp_path):
    whole = {name: tensor for name, tensor in {**GOOD, **tensors}.items() if tensor is not None}
    model = fresh(twins("llama"))
    with pytest.raises(DanluError, match=told):
        load_adapter(model, written(tmp_path, whole, **settings))
    assert not list(adapters(model)) and all(weight.requires_grad for weight in model.parameters())
    load_adapter(model, written(tmp_path, GOOD))


def test_pickles_and_damaged_files_are_refused(twins, tmp_path):
    model = fresh(twins("llama"))
    with pytest.raises(DanluError, match=r"is no adapter: it has no adapter_config\.json"):
        load_adapter(model, tmp_path)
    written(tmp_path, GOOD)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    with pytest.raises(DanluError, match="is damaged or cut short"):
        load_adapter(model, tmp_path)
    weights.unlink()
    with pytest.raises(DanluError, match=r"has no adapter_model\.safetensors"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(DanluError, match=r"has only adapter_model\.bin, a pickle"):
        load_adapter(model, tmp_path)


def test_a_model_without_adapters_saves_none(twins, tmp_path):
    with pytest.raises(DanluError, match="the model has no adapters"):
        save_adapter(twins("llama").ours, tmp_path / "none", base="x")
    assert not (tmp_path / "none").exists()


@torch.no_grad()
def test_adapters_are_kept_in_fp32_whatever_the_models_dtype(twins, tmp_path):
    pair = twins("llama")
    model = learn(adapted(pair))
    save_adapter(model, tmp_path, base="x")
    low = pair.stored.load(torch.bfloat16)
    load_adapter(low, tmp_path)
    save_adapter(low, tmp_path / "again", base="x")
    one, two = (load_file(place / "adapter_model.safetensors") for place in (tmp_path, tmp_path / "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
