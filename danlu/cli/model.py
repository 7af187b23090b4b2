"""`danlu model`: what a model costs, and whether it computes what it should."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from danlu.cli.base import DefaultGroup, Json, app, command, print_json


class _Model(DefaultGroup):
    default = "show"


model = typer.Typer(
    cls=_Model,
    help="""Say what a model costs, or compare it.

    `danlu model X` says what a checkpoint weighs and costs, or what a family is, as `danlu model show X` does;
    `danlu model check PATH` compares what Danlu and transformers compute.
    """,
    short_help="Say what a model costs, or compare it.",
    epilog="Example:  danlu model llama   Example:  danlu model check ./SmolLM2-135M",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(model, name="model")


@functools.partial(command, group=model, name="show")
def model_show(
    ref: Annotated[str, typer.Argument(metavar="FAMILY_OR_PATH", help="A family, such as llama, or a checkpoint.")],
    as_json: Json = False,
) -> None:
    """Say what a model costs, or what a family is.

    Of a checkpoint: parameters of each part, operations for a token, memory of the weights and of the cache at several
    lengths. Of a family: its architectures and how Danlu, Hugging Face and GGUF call its weights.

    Example:  danlu model llama
    """
    from danlu.model.describe import describe, print_facts

    facts = describe(ref)
    if as_json:
        print_json(facts.plain())
    else:
        print_facts(facts)


@functools.partial(command, group=model, name="check")
def model_check(
    path: Annotated[str, typer.Argument(help="A Hugging Face directory.")],
    tolerance: Annotated[float, typer.Option(min=0, help="How far numbers may be apart.")] = 1e-4,
    as_json: Json = False,
) -> None:
    """Compare a model with transformers, layer by layer.

    Both compute the same random batch in fp32: the largest differences of hidden states, logits and greedy tokens.
    Exits 1 above the tolerance and names the first layer that differs. Needs transformers.

    Example:  danlu model check ./SmolLM2-135M
    """
    from danlu.model.compare import check, print_comparison

    comparison = check(path, tolerance)
    if as_json:
        print_json({"path": path} | comparison.plain())
    else:
        print_comparison(comparison)
    comparison.raise_if_apart(path)
