"""Starts: each kind of weight has the spread its scheme asks for, decided by seed and name; muP is flat in width."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F

from danlu.errors import DanluError
from danlu.model.config import (
    EncoderDecoderConfig,
    Experts,
    Head,
    Learned,
    ModelConfig,
    PairConfig,
    Patches,
    Relative,
)
from danlu.model.families.known import family_of
from danlu.model.initialize import initialize, mup_config, mup_multipliers
from danlu.model.lora import add_lora
from danlu.model.transformer import Decoder, Encoder, make_model

WIDTH, INNER, WORDS = 128, 192, 512
SHAPE = {
    "vocab_size": WORDS,
    "width": WIDTH,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 32,
    "feedforward_width": INNER,
    "context": 64,
}
MIXTURE = Experts(count=4, chosen=2, width=96, layers=(1,), shared_width=64, shared_gate=True)
PICTURE = {
    "patches": Patches((32, 32), (8, 8)),
    "causal": False,
    "positions": Learned(),
    "vocab_size": 0,
    "context": 17,
}
DECODER = ModelConfig(**SHAPE, positions=Learned(), experts=MIXTURE, attention_bias=True)


def decoder(config: ModelConfig = DECODER, scheme: str = "normal", seed: int = 1) -> Decoder:
    made = Decoder(mup_config(config) if scheme == "mup" else config)
    initialize(made, scheme, seed)
    return made


def start(config, scheme: str = "normal", seed: int = 1):
    made = make_model(mup_config(config) if scheme == "mup" else config)
    initialize(made, scheme, seed)
    return made


def spread(model, glob: str) -> list[float]:
    """The root mean square of every weight of such a name."""
    found = [weight for name, weight in model.named_parameters() if fnmatchcase(name, glob)]
    assert found, glob
    return [float(weight.detach().square().mean().sqrt()) for weight in found]


def xavier(inputs: int, outputs: int) -> float:
    return math.sqrt(2 / (inputs + outputs))


SPREADS = {
    "xavier": {
        "embedding.*.weight": 0.02,
        "blocks.*.attention.query.weight": xavier(128, 128),
        "blocks.*.attention.key.weight": xavier(128, 64),
        "blocks.*.attention.output.weight": xavier(128, 128),
        "blocks.[02].feedforward.up.weight": xavier(128, 192),
        "blocks.[02].feedforward.down.weight": xavier(192, 128),
        "blocks.1.feedforward.experts.gate.weight": xavier(128, 96),
        "blocks.1.feedforward.shared.down.weight": xavier(64, 128),
        "head.weight": xavier(128, 512),
    },
    "he": {
        "embedding.*.weight": 0.02,
        "blocks.*.attention.*.weight": math.sqrt(2 / 128),
        "blocks.[02].feedforward.down.weight": math.sqrt(2 / 192),
        "blocks.1.feedforward.experts.up.weight": math.sqrt(2 / 128),
        "blocks.1.feedforward.experts.down.weight": math.sqrt(2 / 96),
        "head.weight": math.sqrt(2 / 128),
    },
    "normal": {
        "embedding.*.weight": 0.02,
        "blocks.*.attention.[qkv]*.weight": 0.02,
        "blocks.*.attention.output.weight": 0.02 / math.sqrt(6),
        "blocks.[02].feedforward.gate.weight": 0.02,
        "blocks.[02].feedforward.down.weight": 0.02 / math.sqrt(6),
        "blocks.1.feedforward.experts.up.weight": 0.02,
        "blocks.1.feedforward.experts.down.weight": 0.02 / math.sqrt(6),
        "blocks.1.feedforward.shared.down.weight": 0.02 / math.sqrt(6),
        "head.weight": 0.02,
    },
    "mup": {
        "embedding.*.weight": 1.0,
        "blocks.*.attention.*.weight": 1 / math.sqrt(128),
        "blocks.[02].feedforward.down.weight": 1 / math.sqrt(192),
        "blocks.1.feedforward.experts.down.weight": 1 / math.sqrt(96),
        "blocks.1.feedforward.router.weight": 1 / 128,
        "head.weight": 1 / 128,
    },
}


@pytest.mark.parametrize(
    ("scheme", "glob", "expected"), [(scheme, *pair) for scheme, kinds in SPREADS.items() for pair in kinds.items()]
)
def test_every_kind_of_weight_has_its_spread(scheme, glob, expected):
    for found in spread(decoder(scheme=scheme), glob):
        assert found == pytest.approx(expected, rel=0.05 if "router" not in glob else 0.15)


def test_every_expert_has_the_spread_of_a_matrix_of_its_own():
    for scheme, expected in (("xavier", xavier(128, 96)), ("he", math.sqrt(2 / 128)), ("mup", math.sqrt(1 / 128))):
        bank = decoder(scheme=scheme).blocks[1].feedforward.experts.up.weight.detach()
        assert bank.square().mean((1, 2)).sqrt().tolist() == pytest.approx([expected] * 4, rel=0.05)
        assert not torch.equal(bank[0], bank[1])


def test_tails_end_where_they_should():
    bound = math.sqrt(6 / 256)
    uniform = decoder(scheme="xavier").blocks[0].attention.query.weight.abs().max()
    assert 0.99 * bound < uniform <= bound
    cut = decoder(scheme="normal").head.weight.abs().max()
    assert 0.058 < cut < 0.0612  # three times the std before the cut, which is a little above 0.02
    assert decoder(scheme="he").head.weight.abs().max() > 4 * math.sqrt(2 / 128)  # a whole normal


@pytest.mark.parametrize("norm", ["rms", "layer", "batch"])
def test_norms_do_nothing_and_biases_are_zero(norm):
    config = ModelConfig(**SHAPE, norm=norm, feedforward_bias=True, output_bias=True, head=Head(bias=True))
    model = decoder(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
    if norm == "batch":
        model.blocks[0].attention_norm.running_mean.fill_(3)
        initialize(model, "he", 0)
        assert not model.blocks[0].attention_norm.running_mean.any()
    if norm == "rms":
        plus_one = decoder(ModelConfig(**SHAPE, norm_plus_one=True))
        assert not plus_one.norm.weight.any() and not plus_one.blocks[1].feedforward_norm.weight.any()


def test_other_bodies_start_too():
    picture = start(ModelConfig(**{**SHAPE, **PICTURE}, head=Head("sequence", 10, pool="first")), "xavier")
    assert isinstance(picture, Encoder)
    assert spread(picture, "embedding.patches.weight") == pytest.approx([xavier(192, 128)], rel=0.05)
    assert spread(picture, "embedding.class_token")[0] == pytest.approx(0.02, rel=0.3)
    assert spread(start(picture.config, "mup"), "head.output.weight") == pytest.approx([1 / 128], rel=0.15)
    stack = {**SHAPE, "positions": Relative(), "attention_scale": 1.0}
    both = EncoderDecoderConfig(
        ModelConfig(**stack, causal=False, head=None, tied=True), ModelConfig(**stack, cross=True, tied=True)
    )
    model = start(both)
    assert spread(model, "encoder.blocks.*.output.weight") == pytest.approx([0.02 / math.sqrt(6)] * 3, rel=0.05)
    assert spread(model, "decoder.blocks.*.output.weight") == pytest.approx([0.02 / math.sqrt(9)] * 6, rel=0.05)
    assert spread(model, "*.relative.weight") == pytest.approx([0.02] * 2, rel=0.3)
    head = Head("embedding", 24, pool="first")
    pair = PairConfig(ModelConfig(**SHAPE, head=head), ModelConfig(**{**SHAPE, **PICTURE}, head=head), logit_scale=1.5)
    assert start(pair).logit_scale == 1.5


def test_the_seed_and_the_name_decide_and_nothing_else():
    torch.manual_seed(1)
    one = decoder().state_dict()
    torch.manual_seed(2)
    two = Decoder(DECODER)
    two._modules = dict(reversed(two._modules.items()))  # in another order
    initialize(two, "normal", 1)
    assert list(two.state_dict()) != list(one)
    assert all(torch.equal(one[name], weight) for name, weight in two.state_dict().items())
    other = decoder(seed=2).state_dict()
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].std() > 0)
    names = [name for name in one if one[name].std() > 0]
    assert len({float(one[name].flatten()[0]) for name in names}) == len(names)  # no two start alike


def test_a_deeper_model_starts_with_the_same_first_layers():
    shallow, deep = (decoder(ModelConfig(**{**SHAPE, "layers": layers}), "he") for layers in (2, 5))
    longer = dict(deep.named_parameters())
    assert all(torch.equal(weight, longer[name]) for name, weight in shallow.named_parameters())


def test_in_bf16_the_start_is_rounded():
    low = Decoder(DECODER).bfloat16()
    initialize(low, "normal", 1)
    whole = decoder().state_dict()
    assert all(torch.equal(weight, whole[name].bfloat16()) for name, weight in low.state_dict().items())


@pytest.mark.parametrize("scheme", ["xavier", "he", "normal", "mup"])
def test_every_family_has_a_start(scheme):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.model.zoo import CASES

    seen = set()
    for kind, hf in CASES.values():
        file = {**json.loads(hf.to_json_string(use_diff=False)), "architectures": [kind.__name__]}
        model = start(family_of(file).config(file), scheme)
        assert all(bool(weight.isfinite().all()) for weight in model.parameters())
        seen.add(type(model).__name__)
    assert seen == {"Decoder", "Encoder", "EncoderDecoder", "EncoderPair"}


def test_what_cannot_be_started_is_named():
    with pytest.raises(DanluError, match=r"xaver is no scheme\n  did you mean xavier\?"):
        initialize(Decoder(DECODER), "xaver", 0)
    with pytest.raises(DanluError, match=r"not scaled as muP asks\n  make it of mup_config"):
        initialize(Decoder(DECODER), "mup", 0)
    model = Decoder(DECODER)
    add_lora(model, rank=2, alpha=2, dropout=0, targets=["*.query"], seed=0)
    with pytest.raises(DanluError, match=r"how blocks\.0\.attention\.query\.lora_down starts is not known"):
        initialize(model, "he", 0)


def test_mups_scales_and_learning_rates():
    config = ModelConfig(**SHAPE, tied=True, embedding_scale=11.0)
    scaled = mup_config(config)
    assert (scaled.attention_scale, scaled.head_scale, scaled.embedding_scale) == (1 / 32, 1 / 128, 1.0)
    assert mup_config(DECODER).head_scale == 1.0  # a head of its own starts smaller instead
    found = mup_multipliers(decoder(scheme="mup"), base_width=32)
    ones = {"embedding.tokens.weight", "embedding.positions.weight", "blocks.0.attention.query.bias", "norm.weight"}
    quarters = {"head.weight", "blocks.1.feedforward.router.weight", "blocks.0.attention.output.weight"}
    assert found.keys() == dict(decoder().named_parameters()).keys()
    assert {found[name] for name in ones} == {1.0} and {found[name] for name in quarters} == {0.25}
    assert found["blocks.1.feedforward.experts.down.weight"] == 0.25
    assert set(mup_multipliers(decoder(scheme="mup"), base_width=128).values()) == {1.0}
    with pytest.raises(DanluError, match="base_width is 0"):
        mup_multipliers(decoder(), 0)
    head = Head("embedding", 24, pool="first")
    pair = PairConfig(ModelConfig(**SHAPE, head=head), ModelConfig(**{**SHAPE, **PICTURE, "width": 64}, head=head))
    with pytest.raises(DanluError, match="stacks of widths 64 and 128"):
        mup_multipliers(make_model(pair), 64)


def moved(width: int, scheme: str, tied: bool) -> tuple[float, float]:
    """How far four steps of Adam move the stream after the last block, and the logits; the mean over all of them."""
    shape = {**SHAPE, "vocab_size": 64, "layers": 2, "kv_heads": 4, "context": 32}
    shape |= {"width": width, "head_width": width // 4, "feedforward_width": 2 * width}
    model = decoder(ModelConfig(**shape, tied=tied), scheme)
    rates = mup_multipliers(model, 64) if scheme == "mup" else dict.fromkeys(dict(model.named_parameters()), 1.0)
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": 0.02 * rates[name]} for name, weight in model.named_parameters()]
    )
    tokens = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(1))

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        hidden: list[torch.Tensor] = []
        logits = model.logits(model(tokens, hidden=hidden))
        return hidden[-1].detach(), logits

    before = look()
    for _ in range(4):
        F.cross_entropy(look()[1][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = look()
    stream, logits = ((a - b).abs().mean().item() for a, b in zip(after, before, strict=True))
    return stream, logits


@pytest.mark.parametrize("tied", [False, True])
def test_under_mup_learning_moves_activations_alike_at_every_width(tied):
    """The coordinate check of arXiv:2203.03466, appendix D.1."""
    widths = (64, 128, 256)
    flat = [moved(width, "mup", tied) for width in widths]
    growing = [moved(width, "xavier", tied) for width in widths]
    for kind in (0, 1):
        assert max(at[kind] for at in flat) < 1.6 * min(at[kind] for at in flat), flat
        assert growing[2][kind] > 1.5 * growing[0][kind], growing
        assert growing[0][kind] < growing[1][kind] < growing[2][kind]
    assert growing[2][0] > 3 * growing[0][0]
