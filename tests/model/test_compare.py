"""`danlu model check`: equal models pass, and the first layer of one that was changed is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from danlu.cli import app
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.compare import Comparison, check, compare, load_reference, make_sample
from danlu.model.config import EncoderDecoderConfig, ModelConfig, Relative
from danlu.model.families.llama import LLAMA
from danlu.model.transformer import Model, make_model
from tests.model.zoo import CASES, Twin, twin

TOLERANCE = 1e-4
Made = Callable[[str], Twin]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The pair of a case, made once; whoever changes a side puts it back or takes another."""
    root = tmp_path_factory.mktemp("zoo")
    return cache(lambda case: twin(case, root / case))


def danlu(*words: object) -> tuple[int, str, str]:
    ended = CliRunner().invoke(app, ["model", "check", *map(str, words)])
    return ended.exit_code, ended.stdout, ended.stderr


def compared(pair: Twin, ours: Model | None = None) -> Comparison:
    return compare(ours or pair.ours, pair.theirs, make_sample(pair.stored.config), TOLERANCE)


@pytest.mark.parametrize("case", list(CASES))
def test_every_family_is_as_transformers_computes_it(case: str, made: Made) -> None:
    code, told, said = danlu(made(case).path, "--json")
    found = json.loads(told)
    assert code == 0 and found["ok"] and found["first"] is None, said
    names = [line["what"] for line in found["differences"]]
    stacks = {"t5": ("encoder ", "decoder "), "clip": ("text ", "image ")}.get(case, ("",))
    if case in ("llama", "gemma3", "bert words", "t5", "vit", "clip", "mixtral"):
        for stack in stacks:
            assert {f"{stack}embedding", *(f"{stack}layer {layer}" for layer in range(3))} <= set(names)
    assert ("greedy tokens" in names) is CASES[case][0].__name__.endswith(
        ("CausalLM", "LMHeadModel", "ConditionalGeneration")
    )


@pytest.mark.parametrize(
    ("case", "weight", "named"),
    [
        ("llama", "blocks.2.feedforward.up.weight", "layer 2"),
        ("llama", "blocks.1.attention.value.weight", "layer 1"),
        ("llama", "embedding.tokens.weight", "embedding"),
        ("llama", "head.weight", "logits"),
        ("bert words", "blocks.2.attention.key.weight", "layer 2"),
        ("bert words", "embedding.types.weight", "embedding"),
        ("bert words", "head.bias", "logits"),
        ("roberta words", "embedding.positions.weight", "embedding"),
        ("mixtral", "blocks.0.feedforward.experts.down.weight", "layer 0"),
        ("t5", "encoder.blocks.1.feedforward.down.weight", "encoder layer 1"),
        ("t5", "decoder.blocks.0.cross.key.weight", "decoder layer 0"),
        ("vit", "blocks.2.attention.output.bias", "layer 2"),
        ("clip", "image.blocks.1.feedforward.up.weight", "image layer 1"),
        ("clip", "text.head.output.weight", "text vectors"),
    ],
)
def test_a_change_is_found_where_it_was_made(
    case: str, weight: str, named: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = made(case)
    change_on_load(monkeypatch, weight)
    code, told, said = danlu(pair.path)
    assert code == 1 and "Traceback" not in said
    assert f"danlu: {pair.path}: {named} " in said and "is the first that differs: by " in said
    assert "Danlu and transformers" in told and "all within tolerance" not in told


def change_on_load(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ours is no longer what lies on disk."""
    load = StoredModel.load

    def changed(self: StoredModel, *args: Any, **kwargs: Any) -> Model:
        model = load(self, *args, **kwargs)
        with torch.no_grad():
            model.get_parameter(name).mul_(1.05).add_(0.01)
        return model

    monkeypatch.setattr(StoredModel, "load", changed)


def test_the_tolerance_decides(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made("llama").path
    change_on_load(monkeypatch, "blocks.2.feedforward.up.weight")
    assert danlu(path, "--json")[0] == 1
    assert json.loads(danlu(path, "--json")[1])["first"] == "layer 2"
    assert danlu(path, "--tolerance", "10")[0] == 0


def test_no_number_is_a_difference(made: Made) -> None:
    pair = made("llama")
    ours = pair.stored.load()
    with torch.no_grad():
        ours.get_parameter("blocks.1.feedforward.down.weight")[0, 0] = torch.nan
    found = compared(pair, ours)
    assert found.first is not None and found.first.what == "layer 1"
    assert [line["largest"] for line in found.plain()["differences"]][-2:] == [None, None]


def test_padding_is_not_compared(made: Made) -> None:
    """Both sides compute something else for it, since nobody looks at it."""
    pair = made("bert words")
    sample = make_sample(pair.stored.config)
    assert sample.tokens is not None and sample.segments is not None and (sample.segments == 0).any()
    with torch.no_grad():
        ours = pair.ours.logits(pair.ours(sample.tokens, types=sample.types, segments=sample.segments))
        theirs = pair.theirs(sample.tokens, attention_mask=sample.segments, token_type_ids=sample.types).logits
    apart = (ours - theirs).abs().amax(-1)
    assert apart[sample.segments == 0].max() > 1e-3 > TOLERANCE > apart[sample.segments != 0].max()
    assert compared(pair).first is None


@pytest.mark.parametrize("case", ["mistral", "gemma3", "t5"])
def test_rows_are_long_enough_to_tell_windows_and_buckets(case: str, made: Made) -> None:
    pair = made(case)
    other = make_model(seeing_farther(pair.stored.config)).eval()
    other.load_state_dict(pair.ours.state_dict())
    assert compared(pair).first is None
    assert compared(pair, other).first is not None


def seeing_farther(config: Any) -> ModelConfig | EncoderDecoderConfig:
    if isinstance(config, ModelConfig):
        return replace(config, sliding_window=config.context)
    assert isinstance(config.encoder.positions, Relative)
    farther = replace(config.encoder.positions, farthest=2 * config.encoder.positions.farthest)
    return replace(config, encoder=replace(config.encoder, positions=farther))


def test_a_window_that_no_row_reaches_is_said(made: Made, tmp_path: Path) -> None:
    kind, config = CASES["mistral"]
    changed = kind(type(config)(**{**config.to_dict(), "sliding_window": 4096}))
    changed.save_pretrained(tmp_path)
    code, _, said = danlu(tmp_path)
    assert code == 0 and "which the window of 4,096 does not cut" in said
    assert "does not cut" not in danlu(made("mistral").path)[2]


def test_greedy_choices_between_equals_are_no_difference(made: Made) -> None:
    pair = made("llama")
    kept, ours = pair.theirs.lm_head.weight.detach().clone(), pair.stored.load()
    with torch.no_grad():
        pair.theirs.lm_head.weight[:] = kept[0]
        ours.get_parameter("head.weight")[:] = kept[0]
        ours.get_parameter("head.weight")[5:] *= 1 + 1e-6  # as good as equal, but another one is the largest
        found = compared(pair, ours)
        pair.theirs.lm_head.weight[:] = kept
    greedy = found.differences[-1]
    assert found.first is None and greedy.what == "greedy tokens"
    assert greedy.note != "48 of 48 are the same" and greedy.largest < TOLERANCE
    assert compared(pair).differences[-1].note == "48 of 48 are the same"


def test_the_batch_is_the_same_at_every_call() -> None:
    config = ModelConfig(
        vocab_size=9, width=8, layers=1, heads=1, kv_heads=1, head_width=8, feedforward_width=8, context=5
    )
    one, two, other = make_sample(config), make_sample(config), make_sample(config, seed=1)
    assert one.tokens is not None and two.tokens is not None and other.tokens is not None
    assert torch.equal(one.tokens, two.tokens) and not torch.equal(one.tokens, other.tokens)
    assert one.segments is not None and one.segments.sum(1).tolist() == [5, 4, 2]


def test_models_of_the_shortest_contexts_can_be_checked(tmp_path: Path) -> None:
    kind, config = CASES["llama"]
    for context in (1, 2, 9):
        theirs = kind(type(config)(**{**config.to_dict(), "max_position_embeddings": context}))
        theirs.save_pretrained(tmp_path / str(context))
        assert check(tmp_path / str(context), TOLERANCE).first is None


# --- Bad input ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_checked_says_why(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, told, said = danlu(tmp_path / "absent")
    assert (code, told) == (2, "") and "absent: no such file or directory" in said
    (tmp_path / "model.gguf").touch()
    assert (
        "is a GGUF file; to compare with transformers a Hugging Face directory is needed"
        in danlu(tmp_path / "model.gguf")[2]
    )
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((made("llama").path / "config.json").read_text())
    (pickled / "pytorch_model.bin").touch()
    code, _, said = danlu(pickled)
    assert code == 2 and "has only pytorch_model.bin, a pickle" in said


def test_without_transformers_the_command_says_how_to_get_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made("llama").path
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, said = danlu(path)
    assert code == 2 and "needs the package transformers, which is not installed\n  pip install transformers" in said


def test_what_transformers_cannot_load_is_said(made: Made, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="has no LlamaForNothing\n  pip install --upgrade transformers"):
        load_reference(replace(LLAMA, architecture="LlamaForNothing"), made("llama").path)
    with pytest.raises(DanluError, match="transformers cannot load it"):
        load_reference(LLAMA, tmp_path)


def test_transformers_is_loaded_only_for_a_check() -> None:
    code = "import sys, danlu.model.compare; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
