"""The tune stage: a checkpoint and packed rows in, a checkpoint that has learned from them out."""

from __future__ import annotations

import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danlu.artifact import WORK, Figures, figure, write_json
from danlu.console import say
from danlu.data.stream import Rows, Stream
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.lora import add_lora, freeze, merge_lora, train_only
from danlu.model.peft import save_adapter
from danlu.model.transformer import Decoder
from danlu.plan.plan import Plan
from danlu.train.compiling import choose_compile, parameters
from danlu.train.loop import Run, Turn, train
from danlu.train.memory import kept_memory
from danlu.train.mesh import Mesh
from danlu.train.metrics import METRICS, read_back
from danlu.train.notes import read_note
from danlu.train.objective import next_token
from danlu.train.optimizer import Optimizer, masters_of
from danlu.train.optimizing.settings import OptimizerSettings
from danlu.train.precision import choose_precision
from danlu.train.recompute import keep_probabilities
from danlu.train.replica import Replica
from danlu.train.schedule import learning_rate
from danlu.train.settings import TuneSettings
from danlu.train.state import Checkpoints

ADAPTERS = ("lora", "dora")  # the methods that train adapters


def tune(settings: TuneSettings, base: Checkpoint, data: Path, out: Path, seed: int) -> Figures:
    """Teach a model the training rows.

    Fills `out` with model/ (a Hugging Face directory of merged fp32 weights), adapter/ (LoRA and DoRA, PEFT's layout),
    metrics.jsonl and tensorboard/. Checkpoints stand in `out`/work until the end, so calling it again on the same
    directory goes on where it stopped and ends with the same bits.

    Args:
        settings: how to learn.
        base: where to start.
        data: a data artifact, of which train/ is read.
        seed: decides the order of the rows, the adapters' start, and dropout.

    Raises DanluError where the rows do not suit the model, the disk is full, or the loss is no number any more.
    """
    started = time.perf_counter()
    rows = Rows.open(data / "train")
    if rows.window > base.config.context:
        what = f"rows of {rows.window} tokens are longer than the model's context of {base.config.context}"
        raise DanluError(what, where=data, fix="lower data.window")
    steps = settings.steps or math.ceil(settings.epochs * len(rows) / settings.batch_rows)
    tokens = steps * settings.batch_rows * rows.window
    dtype, compiled = _decide(settings, base, tokens, out / WORK / "decisions.json")

    model = prepare(settings, base, dtype, seed)
    mesh = Mesh(Plan(micro_batches=settings.batch_rows // (settings.micro_rows or settings.batch_rows)))
    replica = Replica(model, [next_token], mesh, rows=settings.batch_rows, length=rows.window, compiled=compiled)
    optimizer = Optimizer(*masters_of(model, dtype), optimizer_settings(settings))
    trainable = sum(tensor.numel() for tensor in optimizer.masters.values())
    epochs = steps * settings.batch_rows / len(rows)
    say(
        f"tune: {steps} steps of {settings.batch_rows} x {rows.window} tokens ({epochs:.2f} epochs of {len(rows)} rows)"
    )
    say(f"tune: {settings.method}, {trainable:,} trainable of {sum(p.numel() for p in model.parameters()):,} weights")
    with kept_memory():
        run = Run(
            replica,
            [Turn(optimizer, partial(learning_rate, steps=steps, settings=settings), settings.clip)],
            Stream(rows, settings.batch_rows, seed),
            steps=steps,
            seed=seed,
            # Written while the run stands still: a copy to write from would take as much memory again.
            checkpoints=Checkpoints(out / WORK / "checkpoints", settings.keep_checkpoints, background=False),
            checkpoint_steps=settings.checkpoint_steps,
            out=out,
            label="tune",
        )
        train(run)
    learned = {name: tensor.detach() for name, tensor in optimizer.masters.items()}
    del model, optimizer, replica, run
    finished = _finished(settings, base, learned, seed)
    if settings.method in ADAPTERS:
        save_adapter(finished, out / "adapter", base=str(base.path))
        merge_lora(finished)
    save_checkpoint(finished, base.tokenizer, out / "model")
    return _figures(out, steps, trainable, time.perf_counter() - started) | {
        "method": settings.method,
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "compiled": compiled,
    }


def optimizer_settings(settings: TuneSettings) -> OptimizerSettings:
    """Tuning's choice of an optimizer: AdamW."""
    names = ("learning_rate", "betas", "epsilon", "weight_decay", "clip")
    return OptimizerSettings(**{name: getattr(settings, name) for name in names})


def prepare(settings: TuneSettings, base: Checkpoint, dtype: torch.dtype, seed: int) -> Decoder:
    """The model ready to learn: what learns in fp32, what is frozen in `dtype`.

    Raises DanluError where a glob matches nothing, or nothing is left to learn.
    """
    if settings.method in ADAPTERS:
        model = base.load(dtype)
        keep_probabilities(model)  # without masters and moments of all weights there is memory to spare
        add_lora(
            model,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=settings.targets,
            seed=seed,
            dora=settings.method == "dora",
        )
        return model
    model = base.load(torch.float32)
    if settings.method == "partial":
        _choose(model, settings)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return model


def _choose(model: Decoder, settings: TuneSettings) -> None:
    """Freeze what partial tuning does not train."""
    if settings.train:
        train_only(model, settings.train)
    if settings.freeze:
        freeze(model, settings.freeze)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DanluError("nothing is left to learn", where="tune.freeze", fix="freeze fewer weights, or train more")


def _decide(settings: TuneSettings, base: Checkpoint, tokens: int, note: Path) -> tuple[torch.dtype, bool]:
    """Precision and compiling, measured once a run: a resumed run must compute as it began."""
    if note.exists():
        decided = read_note(note, dict, "delete it: precision and compiling are then decided anew")
    else:
        dtype, why = choose_precision(settings.precision)
        # 6 a weight and token where all learn, 4 where only adapters do (arXiv:2001.08361); of partial tuning's weights
        # it is not known how many are left, and they may be most.
        flops = (4 if settings.method in ADAPTERS else 6) * parameters(base.config) * tokens
        compiled, reason = choose_compile(settings.compile, flops, dtype)
        decided = {"bf16": dtype == torch.bfloat16, "compile": compiled, "precision": why, "compiling": reason}
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, decided)
    say(f"tune: precision {decided['precision']}")
    say(f"tune: compile {decided['compiling']}")
    return torch.bfloat16 if decided["bf16"] else torch.float32, decided["compile"]


def _finished(settings: TuneSettings, base: Checkpoint, learned: dict[str, torch.Tensor], seed: int) -> Decoder:
    """The base in fp32 with what was learned: adapters beside it, or weights in the place of its own."""
    model = prepare(settings, base, torch.float32, seed)
    places: dict[str, nn.Parameter] = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in learned.items():
            places[name].copy_(tensor)
    return model


def _figures(out: Path, steps: int, trainable: int, seconds: float) -> dict[str, Any]:
    lines = [*read_back(out / METRICS)][::-1]
    losses = [line["loss"] for line in lines]
    tenth = max(1, len(losses) // 10)
    return {
        "loss_first": figure(statistics.fmean(losses[:tenth]), "nat/token", by=f"mean of the first {tenth} steps"),
        "loss_last": figure(statistics.fmean(losses[-tenth:]), "nat/token", by=f"mean of the last {tenth} steps"),
        "steps": figure(steps, "steps"),
        "tokens": figure(sum(line["tokens"] for line in lines), "tokens"),
        "trained_tokens": figure(sum(line["trained"] for line in lines), "tokens"),
        "tokens_per_second": figure(
            statistics.median(line["tokens_per_second"] for line in lines), "token/s", by="median of the steps"
        ),
        "trainable_weights": figure(trainable, "weights"),
        "seconds": figure(round(seconds, 1), "s", by="this process; time before a restart is not in it"),
        "memory": figure(max(line["memory_bytes"] for line in lines), "bytes", by="the most held at any time"),
    }
