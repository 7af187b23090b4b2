"""A whole model rounded to one format: nearer to the original than without the text, and llama.cpp runs it."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from danlu.compress import beside, parts, walk
from danlu.compress.quantizing import qat, quantizer
from danlu.compress.quantizing.formats.known import FORMATS
from danlu.compress.quantizing.mixes import matrices, types_of
from danlu.compress.quantizing.quantizer import calibration_rows, quantize_model
from danlu.compress.quantizing.rounding import round_plainly
from danlu.compress.quantizing.spool import Spool
from danlu.errors import DanluError
from danlu.evaluate.divergence import divergence
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.gguf import Packed, forget_pages, write_gguf
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer

WHOLE = "\n\n".join(topics.topics[topic] for topic in sorted(topics.topics))  # of Python's language reference
TEXT, OTHER = WHOLE[:60_000], WHOLE[200_000:203_000]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """Two layers, 96 wide, whose features go together as those of a trained model do."""
    tokenizer = Tokenizer.load(smollm2)
    torch.manual_seed(0)
    shape = {"width": 96, "layers": 2, "heads": 3, "kv_heads": 1, "head_width": 32, "feedforward_width": 256}
    made = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, context=64, tied=True, **shape))
    with torch.no_grad():
        mixing = torch.randn(96, 96) * torch.logspace(0, -2, 96)
        made.embedding.tokens.weight.copy_(torch.randn(tokenizer.vocab_size, 96) @ mixing * 0.1)
        for block in made.blocks:
            for weight in block.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.15)
    out = tmp_path_factory.mktemp("model") / "f32.gguf"
    write_gguf(made, tokenizer, out)
    return out


def apart(reference: Checkpoint, path: Path) -> float:
    """The mean divergence of a file from the reference, in nat."""
    ids = reference.tokenizer.encode(OTHER, special=False)
    tokens = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    with torch.inference_mode():
        before, after = (model.logits(model(tokens)) for model in (reference.load(), Checkpoint.open(path).load()))
    return float(divergence(before, after).mean())


def test_a_file_is_nearer_with_a_text_than_without_and_llama_cpp_runs_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(model)
    made = quantize_model(checkpoint, "q4_0", TEXT, tmp_path / "with.gguf", tokens=4096)
    assert made.forms == {"q4_0": 14, "q8_0": 1} and made.stand_ins == {"q8_0": 1}
    assert made.bytes == made.path.stat().st_size
    with monkeypatch.context() as patched:
        patched.setattr(beside, "_inputs", lambda before, after: None)
        quantize_model(checkpoint, "q4_0", TEXT, tmp_path / "without.gguf", tokens=4096)
    assert apart(checkpoint, tmp_path / "with.gguf") < 0.8 * apart(checkpoint, tmp_path / "without.gguf")
    assert {file.name for file in tmp_path.iterdir()} == {"with.gguf", "without.gguf"}, "nothing else is left"

    pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")
    from danlu.device.engine import Engine

    with Engine(tmp_path / "with.gguf", context=64, threads=1) as engine:
        assert len(list(engine.generate([5, 6, 7], max_new_tokens=3))) == 3


def test_what_is_too_large_for_memory_lies_in_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, room in {"memory": 2**30, "files": 0}.items():
        monkeypatch.setattr(parts, "ROOM", room)
        quantize_model(Checkpoint.open(model), "q4_0", TEXT, tmp_path / f"{name}.gguf", tokens=2048)
    assert (tmp_path / "memory.gguf").read_bytes() == (tmp_path / "files.gguf").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"memory.gguf", "files.gguf"}


def test_long_rows_go_through_fewer_at_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model but for the order in which numbers are added up."""
    checkpoint = Checkpoint.open(model)
    for name, numbers in {"four": 2**23, "one": 1}.items():
        monkeypatch.setattr(walk, "NUMBERS", numbers)
        quantize_model(checkpoint, "q4_0", TEXT, tmp_path / f"{name}.gguf", tokens=4096)
    lost = [apart(checkpoint, tmp_path / f"{name}.gguf") for name in ("four", "one")]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)


def test_tuning_brings_it_nearer_still(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat, "RATE", 5e-3)  # few steps, and weights that are no more than random
    checkpoint = Checkpoint.open(model)
    types = {name: "f32" if name.startswith("embedding") else "q2_k" for name in matrices(checkpoint)}
    made = [
        quantize_model(checkpoint, types, TEXT, tmp_path / f"{steps}.gguf", tokens=4096, steps=steps)
        for steps in (0, 15)
    ]
    assert made[0].forms == made[1].forms == {"iq4_nl": 12, "q2_k": 2, "f32": 1} and made[0].bytes == made[1].bytes
    assert apart(checkpoint, made[1].path) < 0.97 * apart(checkpoint, made[0].path)


def test_adapters_without_steps_to_learn_in_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="half of the steps"):
        quantize_model(Checkpoint.open(model), "q4_0", TEXT, tmp_path / "never.gguf", tokens=4096, rank=8)
    assert not list(tmp_path.iterdir())


def test_every_matrix_gets_the_type_it_was_given(model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model)
    types = {name: "q8_0" if "attention" in name else "f32" for name in matrices(checkpoint)}
    types |= {"blocks.1.feedforward.down.weight": "q2_k", "blocks.0.feedforward.gate.weight": "iq4_nl"}
    made = quantize_model(checkpoint, types, TEXT, tmp_path / "out.gguf", tokens=4096)
    assert types_of(made.path, checkpoint) == types
    assert made.forms == {"q8_0": 8, "f32": 5, "q2_k": 1, "iq4_nl": 1} and not made.stand_ins
    before, after = (each.model.makers(torch.float32) for each in (checkpoint, Checkpoint.open(made.path)))
    assert torch.equal(*(makers["blocks.0.feedforward.up.weight"]() for makers in (before, after)))

    del types["embedding.tokens.weight"]
    with pytest.raises(DanluError, match="no type is given for embedding"):
        quantize_model(checkpoint, types, TEXT, tmp_path / "never.gguf")
    with pytest.raises(DanluError, match=r"kueri\.weight is no matrix") as problem:
        quantize_model(checkpoint, types | {"blocks.0.attention.kueri.weight": "q4_0"}, TEXT, tmp_path / "never.gguf")
    assert "blocks.0.attention.query.weight" in str(problem.value.fix)
    assert {file.name for file in tmp_path.iterdir()} == {"out.gguf"}


@pytest.mark.soak
def test_rows_that_do_not_fill_blocks_take_what_stands_in(model: Path, tmp_path: Path) -> None:
    made = quantize_model(Checkpoint.open(model), "Q3_K", TEXT, tmp_path / "out.gguf", tokens=4096)
    assert made.forms == {"iq4_nl": 12, "q3_k": 2, "q8_0": 1}, "rows of 96 take 4 bits, the two of 256 three"


def test_a_text_is_drawn_evenly_and_must_be_long_enough(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    rows = calibration_rows(checkpoint, TEXT, 4096)
    assert rows.shape == (64, 64)
    every = calibration_rows(checkpoint, TEXT, 10**9)
    assert torch.equal(rows[0], every[0]) and torch.equal(rows[-1], every[-1]) and len(every) > len(rows)
    with pytest.raises(DanluError, match="4,096 are needed"):
        calibration_rows(checkpoint, TEXT[:500], 4096)


def test_a_text_is_encoded_in_stretches_but_for_their_borders_as_a_whole(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(model)
    whole = calibration_rows(checkpoint, TEXT, 10**9)
    monkeypatch.setattr(quantizer, "STRETCH", 20_000)
    parts = calibration_rows(checkpoint, TEXT, 10**9)
    assert parts.dtype == whole.dtype == torch.int64
    same = TEXT[:19_000]
    assert checkpoint.tokenizer.decode(parts.flatten().tolist()).startswith(same)
    assert abs(parts.numel() - whole.numel()) <= 64 and torch.equal(parts[:50], whole[:50])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is in memory")
def test_what_is_put_aside_takes_no_memory_and_is_read_again(tmp_path: Path) -> None:
    """Also where a file is read or written over: memory must not grow with the number of matrices."""
    form, weight = FORMATS["q8_0"], torch.randn(512, 1024)
    rounded = round_plainly(weight, form)
    spool = Spool(tmp_path)

    def in_memory() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        start = next(number for number, line in enumerate(lines) if line.endswith("a.bin"))
        return int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1])

    for values in (rounded, round_plainly(-weight, form)):
        spool.keep("a", values, form, (512, 1024))
        for _ in range(2):
            assert torch.equal(spool.values("a"), values.values)
            assert in_memory() == 0
    packed = spool.weights["a"]
    assert isinstance(packed, Packed) and torch.equal(packed.data, round_plainly(-weight, form).packed)
    assert in_memory() > 500
    forget_pages(packed.data)
    assert in_memory() == 0 and torch.equal(packed.data, round_plainly(-weight, form).packed)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, short: Checkpoint) -> Path:
    """Two layers whose rows fill the blocks of every format."""
    tokenizer = short.tokenizer
    torch.manual_seed(0)
    shape = {"width": 256, "layers": 2, "heads": 4, "kv_heads": 4, "head_width": 64, "feedforward_width": 512}
    made = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, context=64, tied=True, **shape))
    with torch.no_grad():
        made.embedding.tokens.weight.normal_(0, 0.05)
        for weight in made.blocks.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.1)
    out = tmp_path_factory.mktemp("wide") / "f32.gguf"
    write_gguf(made, tokenizer, out)
    return out


LONG = ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_1")  # what these are made of, the others are, too


@pytest.mark.parametrize("kind", [pytest.param(x, marks=pytest.mark.soak) if x in LONG else x for x in FORMATS])
def test_the_engine_computes_with_what_was_written(wide: Path, tmp_path: Path, kind: str) -> None:
    """A whole file of one format beside its own numbers in F32, whose inputs the engine does not round."""
    pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")
    from danlu.device.divergence import score_divergence
    from danlu.device.texts import documents_of

    file, plain = tmp_path / "made.gguf", tmp_path / "plain.gguf"
    checkpoint = Checkpoint.open(wide)
    forms = dict.fromkeys(matrices(checkpoint), kind)
    assert quantize_model(checkpoint, forms, TEXT, file, tokens=4096).forms == {kind: len(forms)}
    made = Checkpoint.open(file)
    write_gguf(made.load(), made.tokenizer, plain)
    documents = documents_of(OTHER, made.tokenizer, 256, "--heldout", 64)

    def apart(original: Path) -> float:
        scored = score_divergence(original, file, documents, context=64, threads=1)
        return float(scored.divergence.sum() / scored.counts.sum())

    assert apart(plain) < min(1e-3, 0.5 * apart(wide))
