"""`danlu model`: parameters, operations and caches are what the model itself, transformers and PyTorch count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from danlu.cli import app
from danlu.cli.model import model as model_commands
from danlu.errors import DanluError
from danlu.model.config import AnyConfig, ModelConfig
from danlu.model.costs import costs, count_parameters, training_operations
from danlu.model.describe import BYTES, CheckpointFacts, FamilyFacts, describe
from danlu.model.families.family import Family
from danlu.model.families.known import FAMILIES, family_of
from danlu.model.sight import Batch, visible
from danlu.model.transformer import Decoder, EncoderDecoder, EncoderPair, Model, make_model
from tests.model.zoo import CASES, twin

# The published config.json, without what does not change a weight.
GPT2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
GPT2 |= {"n_positions": 1024}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32}
MIXTRAL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
MIXTRAL |= {"max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2}
aten = torch.ops.aten
BODIES = {
    "Decoder": "decoder",
    "Encoder": "encoder",
    "EncoderDecoder": "encoder and decoder",
    "EncoderPair": "pair of encoders",
}


def read(hf: dict[str, Any]) -> AnyConfig:
    return family_of(hf).config(hf)


def config_of(case: str) -> AnyConfig:
    kind, config = CASES[case]
    return read(json.loads(config.to_json_string()) | {"architectures": [kind.__name__]})


def without_memory(config: AnyConfig) -> Model:
    with torch.device("meta"):
        return make_model(config)


def counted(model: Model, device: str) -> tuple[int, int]:
    """PyTorch's count of a forward pass over one whole row: operations with weights, and those of attention."""
    with torch.device(device), torch.no_grad(), FlopCounterMode(display=False) as counter:
        if isinstance(model, EncoderDecoder):
            model.logits(model(*2 * [ids(model.config.decoder)]))
        elif isinstance(model, EncoderPair):
            model.embed_text(ids(model.config.text))
            model.embed_image(pixels(model.config.image))
        else:
            model.logits(model(pixels(model.config) if model.config.patches else ids(model.config)))
    count = counter.get_flop_counts()["Global"]
    matrix, added, batched = (count.get(operator, 0) for operator in (aten.mm, aten.addmm, aten.bmm))
    return matrix + added, batched


def ids(config: ModelConfig) -> torch.Tensor:
    return torch.zeros(1, config.context, dtype=torch.int64)


def pixels(config: ModelConfig) -> torch.Tensor:
    assert config.patches is not None
    return torch.zeros(1, config.patches.channels, *config.patches.image)


def of_row(model: Model, kind: str) -> float:
    """Our count of the same."""
    longest = {cost.unit: cost for cost in costs(model)}.values()
    return sum(getattr(cost, kind) * (1 if cost.unit == "image" else cost.context) for cost in longest)


# --- Parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_as_many_parameters_as_transformers_counts(case: str) -> None:
    kind, config = CASES[case]
    with torch.device("meta"):
        theirs = kind(config)
    ours = without_memory(config_of(case))
    parts = count_parameters(ours)
    total = sum(part.total for part in parts)
    assert total == sum(weight.numel() for weight in ours.parameters()) == theirs.num_parameters()
    assert len({part.name for part in parts}) == len(parts)
    sparse = any("experts" in part.name for part in parts)
    assert (sum(part.active for part in parts) < total) is sparse


def test_the_published_figures_of_gpt2_and_mixtral() -> None:
    assert sum(part.total for part in count_parameters(without_memory(read(GPT2)))) == 124_439_808
    parts = {part.name: part for part in count_parameters(without_memory(read(MIXTRAL)))}
    assert sum(part.total for part in parts.values()) == 46_702_792_704  # "47B parameters", arXiv:2401.04088
    assert sum(part.active for part in parts.values()) == 12_879_925_248  # "13B active parameters"
    assert parts["experts"].total == 4 * parts["experts"].active == 32 * 8 * 3 * 4096 * 14336
    assert list(parts) == ["embedding", "attention", "router", "experts", "norms", "head"]


# --- Operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if "switch" not in case])  # whose experts pass tokens by
def test_operations_with_weights_equal_pytorch_s_count(case: str) -> None:
    model = make_model(config_of(case)).eval()
    assert of_row(model, "weights") == counted(model, "cpu")[0]


@pytest.mark.parametrize("case", ["bert words", "vit"])
def test_operations_of_attention_equal_pytorch_s_count_where_all_see_all(case: str) -> None:
    model = without_memory(config_of(case)).eval()
    assert of_row(model, "attention") == counted(model, "meta")[1]


def test_pairs_hidden_by_causality_are_not_counted() -> None:
    """PyTorch counts every pair of a row; a causal stack's are those up to the query's own place."""
    model = without_memory(config_of("gpt2")).eval()
    length = model.config.context
    assert of_row(model, "attention") == counted(model, "meta")[1] * (length + 1) / (2 * length)

    model = without_memory(config_of("t5")).eval()
    length, decoder = model.config.decoder.context, model.config.decoder
    hidden = 4 * decoder.heads * decoder.head_width * decoder.layers * length * (length - 1) / 2
    assert of_row(model, "attention") == counted(model, "meta")[1] - hidden


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
def test_pairs_are_those_that_the_mask_shows(case: str) -> None:
    config = config_of(case)
    assert isinstance(config, ModelConfig)
    row = Batch(torch.arange(config.context)[None])
    seen = sum(int(visible(True, config.window(layer) or 0, row).sum()) for layer in range(config.layers))
    assert of_row(without_memory(config), "attention") == 4 * config.heads * config.head_width * seen


def test_the_formula_of_the_scaling_laws() -> None:
    """2 N + 2 layers width context, and three times as much for training (arXiv:2001.08361)."""
    (cost,) = costs(without_memory(read(GPT2)))
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert cost.forward == 2 * weights + 2 * 12 * 768 * (1024 + 1)
    assert cost.training == 6 * weights + 6 * 12 * 768 * (1024 + 1)


def test_training_costs_what_both_ways_cost() -> None:
    for case in ("llama", "bert words", "vit", "t5 uneven"):
        model = without_memory(config_of(case))
        told = [cost for cost in costs(model) if cost.context == costs(model)[-1].context]
        expected = sum(cost.training for cost in told) / len(told)
        assert training_operations(model, told[0].context) == expected
    assert training_operations(without_memory(config_of("clip")), 16) is None


def test_costs_are_told_up_to_the_context() -> None:
    assert [cost.context for cost in costs(without_memory(read(MIXTRAL)))] == [1024, 4096, 16384, 32768]


# --- The cache ------------------------------------------------------------------------------------------------------


def test_the_cache_is_as_large_as_the_real_one() -> None:
    model = make_model(config_of("llama"))
    assert isinstance(model, Decoder)
    cache = model.new_cache(1, model.config.context)
    assert costs(model)[-1].cache == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)

    model = make_model(config_of("t5 uneven")).eval()
    assert isinstance(model, EncoderDecoder)
    read = ids(model.config.decoder)
    cache = model.new_cache(1, read.shape[1])
    with torch.no_grad():
        model.decode(read[:, :1], model.encode(read), cache=cache)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    kept += sum(side.numel() for layer in cache.layers for side in layer.memory or ())
    assert costs(model)[-1].cache == kept


def test_layers_with_a_window_need_only_the_window() -> None:
    config = config_of("gemma3")  # two layers of three look back on 8 of 64 places
    assert isinstance(config, ModelConfig)
    cost = costs(without_memory(config))[-1]
    per_token = 2 * config.kv_heads * config.head_width
    assert (cost.cache, cost.needed) == (3 * 64 * per_token, (8 + 64 + 8) * per_token)
    everywhere = costs(without_memory(replace(config, sliding_window=None)))[-1]
    assert everywhere.cache == everywhere.needed == cost.cache


def test_only_what_writes_has_a_cache() -> None:
    for case in ("bert words", "vit", "clip"):
        assert all(cost.cache == 0 for cost in costs(without_memory(config_of(case))))


# --- Families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_a_family_s_body_is_the_one_that_is_built(case: str) -> None:
    facts = describe(CASES[case][0].__name__)
    assert isinstance(facts, FamilyFacts)
    built = type(without_memory(config_of(case))).__name__
    assert {line["body"] for line in facts.architectures()} == {BODIES[built]}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_every_weight_of_a_family_is_named(family: Family) -> None:
    facts = describe(family.model_type)
    assert isinstance(facts, FamilyFacts)
    assert family in facts.families and all(line["head"] for line in facts.architectures())
    named = {line["ours"] for line in facts.weights() if any(family.architecture in label for label in line["in"])}
    assert set(family.weights) <= named


def test_formats_of_one_weight_stand_side_by_side() -> None:
    facts = describe("gpt2")
    key = next(line for line in facts.plain()["weights"] if line["ours"] == "blocks.{i}.attention.key")
    assert key["hugging_face"] == "transformer.h.{i}.attn.c_attn (2 of 3)"
    assert key["gguf"] == "blk.{i}.attn_qkv (2 of 3)"
    labels = [line["architecture"] for line in describe("t5").plain()["architectures"]]
    assert labels == ["T5ForConditionalGeneration", "T5ForConditionalGeneration, gated"]


@pytest.mark.parametrize(
    ("ref", "told"),
    [
        ("lama", "did you mean llama?"),
        ("LLAMA", "did you mean llama?"),
        ("LlamaForCasualLM", "did you mean LlamaForCausalLM?"),
        ("zzzzzz", "families: llama, mistral,"),
        ("nothere.gguf", "models: name a Hugging Face directory"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(ref: str, told: str) -> None:
    with pytest.raises(DanluError, match="is neither a family nor a model") as raised:
        describe(ref)
    assert told in str(raised.value)


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin("mixtral", tmp_path_factory.mktemp("zoo") / "mixtral").path


def danlu(*words: object) -> tuple[int, str, str]:
    ended = CliRunner().invoke(app, ["model", *map(str, words)])
    return ended.exit_code, ended.stdout, ended.stderr


def test_a_checkpoint_as_json(mixtral: Path) -> None:
    code, told, _ = danlu(mixtral, "--json")
    found = json.loads(told)
    assert code == 0 and found["architecture"] == "MixtralForCausalLM" and found["config"]["experts"]["count"] == 4
    facts = describe(str(mixtral))
    assert isinstance(facts, CheckpointFacts)
    assert found["parameters"]["total"] == facts.total > found["parameters"]["active"] == facts.active
    assert {kind: size["value"] for kind, size in found["weights"].items()} == {
        kind: facts.total * size for kind, size in BYTES.items()
    }
    (cost,) = found["costs"]
    assert cost["training"] == {"value": 3 * cost["forward"]["value"], "unit": "FLOP/token"}


def test_a_checkpoint_as_text(mixtral: Path, smollm2: Path) -> None:
    code, told, _ = danlu(mixtral)
    assert code == 0 and "2 of 4 experts of 48" in told and "of them for each token" in told
    code, told, _ = danlu(smollm2)
    assert code == 0 and "134,515,008" in told and "269.0 MB in bf16" in told
    assert "the head multiplies by the embedding" in told and "269.0 MFLOP" in told


def test_what_windows_save_is_said(tmp_path: Path) -> None:
    told = danlu(twin("mistral", tmp_path).path)[1]
    assert "layers with a window need only its 8 tokens in the cache" in told and "Danlu keeps all" in told


def test_a_family_as_text_and_json() -> None:
    code, told, _ = danlu("bert")
    assert code == 0 and "start and end of an answer" in told and "bert.encoder.layer.{i}.output.dense" in told
    assert "name a checkpoint to see its numbers" in told
    assert danlu("show", "bert")[1] == told
    assert json.loads(danlu("--json", "llama")[1])["architectures"] == [
        {"architecture": "LlamaForCausalLM", "body": "decoder", "head": "words", "gguf": "llama"}
    ]


def test_a_path_named_like_a_family_is_the_one_meant(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mixtral").symlink_to(mixtral)
    monkeypatch.chdir(tmp_path)
    code, told, said = danlu("mixtral")
    assert code == 0 and "parameters" in told
    assert "the path mixtral is meant; for the family:  danlu model MixtralForCausalLM" in said


def test_a_mistake_gets_one_message_and_exit_code_2() -> None:
    code, told, said = danlu("lama")
    assert (code, told) == (2, "") and said.startswith("danlu: lama: is neither a family nor a model\n  did you mean")


def test_help_explains_both_commands_with_an_example() -> None:
    code, told, _ = danlu("--help")
    assert code == 0 and "danlu model X" in told
    assert "Example:  danlu model llama" in told and "danlu model check" in told
    for command in model_commands.registered_commands:
        assert command.callback is not None and "Example:  danlu model " in (command.callback.__doc__ or "")
