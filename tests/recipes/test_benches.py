"""The benches that run recipes and models: they do what they measure, and refuse what they cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


def bench(name: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`python bench/NAME.py WORDS` in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def last(said: str) -> Any:
    return json.loads(said.splitlines()[-1])


@pytest.mark.soak
def test_a_tiny_shape_is_trained_and_measured() -> None:
    said = bench("gpu", "--shapes", "tiny", "--window", "64", "--steps", "3").stdout
    line, record = json.loads(said.splitlines()[0]), last(said)
    assert record["bench"] == "gpu" and record["figures"]["shapes"] == {"tiny": line}
    width, inner, words = 64, 128, 512
    multiplied = 2 * (2 * width * 64 + 2 * width * 32 + 3 * width * inner) + width * words
    assert line["parameters"] == multiplied + 5 * width  # the embedding is the head; norms are not multiplied
    assert line["flops_per_token"]["6N"] == 6 * multiplied < line["flops_per_token"]["with attention"]
    assert line["tokens_per_step"] == 64 * line["rows"] and line["tokens_per_second"] > 0
    rate, ceiling = line["tokens_per_second"], record["figures"]["device"]["products"] * 1e12
    assert line["mfu"]["6N"]["measured"] == pytest.approx(rate * 6 * multiplied / ceiling)
    if not torch.cuda.is_available():
        assert line["mfu"]["6N"]["data sheet"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_large_shapes_need_a_gpu() -> None:
    done = bench("gpu", code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("danlu: 0.1B, 1B, 3B, 8B: training models of these sizes is measured on a CUDA GPU")


def test_recipes_run_from_an_empty_directory(tmp_path: Path) -> None:
    record = last(bench("recipes", "gan", "--steps", "3", "--data", str(tmp_path)).stdout)
    one = record["figures"]["gan"]
    assert record["bench"] == "recipes" and one["steps"] == 3 and {"modes", "near"} < one["figures"].keys()
    assert one["bar"] == {"figure": "modes", "at least": 8} and one["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("switsch",), "switsch is none of shakespeare, "),
        (("vae", "--data", "nowhere"), "vae: nowhere is not there; name the folder with --data or DANLU_DATA"),
    ],
)
def test_what_cannot_be_run_is_named(words: tuple[str, ...], told: str) -> None:
    assert told in bench("recipes", *words, code=2).stderr
