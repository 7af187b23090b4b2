"""`danlu model check`: a Hugging Face directory computed by Danlu and by transformers, side by side.

transformers is imported only here, and only when a check is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.console import result, say, table, warn
from danlu.errors import DanluError, TargetMissed
from danlu.model.checkpoint import StoredModel, find_checkpoint
from danlu.model.config import AnyConfig, EncoderDecoderConfig, Learned, ModelConfig, PairConfig, Relative
from danlu.model.families.family import Family
from danlu.model.head import WordHead
from danlu.model.stored import stacks
from danlu.model.transformer import Decoder, Encoder, EncoderDecoder, EncoderPair, Model

IMAGES = 2
LENGTH, LONGEST = 48, 1024  # tokens of the longest row; more, up to the second, where a window or bucket lies farther
PAST = 16  # tokens beyond that
PROMPT, STEPS = 8, 16  # tokens of the greedy comparison


@dataclass(frozen=True)
class Sample:
    """A random batch; what a model does not take is None.

    Attributes:
        tokens: int64 [3, T]; rows of different lengths, padded on the right.
        segments: int32 [3, T], 1 for a token, 0 for padding.
        types: int64 [3, T].
        written, written_segments: the same for what a decoder beside an encoder is given.
        pixels: fp32 [2, channels, height, width].
    """

    tokens: Tensor | None = None
    segments: Tensor | None = None
    types: Tensor | None = None
    written: Tensor | None = None
    written_segments: Tensor | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Difference:
    """How far both computations lie apart in one thing.

    Attributes:
        what: "layer 2" is the stream after `blocks.2`.
        largest: the largest difference of two numbers; of hidden states, in units of their place's root mean square.
        tolerance: how large it may be.
        note: more about it, if there is more to say.
    """

    what: str
    largest: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Within the tolerance; what is no number is not."""
        return self.largest <= self.tolerance

    def plain(self) -> dict[str, Any]:
        """JSON-ready; JSON has nothing for what is no number."""
        return asdict(self) | {"largest": self.largest if math.isfinite(self.largest) else None, "ok": self.ok}


@dataclass(frozen=True)
class Comparison:
    """All differences, in the order of the computation."""

    differences: Sequence[Difference]

    @property
    def first(self) -> Difference | None:
        """The first one above its tolerance."""
        return next((found for found in self.differences if not found.ok), None)

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        first = self.first
        rows = [found.plain() for found in self.differences]
        return {"ok": first is None, "first": None if first is None else first.what, "differences": rows}

    def raise_if_apart(self, where: object) -> None:
        """Raises TargetMissed, exit code 1, naming the first thing that differs."""
        if self.first is not None:
            found = self.first
            name = f"{found.what} ({found.note})" if found.note else found.what
            what = f"{name} is the first that differs: by {found.largest:.2e}, more than {found.tolerance:.2e}"
            raise TargetMissed(what, where=where)


def check(ref: str | Path, tolerance: float) -> Comparison:
    """Load a model with Danlu and with transformers, in fp32 (8 bytes a parameter together), and compare the results.

    Args:
        ref: a Hugging Face directory, or what leads to one (see `find_checkpoint`).
        tolerance: see `compare`.

    Raises DanluError where there is no such model, or transformers is not installed or cannot load it.
    """
    path = find_checkpoint(ref)
    if path.is_file():
        what = "is a GGUF file; to compare with transformers a Hugging Face directory is needed"
        raise DanluError(what, where=path, fix="name the directory it was made from")
    stored = StoredModel.open(path)
    reference = load_reference(stored.family, path)
    say(f"{path}: {stored.family.architecture}, by Danlu and by transformers, in fp32")
    for stack in stacks(stored.config):
        if stack.sliding_window is not None and stack.sliding_window >= _length(stack):
            rows = f"rows of {_length(stack)} tokens, which the window of {stack.sliding_window:,} does not cut"
            warn(f"{path}: compared on {rows}")
    return compare(stored.load(), reference, make_sample(stored.config), tolerance)


def load_reference(family: Family, path: Path) -> Any:
    """transformers' model of a directory, in fp32, its attention computed the plain way."""
    try:
        import transformers
    except ImportError:
        what = "this needs the package transformers, which is not installed"
        raise DanluError(what, fix="pip install transformers") from None
    kind = getattr(transformers, family.architecture, None)
    if kind is None:
        what = f"transformers {transformers.__version__} has no {family.architecture}"
        raise DanluError(what, where=path, fix="pip install --upgrade transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DanluError(f"transformers cannot load it: {reason}", where=path) from None


# --- The batch ------------------------------------------------------------------------------------------------------


def make_sample(config: AnyConfig, seed: int = 0) -> Sample:
    """A random batch for a model, the same at every call with the same seed."""
    random = torch.Generator().manual_seed(seed)
    if isinstance(config, EncoderDecoderConfig):
        tokens, segments = _text(config.encoder, random)
        written, written_segments = _text(config.decoder, random)
        written[:, 0] = config.start
        return Sample(tokens, segments, written=written, written_segments=written_segments)
    if isinstance(config, PairConfig):
        return Sample(*_text(config.text, random), pixels=_pixels(config.image, random))
    if config.patches is not None:
        return Sample(pixels=_pixels(config, random))
    tokens, segments = _text(config, random)
    types = torch.randint(0, config.types, tokens.shape, generator=random) if config.types > 1 else None
    return Sample(tokens, segments, types)


def _text(config: ModelConfig, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and segments, [3, T]: rows of T, two thirds of T and a third of T tokens."""
    length = _length(config)
    lengths = torch.tensor([[length], [-(-2 * length // 3)], [-(-length // 3)]])
    real = torch.arange(length) < lengths
    end = config.head.end if config.head is not None else None
    end = config.vocab_size - 1 if end == -1 else end
    # RoBERTa numbers places by what is no padding, so that id must stand nowhere else.
    padding = max(config.positions.first - 1, 0) if isinstance(config.positions, Learned) else 0
    words = torch.tensor([word for word in range(config.vocab_size) if word not in (end, padding)] or [0])
    tokens = words[torch.randint(0, len(words), real.shape, generator=random)]
    if end is not None:
        tokens = tokens.scatter(1, lengths - 1, end)
    return tokens.masked_fill(~real, padding), real.int()


def _length(config: ModelConfig) -> int:
    """Long enough for a window to hide something, and for the farthest bucket of relative positions."""
    reach = config.sliding_window or 0
    if isinstance(config.positions, Relative):
        reach = config.positions.farthest
    far = reach + PAST if reach and reach + PAST <= LONGEST else 0
    return min(max(LENGTH, far), config.context)


def _pixels(config: ModelConfig, random: torch.Generator) -> Tensor:
    assert config.patches is not None
    return torch.randn(IMAGES, config.patches.channels, *config.patches.image, generator=random)


# --- The comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """What one side computed.

    Attributes:
        streams: a stack's name -> what goes into its first block, and what comes out of each; ours once more after
            the last norm. [B, T, width].
        outputs: name -> what the model is there for: [B, T, features], or for whole rows of any other shape.
    """

    streams: Mapping[str, Sequence[Tensor]]
    outputs: Mapping[str, Tensor]


def compare(model: Model, reference: Any, sample: Sample, tolerance: float) -> Comparison:
    """Compare hidden states, outputs and, where words are written, greedy choices. Padding is not compared.

    Args:
        model: ours.
        reference: transformers'.
        sample: from `make_sample`.
        tolerance: how far outputs may be apart, and hidden states in units of the root mean square of their place, by
            which the next norm divides: it is a thousand at some places of some models (arXiv:2402.17762).
    """
    model.eval()
    with torch.inference_mode():
        ours, theirs = _ours(model, sample), _theirs(model, reference, sample)
        found = [
            difference
            for stack, streams in theirs.streams.items()
            for difference in _layers(stack, ours.streams[stack], streams, _real(stack, sample), tolerance)
        ]
        for name, values in theirs.outputs.items():
            real = _real("decoder " if sample.written is not None else "", sample) if values.dim() == 3 else None
            found.append(_difference(name, ours.outputs[name], values, real, tolerance))
        if isinstance(model, Decoder | EncoderDecoder) and isinstance(model.head, WordHead):
            found += _greedy(model, reference, sample, tolerance)
    return Comparison(found)


def _ours(model: Model, sample: Sample) -> Trace:
    stream: list[Tensor] = []
    more: list[Tensor] = []
    if isinstance(model, EncoderPair):
        assert sample.tokens is not None and sample.pixels is not None
        text = model.text(sample.tokens, segments=sample.segments, hidden=stream)
        image = model.image(sample.pixels, hidden=more)
        outputs = {
            "text vectors": model.embed_text(sample.tokens, sample.segments),
            "image vectors": model.embed_image(sample.pixels),
            "logits": model(sample.tokens, sample.pixels, sample.segments),
        }
        return Trace({"text ": [*stream, text], "image ": [*more, image]}, outputs)
    if isinstance(model, EncoderDecoder):
        assert sample.tokens is not None and sample.written is not None
        read = model.encode(sample.tokens, segments=sample.segments, hidden=stream)
        last = model.decode(
            sample.written,
            read,
            segments=sample.written_segments,
            memory_segments=sample.segments,
            hidden=more,
        )
        return Trace({"encoder ": [*stream, read], "decoder ": [*more, last]}, {"logits": model.logits(last)})
    if isinstance(model, Encoder):
        given = sample.tokens if sample.pixels is None else sample.pixels
        assert given is not None
        last = model(given, types=sample.types, segments=sample.segments, hidden=stream)
    else:
        assert sample.tokens is not None
        last = model(sample.tokens, segments=sample.segments, hidden=stream)
    return Trace({"": [*stream, last]}, {_output(model): model.logits(last, sample.segments)})


def _theirs(model: Model, reference: Any, sample: Sample) -> Trace:
    """`model`, ours, tells which body it is."""
    given = {
        "input_ids": sample.tokens,
        "attention_mask": sample.segments,
        "token_type_ids": sample.types,
        "decoder_input_ids": sample.written,
        "decoder_attention_mask": sample.written_segments,
        "pixel_values": sample.pixels,
    }
    made = reference(**{name: value for name, value in given.items() if value is not None}, output_hidden_states=True)
    if isinstance(model, EncoderPair):
        streams = {
            "text ": made.text_model_output.hidden_states,
            "image ": made.vision_model_output.hidden_states,
        }
        vectors = {"text vectors": made.text_embeds, "image vectors": made.image_embeds}
        return Trace(streams, {**vectors, "logits": made.logits_per_text})
    if isinstance(model, EncoderDecoder):
        streams = {"encoder ": made.encoder_hidden_states, "decoder ": made.decoder_hidden_states}
        return Trace(streams, {"logits": made.logits})
    if "start_logits" in made:
        logits = torch.stack((made.start_logits, made.end_logits), -1)
    else:
        logits = made.pooler_output if _output(model) == "vector" else made.logits
    return Trace({"": made.hidden_states}, {_output(model): logits})


def _output(model: Decoder | Encoder) -> str:
    """What the model is there for."""
    head = model.config.head
    return "vector" if head is not None and head.task == "embedding" else "logits"


def _real(stack: str, sample: Sample) -> Tensor | None:
    """bool [B, T], the places of a stack that are no padding; None where all count."""
    segments = {"image ": None, "decoder ": sample.written_segments}.get(stack, sample.segments)
    return None if segments is None else segments != 0


def _layers(
    stack: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], real: Tensor | None, tolerance: float
) -> Iterator[Difference]:
    """The stream before the first block and after each. What transformers gives for the last is, depending on the model
    and the version, taken before or after the final norm: it is compared with that of ours which is nearer."""
    names = [f"{stack}embedding", *(f"{stack}layer {layer}" for layer in range(len(theirs) - 1))]
    for name, mine, other in zip(names[:-1], ours[:-2], theirs[:-1], strict=True):
        yield _difference(name, mine, other, real, tolerance, hidden=True)
    bare, normed = (_difference(names[-1], mine, theirs[-1], real, tolerance, hidden=True) for mine in ours[-2:])
    if normed.largest < bare.largest:
        yield Difference(names[-1], normed.largest, tolerance, "after the final norm")
    else:
        yield bare


def _difference(
    what: str, ours: Tensor, theirs: Tensor, real: Tensor | None, tolerance: float, hidden: bool = False
) -> Difference:
    if real is not None:
        ours, theirs = ours[real], theirs[real]
    apart = (ours - theirs).abs()
    if hidden:
        apart = apart / theirs.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(theirs.dtype).tiny)
    return Difference(what, apart.max().item(), tolerance)


def _greedy(model: Decoder | EncoderDecoder, reference: Any, sample: Sample, tolerance: float) -> list[Difference]:
    """The likeliest next token on each side, step by step, after what transformers has chosen so far.

    A choice may differ where two tokens are as good as equal: what counts is by how much our logit of its choice lies
    below that of ours, which twice the tolerance bounds if no logit is off by more than once.
    """
    prompt, ours, theirs = _writers(model, reference, sample)
    config = model.config.decoder if isinstance(model, EncoderDecoder) else model.config
    steps = min(STEPS, config.context - prompt.shape[1])
    equal, gaps = 0, [torch.zeros(())]
    for _ in range(steps):
        mine, other = ours(prompt), theirs(prompt)
        chosen = other.argmax(-1, keepdim=True)
        gaps.append((mine.amax(-1, keepdim=True) - mine.gather(-1, chosen)).max())
        equal += int((mine.argmax(-1, keepdim=True) == chosen).sum())
        prompt = torch.cat((prompt, chosen), 1)
    if not steps:
        return []
    note = f"{equal} of {steps * len(prompt)} are the same"
    return [Difference("greedy tokens", torch.stack(gaps).max().item(), 2 * tolerance, note)]


Writer = Callable[[Tensor], Tensor]  # int64 [B, T] -> logits of what comes next, [B, vocab]


def _writers(model: Decoder | EncoderDecoder, reference: Any, sample: Sample) -> tuple[Tensor, Writer, Writer]:
    """What both sides begin with, ours, and theirs."""
    tokens, segments = sample.tokens, sample.segments
    assert tokens is not None and segments is not None
    if isinstance(model, EncoderDecoder):
        memory = model.encode(tokens, segments=segments)
        start = torch.full((len(tokens), 1), model.config.start)
        return (
            start,
            lambda ids: model.logits(model.decode(ids, memory, memory_segments=segments)[:, -1]),
            lambda ids: reference(input_ids=tokens, attention_mask=segments, decoder_input_ids=ids).logits[:, -1],
        )
    short = max(1, min(PROMPT, int(segments.sum(1).min()), model.config.context - STEPS))
    return (
        tokens[:, :short],
        lambda ids: model.logits(model(ids)[:, -1]),
        lambda ids: reference(input_ids=ids).logits[:, -1],
    )


def print_comparison(comparison: Comparison) -> None:
    """The differences as a table on standard output."""
    rows = [(x.what, f"{x.largest:.2e}", f"{x.tolerance:.2e}", x.note) for x in comparison.differences]
    table("Danlu and transformers", ("what", "largest difference", "tolerance", ""), rows)
    result("embedding and layers in units of each place's root mean square; padding is left out")
    if comparison.first is None:
        result("all within tolerance")
