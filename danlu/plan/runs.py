"""One row of a table of measured runs, as the columns of a job."""

from __future__ import annotations

import math
import re

from danlu.plan.cluster import accelerator
from danlu.plan.jobs import DEFAULTS
from danlu.plan.shapes import PLAIN, shapes
from danlu.plan.stacks import LATENT, Row, Stack, stack_of
from danlu.plan.told import adapter_columns, offload_columns

SHARDS = {"zero-0": 0, "zero-1": 1, "zero-2": 2, "zero-3": 3, "fsdp": 3, "full_shard": 3, "shard_grad_op": 2}
BYTES = {"fp8": 1.0, "fp4": 0.5, "fp32": 4.0}  # of a number in products; others have 2
PRECISIONS = {"mxfp8": "fp8", "fp8": "fp8", "float8": "fp8", "amp_fp8": "fp8", "nvfp4": "fp4", "fp32": "fp32"}
# Words of models whose layers no row tells enough of: state spaces, images, two stacks. Those of a known name are
# counted.
UNCOUNTED = ("nemotron", "hybrid", "mamba", "llava", "t5/")


class Lacks(Exception):
    """A row cannot be predicted, and why."""


def known_stack(row: Row) -> Stack:
    """The software of a row. Raises Lacks where it is not known."""
    found = stack_of(row)
    if found is None:
        raise Lacks(f"how {row['framework'] or 'the software'} trains is not known")
    return found


def number(row: Row, name: str, default: float | None = None) -> float:
    """A cell. Raises Lacks where it is blank and there is no default, or no number."""
    text = row.get(name, "").strip()
    if not text:
        if default is None:
            raise Lacks(f"{name} is blank")
        return default
    try:
        return float(text)
    except ValueError:
        raise Lacks(f"{name} is {text!r}, no number") from None


def job_columns(row: Row, stack: Stack) -> dict[str, float]:
    """Columns of `Jobs`. Raises Lacks, or DanluError of an accelerator, where a row does not say what is needed."""
    tensor, pipeline, data = (number(row, name) for name in ("tp", "pp", "dp"))
    context, expert = number(row, "cp", 1), number(row, "ep", 1)
    for name, degree in (("tp", tensor), ("pp", pipeline), ("dp", data), ("cp", context), ("ep", expert)):
        if degree < 1:
            raise Lacks(f"{name} is {degree:g}, less than 1")
    if _flag(row, "expert-tensor-parallel-size") == "1" or expert > data * context:
        # Experts lie whole on a process, spread over tensor processes too: as many weights, cut the other way.
        expert = max(expert / tensor, 1)
    model = _model(row, stack, tensor)
    if not row["gpu"]:
        raise Lacks("gpu is blank")
    device = accelerator(row["gpu"])
    world = number(row, "n_gpus", tensor * pipeline * data * context)
    if tensor * pipeline * data * context != world:
        raise Lacks(f"tp x pp x dp x cp is not n_gpus = {world:g}")
    micro_rows = number(row, "mbs", stack.micro_rows)
    if micro_rows <= 0:
        raise Lacks(f"mbs is {micro_rows:g}, less than a row")
    batches = _batches(row, stack, data * micro_rows)
    precision = _precision(row, stack)
    if precision == "fp4" and model["state_layers"]:
        precision = "fp8"  # of hybrids only the experts are computed with 4 bits
    if precision not in device.peak:
        raise Lacks(f"{device.name} has no {precision} products")
    zero = _zero(row, stack)
    sequence = stack.sequence or "sequence-parallel" in row["notes"]
    node = min(number(row, "gpus_per_node", device.node), device.node)
    away = offload_columns(row.get("offload", ""), device)
    if away is None:
        raise Lacks(f"the host of {device.name} is not known")
    return DEFAULTS | model | adapter_columns(f"{row['model']} {row['notes']}") | away | {
        "length": number(row, "seq"), "tensor": tensor, "pipeline": pipeline, "data": data, "context": context,
        "chunks": _chunks(row, model["layers"], pipeline), "balanced": _balanced(row, stack), "expert": expert,
        "zero": zero, "sharers": data * context, "expert_sharers": max(data * context / expert, 1),
        "sequence": float(sequence and tensor > 1),
        "micro_rows": micro_rows, "micro_batches": batches, "recompute": _recompute(row, stack, world > node),
        "redone": stack.redone, "uneven": float(stack.uneven), "beside": float(stack.beside and not model["experts"]),
        "fused_loss": float("liger" in row["framework"].lower()),
        "flash": float(stack.flash and "attention-backend=unfused" not in row["notes"]),
        "compiled": float(row["compile"] == "yes"),
        "weight_bytes": 4.0 if precision == "fp32" else stack.weight_bytes, "gemm_bytes": BYTES.get(precision, 2.0),
        "state_bytes": stack.state_bytes, "gradient_bytes": stack.gradient_bytes, "peak": device.peak[precision],
        "memory_rate": device.memory_rate, "units": device.units, "near_rate": device.near,
        "far_rate": device.far if "800 Gbps" not in row["notes"] else 12.5e9, "node": node,
        "release": _release(row),
    }  # fmt: skip


def _batches(row: Row, stack: Stack, rows: float) -> float:
    """Micro-batches of a step, of so many rows over all copies. Where batch and count disagree, the batch holds: times
    and rates are told of it."""
    batch, count = number(row, "gbs", math.nan), number(row, "n_microbatches", math.nan)
    if math.isnan(batch):
        return count if not math.isnan(count) else number(row, "gbs", rows if not stack.accumulates else None) / rows
    if batch < rows:
        raise Lacks(f"gbs = {batch:g} is less than a micro-batch of each copy, {rows:g}")
    return batch / rows


def _model(row: Row, stack: Stack, tensor: float) -> dict[str, float]:
    known = shapes().get(row["model"].lower().split(" (cut")[0])
    if known is not None and (not row["layers"] or known["key_rank"]):
        return _cut_short(known, number(row, "layers", known["layers"]))
    told = row["model"].lower()
    if any(word in told for word in UNCOUNTED):
        raise Lacks(f"layers of {row['model']} are of a kind that is not counted")
    if "grpo" in told:
        raise Lacks("the run also generates what it learns from")
    width, heads = number(row, "hidden"), number(row, "heads")
    vocab = number(row, "vocab", stack.vocab)
    if stack.pads or (not row["vocab"] and tensor > 1):
        vocab = math.ceil(vocab / (stack.padded * tensor)) * stack.padded * tensor
    gated = stack.gated or "swiglu" in row["notes"]
    biased = stack.biased and "disable-bias-linear" not in row["notes"]
    tied = (stack.tied and "untie-embeddings" not in row["notes"]) or (stack.name == "nanotron" and _small(row))
    layers, experts = number(row, "layers"), number(row, "n_experts", 0)
    mixtures = _expert_layers(row, layers) if experts else 0.0
    inner, kv_heads = number(row, "ffn", 4 * width), number(row, "kv_heads", heads)
    head_width = float(_flag(row, "kv-channels") or width / heads)
    norms = 2 * width * (2 if stack.biased and "normalization=RMSNorm" not in row["notes"] else 1)
    biases = (heads + 2 * kv_heads) * head_width + 2 * width + (1 + gated) * inner
    learned = not stack.gated and "position-embedding-type" not in row["notes"]
    return PLAIN | {
        "layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "head_width": head_width,
        "feedforward": inner, "gated": float(gated), "vocab": vocab, "tied": float(tied), "outputs": vocab,
        "vectors": norms + biased * biases, "ends": norms / 2, "positions": number(row, "seq") if learned else 0.0,
        "experts": experts, "chosen": number(row, "topk", 0),
        "expert_width": float(_flag(row, "moe-ffn-hidden-size") or inner) if experts else 0.0,
        "expert_layers": mixtures, "leading": layers - mixtures if experts else 0.0,
    } | _latent(row) | _further(row)  # fmt: skip


def _cut_short(known: dict[str, float], layers: float) -> dict[str, float]:
    """A public model, or as many of its layers as a study took, one of them before the mixtures."""
    if layers == known["layers"]:
        return known
    plain = min(known["leading"], 1)
    mixtures = layers - plain if known["experts"] else 0
    return known | {"layers": layers, "expert_layers": mixtures, "leading": plain, "ahead": 0, "ahead_blocks": 0}


def _latent(row: Row) -> dict[str, float]:
    """Of latent attention: what a row's study tells of it, its norms, and the shared expert that comes with it."""
    if "multi-latent-attention" not in row["notes"]:
        return {}
    width, experts = number(row, "hidden"), number(row, "n_experts", 0)
    told = LATENT.get((width, _flag(row, "kv-channels")))
    if told is None:
        raise Lacks("what latent attention squeezes queries and keys to is not told")
    query_rank, key_rank, plain, turned, value = told
    return {
        "query_rank": query_rank, "key_rank": key_rank, "turned": turned, "head_width": plain + turned,
        "value_width": value, "vectors": 2 * width + query_rank + key_rank,
        "shared_width": float(_flag(row, "moe-ffn-hidden-size") or 0) if experts else 0.0,
    }  # fmt: skip


def _further(row: Row) -> dict[str, float]:
    """Tokens predicted beyond the next one, each by a block of its own."""
    further = float(_flag(row, "mtp-num-layers") or 0)
    return {"ahead": further, "ahead_blocks": further}


def _flag(row: Row, name: str) -> str | None:
    """What a row's notes say that the software was told."""
    found = re.search(rf"\b{name}=([^,;]+)", row["notes"])
    return found.group(1) if found else None


def _expert_layers(row: Row, layers: float) -> float:
    """Layers with a mixture: all, or as a pattern such as `([0]*3+[1]*11)` says."""
    pattern = _flag(row, "moe-layer-freq")
    return float(sum(map(int, re.findall(r"\[1\]\*(\d+)", pattern)))) if pattern else layers


def _release(row: Row) -> float:
    """Of the container that a run was made in."""
    told = re.search(r"(\d\d\.\d\d)\S* NeMo Container", row["notes"])
    return float(told.group(1)) if told else 0.0


def _small(row: Row) -> bool:
    """Nanotron's benchmark ties the ends of models whose feed-forward is narrower than this."""
    return number(row, "ffn") < 10_000


def _precision(row: Row, stack: Stack) -> str:
    told = row["precision"].lower()
    if not told:
        return stack.precision
    return next((known for word, known in PRECISIONS.items() if told.startswith(word)), "bf16")


def _zero(row: Row, stack: Stack) -> float:
    told = row["shard"].lower()
    return next((level for word, level in SHARDS.items() if word in told), stack.zero)


def _chunks(row: Row, layers: float, pipeline: float) -> float:
    """Chunks a stage; some tables count layers a chunk instead, which shows where chunks would be empty."""
    told = number(row, "vpp_chunks", 1)
    return told if told * pipeline <= layers else max(layers // (pipeline * told), 1)


def _balanced(row: Row, stack: Stack) -> float:
    """Whether stages are cut by cost: as the software does, or as a study of the vocabulary's place tells."""
    told = row["sched"].lower()
    if "vocab layers:" in told and "baseline" not in told and "redis" not in told:
        raise Lacks("the vocabulary is spread over the stages, which is not counted")
    return float(stack.balanced or "redis" in told)


def _recompute(row: Row, stack: Stack, spans_nodes: bool) -> float:
    told = row["recompute"].lower()
    if told:
        return 2 if told.startswith("full") else 0 if told.startswith("none") else 1
    return (2 if spans_nodes else 0) if stack.recompute < 0 else stack.recompute
