"""Engines over the real model, loaded once for all tests of the room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="the extra danlu[device] is not installed")

from danlu.device.engine import Engine


@pytest.fixture(scope="session")
def shared_engine(smollm2: Path) -> Iterator[Engine]:
    with Engine(smollm2, context=256, threads=1) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    """One thread, so that the numbers are the same on a busy machine; an empty cache."""
    shared_engine.clear()
    return shared_engine


@pytest.fixture(scope="session")
def exact_engine(smollm2: Path) -> Iterator[Engine]:
    """Computes the same whatever else is in a step: quantized weights amplify the rounding of an fp16 cache."""
    with Engine(smollm2, context=128, threads=1, exact=True) as engine:
        yield engine


@pytest.fixture
def question(engine: Engine) -> list[int]:
    return engine.tokenize("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
