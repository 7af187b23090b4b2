"""The evaluate stage: the base and the tuned model on the same held-out documents and questions, side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from danlu.artifact import Figures, figure, write_aside
from danlu.console import say
from danlu.data.stream import Rows
from danlu.errors import DanluError
from danlu.evaluate.answers import Answer, Question, answer_all, draw_questions
from danlu.evaluate.bootstrap import Change, interval, paired_change, proportion
from danlu.evaluate.heldout import Heldout, choose_rows, perplexity, relative_perplexity, score
from danlu.evaluate.settings import EvaluateSettings
from danlu.model.checkpoint import Checkpoint
from danlu.train.precision import choose_precision


@dataclass(frozen=True)
class Measured:
    """Everything measured about one model."""

    heldout: Heldout
    answers: list[Answer]


def evaluate(
    settings: EvaluateSettings, base: Checkpoint, tuned: Checkpoint, data: Path, out: Path, seed: int
) -> Figures:
    """Measure both models on the same held-out rows and questions.

    Fills `out` with documents.jsonl (loss sums in nat, tokens and right tokens of every scored document) and
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
    _write_documents(out / "documents.jsonl", before.heldout, after.heldout)
    _write_answers(out / "answers.jsonl", questions, before.answers, after.answers)
    how = f"weights and products in {'bf16' if dtype == torch.bfloat16 else 'fp32'}, seed {seed}"
    by = f"{len(before.heldout.counts)} held-out documents, {how}"
    figures = _heldout_figures(before.heldout, after.heldout, by, seed, settings.resamples)
    if questions:
        by = f"{len(questions)} held-out prompts, greedy, at most {settings.max_new_tokens} tokens, {how}"
        figures |= _answer_figures(before.answers, after.answers, by, seed, settings.resamples)
    return figures


def _heldout_figures(before: Heldout, after: Heldout, by: str, seed: int, samples: int) -> Figures:
    loss = paired_change(before.losses, after.losses, before.counts, seed, samples)
    right = paired_change(before.correct, after.correct, before.counts, seed, samples)
    was, now = before.loss(seed, samples), after.loss(seed, samples)
    return {
        "heldout_documents": figure(len(before.counts), "documents"),
        "heldout_tokens": figure(int(before.counts.sum()), "token"),
        "heldout_loss_before": was.figure("nat/token", by),
        "heldout_loss_after": now.figure("nat/token", by),
        **_change_figures("heldout_loss", loss, "nat/token", by),
        "perplexity_before": perplexity(was).figure("perplexity", by),
        "perplexity_after": perplexity(now).figure("perplexity", by),
        "perplexity_change_relative": relative_perplexity(loss.absolute).figure("share", f"paired; {by}"),
        "token_accuracy_before": before.accuracy(seed, samples).figure("share", by),
        "token_accuracy_after": after.accuracy(seed, samples).figure("share", by),
        **_change_figures("token_accuracy", right, "share", by),
    }


def _answer_figures(before: list[Answer], after: list[Answer], by: str, seed: int, samples: int) -> Figures:
    was, now = [each.rouge for each in before], [each.rouge for each in after]
    was_exact, now_exact = [each.exact for each in before], [each.exact for each in after]
    return {
        "answers": figure(len(before), "answers"),
        "answers_cut_before": figure(sum(each.cut for each in before), "answers"),
        "answers_cut_after": figure(sum(each.cut for each in after), "answers"),
        "rouge_l_before": interval(was, None, seed, samples).figure("score", by),
        "rouge_l_after": interval(now, None, seed, samples).figure("score", by),
        **_change_figures("rouge_l", paired_change(was, now, None, seed, samples), "score", by),
        "exact_match_before": proportion(sum(was_exact), len(was_exact)).figure("share", by),
        "exact_match_after": proportion(sum(now_exact), len(now_exact)).figure("share", by),
        **_change_figures("exact_match", paired_change(was_exact, now_exact, None, seed, samples), "share", by),
    }


def _change_figures(name: str, change: Change, unit: str, by: str) -> Figures:
    made = {f"{name}_change": change.absolute.figure(unit, f"paired; {by}")}
    if change.relative is not None:
        made[f"{name}_change_relative"] = change.relative.figure("share", f"paired; {by}")
    return made


def _write_documents(path: Path, before: Heldout, after: Heldout) -> None:
    columns = {
        "row": before.row,
        "segment": before.segment,
        "tokens": before.counts,
        "loss_before": before.losses.round(4),
        "loss_after": after.losses.round(4),
        "correct_before": before.correct,
        "correct_after": after.correct,
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
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
