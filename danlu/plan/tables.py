"""Tables of measured runs, one row a run, as the columns predictions are made from."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from danlu.errors import DanluError
from danlu.plan.cluster import accelerator
from danlu.plan.jobs import Column, Jobs
from danlu.plan.shapes import PLAIN, shapes

NEEDED = ("id", "model", "layers", "hidden", "gpu", "n_gpus", "framework", "tp", "pp", "dp", "mbs", "gbs", "iter_s")
Row = dict[str, str]


@dataclass(frozen=True)
class Stack:
    """What a training software does that its tables do not say.

    Attributes:
        name: the software.
        words: of the table's `framework` that tell it.
        flash, sequence, gated, tied, balanced: as in Jobs.
        zero: where the table is silent.
        gradient_bytes, state_bytes, weight_bytes: as in Jobs.
        vocab: where the table is silent, before padding; `padded` to so many rows for each tensor process.
        recompute: 0, 1, 2 where the table is silent; -1 for whole blocks where the job spans nodes, else nothing.
        first_stage: the memory told is that of the first stage, not of the fullest.
    """

    name: str
    words: tuple[str, ...]
    flash: bool = True
    sequence: bool = True
    gated: bool = True
    tied: bool = False
    balanced: bool = False
    zero: int = 0
    weight_bytes: int = 2
    gradient_bytes: int = 4
    state_bytes: int = 12
    vocab: int | None = None
    padded: int = 128
    recompute: int = 0
    first_stage: bool = False


# The first whose words stand in a row's framework counts.
STACKS = (
    Stack("megatron-ci", ("megatron-lm ci",), sequence=False, gated=False, tied=True, vocab=50257),
    # Tables of this one leave out vocabulary and recomputing: the head's time asks for GPT-2's vocabulary, unpadded
    # where it is not cut, and the layers' time for no recomputing in one node.
    Stack("megatron-deepspeed", ("megatron-deepspeed", "megatron + deepspeed"), flash=False, sequence=False,
          gated=False, tied=True, gradient_bytes=2, vocab=50257, recompute=-1),
    Stack("nanotron", ("nanotron",), balanced=True, first_stage=True),
    Stack("llm-foundry", ("llm-foundry",), gated=False, tied=True, zero=3, weight_bytes=2, gradient_bytes=4),
    Stack("torchtitan", ("torchtitan",), zero=3),
    Stack("megatron-bridge", ("megatron-bridge", "nemo/"), zero=1),
    Stack("megatron", ("megatron-lm", "megatron"), zero=1),
    Stack("nemo", ("nemo",), zero=1),
)  # fmt: skip

SHARDS = {"zero-0": 0, "zero-1": 1, "zero-2": 2, "zero-3": 3, "fsdp": 3, "full_shard": 3, "shard_grad_op": 2}
BYTES = {"fp8": 1.0, "fp4": 0.5, "fp32": 4.0}  # of a number in products; others have 2
PRECISIONS = {"mxfp8": "fp8", "fp8": "fp8", "float8": "fp8", "amp_fp8": "fp8", "nvfp4": "fp4", "fp32": "fp32"}


@dataclass(frozen=True)
class Table:
    """Rows of which a prediction can be made.

    Attributes:
        rows: all rows of the file as they stand.
        at: which of them `jobs` describes, in order.
        jobs: their columns.
        stacks: the software and hardware of each, as coefficients are kept by.
        groups: model, cluster and batch of each, as `id`s are held apart by in cross-validation.
        seconds, gib: measured, nan where not told.
        first_stage: where the memory told is the first stage's.
        notes: of rows that are left out, by place: what lacks.
    """

    rows: list[Row]
    at: list[int]
    jobs: Jobs
    stacks: list[tuple[str, str, bool]]
    groups: list[tuple[str, ...]]
    seconds: Column
    gib: Column
    first_stage: list[bool]
    notes: dict[int, str]


# Words of models whose layers are of other kinds: state spaces, latent attention, predictions several words ahead.
UNCOUNTED = ("nemotron", "hybrid", "mamba", "multi-latent-attention", "mla", "deepseek", "kimi")


class _Lacks(Exception):
    """A row cannot be predicted, and why."""


def read_tables(paths: Iterable[Path]) -> Table:
    """All rows of some files. Raises DanluError where a file is empty or of another kind."""
    rows = [row for path in paths for row in _rows(path)]
    at: list[int] = []
    made: list[dict[str, float]] = []
    stacks, first_stage, notes = [], [], {}
    for place, row in enumerate(rows):
        try:
            stack = _stack(row)
            columns = _columns(row, stack)
        except (_Lacks, DanluError) as lack:
            notes[place] = str(lack).splitlines()[0]
            continue
        at.append(place)
        made.append(columns)
        stacks.append((stack.name, accelerator(row["gpu"]).name, columns["world"] > columns["node"]))
        first_stage.append(stack.first_stage)
    jobs = Jobs.of(**{each.name: np.array([columns[each.name] for columns in made]) for each in fields(Jobs)})
    told = [rows[place] for place in at]
    seconds = np.array([_seconds(row) for row in told])
    gib = np.array([_number(row, "mem_gib", math.nan) for row in told])
    groups = [tuple(row[key] for key in ("model", "layers", "hidden", "seq", "gpu", "n_gpus", "gbs")) for row in told]
    return Table(rows, at, jobs, stacks, groups, seconds, gib, first_stage, notes)


def _rows(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            read = csv.DictReader(file)
            rows = list(read)
            lacking = [name for name in NEEDED if name not in (read.fieldnames or ())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DanluError(f"cannot be read as a table: {error}", where=str(path)) from None
    if lacking:
        raise DanluError(f"has no column {lacking[0]}", where=str(path), fix=f"needed: {', '.join(NEEDED)}")
    if not rows:
        raise DanluError("holds no rows", where=str(path))
    return [{name: value or "" for name, value in row.items() if name} for row in rows]


def _stack(row: Row) -> Stack:
    told = row["framework"].lower()
    for stack in STACKS:
        if any(word in told for word in stack.words):
            return stack
    raise _Lacks(f"how {row['framework'] or 'the software'} trains is not known")


def _number(row: Row, name: str, default: float | None = None) -> float:
    text = row.get(name, "").strip()
    if not text:
        if default is None:
            raise _Lacks(f"{name} is blank")
        return default
    try:
        return float(text)
    except ValueError:
        raise _Lacks(f"{name} is {text!r}, no number") from None


def _seconds(row: Row) -> float:
    """Of a step: as told, or from tokens a second."""
    rate, rows, length = (_number(row, name, math.nan) for name in ("tokens_s_gpu", "gbs", "seq"))
    return _number(row, "iter_s", rows * length / (rate * _number(row, "n_gpus")))


def _columns(row: Row, stack: Stack) -> dict[str, float]:
    tensor, pipeline, data = (_number(row, name) for name in ("tp", "pp", "dp"))
    context, expert = _number(row, "cp", 1), _number(row, "ep", 1)
    model = _model(row, stack, tensor)
    if not row["gpu"]:
        raise _Lacks("gpu is blank")
    device = accelerator(row["gpu"])
    world = _number(row, "n_gpus", tensor * pipeline * data * context)
    if tensor * pipeline * data * context != world:
        raise _Lacks(f"tp x pp x dp x cp is not n_gpus = {world:g}")
    micro_rows = _number(row, "mbs")
    batches = _number(row, "n_microbatches", math.nan)
    if math.isnan(batches):
        batches = _number(row, "gbs") / (data * micro_rows)
    precision = _precision(row)
    if precision not in device.peak:
        raise _Lacks(f"{device.name} has no {precision} products")
    zero = _zero(row, stack)
    sequence = stack.sequence or "sequence-parallel" in row["notes"]
    node = min(_number(row, "gpus_per_node", device.node), device.node)
    return model | {
        "length": _number(row, "seq"), "tensor": tensor, "pipeline": pipeline, "data": data, "context": context,
        "chunks": _chunks(row, model["layers"], pipeline), "balanced": float(stack.balanced), "expert": expert,
        "zero": zero, "sharers": data * context, "expert_sharers": max(data * context / expert, 1),
        "sequence": float(sequence and tensor > 1),
        "micro_rows": micro_rows, "micro_batches": batches, "recompute": _recompute(row, stack, world > node),
        "flash": float(stack.flash and "attention-backend=unfused" not in row["notes"]),
        "compiled": float(row["compile"] == "yes"),
        "weight_bytes": 4.0 if precision == "fp32" else stack.weight_bytes, "gemm_bytes": BYTES.get(precision, 2.0),
        "state_bytes": stack.state_bytes, "gradient_bytes": stack.gradient_bytes, "peak": device.peak[precision],
        "memory_rate": device.memory_rate, "units": device.units, "near_rate": device.near,
        "far_rate": device.far if "800 Gbps" not in row["notes"] else 12.5e9, "node": node, "world": world,
        "release": _release(row),
    }  # fmt: skip


def _model(row: Row, stack: Stack, tensor: float) -> dict[str, float]:
    known = shapes().get(row["model"].lower())
    if known is not None and not row["layers"]:
        return known
    told = row["model"].lower() + row["notes"]
    if any(word in told for word in UNCOUNTED):
        raise _Lacks(f"layers of {row['model']} are of a kind that is not counted")
    width, heads = _number(row, "hidden"), _number(row, "heads")
    vocab = _number(row, "vocab", stack.vocab)
    if not row["vocab"] and tensor > 1:
        vocab = math.ceil(vocab / (stack.padded * tensor)) * stack.padded * tensor
    gated = stack.gated or "swiglu" in row["notes"]
    tied = (stack.tied and "untie-embeddings" not in row["notes"]) or (stack.name == "nanotron" and _small(row))
    experts = _number(row, "n_experts", 0)
    inner = _number(row, "ffn", 4 * width)
    return PLAIN | {
        "layers": _number(row, "layers"), "width": width, "heads": heads, "kv_heads": _number(row, "kv_heads", heads),
        "head_width": width / heads, "feedforward": inner, "gated": float(gated), "vocab": vocab, "tied": float(tied),
        "outputs": vocab, "vectors": 2 * width, "ends": width,
        "positions": 0.0 if stack.gated else _number(row, "seq"), "experts": experts, "chosen": _number(row, "topk", 0),
        "expert_width": inner if experts else 0.0, "expert_layers": _number(row, "layers") if experts else 0.0,
    }  # fmt: skip


def _release(row: Row) -> float:
    """Of the container that a run was made in."""
    told = re.search(r"(\d\d\.\d\d)\S* NeMo Container", row["notes"])
    return float(told.group(1)) if told else 0.0


def _small(row: Row) -> bool:
    """Nanotron's benchmark ties the ends of models whose feed-forward is narrower than this."""
    return _number(row, "ffn") < 10_000


def _precision(row: Row) -> str:
    told = row["precision"].lower()
    return next((known for word, known in PRECISIONS.items() if told.startswith(word)), "bf16")


def _zero(row: Row, stack: Stack) -> float:
    told = row["shard"].lower()
    return next((level for word, level in SHARDS.items() if word in told), stack.zero)


def _chunks(row: Row, layers: float, pipeline: float) -> float:
    """Chunks a stage; some tables count layers a chunk instead, which shows where chunks would be empty."""
    told = _number(row, "vpp_chunks", 1)
    return told if told * pipeline <= layers else max(layers // (pipeline * told), 1)


def _recompute(row: Row, stack: Stack, spans_nodes: bool) -> float:
    told = row["recompute"].lower()
    if told:
        return 2 if told.startswith("full") else 0 if told.startswith("none") else 1
    return (2 if spans_nodes else 0) if stack.recompute < 0 else stack.recompute
