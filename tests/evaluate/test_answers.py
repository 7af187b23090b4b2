"""Questions are drawn by the seed alone; answers are the model's own greedy ones, scored against the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from danlu.evaluate.answers import answer_all, draw_questions
from danlu.evaluate.metrics import rouge_l
from danlu.model.checkpoint import Checkpoint
from danlu.model.generate import generate


@pytest.fixture(scope="module")
def tiny(tiny_model) -> Checkpoint:
    return Checkpoint.open(tiny_model)


def chat(number: int, words: str = "") -> dict:
    turns = [("user", f"Question {number}? {words}"), ("assistant", f"答案 number {number}.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "origin": {"file": "a.jsonl", "line": number, "group": None}}


def text(number: int) -> dict:
    return {"text": f"plain {number}", "origin": {"file": "a.txt", "line": number, "group": None}}


def write(path: Path, examples: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in examples), encoding="utf-8")
    return path


def drawn(path: Path, tiny: Checkpoint, count: int, seed: int, longest: int = 400) -> list[int]:
    return [one.origin["line"] for one in draw_questions(path, tiny.tokenizer, count, longest, seed)]


def test_the_seed_decides_which_are_drawn(tmp_path, tiny):
    path = write(tmp_path / "heldout.jsonl", [chat(number) for number in range(50)])
    first = drawn(path, tiny, 8, seed=1)
    assert first == drawn(path, tiny, 8, seed=1)
    assert len(set(first)) == 8
    assert first != drawn(path, tiny, 8, seed=2)
    assert drawn(path, tiny, 4, seed=1) == first[:4], "asking for fewer leaves the others as they were"
    assert sorted(drawn(path, tiny, 100, seed=1)) == list(range(50))
    assert drawn(path, tiny, 0, seed=1) == []


def test_a_question_ends_where_the_answer_begins(tmp_path, tiny):
    [question] = draw_questions(write(tmp_path / "h.jsonl", [chat(3)]), tiny.tokenizer, 5, 400, seed=0)
    assert question.reference == "答案 number 3."
    shown = tiny.tokenizer.decode(question.prompt, skip_special=False)
    assert "Question 3?" in shown and "答案" not in shown
    assert shown.endswith("assistant\n")


def test_prompts_too_long_are_left_out_and_counted(tmp_path, tiny, capfd):
    path = write(tmp_path / "h.jsonl", [chat(1), chat(2, "word " * 300), chat(3)])
    assert sorted(drawn(path, tiny, 3, seed=0, longest=100)) == [1, 3]
    assert "1 of 3 drawn prompts" in capfd.readouterr().err


def test_plain_texts_ask_nothing_and_that_is_said(tmp_path, tiny, capfd):
    assert drawn(write(tmp_path / "h.jsonl", [text(1), text(2)]), tiny, 3, seed=0) == []
    assert "plain texts only" in capfd.readouterr().err
    assert drawn(write(tmp_path / "h.jsonl", [text(1), chat(2)]), tiny, 3, seed=0) == [2]


def test_answers_are_the_models_own_whatever_the_batch(tmp_path, tiny):
    examples = [chat(number, "more " * number) for number in range(7)]
    questions = draw_questions(write(tmp_path / "h.jsonl", examples), tiny.tokenizer, 7, 400, seed=0)
    model = tiny.load().eval()
    found = answer_all(model, tiny.tokenizer, questions, max_new_tokens=6, batch=3, label="answers")
    for question, answer in zip(questions, found, strict=True):
        ids = list(generate(model, question.prompt, max_new_tokens=6, stop_ids=tiny.tokenizer.stop_ids))
        assert answer.text == tiny.tokenizer.decode(ids).strip()
        assert answer.rouge == rouge_l(question.reference, answer.text).f
        assert answer.cut == (len(ids) == 6)
        assert not answer.exact
