"""T5 and FLAN-T5 (arXiv:1910.10683, arXiv:2210.11416), and Switch Transformers (arXiv:2101.03961), their mixture.

Source: transformers' modeling_{t5,switch_transformers}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from danlu.model.config import EncoderDecoderConfig, Experts, ModelConfig, Relative
from danlu.model.families.family import Family
from danlu.model.families.fields import ACTIVATIONS, Fields
from danlu.model.names import Table, prefixed, under

# T5 has no longest input: its positions are distances. This is how far they were trained.
CONTEXT = 512


def _stack(hf: Fields, decoder: bool, layers: int, **changes: Any) -> ModelConfig:
    heads, width = hf.integer("num_heads"), hf.integer("d_model")
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_width=hf.integer("d_kv"),
        feedforward_width=hf.integer("d_ff"),
        context=hf.integer("n_positions", CONTEXT),
        causal=decoder,
        cross=decoder,
        positions=Relative(
            hf.integer("relative_attention_num_buckets", 32), hf.integer("relative_attention_max_distance", 128)
        ),
        norm_epsilon=hf.number("layer_norm_epsilon", 1e-6),
        attention_scale=1.0,
        dropout=hf.number("dropout_rate", 0.1),
        attention_dropout=hf.number("dropout_rate", 0.1),
        **changes,
    )


def _both(hf: Fields, scaled: bool, tied: bool, encoder: dict[str, Any], decoder: dict[str, Any]) -> Any:
    """Both stacks. `scaled`: hidden states are scaled before the head. Dicts: what differs between the stacks."""
    for key in ("add_cross_attention", "is_decoder"):
        hf.only(key, False)
    layers = hf.integer("num_layers")
    scale = hf.integer("d_model") ** -0.5 if scaled else 1.0
    return EncoderDecoderConfig(
        _stack(hf, False, layers, head=None, tied=True, **encoder),
        _stack(hf, True, hf.integer("num_decoder_layers", layers), head_scale=scale, tied=tied, **decoder),
        start=hf.integer("decoder_start_token_id", hf.integer("pad_token_id", 0)),
    )


def _read_t5(hf: Fields) -> EncoderDecoderConfig:
    form = str(hf.get("feed_forward_proj", "relu"))
    gated, named = form.startswith("gated-"), form.removeprefix("gated-")
    # T5 1.1 was trained with the tanh form, whatever its configuration calls it.
    hf.hf["feed_forward_proj"] = "gelu_new" if form == "gated-gelu" else named
    activation = hf.activation("feed_forward_proj")
    hf.ignore("dense_act_fn", "is_gated_act")  # the same in two words
    hf.only("classifier_dropout", 0.0)
    scaled = hf.flag("scale_decoder_outputs", hf.flag("tie_word_embeddings", True))
    kind = {"gated": gated, "activation": activation}
    return _both(hf, scaled, hf.flag("tie_word_embeddings", True), kind, kind)


def _write_common(config: EncoderDecoderConfig) -> dict[str, Any]:
    encoder, decoder = config.encoder, config.decoder
    assert isinstance(encoder.positions, Relative)
    return {
        "vocab_size": encoder.vocab_size,
        "d_model": encoder.width,
        "num_layers": encoder.layers,
        "num_decoder_layers": decoder.layers,
        "num_heads": encoder.heads,
        "d_kv": encoder.head_width,
        "d_ff": encoder.feedforward_width,
        "n_positions": encoder.context,
        "relative_attention_num_buckets": encoder.positions.buckets,
        "relative_attention_max_distance": encoder.positions.farthest,
        "layer_norm_epsilon": encoder.norm_epsilon,
        "dropout_rate": encoder.dropout,
        "decoder_start_token_id": config.start,
        "pad_token_id": config.start,
        "is_encoder_decoder": True,
        "tie_word_embeddings": decoder.tied,
    }


def _write_t5(config: EncoderDecoderConfig) -> dict[str, Any]:
    activation = config.encoder.activation
    name = "gelu" if config.encoder.gated and activation == "gelu_tanh" else ACTIVATIONS[activation]
    return _write_common(config) | {
        "feed_forward_proj": f"gated-{name}" if config.encoder.gated else name,
        "scale_decoder_outputs": config.decoder.head_scale != 1,
    }


def _read_switch(hf: Fields) -> EncoderDecoderConfig:
    hf.only("router_bias", False)
    hf.only("router_ignore_padding_tokens", False)
    hf.only("router_dtype", "float32")
    hf.ignore("add_router_probs", "encoder_sparse_step", "decoder_sparse_step")  # the steps follow from the counts
    tied = hf.flag("tie_word_embeddings", True)
    kind = {"gated": False, "activation": hf.activation("dense_act_fn", "relu")}
    layers = hf.integer("num_layers")
    encoder = _switch_experts(hf, layers, hf.integer("num_sparse_encoder_layers", 3))
    deep = hf.integer("num_decoder_layers", layers)
    decoder = _switch_experts(hf, deep, hf.integer("num_sparse_decoder_layers", 3))
    return _both(hf, tied, tied, {**kind, "experts": encoder}, {**kind, "experts": decoder})


def _switch_experts(hf: Fields, layers: int, sparse: int) -> Experts | None:
    step = layers // sparse if sparse else layers
    # Every step-th layer, counted so that the first of each group stays dense; with a step of 1, all.
    chosen = tuple(layer for layer in range(layers) if layer % step == 1 or step == 1)
    if not chosen:
        return None
    return Experts(
        count=hf.integer("num_experts", 8),
        chosen=1,
        width=hf.integer("d_ff"),
        layers=None if len(chosen) == layers else chosen,
        capacity=hf.integer("expert_capacity", 64),
        exact_router=True,
        jitter=hf.number("router_jitter_noise", 0.01),
        balance=hf.number("router_aux_loss_coef", 0.001),
        z=hf.number("router_z_loss_coef", 0.001),
    )


def _write_switch(config: EncoderDecoderConfig) -> dict[str, Any]:
    hf = _write_common(config) | {"dense_act_fn": ACTIVATIONS[config.encoder.activation]}
    for stack, key in ((config.encoder, "num_sparse_encoder_layers"), (config.decoder, "num_sparse_decoder_layers")):
        hf[key] = sum(stack.has_experts(layer) for layer in range(stack.layers))
    experts = config.encoder.experts or config.decoder.experts
    if experts is None:
        return hf
    return hf | {
        "num_experts": experts.count,
        "expert_capacity": experts.capacity,
        "router_jitter_noise": experts.jitter,
        "router_aux_loss_coef": experts.balance,
        "router_z_loss_coef": experts.z,
    }


def _is_gated(hf: Mapping[str, Any]) -> bool:
    return str(hf.get("feed_forward_proj", "relu")).startswith("gated-")


def _weights(feedforward: str, gated: bool = False, experts: bool = False) -> Table:
    """`feedforward`: what files call a block's feed-forward."""
    inner = {"feedforward.up": "wi", "feedforward.down": "wo"}
    if gated:
        inner = {"feedforward.gate": "wi_0", "feedforward.up": "wi_1", "feedforward.down": "wo"}
    made: dict[str, Any] = {"embedding.tokens": "shared", "head": "lm_head"}
    for stack, last in (("encoder", 1), ("decoder", 2)):
        layer = {
            "attention_norm": "layer.0.layer_norm",
            "attention.query": "layer.0.SelfAttention.q",
            "attention.key": "layer.0.SelfAttention.k",
            "attention.value": "layer.0.SelfAttention.v",
            "attention.output": "layer.0.SelfAttention.o",
            "feedforward_norm": f"layer.{last}.layer_norm",
            **{ours: f"layer.{last}.{feedforward}.{theirs}" for ours, theirs in inner.items()},
        }
        if stack == "decoder":
            layer |= {
                "cross_norm": "layer.1.layer_norm",
                "cross.query": "layer.1.EncDecAttention.q",
                "cross.key": "layer.1.EncDecAttention.k",
                "cross.value": "layer.1.EncDecAttention.v",
                "cross.output": "layer.1.EncDecAttention.o",
            }
        if experts:
            layer |= {
                "feedforward.router": f"layer.{last}.mlp.router.classifier",
                "feedforward.experts.up": f"layer.{last}.mlp.experts.expert_{{e}}.wi",
                "feedforward.experts.down": f"layer.{last}.mlp.experts.expert_{{e}}.wo",
            }
        made |= under(f"{stack}.blocks.{{i}}.", prefixed(f"{stack}.block.{{i}}.", layer))
        made[f"{stack}.norm"] = f"{stack}.final_layer_norm"
        made[f"{stack}.relative"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
    return made


SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # the shared one once more
T5 = Family(
    "T5ForConditionalGeneration",
    "t5",
    _read_t5,
    _write_t5,
    _weights("DenseReluDense"),
    unread=SHARED,
    accepts=lambda hf: not _is_gated(hf),
)
# FLAN-T5 is T5 1.1, trained further: gated feed-forwards, and a head of its own.
FLAN_T5 = replace(T5, weights=_weights("DenseReluDense", gated=True), accepts=_is_gated)
SWITCH = Family(
    "SwitchTransformersForConditionalGeneration",
    "switch_transformers",
    _read_switch,
    _write_switch,
    _weights("mlp", experts=True),
    unread=SHARED,
)
