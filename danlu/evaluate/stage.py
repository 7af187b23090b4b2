"""The evaluate stage: the base and the tuned model on the same held-out documents and questions, side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from danlu.artifact import Figures, figure, write_aside
from danlu.console import say, warn
from danlu.data.stream import Rows
from danlu.errors import DanluError
from danlu.evaluate.answers import Answer, Question, answer_all, draw_questions
from danlu.evaluate.bootstrap import Change, interval, paired_change, proportion
from danlu.evaluate.groups import groups_of, pooled
from danlu.evaluate.heldout import Heldout, choose_rows, perplexity, relative_perplexity, score
from danlu.evaluate.settings import EvaluateSettings
from danlu.model.checkpoint import Checkpoint
from danlu.train.precision import choose_precision


@dataclass(frozen=True)
class Measured:
    """Everything measured about one model."""

    heldout: Heldout
    answers: list[Answer]


class Draw(NamedTuple):
    """How the bootstrap draws: its seed, and how often."""

    seed: int
    samples: int


def evaluate(
    settings: EvaluateSettings, base: Checkpoint, tuned: Checkpoint, data: Path, out: Path, seed: int
) -> Figures:
    """Measure both models on the same held-out rows and questions.

    Fills `out` with documents.jsonl (group, tokens, loss sums in nat and right tokens of every scored document) and
    answers.jsonl (prompt, reference, both answers and their scores), from which every figure can be made again.

    Args:
        settings: how much is measured, and in which precision.
        base, tuned: before and after; they must share their tokenizer.
        data: a data artifact, of which heldout/ and heldout.jsonl are read.
        out: an existing directory.
        seed: decides which rows and questions are drawn, and the resampling.

    Raises DanluError where the tokenizers differ or nothing was held out.
    """
    if base.tokenizer.fingerprint != tuned.tokenizer.fingerprint:
        raise DanluError("has another tokenizer than the base, so their losses cannot be compared", where=tuned.path)
    rows = Rows.open(data / "heldout")
    chosen = choose_rows(rows, settings.tokens, seed)
    longest = min(base.config.context, tuned.config.context) - settings.max_new_tokens
    questions = draw_questions(data / "heldout.jsonl", base.tokenizer, settings.answers, longest, seed)
    dtype, why = choose_precision(settings.precision)
    say(f"evaluate: {len(chosen):,} of {len(rows):,} held-out rows and {len(questions)} questions; {why}")

    def measure(checkpoint: Checkpoint, label: str) -> Measured:
        model = checkpoint.load(dtype=dtype)
        model.eval()
        heldout = score(model, rows, chosen, f"held-out, {label}")
        answers = answer_all(
            model, checkpoint.tokenizer, questions, settings.max_new_tokens, settings.batch, f"answers, {label}"
        )
        return Measured(heldout, answers)

    before = measure(base, "before")  # one model at a time: its weights are gone before the next come
    after = measure(tuned, "after")
    groups = groups_of(data / "heldout.jsonl", base.tokenizer, rows, before.heldout.row, before.heldout.segment)
    if len(set(groups)) < 2:
        warn(
            "all held-out documents are of one group: how far they speak for others is unknown, so no interval is given"
        )
    _write_documents(out / "documents.jsonl", before.heldout, after.heldout, groups)
    _write_answers(out / "answers.jsonl", questions, before.answers, after.answers)
    draw = Draw(seed, settings.resamples)
    how = f"weights and products in {'bf16' if dtype == torch.bfloat16 else 'fp32'}, seed {seed}"
    figures = _heldout_figures(before.heldout, after.heldout, groups, draw, how)
    if questions:
        how = f"greedy, at most {settings.max_new_tokens} tokens, {how}"
        figures |= _answer_figures(before.answers, after.answers, [one.group for one in questions], draw, how)
    return figures


def _heldout_figures(before: Heldout, after: Heldout, groups: list[str], draw: Draw, how: str) -> Figures:
    by = f"{len(groups)} held-out documents in {len(set(groups))} groups, which are resampled; {how}"
    counts, was, now, was_right, now_right = pooled(
        groups, before.counts, before.losses, after.losses, before.correct, after.correct
    )
    loss_before, loss_after = interval(was, counts, *draw), interval(now, counts, *draw)
    change = paired_change(was, now, counts, *draw)
    return {
        "heldout_documents": figure(len(groups), "documents"),
        "heldout_groups": figure(len(set(groups)), "groups"),
        "heldout_tokens": figure(int(counts.sum()), "token"),
        "heldout_loss_before": loss_before.figure("nat/token", by),
        "heldout_loss_after": loss_after.figure("nat/token", by),
        **_change_figures("heldout_loss", change, "nat/token", by),
        "perplexity_before": perplexity(loss_before).figure("perplexity", by),
        "perplexity_after": perplexity(loss_after).figure("perplexity", by),
        "perplexity_change_relative": relative_perplexity(change.absolute).figure("share", f"paired; {by}"),
        "token_accuracy_before": interval(was_right, counts, *draw).figure("share", by),
        "token_accuracy_after": interval(now_right, counts, *draw).figure("share", by),
        **_change_figures("token_accuracy", paired_change(was_right, now_right, counts, *draw), "share", by),
    }


def _answer_figures(before: list[Answer], after: list[Answer], groups: list[str], draw: Draw, how: str) -> Figures:
    by = f"{len(groups)} held-out prompts in {len(set(groups))} groups, which are resampled; {how}"
    exact_by = f"{len(groups)} held-out prompts, Wilson's interval; {how}"
    was_exact, now_exact = (np.array([each.exact for each in side]) for side in (before, after))
    was, now = (np.array([each.rouge for each in side]) for side in (before, after))
    counts, was, now, was_hits, now_hits = pooled(groups, np.ones(len(groups)), was, now, was_exact, now_exact)
    return {
        "answers": figure(len(groups), "answers"),
        "answers_cut_before": figure(sum(each.cut for each in before), "answers"),
        "answers_cut_after": figure(sum(each.cut for each in after), "answers"),
        "rouge_l_before": interval(was, counts, *draw).figure("score", by),
        "rouge_l_after": interval(now, counts, *draw).figure("score", by),
        **_change_figures("rouge_l", paired_change(was, now, counts, *draw), "score", by),
        "exact_match_before": proportion(int(was_exact.sum()), len(groups)).figure("share", exact_by),
        "exact_match_after": proportion(int(now_exact.sum()), len(groups)).figure("share", exact_by),
        **_change_figures("exact_match", paired_change(was_hits, now_hits, counts, *draw), "share", by),
    }


def _change_figures(name: str, change: Change, unit: str, by: str) -> Figures:
    made = {f"{name}_change": change.absolute.figure(unit, f"paired; {by}")}
    if change.relative is not None:
        made[f"{name}_change_relative"] = change.relative.figure("share", f"paired; {by}")
    return made


def _write_documents(path: Path, before: Heldout, after: Heldout, groups: list[str]) -> None:
    columns: dict[str, list[Any]] = {
        "row": before.row.tolist(),
        "segment": before.segment.tolist(),
        "group": groups,
        "tokens": before.counts.tolist(),
        "loss_before": before.losses.round(4).tolist(),
        "loss_after": after.losses.round(4).tolist(),
        "correct_before": before.correct.tolist(),
        "correct_after": after.correct.tolist(),
    }
    values = zip(*columns.values(), strict=True)
    _write_lines(path, [dict(zip(columns, row, strict=True)) for row in values])


def _write_answers(path: Path, questions: list[Question], before: list[Answer], after: list[Answer]) -> None:
    rows = []
    for question, was, now in zip(questions, before, after, strict=True):
        asked = question.messages[-1]["content"] if question.messages else ""
        row: dict[str, Any] = {"prompt": asked, "reference": question.reference, "before": was.text, "after": now.text}
        for name, answer in (("before", was), ("after", now)):
            row |= {f"rouge_{name}": round(answer.rouge, 6), f"exact_{name}": answer.exact, f"cut_{name}": answer.cut}
        rows.append(row | {"messages": question.messages, "origin": question.origin})
    _write_lines(path, rows)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
