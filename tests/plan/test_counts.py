"""Counts: weights against transformers', and operations against those that public tables print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from danlu.errors import DanluError
from danlu.model.families.known import family_of
from danlu.plan.counts import operations, total_weights
from danlu.plan.shapes import of_config, shape, shapes
from danlu.plan.tables import read_tables

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from tests.model.zoo import CASES  # noqa: E402  it imports transformers

TABLES = Path(os.environ.get("DANLU_PLANNER", "../shared/planner"))
needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason=f"{TABLES} with measured runs is absent")
OTHERS = ("t5", "flan-t5", "switch", "vit", "clip")  # of two stacks, or of images


def weights_of(kind: Any, config: Any) -> int:
    """Of a model in transformers, shared ones counted once."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in kind(config).parameters())


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith(OTHERS)])
def test_weights_are_those_of_transformers(case: str) -> None:
    kind, config = CASES[case]
    keys = config.to_dict() | {"architectures": [kind.__name__]}
    ours = of_config(family_of(keys).config(keys, Path(case)))
    assert total_weights(ours) == weights_of(kind, config)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(OTHERS)])
def test_what_cannot_be_planned_is_refused(case: str) -> None:
    kind, config = CASES[case]
    keys = config.to_dict() | {"architectures": [kind.__name__]}
    with pytest.raises(DanluError, match="not planned for yet"):
        of_config(family_of(keys).config(keys, Path(case)))


@pytest.mark.parametrize("name", sorted({id(columns): name for name, columns in reversed(shapes().items())}.values()))
def test_weights_of_named_shapes_are_those_of_transformers(name: str) -> None:
    told = {key: int(value) for key, value in shape(name).items()}
    if told["positions"]:
        config = hf.GPT2Config(vocab_size=told["vocab"], n_embd=told["width"], n_layer=told["layers"],
                               n_head=told["heads"], n_positions=told["positions"])  # fmt: skip
        assert total_weights(shape(name)) == weights_of(hf.GPT2LMHeadModel, config)
        return
    plain = {
        "vocab_size": told["vocab"], "hidden_size": told["width"], "num_hidden_layers": told["layers"],
        "num_attention_heads": told["heads"], "num_key_value_heads": told["kv_heads"], "head_dim": told["head_width"],
        "intermediate_size": told["feedforward"], "tie_word_embeddings": bool(told["tied"]),
    }  # fmt: skip
    if not told["experts"]:
        assert total_weights(shape(name)) == weights_of(hf.LlamaForCausalLM, hf.LlamaConfig(**plain))
        return
    mixture = {"num_experts": told["experts"], "num_experts_per_tok": told["chosen"]}
    config = hf.Qwen3MoeConfig(**plain, **mixture, moe_intermediate_size=told["expert_width"])
    difference = weights_of(hf.Qwen3MoeForCausalLM, config) - total_weights(shape(name))
    assert difference == (2 * told["head_width"] * told["layers"] if name == "trillion" else 0)  # it norms no queries


@needs_tables
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("mosaicml_llm_foundry.csv", []),
     ("nvidia_megatron_bridge_25.09_to_26.08.csv", ["nvidia_megatron_bridge_25.09_to_26.08-0241"])],
)  # fmt: skip
def test_printed_rates_follow_from_the_tables_own_times(name: str, wrong: list[str]) -> None:
    """`model` rates: attention's whole square of scores where llm-foundry counts, and half of it where NVIDIA does.

    One of NVIDIA's rows contradicts itself: its tokens a second are half of what its TFLOP/s say.
    """
    told = read_tables([TABLES / name])
    rows = [told.rows[place] for place in told.at]
    printed = np.array([float(row["tflops_gpu"] or "nan") for row in rows])
    assert {row["tflops_kind"] for row in rows if row["tflops_gpu"]} == {"model"}
    half = name.startswith("nvidia")
    rate = operations(told.jobs, half) / told.seconds / told.jobs.world / 1e12
    ratio = (rate / printed)[printed > 0]
    assert len(ratio) > 50
    assert np.median(np.abs(ratio - 1)) < 0.01
    assert [row["id"] for row, apart in zip(rows, np.abs(rate / printed - 1), strict=True) if apart > 0.15] == wrong
