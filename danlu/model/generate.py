"""Generation with our own model: exact and plain. The serving engine is llama.cpp; this is what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.model.transformer import Decoder


def generate(
    model: Decoder,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the ids that follow a prompt. A stop id ends the answer and is not yielded; a full context ends it too.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: the most ids to yield.
        stop_ids: ids that end the answer.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_k: draw among the k likeliest; 0 for all.
        top_p: draw among the likeliest that together reach this probability (arXiv:1904.09751).
        seed: the same seed, prompt and model give the same draw.

    Raises DanluError, at the call, where the prompt is empty or leaves no room in the context.
    """
    room = _room(model, prompt)
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        what = f"temperature {temperature}, top_p {top_p}, top_k {top_k}: they must be >= 0, in (0, 1], and >= 0"
        raise DanluError(what, where="generate")
    draw = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        return _sample(logits.float().cpu() / temperature, top_k, top_p, draw)

    return _generate(model, prompt, min(max_new_tokens, room), stop_ids, choose)


def generate_batch(
    model: Decoder, prompts: list[list[int]], *, max_new_tokens: int, stop_ids: frozenset[int] = frozenset()
) -> list[list[int]]:
    """The likeliest continuations of several prompts of any lengths, computed together. Stop ids are not part of them.

    Raises DanluError where a prompt is empty or does not fit in the context together with its answer.
    """
    if not prompts:
        return []
    for prompt in prompts:
        if _room(model, prompt) < max_new_tokens:
            what = f"a prompt of {len(prompt):,} tokens and an answer of {max_new_tokens:,}"
            raise DanluError(f"{what} are more than the model's context of {model.config.context:,}")
    with torch.inference_mode():
        return _generate_batch(model, prompts, max_new_tokens, stop_ids)


def _room(model: Decoder, prompt: list[int]) -> int:
    """Tokens the context has left after the prompt."""
    context = model.config.context
    if not prompt:
        raise DanluError("the prompt is empty", where="generate")
    if len(prompt) >= context:
        raise DanluError(f"a prompt of {len(prompt):,} tokens leaves no room in the model's context of {context:,}")
    return context - len(prompt)


def _generate(
    model: Decoder, prompt: list[int], count: int, stop_ids: frozenset[int], choose: Callable[[Tensor], int]
) -> Iterator[int]:
    cache = model.new_cache(1, len(prompt) + count)
    given = prompt
    for _ in range(count):
        with torch.inference_mode():  # not across the yield: it would leak into the caller
            hidden = model(torch.tensor([given], device=model.device), cache=cache)
            token = choose(model.logits(hidden[0, -1]))
        if token in stop_ids:
            return
        yield token
        given = [token]


def _generate_batch(
    model: Decoder, prompts: list[list[int]], max_new_tokens: int, stop_ids: frozenset[int]
) -> list[list[int]]:
    device = model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    cache = model.new_cache(len(prompts), longest + max_new_tokens)
    hidden = model(padded, cache=cache)
    cache.lengths = lengths  # what was computed from padding lies behind them and is never looked at
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompts that are still being answered, in the order of the cache
    for step in range(max_new_tokens):
        tokens = model.logits(last).argmax(-1).tolist()
        going = [place for place, token in enumerate(tokens) if token not in stop_ids]
        for place in going:
            answers[rows[place]].append(tokens[place])
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            cache.keep(torch.tensor(going, device=device))
        last = model(torch.tensor([[tokens[place]] for place in going], device=device), cache=cache)[:, -1]
    return answers


def _sample(scores: Tensor, top_k: int, top_p: float, draw: torch.Generator) -> int:
    """Draw from fp32 scores [vocab] after top-k and then top-p, as Hugging Face orders them."""
    ranked, ids = scores.sort(descending=True, stable=True)
    if top_k:
        ranked, ids = ranked[:top_k], ids[:top_k]
    chances = ranked.softmax(-1)
    before = chances.cumsum(-1) - chances
    chances = chances.masked_fill(before >= top_p, 0.0)  # the likeliest always stays
    return int(ids[torch.multinomial(chances, 1, generator=draw)])
