"""The certificate of a small recipe: whole where the target is met and where it is missed; parity that can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from danlu.data.stream import Rows
from danlu.device.certify import certify, missed
from danlu.device.documents import draw_heldout
from danlu.device.engine import Engine
from danlu.device.parity import Prompt, _difference, compare_answers, compare_ids, count_trained, draw_prompts, prove
from danlu.device.settings import CertifySettings, Target
from danlu.evaluate.heldout import score
from danlu.model.checkpoint import Checkpoint
from danlu.model.gguf import write_gguf
from danlu.tokenizer import Tokenizer
from tests.conftest import Project

SMALL = CertifySettings(
    context=64, threads=1, prompt_tokens=16, decode_tokens=4, repeats=2, heldout_tokens=256,
    parity_prompts=4, parity_tokens=8, resamples=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def stages(finished: Project) -> dict[str, Path]:
    named = json.loads((finished.run / "run.json").read_text())["stages"]
    return {stage: finished.run / directory for stage, directory in named.items()}


@pytest.fixture(scope="module")
def tuned(stages: dict[str, Path]) -> Checkpoint:
    return Checkpoint.open(stages["tune"])


@pytest.fixture
def served(stages: dict[str, Path]) -> Path:
    return stages["compress"] / "model.gguf"


def certificate_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "certificate.json").read_text())


def test_the_recipes_own_certificate_is_whole(stages: dict[str, Path]) -> None:
    certificate = certificate_of(stages["certify"])
    assert certificate["passed"] and missed(certificate) is None
    assert certificate["parity"]["same_ids"]["value"] == certificate["parity"]["prompts"]["value"] == 2
    assert certificate["parity"]["same_as_trained"]["value"] == 2
    assert certificate["parity"]["same_answers"]["value"] == 2
    assert certificate["differences"] == []
    assert certificate["engine"]["imported_torch"] is False
    assert not (stages["certify"] / "work").exists()


def test_a_missed_target_leaves_a_whole_certificate(
    stages: dict[str, Path], tuned: Checkpoint, served: Path, tmp_path: Path
) -> None:
    target = Target(memory="1GB", speed=1e6, file_size=1000)
    settings = SMALL.model_copy(update={"parity_prompts": 0, "guesses": True})
    figures = certify(settings, target, tuned, served, stages["data"], tmp_path)
    certificate = certificate_of(tmp_path)
    assert figures["passed"] is certificate["passed"] is False
    verdicts = {line["name"]: line["passed"] for line in certificate["lines"]}
    assert verdicts["peak memory"] and not verdicts["decoding"] and not verdicts["file size"]
    assert certificate["parity"] is None
    error = missed(certificate)
    assert error is not None and error.exit_code == 1 and "decoding" in str(error)
    assert figures["decode_share_of_ceiling"]["value"] > 0
    assert figures["file_size"]["value"] == served.stat().st_size
    assert certificate["figures"]["decode_guessing"]["value"] > 0 and 0 <= figures["guesses_kept"]["value"] <= 1


def test_a_drafts_guesses_are_measured_beside_those_from_the_text(
    stages: dict[str, Path], tuned: Checkpoint, served: Path, tmp_path: Path
) -> None:
    write_gguf(tuned.load(), tuned.tokenizer, tmp_path / "draft.gguf", "f16")
    settings = SMALL.model_copy(update={"parity_prompts": 0, "draft": "draft.gguf"}).beside(tmp_path)
    figures = certify(settings, Target(), tuned, served, stages["data"], tmp_path)
    for name in ("decode_alone", "decode_guessing", "decode_drafting"):
        assert figures[name]["value"] > 0 and figures[name]["unit"] == "token/s"
    assert 0 <= figures["drafts_kept"]["value"] <= 1 and figures["drafting_same_tokens"]["value"] > 0
    assert figures == figures | certificate_of(tmp_path)["figures"]


def test_documents_are_those_our_model_is_scored_on(stages: dict[str, Path], tuned: Checkpoint, tmp_path: Path) -> None:
    drawn = draw_heldout(stages["data"], tuned.tokenizer, 200)
    model = tuned.load()
    reference = score(model, drawn.rows, drawn.chosen)
    assert drawn.counts.tolist() == reference.counts.tolist()
    assert len(drawn.groups) == len(drawn.documents) == len(set(drawn.groups)), "rows of a file are their own groups"
    export = tmp_path / "f32.gguf"
    write_gguf(model, tuned.tokenizer, export)
    with Engine(export, context=64, threads=1, exact=True) as engine:
        sums = [engine.token_losses(each.tokens, each.targets)[0].sum() for each in drawn.documents]
    np.testing.assert_allclose(sums, reference.losses, rtol=1e-4)
    assert len(drawn.sample(5000)) == 5000


@pytest.fixture
def prompts(stages: dict[str, Path], tuned: Checkpoint) -> list[Prompt]:
    return draw_prompts(stages["data"], tuned.tokenizer, 4, 100, seed=0)


def test_ids_agree_from_template_to_engine(prompts: list[Prompt], served: Path, stages: dict[str, Path]) -> None:
    assert len(prompts) == 4
    assert compare_ids(prompts, served, threads=1) == []
    rows = Rows.open(stages["data"] / "heldout")
    assert count_trained(prompts, rows) == 4
    strange = Prompt(prompts[0].messages, "", [*prompts[0].ids[:-1], 5])
    assert count_trained([strange, prompts[1]], rows) == 1


def test_another_template_in_the_served_file_is_found(
    stages: dict[str, Path], tuned: Checkpoint, prompts: list[Prompt], tmp_path: Path
) -> None:
    tuned.tokenizer.save(tmp_path / "other")
    template = (tmp_path / "other" / "chat_template.jinja").read_text()
    (tmp_path / "other" / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|im_start|> ", 1))
    changed, model = tmp_path / "changed.gguf", tuned.load()
    write_gguf(model, Tokenizer.load(tmp_path / "other"), changed, "f16")
    assert "the file's tokenizer differs from token" in compare_ids(prompts, changed, threads=1)[0]
    found = prove(
        model, tuned.tokenizer, changed, stages["data"], prompts=2, tokens=4, work=tmp_path, threads=1, seed=0
    )
    assert found.same_ids == 0 and found.prompts == 2 and found.other_answers == []
    figures = certify(
        SMALL.model_copy(update={"parity_prompts": 2}), Target(), tuned, changed, stages["data"], tmp_path
    )
    assert figures["passed"] is False, "ids that differ fail whatever the target"
    assert not list((tmp_path / "work").glob("*.gguf"))


def test_answers_agree_and_a_difference_is_told(tuned: Checkpoint, prompts: list[Prompt], tmp_path: Path) -> None:
    assert compare_answers(tuned.load(), tuned.tokenizer, prompts, 8, tmp_path, threads=1) == []
    assert list(tmp_path.iterdir()) == []
    export = tmp_path / "f32.gguf"
    write_gguf(tuned.load(), tuned.tokenizer, export)
    with Engine(export, context=128, threads=1, exact=True) as engine:
        ids = prompts[0].ids
        [theirs] = engine.generate_batch([ids], max_new_tokens=4)
        ours = [*theirs[:2], (theirs[2] + 1) % engine.vocab_size, theirs[3]]
        words = _difference(engine, ids, ours, theirs)
        assert words.startswith(f"answers part at token 2: ours {ours[2]}, the engine's {theirs[2]}, logit gap ")
        logits = engine.next_logits(ids + theirs[:2])
        assert float(words.rsplit(" ", 1)[1]) == pytest.approx(logits[theirs[2]] - logits[ours[2]], rel=0.01)


def test_plain_texts_are_prompts_where_there_are_no_chats(tuned: Checkpoint, served: Path, tmp_path: Path) -> None:
    origin = {"file": "a.txt", "line": 1, "group": None}
    texts = ["Gold is <|im_end|> heavy. " * 9, "丹炉炼金。" * 60, "short"]
    lines = (json.dumps({"text": text, "origin": origin}) for text in texts)
    (tmp_path / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    drawn = draw_prompts(tmp_path, tuned.tokenizer, 3, 400, seed=0)
    assert [prompt.text for prompt in drawn] == [text[:100] for text in texts]
    assert compare_ids(drawn, served, threads=1) == []
