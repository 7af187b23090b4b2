"""Tuning a small real model: it learns, resumes bit for bit, and survives damage and a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from danlu.data.stream import Rows, make_batch
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.train import compiling
from danlu.train.compiling import choose_compile, compile_blocks
from danlu.train.objective import next_token
from danlu.train.settings import TuneSettings
from danlu.train.stage import tune
from danlu.train.state import Checkpoints

SETTINGS = TuneSettings(
    steps=8, batch_rows=4, rank=4, learning_rate=5e-3, checkpoint_steps=2, precision="fp32", compile="off", dropout=0.1
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """12 packed rows of 48 tokens, two documents each, easy to learn by heart."""
    train = tmp_path / "data" / "train"
    train.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, 40, (12, 48), dtype=np.int32)
    segments = np.ones((12, 48), dtype=np.int32)
    segments[:, 20:40] = 2
    segments[:, 40:] = 0
    trained = (segments > 0) & (np.arange(48) % 20 > 4)
    for name, array in {"tokens": tokens, "segments": segments, "trained": trained}.items():
        np.save(train / f"{name}.npy", array)
    return train.parent


@pytest.fixture
def base(tiny_model: Path) -> Checkpoint:
    return Checkpoint.open(tiny_model)


def run(base: Checkpoint, data: Path, out: Path, **changes: object) -> dict:
    out.mkdir(exist_ok=True)
    return tune(SETTINGS.model_copy(update=changes), base, data, out, seed=7)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_drawn(board: Path, lines: list[dict[str, Any]]) -> None:
    """TensorBoard has of every step what metrics.jsonl has, in fp32."""
    events = EventAccumulator(str(board)).Reload()

    def curve(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in events.Scalars(f"tune/{name}")]

    for name in ("loss", "learning_rate", "gradient_norm", "memory_bytes"):
        assert curve(name) == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    for name in ("forward", "backward", "optimizer"):
        assert curve(f"seconds_in/{name}") == [
            (line["step"], pytest.approx(line["phases"][name], rel=1e-6)) for line in lines
        ]


@pytest.mark.parametrize(
    "changes", [{}, {"method": "full"}, {"method": "full", "precision": "bf16"}, {"precision": "bf16"}]
)
def test_learns(base, data, tmp_path, changes):
    figures = run(base, data, tmp_path / "out", **changes)
    assert figures["loss_last"]["value"] < figures["loss_first"]["value"] - 0.1
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["tokens"] == 4 * 40 for line in lines)
    assert_drawn(tmp_path / "out" / "tensorboard", lines)
    assert Checkpoint.open(tmp_path / "out").tokenizer.fingerprint == base.tokenizer.fingerprint


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_run_ends_with_the_same_bits(base, data, tmp_path, monkeypatch, method):
    run(base, data, tmp_path / "straight", method=method)
    saves = []

    def power_cut(self, step, tensors, extra, score=None):
        save(self, step, tensors, extra, score)
        self.wait()
        saves.append(step)
        if step == 4:
            raise KeyboardInterrupt

    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "broken", method=method)
    run(base, data, tmp_path / "broken", method=method)
    assert saves == [2, 4, 6, 8]
    assert same(tmp_path / "straight", tmp_path / "broken")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "broken")
    ]
    assert losses[0] == losses[1]


def test_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(base, data):
    batch = make_batch(Rows.open(data / "train"), range(4))
    found = []
    for parts in (1, 2, 4):
        model = base.load()
        losses = [next_token(model, part) for part in batch.split(parts)]
        for loss in losses:
            (loss.sum / batch.count).backward()
        assert sum(loss.count for loss in losses) == batch.count
        found.append(
            (sum(loss.sum.item() for loss in losses), torch.cat([p.grad.flatten() for p in model.parameters()]))
        )
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-4)


def test_a_damaged_checkpoint_is_passed_over_aloud(base, data, tmp_path, monkeypatch, capsys):
    run(base, data, tmp_path / "straight")
    monkeypatch.setattr("danlu.train.stage.save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "broken")
    monkeypatch.undo()
    newest = max((tmp_path / "broken" / "work" / "checkpoints").glob("step-*/part-*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    run(base, data, tmp_path / "broken")
    said = capsys.readouterr().err
    assert "the checkpoint of step 8 is damaged" in said and "goes on after step 6" in said
    assert same(tmp_path / "straight", tmp_path / "broken")


def test_compiled_equals_eager(base, data):
    if not compiling.can_compile():
        pytest.skip("no C++ compiler")
    rows = Rows.open(data / "train")
    eager, compiled = base.load(), base.load()
    compile_blocks(compiled)
    for indices in ([0, 1], [2, 3]):  # another packing must not need another program
        batch = make_batch(rows, indices)
        one, two = next_token(eager, batch), next_token(compiled, batch)
        assert float(one.sum) == pytest.approx(float(two.sum), rel=1e-5)
        one.sum.backward()
        two.sum.backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


def test_compiles_only_where_it_pays(base):
    short, _ = choose_compile("auto", 1e9, torch.float32)
    long, _ = choose_compile("auto", 1e18, torch.float32)
    assert (short, long) == (False, compiling.can_compile())


def test_a_compiler_without_pythons_headers_does_not_do(base, monkeypatch):
    if not compiling.can_compile():
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(compiling, "PYTHON", ("-include", "Python.h.is-not-here"))
    on, why = choose_compile("auto", 1e18, torch.float32)
    assert not on and "Python's headers" in why
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiling.can_compile()


def test_a_loss_that_is_no_number_stops_the_run(base, data, tmp_path):
    with pytest.raises(DanluError, match="gradient norm"):
        run(base, data, tmp_path / "out", learning_rate=1e30, method="full", clip=1e30, steps=8)


def test_rows_longer_than_the_context_are_refused(base, data, tmp_path):
    for file in (data / "train").iterdir():
        array = np.load(file)
        np.save(file, np.concatenate([array] * 11, axis=1))
    with pytest.raises(DanluError, match=r"rows of 528 tokens .* context of 512"):
        run(base, data, tmp_path / "out")
