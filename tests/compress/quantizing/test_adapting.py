"""Adapters beside a rounded model: what they learn is in the file's own numbers in the end, and the file is nearer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.compress.quantizing import lesson, quantizer
from danlu.compress.quantizing.mixes import matrices
from danlu.compress.quantizing.quantizer import quantize_model
from danlu.model.checkpoint import Checkpoint
from tests.compress.short import TEXT, divergence


@pytest.mark.soak
def test_adapters_are_rounded_in_and_what_they_learned_stays(
    short: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On text that nothing was fitted to; codes change, but neither types nor size; what is exact stays so."""
    monkeypatch.setattr(lesson, "STEP_ROWS", 2)
    monkeypatch.setattr(quantizer, "tune", lambda *_: None)  # so that nothing but adapters can have learned
    types = {name: "q4_0" if "gate" in name or "down" in name else "f32" for name in matrices(short)}
    made = [
        quantize_model(short, types, TEXT, tmp_path / f"{rank}.gguf", tokens=4096, steps=steps, rank=rank)
        for rank, steps in ((0, 0), (16, 20))
    ]
    assert made[0].forms == made[1].forms == {"q4_0": 4, "f32": 11} and made[0].bytes == made[1].bytes
    before, after = (Checkpoint.open(each.path) for each in made)
    assert divergence(short, after) < 0.97 * divergence(short, before)
    found, now = (each.model.makers() for each in (before, after))
    assert set(found) == set(now), "no adapters are in the file"
    changed = {name for name in found if not torch.equal(found[name](), now[name]())}
    assert changed == {name for name, type in types.items() if type == "q4_0"}
