"""An exported model run by its own engine and compared with Danlu's: the same numbers, the same greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu.artifact import Figures, figure
from danlu.compress.exports.graph import Graph
from danlu.errors import DanluError
from danlu.model.compare import make_sample
from danlu.model.config import Head, ModelConfig
from danlu.model.generate import generate_batch
from danlu.model.head import pool
from danlu.model.transformer import Decoder, Encoder

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # named inputs -> named outputs
WRITTEN = 24  # tokens of the greedy comparison
PROMPT = 16
TOLERANCE = 1e-3  # of the largest number, or of 1: what sums in another order may make of fp32


def compare_run(graph: Graph, model: Decoder | Encoder, head: Head | None, run: Run, exact: bool) -> Figures:
    """Run both on the same ids and compare what comes out.

    Args:
        graph: what was exported.
        model: it is of, computed as Danlu does.
        head: as of `graph_of`.
        run: the engine.
        exact: it holds fp32 weights, so that numbers must agree.

    Raises DanluError where they should agree and do not.
    """
    if isinstance(model, Encoder):
        figures = _encoder(
            model, head, lambda ids, mask: _named(graph, run({"input_ids": ids, "attention_mask": mask}))
        )
    else:
        figures = _decoder(model, _Cached(graph, model.config, run))
    return _checked(figures, exact)


def compare_rows(model: Decoder | Encoder, head: Head | None, step: Callable[..., Sequence[Tensor]]) -> Figures:
    """The same of an engine that computes one row at a time, and keeps a decoder's cache itself.

    Args: step: from ids and, of a decoder, their places, of an encoder, which are real, int64 [1, T] both, to outputs.
    """

    def vectors(ids: Array, mask: Array) -> tuple[Array, Array]:
        rows = [
            [each.numpy() for each in step(*(torch.from_numpy(x[row, None]) for x in (ids, mask)))]
            for row in range(len(ids))
        ]
        return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])

    def logits(ids: list[int], before: int) -> Array:
        places = torch.arange(before, before + len(ids))[None]
        return step(torch.tensor([ids]), places)[0].numpy()

    return _checked(_encoder(model, head, vectors) if isinstance(model, Encoder) else _decoder(model, logits), True)


def _checked(figures: Figures, exact: bool) -> Figures:
    largest = figures["difference"]["value"]
    if exact and not largest <= TOLERANCE:
        what = f"the exported model's outputs are apart from the original's, by up to {largest:.1e} of the largest"
        raise DanluError(what, where="export", fix="this engine does not compute the model as it is; use another form")
    return figures


def _named(graph: Graph, made: Mapping[str, Array]) -> tuple[Array, Array]:
    hidden, vector = (made[name] for name in graph.outputs)
    return hidden, vector


class _Cached:
    """A decoder whose cache comes in and goes out: ids of one row and how many came before -> logits."""

    def __init__(self, graph: Graph, config: ModelConfig, run: Run) -> None:
        self._graph, self._run = graph, run
        self._shape = (1, config.kv_heads, 0, config.head_width)
        self._past: dict[str, Array] = {}

    def __call__(self, ids: list[int], before: int) -> Array:
        if before == 0:
            self._past = {name: np.zeros(self._shape, np.float32) for name in self._graph.inputs[1:]}
        made = self._run({"input_ids": np.array([ids], np.int64), **self._past})
        names = zip(self._graph.inputs[1:], self._graph.outputs[1:], strict=True)
        self._past = {name: made[new] for name, new in names}
        return made["logits"]


def _decoder(model: Decoder, logits: Callable[[list[int], int], Array]) -> Figures:
    """Args: logits: of ids of one row, and how many tokens of it came before; 0 begins a new one."""
    sample = make_sample(model.config)
    assert sample.tokens is not None
    tokens = sample.tokens[:1]
    with torch.inference_mode():
        ours = model.logits(model(tokens))
    prompt = tokens[0, :PROMPT].tolist()
    difference = _difference(ours.numpy(), logits(tokens[0].tolist(), 0))
    [expected] = generate_batch(model, [prompt], max_new_tokens=WRITTEN)
    given, before, written = prompt, 0, list[int]()
    for _ in expected:
        likeliest = int(logits(given, before)[0, -1].argmax())
        before, given = before + len(given), [likeliest]
        written.append(likeliest)
    same = sum(ours == theirs for ours, theirs in zip(expected, written, strict=True))
    by = f"of {len(expected)}, one after another with the cache"
    return {"difference": difference, "same_greedy_tokens": figure(same, "tokens", by=by)}


def _encoder(model: Encoder, head: Head | None, vectors: Callable[[Array, Array], tuple[Array, Array]]) -> Figures:
    """Args: vectors: from ids and mask to hidden states and what is made of a row."""
    sample = make_sample(model.config)
    assert sample.tokens is not None and sample.segments is not None
    tokens, segments = sample.tokens, sample.segments
    with torch.inference_mode():
        hidden = model(tokens, segments=segments)
        vector = model.logits(hidden, segments, tokens) if head is None else pool(hidden, head, segments, tokens)
    if head is not None and head.normalised:
        vector = torch.nn.functional.normalize(vector, dim=-1)
    their_hidden, theirs = vectors(tokens.numpy(), segments.long().numpy())
    real = segments.bool().numpy()
    ours = vector.numpy()
    if vector.dim() == 3:  # something for every place, of which padding's does not count
        ours, theirs = ours[real], theirs[real]
    return {
        "difference": _difference(ours, theirs),
        "difference_hidden": _difference(hidden.numpy()[real], their_hidden[real]),
    }


def _difference(ours: Array, theirs: Array) -> dict[str, Any]:
    largest = float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(ours).max())))
    return figure(largest, "of the largest number", by="the same random ids, by Danlu and by the engine")
