"""Short runs of `danlu train` that are ended once they are measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from danlu.errors import DanluError
from danlu.train.trial import short_run, step_seconds


def recipe(folder: Path, **changed: Any) -> dict[str, Any]:
    (folder / "text.txt").write_text("some words to be learned from, again and again. " * 200)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
             "intermediate_size": 64, "vocab_size": 300, "max_position_embeddings": 32}  # fmt: skip
    return {
        "name": "trial", "model": {"architecture": "LlamaForCausalLM", "shape": shape}, "precision": "fp32",
        "data": {"sources": str(folder / "text.txt"), "vocabulary": {"kind": "bytes"}, "heldout": 0},
        "batch": {"rows": 2, "window": 32}, "compile": "off", "steps": 3,
    } | changed  # fmt: skip


def running(folder: Path) -> list[str]:
    """Processes that were started in a folder or name it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and int(place.name) != os.getpid():
            found.append(words)
    return found


def test_a_short_run_is_measured_and_ended(tmp_path: Path) -> None:
    lines = short_run(recipe(tmp_path), 6, tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # more than the recipe's own steps
    assert min(line["seconds"] for line in lines) <= step_seconds(lines) <= max(line["seconds"] for line in lines[2:])
    assert all(line["memory_bytes"] > 10**8 for line in lines)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert not (tmp_path / "run" / "model").exists()
    assert not running(tmp_path)


def test_what_a_failed_run_said_is_told(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="ended before it was measured") as raised:
        short_run(recipe(tmp_path), 6, tmp_path, "tensor=2")
    assert "2 processes" in str(raised.value)
    assert not running(tmp_path)
