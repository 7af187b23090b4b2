"""Writing with a model that can answer early: its first blocks guess, the others check several guesses at once.

Self-speculative decoding (LayerSkip, arXiv:2404.16710). There is one model, one cache and nothing computed twice: what
the first blocks made of a guess is what the others go on from. Greedy only, and the text is the whole model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.sight import Batch, Sight, self_sight
from danlu.model.transformer import Block, Decoder
from danlu.model.writer import room, thin_products
from danlu.train.objectives.exits import check_exits


@dataclass
class Guessing:
    """How a text is guessed, and what came of it.

    Attributes:
        layer: blocks that guess.
        most: guesses before they are checked.
        sure: probability that a guess must be given; one with less is not made, and ends a step's guesses.
        steps: checks by the other blocks. guessed, kept: guesses, and those that were right.
    """

    layer: int
    most: int
    sure: float = 0.0
    steps: int = 0
    guessed: int = 0
    kept: int = 0

    @property
    def kept_share(self) -> float:
        """Of the guesses, those that were right."""
        return self.kept / max(self.guessed, 1)

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return vars(self) | {"kept_share": self.kept_share}


def write_early(
    model: Decoder,
    prompt: list[int],
    guessing: Guessing,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield the ids that greedily follow a prompt, as `danlu.model.generate.generate` does.

    Args:
        model: on any device, in evaluation mode.
        guessing: how; its counts are added to.

    Raises DanluError, at the call, where there is no such exit, or the prompt is empty or leaves no room.
    """
    check_exits(model.config, (guessing.layer,))
    if guessing.most < 1:
        raise DanluError(f"{guessing.most} guesses", where="early exit", fix="take at least 1")
    count = min(max_new_tokens, room(model, prompt))
    return _write(model, prompt, guessing, count, stop_ids)


def _write(
    model: Decoder, prompt: list[int], guessing: Guessing, count: int, stop_ids: frozenset[int]
) -> Iterator[int]:
    halves = _Halves(model, guessing.layer, len(prompt) + count)
    with torch.inference_mode():
        fresh = halves.check(halves.begin(prompt, 0), 0)[-1:]
    made = 0
    while made < count:
        for token in fresh:
            if token in stop_ids:
                return
            yield token
        made += len(fresh)
        if made < count:
            with torch.inference_mode():
                fresh = halves.step(fresh[-1], len(prompt) + made - 1, guessing, min(guessing.most, count - made - 1))


class _Halves:
    """The first blocks of a model and the others, over one cache for one row."""

    def __init__(self, model: Decoder, layer: int, length: int) -> None:
        self.model, self.layer = model, layer
        self._blocks = [block for block in model.blocks.children() if isinstance(block, Block)]
        self._cache = model.new_cache(1, length)

    def begin(self, tokens: list[int], place: int) -> Tensor:
        """Tokens from a place on through the first blocks: the stream behind them, [1, T, width]."""
        ids = torch.tensor([tokens], device=self.model.device)
        positions = torch.arange(place, place + len(tokens), device=ids.device)[None]
        return self._run(self.model.embedding(ids, positions), place, 0, self.layer)

    def check(self, early: Tensor, place: int) -> list[int]:
        """The likeliest token after each place, by all blocks."""
        return self._likeliest(self._run(early, place, self.layer, len(self._blocks)))[0]

    def step(self, newest: int, place: int, guessing: Guessing, most: int) -> list[int]:
        """Guess and check: the tokens after `newest`, which stands at `place`; at least one."""
        guesses: list[int] = []
        streams = [self.begin([newest], place)]
        while len(guesses) < most:
            [guess], sure = self._likeliest(streams[-1], guessing.sure > 0)
            if sure < guessing.sure:
                break
            guesses.append(guess)
            streams.append(self.begin([guess], place + len(guesses)))
        said = self.check(torch.cat(streams, 1), place)
        right = next((at for at, guess in enumerate(guesses) if guess != said[at]), len(guesses))
        guessing.steps += 1
        guessing.guessed += len(guesses)
        guessing.kept += right
        return said[: right + 1]

    def _likeliest(self, stream: Tensor, asked: bool = False) -> tuple[list[int], float]:
        """The likeliest token after each place and, where asked, the probability of the last one's."""
        assert self.model.norm is not None
        with thin_products(stream.shape[1], stream.device):
            logits = self.model.logits(self.model.norm(stream))[0]
        tokens = logits.argmax(-1).tolist()
        return tokens, float(logits[-1].float().softmax(-1).max()) if asked else 1.0

    def _run(self, x: Tensor, place: int, first: int, last: int) -> Tensor:
        """The stream [1, T, width] of places from `place` on through some of the blocks."""
        length = x.shape[1]
        positions = torch.arange(place, place + length, device=x.device)[None]
        batch = Batch(positions, keys=place + length)
        sights: dict[bool, Sight] = {}
        with thin_products(length, x.device):
            for layer in range(first, last):
                local = self.model.config.window(layer) is not None
                if local not in sights:
                    sights[local] = self_sight(self.model.config, layer, batch, self.model.relative)
                x = self._blocks[layer](x, sights[local], self._cache.layers[layer])
        return x
