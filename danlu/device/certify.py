"""The certify stage: what the compressed model costs and gives on this machine, against what the target asks."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from danlu.artifact import WORK, Figures, figure, library_version, write_json
from danlu.console import say
from danlu.device.bandwidth import read_bandwidth
from danlu.device.documents import SEED, Drawn, draw_heldout
from danlu.device.guessing import guess_figures
from danlu.device.measure import Measurement, Request, measure
from danlu.device.parity import Parity, prove
from danlu.device.probe import instructions, processor
from danlu.device.settings import CertifySettings, Target
from danlu.device.verdict import Line, amount, judge
from danlu.errors import TargetMissed
from danlu.evaluate.bootstrap import interval, paired_change
from danlu.evaluate.heldout import Heldout, score
from danlu.gguf_header import read_header
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig

CERTIFICATE = "certificate.json"


def certify(
    settings: CertifySettings, target: Target, tuned: Checkpoint, model_gguf: Path, data: Path, out: Path
) -> Figures:
    """Measure the model and write certificate.json, whole whether the target is met or missed.

    Args:
        settings: how much is measured.
        target: what is asked; see `missed` for turning the certificate into an error.
        tuned: the checkpoint the model was made from, the standard of quality.
        model_gguf: the model to certify.
        data: a data artifact, of which heldout/ and heldout.jsonl are read.
        out: an existing directory.

    Returns: the figures of the card; "passed" says whether every line was met.

    Raises DanluError where the model cannot be loaded or nothing was held out.
    """
    drawn = draw_heldout(data, tuned.tokenizer, settings.heldout_tokens)
    say(f"certify: {model_gguf.name}, in a process of its own, on {drawn.words}")
    measured = measure(
        Request(
            model=str(model_gguf),
            context=min(settings.context, tuned.config.context),
            threads=settings.threads,
            prompt=drawn.sample(settings.prompt_tokens),
            decode_tokens=settings.decode_tokens,
            repeats=settings.repeats,
            documents=drawn.documents,
        )
    )
    bandwidth = read_bandwidth(measured.threads)
    model = tuned.load()
    reference = score(model, drawn.rows, drawn.chosen, "held-out, the tuned model in fp32")
    figures = _size_and_speed(measured, _bytes_per_token(model_gguf, tuned.config, measured), bandwidth)
    figures |= _quality(measured, reference, drawn, settings.resamples)
    if settings.guesses or settings.draft:
        figures |= guess_figures(
            model_gguf,
            drawn.sample(settings.prompt_tokens),
            context=min(settings.context, tuned.config.context),
            threads=settings.threads,
            tokens=settings.decode_tokens,
            repeats=settings.repeats,
            draft=None if settings.draft is None else Path(settings.draft),
        )
    lines = _lines(target, figures)
    parity = None
    if settings.parity_prompts:
        work = out / WORK
        work.mkdir(exist_ok=True)
        parity = prove(
            model,
            tuned.tokenizer,
            model_gguf,
            data,
            prompts=settings.parity_prompts,
            tokens=settings.parity_tokens,
            work=work,
            threads=settings.threads,
            seed=SEED,
        )
        lines.append(_same_ids(parity))
    certificate = {
        "passed": all(not line.short for line in lines),
        "lines": [line.plain() for line in lines],
        "parity": parity and parity.figures(),
        "differences": parity and [*parity.other_ids, *parity.other_answers],
        "figures": figures,
        "machine": {"processor": processor(), "instructions": instructions(), "system": platform.platform()},
        "engine": {
            "name": "llama.cpp",
            "llama-cpp-python": library_version("llama-cpp-python"),
            "model": measured.description,
            "threads": measured.threads,
            "context": min(settings.context, tuned.config.context),
            "imported_torch": measured.imported_torch,
        },
    }
    write_json(out / CERTIFICATE, certificate)
    return {"passed": certificate["passed"], **figures, **({} if parity is None else {"parity": parity.figures()})}


def missed(certificate: Mapping[str, Any], where: object = None) -> TargetMissed | None:
    """The error that says which lines of a certificate were missed and by how much; None where all were met."""
    short = [f"{line['name']}: {line['short']}" for line in certificate["lines"] if not line["passed"]]
    if not short:
        return None
    return TargetMissed("the target is missed:" + "".join(f"\n  {line}" for line in short), where=where)


def _size_and_speed(measured: Measurement, bytes_per_token: float, bandwidth: float) -> Figures:
    decode = measured.decode_figure()
    ceiling = bandwidth / bytes_per_token
    by = f"{amount(bytes_per_token, 'byte')} of weights and cache read a token, at the bandwidth measured"
    return {
        "file_size": figure(measured.file_bytes, "byte"),
        "peak_memory": figure(measured.peak_memory, "byte", by="of a process that loads the model, reads and decodes"),
        "load": figure(measured.load_seconds, "s"),
        "prefill": measured.prefill_figure(),
        "decode": decode,
        "read_bandwidth": figure(bandwidth / 1e9, "GB/s", by="reading a large array, best of several"),
        "decode_ceiling": figure(ceiling, "token/s", by=by),
        "decode_share_of_ceiling": figure(decode["value"] / ceiling, "share"),
    }


def _bytes_per_token(path: Path, config: ModelConfig, measured: Measurement) -> float:
    """Bytes read from memory for one token at the mean depth of the timed decoding: weights, keys and values (fp16).

    An embedding that is not the head too is not counted: one row of it is read.
    """
    unread = 0 if config.tied else _embedding_bytes(path)
    depth = measured.prompt_tokens + measured.decode_tokens / 2
    cache = 2 * config.layers * config.kv_heads * config.head_width * 2 * depth
    return measured.weight_bytes - unread + cache


def _embedding_bytes(path: Path) -> int:
    """Bytes from the embedding's first to the next tensor's."""
    header = read_header(path)
    embedding = next(tensor for tensor in header.tensors if tensor.name == "token_embd.weight")
    later = [tensor.offset for tensor in header.tensors if tensor.offset > embedding.offset]
    return min(later, default=header.size) - embedding.offset


def _quality(measured: Measurement, reference: Heldout, drawn: Drawn, samples: int) -> Figures:
    counts, losses, fp32, correct, fp32_correct = drawn.pooled(
        reference.counts, measured.losses, reference.losses, measured.correct, reference.correct
    )
    change = paired_change(fp32, losses, counts, SEED, samples)
    rise = change.relative or change.absolute

    def mean(sums: ArrayLike, unit: str) -> dict[str, Any]:
        return interval(sums, counts, SEED, samples).figure(unit, drawn.words)

    return {
        "heldout_loss": mean(losses, "nat/token"),
        "heldout_loss_fp32": mean(fp32, "nat/token"),
        "heldout_loss_change": change.absolute.figure("nat/token", f"paired; {drawn.words}"),
        "heldout_loss_rise": rise.figure("share", f"paired; {drawn.words}"),
        "token_accuracy": mean(correct, "share"),
        "token_accuracy_fp32": mean(fp32_correct, "share"),
    }


def _lines(target: Target, figures: Figures) -> list[Line]:
    """The target's lines, and what is measured beside them."""
    return [
        *judge(
            target,
            file_size=figures["file_size"],
            memory=figures["peak_memory"],
            decode=figures["decode"],
            loss_rise=figures["heldout_loss_rise"],
        ),
        Line("prefill", None, figures["prefill"]),
        Line("decoding, share of what memory allows", None, figures["decode_share_of_ceiling"]),
    ]


def _same_ids(parity: Parity) -> Line:
    """Token ids must agree whatever the target: otherwise the model that answers is not the one that was measured."""
    figures = parity.figures()
    short = "; ".join(parity.other_ids)
    return Line("same token ids, trained to served", figures["prompts"], figures["same_ids"], short=short)
