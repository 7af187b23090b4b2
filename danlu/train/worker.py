"""One process of `danlu train`: from a recipe to what it trains, and the run itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danlu.artifact import write_json
from danlu.console import say
from danlu.data.corpus import Corpus, Crops, build_corpus
from danlu.data.corrupt import MaskedStream, Masking, SpanCorruption, SpanStream
from danlu.data.mixing import Batches, MixtureStream, growing
from danlu.data.pairs import PairBatch
from danlu.data.stream import Batch
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.config import AnyConfig, EncoderDecoderConfig, ModelConfig
from danlu.model.costs import TRAINING, costs_by_layer
from danlu.model.families.known import family_of
from danlu.model.initialize import initialize, mup_config, mup_multipliers
from danlu.model.transformer import Decoder, Encoder, Model, make_model
from danlu.plan.plan import Plan, Work, check
from danlu.tokenizer import Tokenizer
from danlu.train.ema import Average
from danlu.train.groups import group_weights
from danlu.train.guard import Guard
from danlu.train.loop import Done, Run, Turn, Validation, train
from danlu.train.mesh import Mesh, make_mesh
from danlu.train.objective import Words
from danlu.train.offloading.offload import Offload
from danlu.train.precision import choose_precision, gemm_rate
from danlu.train.rank import Rank
from danlu.train.recipe import TrainRecipe
from danlu.train.replica import Replica
from danlu.train.schedule import Schedule
from danlu.train.state import CHECKPOINTS, Checkpoints

CORPUS, RECIPE, DECISIONS = "corpus", "recipe.json", "decisions.json"


def work(
    rank: Rank, *, recipe: dict[str, Any], out: str, plan: dict[str, Any] | None = None, steps: int | None = None
) -> dict[str, Any]:
    """Train what a recipe says, as one of `rank.world` processes, going on where the run's directory stands.

    Args:
        recipe: of `TrainRecipe`, JSON-able, its paths whole.
        out: the run's directory.
        plan: what of a plan was asked for; the processes that it leaves over are copies (data).
        steps: to do in all, in place of the recipe's. The schedule stays that of the recipe's steps.

    Returns what there is to say of the run; the same on every process.
    """
    settings, home = TrainRecipe.model_validate(recipe), Path(out)
    # Layouts that need two gathers are known, and slow only where a checkpoint is read.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    device = _device(rank)
    begun = rank.world > 1 and not dist.is_initialized()  # Ray makes the group itself
    if begun:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank.number, world_size=rank.world)
    try:
        return _train(settings, home, rank, device, complete(plan or {}, rank.world), steps or settings.steps)
    finally:
        if begun:
            dist.destroy_process_group()


def _device(rank: Rank) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(rank.local)
    return torch.device("cuda", rank.local)


def complete(asked: dict[str, Any], world: int) -> Plan:
    """The plan that was asked for, with as many copies as the processes allow if it does not say how many."""
    plan = Plan.read(asked)
    left, rest = divmod(world, plan.world)
    return plan if "data" in asked or rest else Plan.read({**asked, "data": left})


def _train(
    settings: TrainRecipe, home: Path, rank: Rank, device: torch.device, plan: Plan, steps: int
) -> dict[str, Any]:
    first = rank.number == 0
    if plan.world != rank.world:
        if not first:
            dist.barrier()  # until the first process, which knows the model, has refused the plan for all
        config = model_config(settings, _corpus(settings, home).tokenizer)
        check(plan, Work(config, settings.batch.rows, settings.batch.window), rank.world)
    mesh = make_mesh(plan, device)
    corpus = _together(mesh, lambda: _corpus(settings, home), first)
    config = model_config(settings, corpus.tokenizer)
    check(mesh.plan, Work(config, settings.batch.rows, settings.batch.window), rank.world)
    dtype = _together(mesh, lambda: _precision(settings, home, device), first)
    run = make_run(settings, home, mesh, corpus, config, dtype, rank, steps)
    if first:
        _tell(run, config, dtype)
    done = train(run)
    return _summary(home, done, run)


def _together(mesh: Mesh, make: Callable[[], Any], first: bool) -> Any:
    """What `make` returns: the first process makes it and writes it down, then the others read it."""
    made, error = None, None
    for turn in (True, False):
        if first is turn and error is None:
            try:
                made = make()
            except DanluError as raised:
                error = raised
        mesh.agree(error)
    return made


def _corpus(settings: TrainRecipe, home: Path) -> Corpus:
    """The tokens, built once."""
    folder, note = home / CORPUS, home / RECIPE
    if (folder / "index.json").exists():
        known = json.loads(note.read_text(encoding="utf-8"))["data"]
        if known != settings.data.plain():
            what = "was made from other data settings than the recipe's"
            raise DanluError(what, where=folder, fix="use the recipe of that run, or another --out")
    else:
        home.mkdir(parents=True, exist_ok=True)
        build_corpus(settings.data, folder)
        write_json(note, settings.plain())
    return Corpus.open(folder)


def _precision(settings: TrainRecipe, home: Path, device: torch.device) -> torch.dtype:
    """Decided once a run, by measuring: a resumed run must compute as it began."""
    note = home / DECISIONS
    if not note.exists():
        dtype, why = choose_precision(settings.precision, device.type)
        write_json(note, {"bf16": dtype == torch.bfloat16, "precision": why})
    decided = json.loads(note.read_text(encoding="utf-8"))
    return torch.bfloat16 if decided["bf16"] else torch.float32


def model_config(settings: TrainRecipe, tokenizer: Tokenizer) -> AnyConfig:
    """The shape of the model that learns."""
    chosen = settings.model
    if chosen.base is not None:
        config = StoredModel.open(chosen.base).config
    else:
        keys = {"vocab_size": tokenizer.vocab_size, **chosen.shape, "architectures": [chosen.architecture]}
        config = family_of(keys, Path("model.architecture")).config(keys, Path("model.shape"))
    if isinstance(config, ModelConfig):
        config = _with_dropout(settings, config)
    elif isinstance(config, EncoderDecoderConfig):
        config = replace(
            config,
            encoder=_with_dropout(settings, config.encoder),
            decoder=_with_dropout(settings, config.decoder),
        )
    return mup_config(config) if chosen.start == "mup" and chosen.base is None else config


def _with_dropout(settings: TrainRecipe, config: ModelConfig) -> ModelConfig:
    return replace(config, dropout=settings.dropout, attention_dropout=0.0, drop_path=settings.drop_path)


def make_run(
    settings: TrainRecipe,
    home: Path,
    mesh: Mesh,
    corpus: Corpus,
    config: AnyConfig,
    dtype: torch.dtype,
    rank: Rank,
    steps: int,
) -> Run:
    """Everything that the run is made of, on this process."""
    optimizing = settings.optimizer
    offload = Offload.start(settings.offload, home / "offload", mesh.device)
    with offload.making_weights():
        model = load_model(settings, config, mesh.device)
        multipliers = mup_multipliers(model, optimizing.mup_base_width) if optimizing.mup_base_width else None
        trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        groups = group_weights(trainable, optimizing, multipliers)
        flops = _flops(model, settings.batch.window)
        replica = Replica(
            model,
            [Words(settings.objective.smoothing, settings.objective.z)],
            mesh,
            rows=settings.batch.rows // mesh.plan.readers,
            length=settings.batch.window,
            dtype=dtype,
            recompute=settings.recompute,
            batch=PairBatch if settings.objective.kind == "spans" else Batch,
            offload=offload.policy(),
        )
        masters, copies = masters_and_copies(replica, dtype)
    own_groups = {name: groups[name] for name in masters}
    optimizer = offload.make_optimizer(masters, copies, optimizing, own_groups)
    schedule = Schedule(settings.schedule, optimizing.learning_rate, settings.steps)
    with offload.making_state():
        average = Average(optimizer, optimizing.ema, optimizing.ema_warmup) if optimizing.ema else None
    for part in replica.models:
        offload.follow(part)
    return Run(
        replica,
        [Turn(optimizer, schedule.rate, optimizing.clip, average)],
        make_stream(settings, corpus, mesh),
        steps=steps,
        seed=settings.seed,
        checkpoints=Checkpoints(
            home / CHECKPOINTS,
            settings.checkpoints.last,
            settings.checkpoints.best,
            # A copy in memory to write from would undo what was moved away.
            background=settings.checkpoints.background and settings.offload.state == "none",
        ),
        checkpoint_steps=settings.checkpoints.every,
        out=home,
        identity={
            "seed": settings.seed,
            "data": corpus.index["sides"]["train"],
            "batch": settings.batch.plain(),
            "objective": settings.objective.plain(),
            "optimizer": optimizing.plain(),
            "schedule": [settings.schedule.plain(), settings.steps],
        },
        validation=Validation(
            settings.validation.every,
            lambda: replica.measure(heldout_batches(settings, corpus, mesh)),
            schedule.observe,
            settings.validation.patience,
            (schedule.state, schedule.load),
        )
        if len(corpus.side("heldout"))
        else None,
        guard=Guard(settings.guard, home),
        stopping=lambda: rank.stopping.asked,
        alive=rank.alive.note,
        flops=flops,
        ceiling=gemm_rate(dtype, device=mesh.device.type) * 1e9,
    )


def load_model(settings: TrainRecipe, config: AnyConfig, device: torch.device) -> Model:
    """The whole model, fp32, with the weights it starts from."""
    if settings.model.base is not None:
        loaded = StoredModel.open(settings.model.base).load(device=device)
        model = make_model(config).to(device)
        model.load_state_dict(loaded.state_dict())
        return model
    model = make_model(config)
    initialize(model, settings.model.start, settings.seed)
    return model.to(device)


def masters_and_copies(replica: Replica, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    """The fp32 weights to optimise and the rounded copies that the model computes with, where FSDP makes none."""
    masters: dict[str, Tensor] = {}
    copies: dict[str, nn.Parameter] = {}
    for name, weight in replica.parameters().items():
        if not weight.requires_grad:
            continue
        if dtype == torch.float32 or _laid_out(weight):
            masters[name] = weight
            continue
        masters[name] = weight.detach()
        weight.data = masters[name].to(dtype)
        copies[name] = weight
    return masters, copies


def _laid_out(weight: Tensor) -> bool:
    """Whether FSDP keeps a weight, and gathers it in the precision of the computation."""
    names = weight.device_mesh.mesh_dim_names or () if isinstance(weight, DTensor) else ()
    return "shard" in names or "replicate" in names


def make_stream(settings: TrainRecipe, corpus: Corpus, mesh: Mesh) -> Batches:
    """This process's rows of every step."""
    tokens, batch = corpus.side("train"), settings.batch

    def rows_of(window: int, rows: int) -> Batches:
        crops = Crops(tokens, window, settings.seed, batch.cross_documents)
        return MixtureStream({"corpus": crops}, rows, rank=mesh.reader, world=mesh.plan.readers)

    plain = growing(batch.growing, batch.rows * batch.window, rows_of) if batch.growing else None
    return _corrupted(settings, corpus, plain or rows_of(batch.window, batch.rows), settings.seed, mesh.reader)


def _corrupted(settings: TrainRecipe, corpus: Corpus, stream: Any, seed: int, reader: int) -> Any:
    """The stream as the objective wants it."""
    objective, tokenizer = settings.objective, corpus.tokenizer
    if objective.kind == "masked_tokens":
        if tokenizer.mask_id is None:
            fix = "vocabulary: {kind: wordpiece}, or special: [mask]"
            raise DanluError("the vocabulary has no mask token", where="data.vocabulary", fix=fix)
        how = Masking(tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids, objective.hidden)
        return MaskedStream(stream, how, seed, reader)
    if objective.kind == "spans":
        first = tokenizer.id_of("<extra_id_0>")
        if first is None or tokenizer.eos_id is None:
            fix = "vocabulary: {sentinels: 100}"
            raise DanluError("the vocabulary has no sentinels or no end token", where="data.vocabulary", fix=fix)
        sentinels = settings.data.vocabulary.sentinels
        spans = SpanCorruption(first, tokenizer.eos_id, 0, sentinels, objective.hidden, objective.span)
        return SpanStream(stream, spans, seed, reader)
    return stream


@dataclass(frozen=True)
class _Fixed:
    """The same rows of a measurement, as a stream."""

    crops: Crops
    rows: int
    reader: int
    readers: int

    def batch(self, step: int) -> Batch:
        share = self.rows // self.readers
        first = step * self.rows + self.reader * share
        return self.crops.batch(np.arange(first, first + share))


def heldout_batches(settings: TrainRecipe, corpus: Corpus, mesh: Mesh) -> Iterator[Any]:
    """This process's part of the rows that are measured, in batches as large as a step's; the same on any plan."""
    rows = settings.batch.rows
    crops = Crops(corpus.side("heldout"), settings.batch.window, None, settings.batch.cross_documents)
    count = min(settings.validation.rows, len(crops)) // rows
    if not count:
        what = f"a measurement needs {rows} rows, as many as a step, and the held-out text has {len(crops)}"
        raise DanluError(what, where="validation.rows", fix="hold out more, or lower batch.rows")
    fixed = _Fixed(crops, rows, mesh.reader, mesh.plan.readers)
    stream = _corrupted(settings, corpus, fixed, settings.seed, mesh.reader)
    return (stream.batch(step) for step in range(count))


def _flops(model: Model, window: int) -> float:
    """Operations of training a token."""
    if not isinstance(model, Decoder | Encoder):
        return 0.0
    layers, head = costs_by_layer(model, window)
    return TRAINING * (sum(layers) + head)


def _tell(run: Run, config: AnyConfig, dtype: torch.dtype) -> None:
    held = sum(weight.numel() for weight in run.replica.parameters().values())
    say(f"train: {held:,} weights, of which this process holds a part; {dtype}".replace("torch.", ""))
    say(f"train: plan {run.mesh.plan.short()} on {run.mesh.world} processes")


def _summary(home: Path, done: Done, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"out": str(home), "steps": done.steps, "ended": done.why, "plan": run.mesh.plan.short()}
    if done.losses:
        found["loss"] = done.losses[-1]
    if done.validated:
        found["validation_loss"], found["best_validation_loss"] = (
            done.validated[-1][1],
            min(loss for _, loss in done.validated),
        )
    return found
