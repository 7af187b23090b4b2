"""`danlu plan`: how a model is spread over hardware."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from danlu.cli.base import DefaultGroup, Json, Overrides, app, command, print_json
from danlu.console import result
from danlu.errors import DanluError


class _Plan(DefaultGroup):
    default = "find"


plan = typer.Typer(
    cls=_Plan,
    help="Find the fastest plan that fits, or say how wrong the planner is.",
    epilog="Example:  danlu plan --model llama-3.1-8b --gpus 64xh100 --seq 8192 --tokens-per-step 4M",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(plan, name="plan")
Table = Annotated[Path, typer.Option("--table", help="A table of runs, one row a run.")]
Calibrate = Annotated[
    list[Path] | None, typer.Option("--calibrate", help="A table of measured runs to learn from; repeatable.")
]


@functools.partial(command, group=plan, name="find")
def plan_find(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe of danlu train to plan for, a YAML file.")] = None,
    gpus: Annotated[
        str | None, typer.Option(help="The cluster, say 64xh100, or 2xmachine.json for processes on what --probe saw.")
    ] = None,
    model_name: Annotated[str | None, typer.Option("--model", help="A public model, say llama-3.1-8b.")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; by default 4096.")] = None,
    tokens_per_step: Annotated[
        str | None, typer.Option(help="Of all processes together, M being 1024 x 1024; by default 1M.")
    ] = None,
    precision: Annotated[
        Literal["bf16", "fp8", "fp32"] | None, typer.Option(help="Of matrix products; by default bf16.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Of the whole run, say 15T, whose hours and energy are told; else a recipe's.")
    ] = None,
    fit: Annotated[
        Literal["model", "context", "batch", "cluster"] | None,
        typer.Option(help="Find the largest known model, the longest rows, the most rows at once, the least cluster."),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(help="Rank of adapters that learn in place of the weights; by default all learn.")
    ] = None,
    lora_target: Annotated[
        Literal["all", "attention", "feedforward"] | None, typer.Option(help="Linear layers with one; by default all.")
    ] = None,
    base_bits: Annotated[
        int | None, typer.Option(help="Of a number of the weights beside adapters: 16, 8 or 4; by default 16.")
    ] = None,
    offload: Annotated[
        Literal["auto", "none", "host", "nvme"] | None,
        typer.Option(help="Where state may rest; auto (none with --fit) puts it away only where nothing fits without."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Work out what a step of the plan holds, without its memory; of a recipe.")
    ] = False,
    trials: Annotated[
        int | None,
        typer.Option("--try", min=1, help="Run so many of a recipe's best plans here, 20 steps, and keep the fastest."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the answer as one page, too.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure this machine for the planner, in about three minutes.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The file that --probe writes; else machine.json.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Find the fastest plan that fits, and say where time and memory go.

    Of a recipe of `danlu train`, its model, rows and steps are planned for, and its own plan is compared.

    Example:  danlu plan --model llama-3.1-8b --gpus 64xh100 --seq 8192 --tokens-per-step 4M
    """
    if probe:
        besides = (recipe, gpus, model_name, seq, tokens_per_step, precision, tokens, fit, lora, base_bits, offload)
        if any(given is not None for given in (*besides, lora_target, trials, html)) or verify:
            raise DanluError("--probe measures this machine, and plans for nothing", where="plan")
        _probe(out or Path("machine.json"), as_json)
        return
    if gpus is None or out is not None:
        what = "--out is for --probe" if gpus is not None else "name the cluster to plan for"
        raise DanluError(what, where="plan", fix="--gpus 64xh100, or measure this machine: danlu plan --probe")
    from danlu.plan.adapters import read_lora
    from danlu.plan.describe import RUN, ask, ask_fit, find, print_found, read_tokens

    run = None if tokens is None else read_tokens(tokens, "--tokens", RUN)
    adapters = read_lora(lora, lora_target, base_bits)
    words = (seq or 4096, tokens_per_step or "1M", precision or "bf16", adapters)
    told, written, tried = "", None, None
    if recipe is None and (verify or trials is not None):
        raise DanluError("--verify and --try are for recipes", where="plan", fix="name a recipe of danlu train")
    if recipe is not None:
        if any(given is not None for given in (model_name, seq, tokens_per_step, precision, fit, adapters, offload)):
            fix = "--set changes a setting of it"
            raise DanluError("the recipe says which model, rows, precision and offload", where="plan", fix=fix)
        from danlu.recipe import read_recipe
        from danlu.train.forecast import ask_recipe
        from danlu.train.recipe import TrainRecipe

        read = read_recipe(recipe, overrides or (), TrainRecipe).recipe.beside(recipe.parent)
        asked, written, learned = ask_recipe(read, recipe, gpus)
        run = run or learned
        if trials is not None:
            from danlu.train.trials import Trials

            tried = Trials(read, asked.cluster, trials)
    elif overrides:
        raise DanluError("--set changes a setting of a recipe, and none is named", where="plan")
    elif fit is not None:
        told, asked = ask_fit(fit, model_name, gpus, *words, offload or "none")
    elif model_name is None:
        raise DanluError("name a model or a recipe", where="plan", fix="--model llama-3.1-8b, or a file")
    else:
        asked = ask(model_name, gpus, *words, offload or "auto")
    answer = find(asked, run, written, list if tried is None else tried.order)
    if told:
        answer["fit"] = told
    if tried is not None:
        answer["trials"] = tried.measured
    if verify and written is not None:
        from danlu.train.verify import verified

        answer["dry_run"] = verified(read, written.work.config, asked, answer)
    if html is not None:
        from danlu.plan_page import write_page

        write_page(html, answer, model_name or (str(recipe) if recipe is not None else told))
    if as_json:
        print_json(answer)
        return
    if told:
        result(told)
    print_found(answer)
    _print_tested(answer)


def _print_tested(answer: dict[str, Any]) -> None:
    """What was found by trying plans, if any was tried."""
    if "trials" in answer:
        from danlu.train.trials import print_trials

        print_trials(answer["trials"])
    if "dry_run" in answer:
        from danlu.train.verify import print_verified

        print_verified(answer["dry_run"])


def _probe(out: Path, as_json: bool) -> None:
    """Measure this machine and write what was found."""
    from danlu.artifact import check_parent
    from danlu.device.plan_probe import plan_probe, print_machine

    check_parent(out)
    machine = plan_probe()
    machine.write(out)
    if as_json:
        print_json({"out": str(out), **machine.plain()})
        return
    print_machine(machine)
    result(f"{out}: plan with it by --gpus {out}, or --gpus 2x{out} for two processes")


@functools.partial(command, group=plan, name="predict")
def plan_predict(
    table_file: Table,
    out: Annotated[Path, typer.Option(help="The table to write, with what is predicted beside each row.")],
    calibrated: Calibrate = None,
    as_json: Json = False,
) -> None:
    """Predict step time and memory of each run of a table.

    Example:  danlu plan predict --table rows.csv --out predicted.csv --calibrate measured.csv
    """
    from danlu.plan.evaluate import predict_file

    predicted, rows = predict_file(table_file, out, calibrated)
    if as_json:
        print_json({"out": str(out), "predicted": predicted, "rows": rows})
    else:
        result(f"{out}: {predicted} of {rows} rows predicted; pred_note says what the others lack")


@functools.partial(command, group=plan, name="evaluate")
def plan_evaluate(table_file: Table, calibrated: Calibrate = None, as_json: Json = False) -> None:
    """Say how far predictions are from the measured runs of a table.

    Example:  danlu plan evaluate --table rows.csv --calibrate measured.csv
    """
    from danlu.plan.evaluate import evaluate_file, print_scores

    scores = evaluate_file(table_file, calibrated)
    if as_json:
        print_json([score.plain() for score in scores])
    else:
        print_scores(scores)
