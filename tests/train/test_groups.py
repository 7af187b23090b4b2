"""Which weights decay, how fast each learns, and from when on; settings that make no sense are refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.config import EncoderDecoderConfig, Experts, ModelConfig
from danlu.model.initialize import mup_config, mup_multipliers
from danlu.model.lora import add_lora
from danlu.model.transformer import Decoder, EncoderDecoder
from danlu.train.groups import Group, group_weights
from danlu.train.optimizing.settings import RULES, OptimizerSettings

SHAPE = {
    "vocab_size": 50,
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "head_width": 8,
    "feedforward_width": 24,
    "context": 64,
}


def weights(**changes: object) -> dict[str, Tensor]:
    return dict(Decoder(ModelConfig(**{**SHAPE, "layers": 3, **changes})).named_parameters())


def groups(named: dict[str, Tensor], **settings: object) -> dict[str, Group]:
    return group_weights(named, OptimizerSettings(**settings))


def test_matrices_decay_and_globs_change_that():
    named = weights(attention_bias=True, experts=Experts(4, 2, 12))
    found = groups(named)
    assert {name for name in named if not found[name].decays} == {
        n for n in named if n.endswith(("bias", "norm.weight"))
    }
    found = groups(named, decay=("blocks.0.*norm*",), no_decay=("*embedding*", "blocks.0.attention_norm.*"))
    assert found["blocks.0.feedforward_norm.weight"].decays and not found["blocks.0.attention_norm.weight"].decays
    assert not found["embedding.tokens.weight"].decays and found["blocks.1.attention.query.weight"].decays


def test_magnitudes_and_biases_of_banks_are_vectors():
    model = Decoder(ModelConfig(**SHAPE, layers=1, experts=Experts(4, 2, 12), feedforward_bias=True))
    add_lora(model, rank=2, alpha=2, dropout=0, targets=("*experts*",), seed=0, dora=True)
    named = dict(model.named_parameters())
    stacked = {name for name, weight in named.items() if weight.dim() == 2 and name.endswith(("bias", "magnitude"))}
    assert len(stacked) == 6
    assert not any(group.decays or group.muon for name, group in groups(named, name="muon").items() if name in stacked)


def test_lower_layers_learn_slower():
    named = weights()
    found = groups(named, layer_decay=0.5, factors={"*norm*": 3.0, "blocks.0.*": 2.0})
    assert found["head.weight"].factor == 1 and found["norm.weight"].factor == 3
    assert found["blocks.2.attention.query.weight"].factor == 0.5
    assert found["blocks.0.attention.query.weight"].factor == 0.125 * 2
    assert found["blocks.0.attention_norm.weight"].factor == 0.125 * 2 * 3
    assert found["embedding.tokens.weight"].factor == 0.0625


def test_the_stacks_of_a_pair_are_counted_apart():
    stack = ModelConfig(**SHAPE, layers=2, causal=False)
    decoder = ModelConfig(**SHAPE, layers=4, cross=True)
    named = dict(EncoderDecoder(EncoderDecoderConfig(stack, decoder)).named_parameters())
    found = groups(named, layer_decay=0.5)
    assert found["encoder.blocks.1.attention.query.weight"].factor == 0.5
    assert found["decoder.blocks.0.attention.query.weight"].factor == 0.5**4
    assert found["embedding.tokens.weight"].factor == 0.5**5


def test_blocks_thaw_one_by_one():
    found = groups(weights(), thaw_steps=100)
    thaw = {name: group.thaw for name, group in found.items() if "attention.query" in name or "blocks" not in name}
    assert thaw == {
        "head.weight": 0,
        "norm.weight": 0,
        "blocks.2.attention.query.weight": 0,
        "blocks.1.attention.query.weight": 100,
        "blocks.0.attention.query.weight": 200,
        "embedding.tokens.weight": 300,
    }


def test_what_is_frozen_never_learns():
    named = weights()
    found = groups(named, frozen=("blocks.0.*", "embedding.*"), thaw_steps=100)
    assert {n for n in named if found[n].thaw is None} == {
        n for n in named if n.startswith(("blocks.0.", "embedding."))
    }
    assert found["blocks.1.attention.query.weight"].thaw == 100
    with pytest.raises(DanluError, match=r"optimizer\.frozen: nothing is left to learn"):
        groups(named, frozen=("blocks.*", "norm.*", "head.*", "embedding.*"))
    assert not groups(named, name="muon", frozen=("blocks.0.*",))["blocks.0.attention.query.weight"].muon
    with pytest.raises(DanluError, match="globs name none that learns"):
        groups(named, name="muon", frozen=("blocks.*",))


def test_muon_learns_matrices_inside_blocks():
    named = weights(experts=Experts(4, 2, 12))
    found = groups(named, name="muon")
    assert {name for name in named if found[name].muon} == {n for n in named if "blocks" in n and "norm" not in n}
    assert not any(group.muon for group in groups(named).values())
    with pytest.raises(DanluError, match="globs name none"):
        groups({"w": torch.zeros(3)}, name="muon", muon=("*",))


def test_mup():
    wide = Decoder(mup_config(ModelConfig(**SHAPE, layers=1)))
    settings = OptimizerSettings(mup_base_width=8, factors={"head.*": 3.0})
    found = group_weights(dict(wide.named_parameters()), settings, mup_multipliers(wide, 8))
    assert found["blocks.0.attention.query.weight"].factor == 0.5
    assert found["embedding.tokens.weight"].factor == 1 and found["head.weight"].factor == 1.5
    with pytest.raises(DanluError, match="Danlu's own models"):
        group_weights(dict(wide.named_parameters()), settings)


@pytest.mark.parametrize("field", ["decay", "no_decay", "factors", "frozen"])
def test_a_glob_that_matches_nothing_is_refused(field):
    with pytest.raises(DanluError, match=r"named like head\.wieght") as caught:
        groups(weights(), **{field: {"head.wieght": 2.0} if field == "factors" else ("head.wieght",)})
    assert "head.weight" in str(caught.value) and f"optimizer.{field}" in str(caught.value)


@pytest.mark.parametrize("settings", [{"layer_decay": 0.9}, {"thaw_steps": 5}])
def test_what_has_no_blocks_has_no_layers(settings):
    with pytest.raises(DanluError, match="no blocks"):
        groups({"0.weight": torch.zeros(2, 2)}, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"name": "sgd", "betas": (0.9, 0.9)},
            "betas has no effect where name is sgd; it belongs to adam, adamw, muon",
        ),
        ({"name": "adam", "weight_decay": 0.1}, "weight_decay has no effect where name is adam"),
        ({"name": "adagrad", "state": "8bit"}, "state has no effect where name is adagrad"),
        ({"name": "muon", "mup_base_width": 64}, "mup_base_width has no effect"),
        ({"momentum": 0.9}, "momentum has no effect where name is adamw"),
        ({"name": "sgd", "nesterov": True}, "nesterov needs momentum"),
        ({"betas": (0.9, 1.0)}, r"must lie in \[0, 1\)"),
        ({"ema_warmup": True}, "without ema"),
        ({"factors": {"*": 0.0}}, "factors must be more than 0"),
        ({"name": "lion"}, "Input should be 'sgd'"),
        ({"learning_rat": 1.0}, "Extra inputs"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        OptimizerSettings(**settings)


@pytest.mark.parametrize("name", RULES)
def test_settings_written_out_are_read_again(name):
    settings = OptimizerSettings(name=name)
    assert OptimizerSettings(**settings.plain()) == settings
    assert {field: getattr(settings, field) for field in RULES[name]} == RULES[name]
