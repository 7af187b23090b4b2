"""The commands that belong to no group: run, train, show, chat, serve, recipe, doctor, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from danlu.cli.base import (
    Battery,
    Context,
    Draft,
    Guess,
    Json,
    Memory,
    Overrides,
    Ref,
    Stage,
    Stopped,
    Threads,
    command,
    print_json,
    tuned,
)
from danlu.console import result, say, table
from danlu.errors import DanluError


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
        print_json(done.summary())
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
        print_json(TrainRecipe.model_json_schema())
        return
    if recipe is None:
        raise DanluError("name a recipe to train", fix="or see all settings:  danlu train --schema")
    given: dict[str, object] = {"nproc": nproc, "nodes": nodes, "rendezvous": rendezvous}
    words = [f"launch.{name}={value}" for name, value in given.items() if value is not None]
    read = read_recipe(recipe, [*(overrides or ()), *words], TrainRecipe)
    if job is not None:
        from danlu.train.jobs import JOBS

        given |= {"on": None if on == "here" else on, "json": as_json or None}
        without_effect = [f"--{name}" for name, value in given.items() if value is not None]
        if without_effect:
            what = (
                f"{', '.join(without_effect)} has no effect on a job file; it says what the recipe's section job does"
            )
            raise DanluError(what, where="--job", fix="as in --set job.nodes=3 --set job.gpus=4")
        options = {"--plan": plan, "--steps": steps, "--out": out}
        named = [(name, str(value)) for name, value in options.items() if value is not None]
        set_words = [("--set", override) for override in overrides or ()]
        told = tuple(word for pair in (*named, *set_words) for word in pair)
        result(JOBS[job](str(recipe), told, read.recipe.job).rstrip())
        return
    done = start(read.recipe.beside(recipe.parent), out, plan=plan, steps=steps, on=on)
    if as_json:
        print_json(done)
        return
    loss = f", loss {done['loss']:.4f}" if "loss" in done else ""
    result(f"{done['out']}: {done['steps']} steps, {done['ended']}{loss}")


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
        print_json([hop.summary() for hop in hops])
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
    memory: Memory = None,
    battery: Battery = None,
    guess: Guess = False,
    draft: Draft = None,
    as_json: Json = False,
) -> None:
    """Talk with a model in the terminal.

    Through a pipe each line is one turn of the conversation.

    Example:  danlu chat runs/python-helper --prompt "What does textwrap.dedent do?"
    """
    from danlu.device.budget import within
    from danlu.serve.backend import CONTEXT, Guesses
    from danlu.serve.chat import chat as talk

    talk(
        within(ref, memory, battery, context or CONTEXT),
        prompt=prompt,
        system=system,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        context=context,
        threads=threads,
        guesses=Guesses(draft) if guess or draft else None,
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
    memory: Memory = None,
    battery: Battery = None,
    guess: Guess = False,
    draft: Draft = None,
) -> None:
    """Serve a model over HTTP, as OpenAI does.

    Ends with Ctrl-C, after the answers under way.

    Example:  danlu serve runs/python-helper --port 8000
    """
    from danlu.device.budget import within
    from danlu.serve.backend import CONTEXT, Guesses
    from danlu.serve.server import run_server

    ref = str(within(ref, memory, battery, context or CONTEXT))
    guesses = Guesses(draft) if guess or draft else None
    run_server(
        ref, host=host, port=port, token=token, context=context, threads=threads, waiting=waiting, guesses=guesses
    )


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
        print_json(Recipe.model_json_schema())
        return
    if file is None:
        raise DanluError("name a recipe to check", fix="or see all settings:  danlu recipe --schema")
    settings = list(read_recipe(file, overrides or ()).resolved())
    if as_json:
        print_json([{"setting": name, "value": value, "from": origin} for name, value, origin in settings])
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
        print_json(found)
    else:
        print_probe(found)


@command
def export(
    ref: Ref,
    out: Annotated[Path, typer.Option(help="The file to write; with another --to than gguf, the directory.")],
    to: Annotated[
        Literal["gguf", "onnx", "openvino", "executorch", "compressed-tensors"],
        typer.Option(help="The form: llama.cpp's file, a graph, or what transformers and vLLM load in few bits."),
    ] = "gguf",
    type_: Annotated[
        str | None,
        typer.Option("--type", help="gguf: q8_0, q4_0, ...; onnx: f32, int8; compressed-tensors: w8a16, w4a16, ..."),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="compressed-tensors: a text like what it is for.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="compressed-tensors: another, to measure the loss on.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the calibration text, at most.")] = 16_384,
    as_json: Json = False,
) -> None:
    """Write a model in another program's form, run it there, and compare.

    GGUF is one file for llama.cpp and all that is built on it. The others are directories with a card of what was
    measured; what the other program does not compute as the original does is refused.

    Example:  danlu export runs/python-helper --type q8_0 --out helper.gguf
    """
    if to == "gguf":
        if calibration is not None or heldout is not None:
            fix = "danlu compress quantize rounds by a text and writes GGUF"
            raise DanluError("a text has no effect on --to gguf", where="export", fix=fix)
        _export_gguf(ref, type_, out, as_json)
        return
    from danlu.compress.exports.export import Request, export_model
    from danlu.compress.quantizing.quantizer import read_text

    texts = [None if file is None else read_text(file) for file in (calibration, heldout)]
    made = export_model(Request(tuned(ref), to, type_, out, texts[0], texts[1], tokens))
    if as_json:
        print_json(made.plain())
    else:
        result(f"{made.path}: {made.figures['file_size']['value'] / 1e6:,.1f} MB")


def _export_gguf(ref: str, file_type: str | None, out: Path, as_json: bool) -> None:
    from danlu.compress.presets.quantize import export as write
    from danlu.model.checkpoint import Checkpoint

    if file_type is None:
        raise DanluError("name the type of the file", where="--type", fix="f32, f16, q8_0, q4_k_m, q4_0, ...")
    source = tuned(ref)
    stored = write(Checkpoint.open(source), file_type, out)
    if as_json:
        print_json({"file": str(out), "bytes": out.stat().st_size, "from": str(source), **stored.plain()})
    else:
        result(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")
