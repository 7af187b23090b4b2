"""Writing with a model token by token, whichever body it has: what greedy search, sampling and beam search share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.config import ModelConfig, Relative
from danlu.model.transformer import Decoder, EncoderDecoder

THIN = 2  # rows up to which a product is thin
Writing = Decoder | EncoderDecoder  # the bodies that write text


class Writer:
    """Several answers, written one token each at a time.

    A decoder's answer continues its prompt. An encoder-decoder reads the prompt with its encoder, and the answer
    begins with the id `config.start`.

    Args:
        model: in whatever mode; it is run as `model.eval()` would have it.
        prompts: token ids, checked by `room`.
        count: tokens that each answer may have, at least 1.

    Attributes:
        before: the tokens that each answer continues.
        logits: [rows, vocab], of each row's next token.
    """

    def __init__(self, model: Writing, prompts: Sequence[list[int]], count: int) -> None:
        self._model = model
        self._memory: Tensor | None = None
        self._segments: Tensor | None = None  # of the memory
        self.before = list(prompts)
        if isinstance(model, EncoderDecoder):
            self.before = [[model.config.start]] * len(prompts)
            self._read(model, prompts)
        tokens, lengths = _padded(self.before, model.device)
        self._cache = model.new_cache(len(prompts), tokens.shape[1] + count - 1)
        self.logits = self._step(tokens, lengths)

    def write(self, tokens: Tensor) -> None:
        """Go on with one token a row, int64 [rows]."""
        self.logits = self._step(tokens[:, None], None)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, in this order; a row may be taken several times."""
        if rows == list(range(len(self._cache.lengths))):
            return
        chosen = torch.tensor(rows, device=self._cache.lengths.device)
        with torch.inference_mode():
            self._cache.keep(chosen)
            self._memory = None if self._memory is None else self._memory[chosen]
            self._segments = None if self._segments is None else self._segments[chosen]

    def _read(self, model: EncoderDecoder, prompts: Sequence[list[int]]) -> None:
        tokens, lengths = _padded(prompts, model.device)
        if len({len(prompt) for prompt in prompts}) > 1:
            self._segments = (torch.arange(tokens.shape[1], device=model.device) < lengths[:, None]).int()
        with _at_rest(model):
            self._memory = model.encode(tokens, segments=self._segments)

    def _step(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """Logits after the last token of each row of [rows, T].

        Args: lengths: int64 [rows], the tokens of each row that are no padding; None for all.
        """
        with _at_rest(self._model), thin_products(tokens.numel(), tokens.device):
            hidden = self._hidden(tokens)
            if lengths is None:
                return self._model.logits(hidden[:, -1])
            self._cache.lengths = lengths  # what padding left lies behind them and is never looked at
            return self._model.logits(hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])

    def _hidden(self, tokens: Tensor) -> Tensor:
        if isinstance(self._model, Decoder):
            return self._model(tokens, cache=self._cache)
        assert self._memory is not None
        return self._model.decode(tokens, self._memory, memory_segments=self._segments, cache=self._cache)


def room(model: Writing, prompt: list[int]) -> int:
    """Tokens that an answer to this prompt may have.

    Raises DanluError where the prompt is empty, too long, or holds ids that the model does not know.
    """
    if not prompt:
        raise DanluError("the prompt is empty", where="generate")
    if isinstance(model, EncoderDecoder):
        reads, writes, before = model.config.encoder, model.config.decoder, 1
    else:
        reads, writes, before = model.config, model.config, len(prompt)
    if not 0 <= min(prompt) <= max(prompt) < reads.vocab_size:
        strange = min(prompt) if min(prompt) < 0 else max(prompt)
        what = f"the prompt holds id {strange:,}; the model's vocabulary has {reads.vocab_size:,}"
        raise DanluError(what, where="generate")
    if len(prompt) > _context(reads):
        what = f"a prompt of {len(prompt):,} tokens is longer than the model's context of {_context(reads):,}"
        raise DanluError(what, where="generate")
    if before >= _context(writes):
        what = f"a prompt of {len(prompt):,} tokens leaves no room in the model's context of {_context(writes):,}"
        raise DanluError(what, where="generate")
    return _context(writes) - before


def _context(config: ModelConfig) -> int:
    """Positions that a stack can tell apart; distances have no end."""
    return sys.maxsize if isinstance(config.positions, Relative) else config.context


def _padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of any lengths -> int64 [rows, longest], filled up on the right, and their lengths, int64 [rows]."""
    lengths = [len(row) for row in rows]
    filled = [row + [0] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(filled, device=device), torch.tensor(lengths, device=device)


@contextmanager
def thin_products(rows: int, device: torch.device) -> Iterator[None]:
    """Products of one or two rows read each weight once and are as fast as that: on a CPU torch's own loops then read
    twice as fast as oneDNN, which first brings the weight into another order."""
    before = torch.backends.mkldnn.enabled
    if rows <= THIN and device.type == "cpu":
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@contextmanager
def _at_rest(model: Writing) -> Iterator[None]:
    """Without gradients and without anything random; a model that is being trained goes back to it."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
