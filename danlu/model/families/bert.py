"""BERT (arXiv:1810.04805) and RoBERTa (arXiv:1907.11692): encoders whose norms stand after each sum.

Source: transformers' modeling_{bert,roberta}.py. Every task is an architecture of its own, which differs in the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from danlu.model.config import Head, Learned, ModelConfig
from danlu.model.families.family import Family
from danlu.model.families.fields import ACTIVATIONS, Fields, write_labels
from danlu.model.names import Place, Table, prefixed

LAYER = "encoder.layer.{i}."
BODY = {
    "embedding.tokens": "embeddings.word_embeddings",
    "embedding.positions": "embeddings.position_embeddings",
    "embedding.types": "embeddings.token_type_embeddings",
    "embedding.norm": "embeddings.LayerNorm",
    "blocks.{i}.attention.query": LAYER + "attention.self.query",
    "blocks.{i}.attention.key": LAYER + "attention.self.key",
    "blocks.{i}.attention.value": LAYER + "attention.self.value",
    "blocks.{i}.attention.output": LAYER + "attention.output.dense",
    "blocks.{i}.attention_norm_after": LAYER + "attention.output.LayerNorm",
    "blocks.{i}.feedforward.up": LAYER + "intermediate.dense",
    "blocks.{i}.feedforward.down": LAYER + "output.dense",
    "blocks.{i}.feedforward_norm_after": LAYER + "output.LayerNorm",
}
SHAPE = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feedforward_width": "intermediate_size",
}
HeadOf = Callable[[Fields], Head]


def _read(hf: Fields, head: HeadOf, first: int | None) -> ModelConfig:
    """`first`: the row of the first place; None where it follows the padding's id."""
    hf.only("position_embedding_type", "absolute")
    for key in ("add_cross_attention", "is_decoder"):
        hf.only(key, False)
    start = hf.integer("pad_token_id", 1) + 1 if first is None else first
    dropout = hf.number("hidden_dropout_prob", 0.1)
    facts: dict[str, Any] = {name: hf.integer(key) for name, key in SHAPE.items()}
    return ModelConfig(
        **facts,
        kv_heads=facts["heads"],
        head_width=facts["width"] // max(facts["heads"], 1),
        context=hf.integer("max_position_embeddings") - start,
        causal=False,
        positions=Learned(start),
        types=hf.integer("type_vocab_size", 2),
        norm="layer",
        norm_place="post",
        norm_epsilon=hf.number("layer_norm_eps", 1e-12),
        embedding_norm=True,
        final_norm=False,
        tied=hf.flag("tie_word_embeddings", True),
        head=head(hf),
        attention_bias=True,
        output_bias=True,
        feedforward_bias=True,
        activation=hf.activation("hidden_act", "gelu"),
        gated=False,
        dropout=dropout,
        attention_dropout=hf.number("attention_probs_dropout_prob", 0.1),
        head_dropout=dropout if hf.get("classifier_dropout") is None else hf.number("classifier_dropout"),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    hf = {key: getattr(config, name) for name, key in SHAPE.items()}
    assert isinstance(config.positions, Learned)
    if config.positions.first:
        hf["pad_token_id"] = config.positions.first - 1
    assert config.head is not None
    return (
        hf
        | write_labels(config.head)
        | {
            "max_position_embeddings": config.context + config.positions.first,
            "type_vocab_size": config.types,
            "layer_norm_eps": config.norm_epsilon,
            "hidden_act": ACTIVATIONS[config.activation],
            "tie_word_embeddings": config.tied,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "classifier_dropout": config.head_dropout,
        }
    )


def _words(hf: Fields) -> Head:
    # RoBERTa's is always "gelu", which is also what its configurations say.
    return Head("words", dense=hf.activation("hidden_act", "gelu"), norm=True, bias=True)


def _vector(hf: Fields) -> Head:
    return Head("embedding", pool="first", dense="tanh")


def _sequence(hf: Fields) -> Head:
    labels = hf.labels()
    return Head("sequence", len(labels), pool="first", dense="tanh", bias=True, labels=labels)


def _tokens(hf: Fields) -> Head:
    labels = hf.labels()
    return Head("tokens", len(labels), bias=True, labels=labels)


def _span(hf: Fields) -> Head:
    return Head("span", 2, bias=True)


def _make(model_type: str, name: str, first: int | None, tasks: dict[str, tuple[HeadOf, Table]]) -> tuple[Family, ...]:
    prefix = f"{model_type}."
    heads = {Place.of(to).name.split(".")[0] for _, weights in tasks.values() for to in weights.values()}
    made = []
    for task, (head, weights) in tasks.items():
        bare = task == "Model"  # the body alone, whose names have no prefix
        made.append(
            Family(
                name + task,
                model_type,
                partial(_read, head=head, first=first),
                _write,
                {**(BODY if bare else prefixed(prefix, BODY)), **weights},
                prefix=prefix,
                unread=("position_ids", "cls.predictions.decoder.bias", "lm_head.decoder.bias"),
                others=(f"{prefix}pooler.", "pooler.", *(f"{stem}." for stem in heads if stem != model_type)),
            )
        )
    return tuple(made)


BERT = _make(
    "bert",
    "Bert",
    0,
    {
        "ForMaskedLM": (
            _words,
            {
                "head.dense": "cls.predictions.transform.dense",
                "head.norm": "cls.predictions.transform.LayerNorm",
                "head.weight": Place("cls.predictions.decoder.weight", bare=True),
                "head.bias": Place("cls.predictions.bias", bare=True),
            },
        ),
        "Model": (_vector, {"head.dense": "pooler.dense"}),
        "ForSequenceClassification": (_sequence, {"head.dense": "bert.pooler.dense", "head.output": "classifier"}),
        "ForTokenClassification": (_tokens, {"head.output": "classifier"}),
        "ForQuestionAnswering": (_span, {"head.output": "qa_outputs"}),
    },
)
ROBERTA = _make(
    "roberta",
    "Roberta",
    None,
    {
        "ForMaskedLM": (
            _words,
            {
                "head.dense": "lm_head.dense",
                "head.norm": "lm_head.layer_norm",
                "head.weight": Place("lm_head.decoder.weight", bare=True),
                "head.bias": Place("lm_head.bias", bare=True),
            },
        ),
        "Model": (_vector, {"head.dense": "pooler.dense"}),
        "ForSequenceClassification": (
            _sequence,
            {"head.dense": "classifier.dense", "head.output": "classifier.out_proj"},
        ),
        "ForTokenClassification": (_tokens, {"head.output": "classifier"}),
        "ForQuestionAnswering": (_span, {"head.output": "qa_outputs"}),
    },
)
