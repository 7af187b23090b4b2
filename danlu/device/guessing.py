"""Greedy answers guessed ahead in the engine: which draft, how many guesses pay on this machine, and what it is worth.

See `danlu.device.speculation` for how guesses are checked; here is what a server and a certificate need around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from danlu.artifact import Figures, figure
from danlu.console import say
from danlu.device.engine import Engine
from danlu.device.speculation import Costs, Draft, Lookup, Smaller, Tally, speculate
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

SAMPLE = "The furnace turns ore into silver and gold, slowly; nobody hurries. "
KEPT = {"guessing": "guesses", "drafting": "drafts"}  # what is kept of each way
TIMED = 32  # tokens behind which steps are timed, and which a draft model is timed with


class Guesser:
    """Answers of one engine, guessed ahead.

    Args:
        engine: the model whose answers they are; the caller closes it.
        draft: a GGUF of a smaller model with the same vocabulary, which guesses; None guesses what followed the same
            few tokens earlier in the text.

    Attributes: tally: of all answers so far.

    Raises DanluError where the draft has another vocabulary, or cannot be loaded.
    """

    def __init__(self, engine: Engine, draft: Path | None = None) -> None:
        self.engine, self.tally = engine, Tally()
        self._small: Engine | None = None
        tokens = (engine.tokenize(SAMPLE) * TIMED)[: min(TIMED, engine.context // 2)]
        pace = 0.0
        if draft is not None:
            _check_words(engine.path, draft)
            self._small = Engine(draft, context=engine.context, threads=engine.threads)
            pace = _pace(self._small, tokens)
        self._costs = Costs.measure(engine, tokens, pace)
        say(f"guessing ahead: {'what came before in the text' if draft is None else draft.name}; steps were timed")

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int] = frozenset()
    ) -> Iterator[int]:
        """The tokens that `Engine.generate` takes greedily; see `speculate`."""
        draft: Draft = Lookup() if self._small is None else Smaller(self._small, self.engine)
        return speculate(
            self.engine,
            prompt,
            draft,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            costs=self._costs,
            tally=self.tally,
        )

    def close(self) -> None:
        """Free the draft's memory."""
        if self._small is not None:
            self._small.close()


def guess_figures(
    model: Path,
    prompt: list[int],
    *,
    context: int,
    threads: int | None,
    tokens: int,
    repeats: int,
    draft: Path | None = None,
) -> Figures:
    """What guessing gains on a text, from the text so far and by a smaller model, and that both say the same.

    Args:
        model: the GGUF.
        prompt: ids that are gone on with.
        context, threads: of the engine.
        tokens: of an answer; repeats: of each way, in turn.
        draft: the smaller model; None leaves it out.

    Raises DanluError as `Guesser`.
    """
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(model, context=context, threads=threads))
        tokens = min(tokens, engine.context // 2)
        prompt = prompt[: engine.context - tokens - 1]
        drafts: dict[str, Path | None] = {"guessing": None} | ({} if draft is None else {"drafting": draft})
        guessers = {name: stack.enter_context(closing(Guesser(engine, each))) for name, each in drafts.items()}
        ways = [
            partial(way, prompt, max_new_tokens=tokens)
            for way in (engine.generate, *(guesser.generate for guesser in guessers.values()))
        ]
        timed = [[_timed(engine, prompt, way) for way in ways] for _ in range(repeats)]
    by = f"median of {repeats} answers of {tokens} tokens after {len(prompt)} of held-out text"
    rates, answers = [[each[way][0] for each in timed] for way in range(len(ways))], [each[1] for each in timed[0]]
    figures = {"decode_alone": _rate(rates[0], by)}
    for (name, guesser), found, answer in zip(guessers.items(), rates[1:], answers[1:], strict=True):
        kept, guesses = guesser.tally.kept, guesser.tally.guessed
        same = sum(one == other for one, other in zip(answers[0], answer, strict=True)) / tokens
        figures[f"decode_{name}"] = _rate(found, by)
        figures[f"{KEPT[name]}_kept"] = figure(kept / max(guesses, 1), "share", by=f"of {guesses} that were checked")
        beside = f"of {tokens} tokens, beside those without guesses"
        figures[f"{name}_same_tokens"] = figure(same, "share", by=beside)
    return figures


def _rate(rates: Sequence[float], by: str) -> dict[str, Any]:
    return figure(median(rates), "token/s", min(rates), max(rates), by)


def _timed(engine: Engine, prompt: list[int], way: Callable[[], Iterator[int]]) -> tuple[float, list[int]]:
    """Token/s of an answer to a prompt that has been read, and the answer."""
    engine.likeliest(prompt, 1)
    started = time.perf_counter()
    answer = list(way())
    return len(answer) / (time.perf_counter() - started), answer


def _pace(small: Engine, tokens: list[int]) -> float:
    """Seconds that a draft model takes for a guess."""
    small.likeliest(tokens, 1)
    started = time.perf_counter()
    made = sum(1 for _ in small.generate(tokens, max_new_tokens=TIMED))
    return (time.perf_counter() - started) / max(made, 1)


def _check_words(model: Path, draft: Path) -> None:
    one, other = (Tokenizer.load(path).complete_backend.get_vocab(with_added_tokens=True) for path in (model, draft))
    if one != other:
        what = f"its tokens are not those of {model.name}, so it cannot guess for it"
        raise DanluError(what, where=draft, fix="take a smaller model with the same vocabulary")
