"""Generation with our own model: exact and plain. The serving engine is llama.cpp; this is what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

from torch import Tensor

from danlu.errors import DanluError
from danlu.model.allowed import Allowed, only
from danlu.model.sampling import GREEDY, Choice, Chooser
from danlu.model.writer import Writer, Writing, room
from danlu.streaming import StopStrings, TextStream
from danlu.tokenizer import Tokenizer


def generate(
    model: Writing,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    allowed: Allowed | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[int]:
    """Yield the ids that follow a prompt, as they come; called as `danlu.device.engine.Engine.generate` is.

    Args:
        model: a decoder continues the prompt; an encoder-decoder reads it and writes its answer.
        prompt: token ids, at least one.
        max_new_tokens: the most ids to yield; a full context ends the answer too.
        stop_ids: ids that end the answer; they are not yielded.
        temperature, top_p, top_k, min_p, seed, repetition_penalty: see `danlu.model.sampling.Choice`.
        allowed: the only answers there may be.
        watch: is shown the logits [1, vocab] that each token is chosen from, before it comes.

    Raises DanluError, at the call, where the prompt is empty or leaves no room in the context, where a setting is out
    of range, or where not every allowed answer can be written.
    """
    choice = Choice(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    count = min(max_new_tokens, room(model, prompt))
    check_answers(model, count, stop_ids, allowed)
    return (token for [(_, token)] in _write(model, [prompt], count, stop_ids, choice, allowed, watch=watch))


def generate_batch(
    model: Writing,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    choice: Choice = GREEDY,
    allowed: Allowed | None = None,
) -> list[list[int]]:
    """Answers to several prompts of any lengths, computed together; each is what it would be alone.

    With a seed the first row draws what `generate` draws; every other row draws for itself. For the arguments see
    `generate`; for padded tensors `unpad`.

    Raises DanluError where a prompt is empty or does not fit in the context together with its answer, or where not
    every allowed answer can be written.
    """
    check_prompts(model, prompts, max_new_tokens)
    check_answers(model, max_new_tokens, stop_ids, allowed)
    answers: list[list[int]] = [[] for _ in prompts]
    for made in _write(model, prompts, max_new_tokens, stop_ids, choice, allowed):
        for row, token in made:
            answers[row].append(token)
    return answers


def generate_text(
    model: Writing,
    tokenizer: Tokenizer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    choice: Choice = GREEDY,
    allowed: Allowed | None = None,
) -> Iterator[str]:
    """Yield the text that follows a prompt, in whole characters, as soon as it can be no part of a stop string.

    Args:
        stops: strings that end the answer and are no part of it.
        model, prompt, max_new_tokens, allowed: see `generate`.
        tokenizer: decodes; its `stop_ids` end the answer too.
        choice: how tokens are chosen.

    Raises DanluError, at the call, as `generate` does, and where a stop string is empty.
    """
    count = min(max_new_tokens, room(model, prompt))
    check_answers(model, count, tokenizer.stop_ids, allowed)
    return (text for _, text in _texts(model, tokenizer, [prompt], count, _checked(stops), choice, allowed) if text)


def generate_texts(
    model: Writing,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    choice: Choice = GREEDY,
    allowed: Allowed | None = None,
) -> list[str]:
    """The texts that follow several prompts, computed together. For arguments and errors see `generate_text` and
    `generate_batch`."""
    check_prompts(model, prompts, max_new_tokens)
    check_answers(model, max_new_tokens, tokenizer.stop_ids, allowed)
    answers = [""] * len(prompts)
    for row, text in _texts(model, tokenizer, prompts, max_new_tokens, _checked(stops), choice, allowed):
        answers[row] += text
    return answers


def unpad(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    """The prompts in tensors padded on the left or on the right, as Hugging Face's tokenizers make them.

    Args: tokens: int64 [B, T]; mask: [B, T], 0 for padding.
    """
    if tokens.shape != mask.shape or tokens.dim() != 2:
        raise DanluError(f"tokens {list(tokens.shape)} and mask {list(mask.shape)} must be of one shape, [B, T]")
    return [row[real].tolist() for row, real in zip(tokens, mask != 0, strict=True)]


def check_prompts(model: Writing, prompts: Sequence[list[int]], count: int) -> None:
    """Raise DanluError where a prompt is empty or does not fit in the context together with `count` more tokens."""
    for prompt in prompts:
        left = room(model, prompt)
        if left < count:
            what = f"a prompt of {len(prompt):,} tokens leaves room for {left:,}, not for an answer of {count:,}"
            raise DanluError(what, where="generate")


def check_answers(model: Writing, count: int, stop_ids: frozenset[int], allowed: Allowed | None) -> None:
    """Raise DanluError where answers of `count` tokens cannot be asked for, or not every allowed one be written."""
    if count < 0:
        raise DanluError(f"max_new_tokens is {count}; it must be at least 0", where="generate")
    if allowed is not None:
        allowed.check(count, stop_ids, model.embedding.tokens.num_embeddings)


def _write(
    model: Writing,
    prompts: Sequence[list[int]],
    count: int,
    stop_ids: frozenset[int],
    choice: Choice,
    allowed: Allowed | None,
    ended: AbstractSet[int] = frozenset(),
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, the row and the new token of every answer that goes on.

    Args:
        ended: rows that the caller wants no more of; looked at after every step.
        watch: is shown each step's logits.
    """
    if not prompts or count == 0:
        return
    writer = Writer(model, prompts, count)
    chooser = Chooser(choice, writer.before, writer.logits.shape[-1], model.device)
    rows = list(range(len(prompts)))  # the prompts that are still being answered, in the order of the writer
    places = [allowed.start for _ in prompts] if allowed is not None else None
    for length in range(1, count + 1):
        if watch is not None:
            watch(writer.logits)
        tokens = chooser.choose(writer.logits if places is None else only(writer.logits, places, stop_ids))
        made = tokens.tolist()
        going = [at for at, token in enumerate(made) if token not in stop_ids]
        if not going:
            return
        yield [(rows[at], made[at]) for at in going]
        if places is not None:
            places = [place.after.get(token, place) for place, token in zip(places, made, strict=True)]
            going = [at for at in going if places[at].after]
        going = [at for at in going if rows[at] not in ended]
        if not going or length == count:
            return
        if len(going) < len(rows):
            rows, tokens = [rows[at] for at in going], tokens[going]
            places = None if places is None else [places[at] for at in going]
            writer.keep(going)
            chooser.keep(going)
        writer.write(tokens)


def _texts(
    model: Writing,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    count: int,
    stops: Sequence[str],
    choice: Choice,
    allowed: Allowed | None,
) -> Iterator[tuple[int, str]]:
    """Yield rows and what their answers' texts go on with. A character cut in half by the limit is left out."""
    streams = [(TextStream(tokenizer), StopStrings(stops)) for _ in prompts]
    ended: set[int] = set()
    for made in _write(model, prompts, count, tokenizer.stop_ids, choice, allowed, ended):
        for row, token in made:
            text, cut = streams[row]
            ready, met = cut.push(text.push(token))
            if met:
                ended.add(row)
            yield row, ready
    for row, (_, cut) in enumerate(streams):
        if row not in ended:
            yield row, cut.rest()


def _checked(stops: Sequence[str]) -> Sequence[str]:
    if isinstance(stops, str) or not all(stops):
        raise DanluError("stop strings must be a list of strings that are not empty", where="generate")
    return stops
