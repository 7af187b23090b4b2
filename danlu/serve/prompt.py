"""From messages or text to the token ids a model continues: the same template and ids as in training and export."""

from __future__ import annotations

from danlu.errors import DanluError
from danlu.serve.text import Backend
from danlu.tokenizer import Tokenizer


def with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """The conversation as tuning saw it: with its system message, unless the conversation brings one of its own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def chat_prompt(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Render a conversation with the model's own chat template, up to where its answer begins."""
    if tokenizer.chat_template is None:
        raise DanluError("this model has no chat template", fix="use plain completion: POST /v1/completions")
    return tokenizer.encode(tokenizer.render(messages, generation_prompt=True))


def text_prompt(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    """A plain text to continue, begun as the model expects; token ids are taken as they are."""
    if isinstance(prompt, str):
        begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        ids = begin + tokenizer.encode(prompt)
    else:
        ids = prompt
        wrong = next((token for token in ids if not 0 <= token < tokenizer.vocab_size), None)
        if wrong is not None:
            raise DanluError(f"{wrong} is no token id of this model; they go from 0 to {tokenizer.vocab_size - 1}")
    if not ids:
        raise DanluError("the prompt is empty")
    return ids


def room(backend: Backend, prompt: list[int], answer: int = 1) -> int:
    """How many tokens an answer may have; raises DanluError where the prompt leaves less than `answer`."""
    left = backend.context - len(prompt)
    if left < answer:
        raise DanluError(
            f"{len(prompt)} tokens do not fit: this model's context holds {backend.context}, the answer included",
            fix="shorten the prompt, or start with a longer --context",
        )
    return left
