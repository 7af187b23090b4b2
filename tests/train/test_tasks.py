"""Every kind of data and objective that a recipe can name: trained, measured, split, resumed, exported and refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from sklearn.metrics import f1_score

from danlu.data.memory import AlikeStream, MemoryStream, Ragged
from danlu.data.pairs import TextPairRows
from danlu.data.row_files import labelled_texts, tagged_words, text_pairs
from danlu.data.rows_settings import RowsSettings
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.transformer import Encoder
from danlu.recipe import read_recipe
from danlu.train.export import export
from danlu.train.rank import Job
from danlu.train.recipe import TrainRecipe
from danlu.train.signals import Stopping
from danlu.train.tasks.quality import (
    accuracy,
    answer_scores,
    correlations,
    entities,
    entity_f1,
    macro_f1,
    translation_scores,
)
from danlu.train.tasks.task import measure_test
from tests.train.ranks import run_ranks

TOLERANCE = 1e-5
GOOD, BAD = ("splendid", "warm", "优秀", "clever"), ("dull", "cold", "糟糕", "clumsy")
NOUNS = ("film", "story", "ending", "music", "电影", "cast")
NAMES = {"PER": ("Ada", "Lin", "鲁迅"), "LOC": ("Paris", "北京", "Oslo")}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
}
T5 = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
WORDS = {"kind": "wordpiece", "size": 150}
COMMON: dict[str, Any] = {
    "name": "tiny",
    "batch": {"rows": 8},
    "steps": 20,
    "optimizer": {"learning_rate": 3e-3},
    "precision": "fp32",
    "compile": "off",
    "checkpoints": {"every": 10},
    "validation": {"every": 5, "rows": 16},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of every format."""
    folder = tmp_path_factory.mktemp("rows")
    chance = random.Random(3)
    for side, count in (("train", 48), ("heldout", 20), ("test", 13)):
        _write_side(folder, side, count, chance)
    for number, nouns in enumerate((NOUNS, (*GOOD, *BAD))):
        text = "\n".join(" ".join(chance.choice(nouns) for _ in range(30)) for _ in range(60))
        (folder / f"text{number}.txt").write_text(text, encoding="utf-8")
    return folder


def _write_side(folder: Path, side: str, count: int, chance: random.Random) -> None:
    labelled, tagged, read, written, asked = [], [], [], [], []
    for number in range(count):
        good = bool(chance.getrandbits(1))
        words = [chance.choice(GOOD if good else BAD) for _ in range(chance.randint(1, 4))]
        text = " ".join(f"{chance.choice(NOUNS)} {word}" for word in words)
        labelled.append(f"{'good' if good else 'bad'} {text}")
        kind = chance.choice(("PER", "LOC"))
        tagged.append(f"the\tO\n{chance.choice(NAMES[kind])}\tB-{kind}\nfilm\tO\n")
        read.append(text)
        written.append(" ".join(reversed(text.split())))
        answer = {"text": words[0], "answer_start": text.index(words[0])}
        asked.append({"context": text, "qas": [{"question": f"how is it {number}", "answers": [answer]}]})
    files = {"labels": labelled, "tags": tagged, "read": read, "written": written}
    for name, lines in files.items():
        (folder / f"{name}.{side}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    numbered = "".join(f"{text}\t{len(text.split())}\n" for text in read)
    (folder / f"values.{side}.tsv").write_text("text\tlength\n" + numbered, encoding="utf-8")
    (folder / f"asked.{side}").write_text(json.dumps({"data": [{"paragraphs": asked}]}), encoding="utf-8")


def sides(name: str, ending: str = "") -> dict[str, Any]:
    return {side: f"{name}.{side}{ending}" for side in ("train", "heldout", "test")}


def bert(architecture: str) -> dict[str, Any]:
    return {"architecture": architecture, "shape": BERT, "start": "xavier"}  # "normal" begins with all rows alike


PAIRS = {side: [f"read.{side}", f"written.{side}"] for side in ("train", "heldout", "test")}
RECIPES: dict[str, dict[str, Any]] = {
    "classification": {
        "model": bert("BertForSequenceClassification"),
        "data": {**sides("labels"), "format": "labelled", "vocabulary": WORDS},
        "objective": {"kind": "classification", "weights": {"bad": 2.0}, "smoothing": 0.1},
    },
    "token_classification": {
        "model": bert("BertForTokenClassification"),
        "data": {**sides("tags"), "format": "tagged", "vocabulary": WORDS},
        "objective": {"kind": "token_classification"},
    },
    "question_answering": {
        "model": bert("BertForQuestionAnswering"),
        "data": {**sides("asked"), "format": "squad", "vocabulary": WORDS},
        "objective": {"kind": "question_answering"},
    },
    "regression": {
        "model": bert("BertForSequenceClassification"),
        "data": {
            **sides("values", ".tsv"),
            "format": "table",
            "columns": {"text": "text", "label": "length"},
            "vocabulary": WORDS,
        },
        "objective": {"kind": "regression"},
    },
    "sequence_to_sequence": {
        "model": {"architecture": "T5ForConditionalGeneration", "shape": T5},
        "data": {
            **PAIRS,
            "format": "parallel",
            "limit": 48,
            "vocabulary": {"kind": "bpe", "size": 300, "special": ["eos", "pad"]},
        },
        "objective": {"kind": "sequence_to_sequence", "smoothing": 0.1},
        "batch": {"rows": 8, "alike": 3},
    },
    "contrastive": {
        "model": bert("BertModel"),
        "data": {
            **{side: PAIRS[side] for side in ("train", "heldout")},
            "format": "parallel",
            "limit": 48,
            "vocabulary": WORDS,
        },
        "objective": {"kind": "contrastive", "temperature": 0.1, "symmetric": True},
    },
    "several corpora, growing": {
        "model": bert("BertForMaskedLM"),
        "data": {
            "corpora": {
                "nouns": {"sources": "text0.txt", "weight": 1},
                "others": {"sources": "text1.txt", "weight": 2},
            },
            "vocabulary": WORDS,
            "heldout": "20%",
            "heldout_from": "end",
        },
        "objective": {"kind": "masked_tokens"},
        "batch": {"rows": 8, "window": 32, "growing": [[0, 16], [8, 32]]},
    },
}


def recipe(home: Path, kind: str, **changes: Any) -> TrainRecipe:
    """A recipe by kind, with sections changed."""
    sections = {**COMMON, **RECIPES[kind]}
    for name, change in changes.items():
        both = isinstance(change, dict) and isinstance(sections.get(name), dict)
        sections[name] = {**sections[name], **change} if both else change
    return TrainRecipe.model_validate(sections).beside(home)


def train(settings: TrainRecipe, out: Path, plan: dict[str, int] | None = None, steps: int | None = None) -> Any:
    """One process's part of a run, in the group that this process belongs to, if any."""
    number, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    arguments = {"recipe": settings.plain(), "out": str(out), "plan": plan, "steps": steps}
    out.mkdir(parents=True, exist_ok=True)
    return Job("danlu.train.worker:work", arguments, out).run(number, world, number, Stopping())


def curve(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line.get(name) for name in ("loss", "validation", "quality", "batch")} for line in lines]


@cache
def alone(home: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """A run in one process, exported and tested."""
    out = home / f"alone-{kind}"
    done = train(recipe(home, kind), out)
    export(out, out / "model")
    return out, done | measure_test(out)


FIGURES = {
    "classification": {"accuracy", "macro_f1"},
    "token_classification": {"accuracy", "entity_precision", "entity_recall", "entity_f1"},
    "question_answering": {"exact_match", "answer_f1"},
    "regression": {"pearson", "spearman"},
    "sequence_to_sequence": set(),
    "contrastive": set(),
    "several corpora, growing": set(),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_it_learns_measures_and_writes_a_model_that_transformers_loads(kind: str, home: Path) -> None:
    out, done = alone(home, kind)
    lines = curve(out)
    assert lines[-1]["validation"] < lines[4]["validation"] and set(lines[-1]["quality"] or {}) == FIGURES[kind]
    assert all(done[name] == value for name, value in (lines[-1]["quality"] or {}).items())
    tested = {"bleu", "chrf"} if kind == "sequence_to_sequence" else FIGURES[kind]
    assert {name for name in done if name.startswith("test_")} == {f"test_{name}" for name in tested}
    loads = getattr(transformers, json.loads((out / "model" / "config.json").read_text())["architectures"][0])
    assert "MISSING" not in str(loads.from_pretrained(out / "model", output_loading_info=True)[1])


def test_what_is_measured_is_what_transformers_says_of_the_written_model(home: Path) -> None:
    out, done = alone(home, "classification")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    assert model.config.id2label == {0: "bad", 1: "good"}
    rows = [line.split(" ", 1) for line in (home / "labels.test").read_text(encoding="utf-8").splitlines()]
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for _, text in rows]
    labels = [model.config.id2label[one] for one in found]
    assert done["test_accuracy"] == accuracy([label for label, _ in rows], labels)
    assert json.loads((out / "test.json").read_text())["test_accuracy"] == done["test_accuracy"]


@pytest.mark.parametrize(
    ("kind", "world", "plan"),
    [
        ("classification", 2, {"shard": 2}),
        pytest.param("classification", 4, {"tensor": 2, "shard": 2, "micro_batches": 2}, marks=pytest.mark.soak),
        pytest.param("sequence_to_sequence", 2, {"tensor": 2}, marks=pytest.mark.soak),
        pytest.param("sequence_to_sequence", 4, {"data": 2, "shard": 2}, marks=pytest.mark.soak),
        ("question_answering", 2, {"data": 2}),
        ("contrastive", 2, {"shard": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value).replace("'", ""),
)
def test_any_plan_follows_one_process(kind: str, world: int, plan: dict[str, int], home: Path, tmp_path: Path) -> None:
    expected = curve(alone(home, kind)[0])
    told = run_ranks(world, train, recipe(home, kind), tmp_path, plan)
    assert all(one == told[0] for one in told)
    for mine, line in zip(curve(tmp_path), expected, strict=True):
        assert mine["batch"] == line["batch"] and abs(mine["loss"] - line["loss"]) < TOLERANCE
        assert mine["validation"] == pytest.approx(line["validation"], abs=TOLERANCE)
        assert mine["quality"] == pytest.approx(line["quality"])


@pytest.mark.parametrize("kind", ["several corpora, growing", "token_classification"])
def test_a_run_that_goes_on_gives_the_same_bits(kind: str, home: Path, tmp_path: Path) -> None:
    train(recipe(home, kind), tmp_path, steps=10)
    train(recipe(home, kind), tmp_path)
    assert curve(tmp_path) == curve(alone(home, kind)[0])


def test_corpora_are_mixed_by_weight_in_one_vocabulary(home: Path, tmp_path: Path) -> None:
    out = alone(home, "several corpora, growing")[0]
    ids = [(out / "corpus" / name / "tokenizer" / "tokenizer.json").read_text() for name in ("nouns", "others")]
    assert ids[0] == ids[1] and "splendid" in ids[0]
    other = recipe(home, "several corpora, growing", data={"heldout": "10%"})
    with pytest.raises(DanluError, match="made from other data settings") as raised:
        train(other, out)
    assert raised.value.fix == "use the recipe of that run, or another --out"


def test_a_run_that_ended_before_it_learned_can_be_deleted_for_other_data(home: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    short = recipe(home, "several corpora, growing").plain()
    short["data"] = {"sources": [str(tmp_path / "short.txt")], "vocabulary": {"kind": "characters"}}
    short["data"]["heldout_from"] = "end"
    with pytest.raises(DanluError, match="fewer than a window"):
        train(TrainRecipe.model_validate(short), tmp_path / "run")
    with pytest.raises(DanluError, match="made from other data settings") as raised:
        train(recipe(home, "several corpora, growing"), tmp_path / "run")
    assert raised.value.fix == "delete it, as it has no checkpoint to lose"


@pytest.mark.parametrize("file", ["bert-pretraining", "bert-sst2", "bert-sst2-scratch", "t5-multi30k"])
def test_recipes_that_come_along_can_be_read(file: str) -> None:
    path = Path(__file__).parents[2] / "recipes" / f"{file}.yaml"
    assert read_recipe(path, (), TrainRecipe).recipe.name == file


# --- Starting from a base -----------------------------------------------------------------------------------------


def test_a_classifier_takes_over_the_encoder_of_a_masked_model(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = alone(home, "several corpora, growing")[0]
    model = {"base": str(base), "architecture": None, "shape": {}}
    settings = recipe(home, "classification", model=model, data={"vocabulary": None})
    train(settings, tmp_path, steps=1)
    told = capsys.readouterr().err
    assert "new are head.dense.bias, head.dense.weight, head.output.bias, head.output.weight" in told
    assert "left out are head.bias" in told
    frozen = settings.model_copy(
        update={"optimizer": settings.optimizer.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})}
    )
    train(frozen, tmp_path / "still", steps=1)
    export(tmp_path / "still", tmp_path / "model")
    made, old = (StoredModel.open(place).load() for place in (tmp_path / "model", base))
    assert isinstance(made, Encoder) and made.config.head is not None and made.config.head.labels == ("bad", "good")
    for name, weight in old.state_dict().items():
        assert name.startswith("head.") or torch.equal(made.state_dict()[name], weight), name


def test_a_teacher_that_agrees_leaves_nothing_to_learn(home: Path, tmp_path: Path) -> None:
    base = str(alone(home, "classification")[0])
    changes = {
        "model": {"base": base, "architecture": None, "shape": {}},
        "data": {"vocabulary": None},
        "objective": {"teacher": base, "share": 1.0, "temperature": 3.0, "weights": {}, "smoothing": 0.0},
    }
    train(recipe(home, "classification", **changes), tmp_path, steps=1)
    assert abs(curve(tmp_path)[0]["loss"]) < 1e-6
    changes["objective"] |= {"share": 0.5}
    train(recipe(home, "classification", **changes), tmp_path / "half", steps=1)
    assert curve(tmp_path / "half")[0]["loss"] > 0.01


@given(st.lists(st.integers(1, 40), min_size=24, max_size=60), st.integers(1, 3), st.integers(0, 20))
def test_rows_of_like_length_come_together_and_all_come(lengths: list[int], together: int, seed: int) -> None:
    rows = TextPairRows(Ragged.of([[7] * length for length in lengths]), Ragged.of([[7]] * len(lengths)))
    parts = [AlikeStream(rows, 8, seed, together, rank, 2) for rank in range(2)]
    plain = MemoryStream(rows, 8, seed)
    spans, drawn, expected = [], [], []
    for step in range(together):
        batch = np.concatenate([part.indices(step) for part in parts])
        spans.append((min(lengths[row] for row in batch), max(lengths[row] for row in batch)))
        drawn += batch.tolist()
        expected += plain.indices(step).tolist()
    assert sorted(drawn) == sorted(expected)
    assert all(low[1] <= high[0] for low, high in pairwise(sorted(spans)))


# --- Reading ------------------------------------------------------------------------------------------------------


def test_tables_say_what_plain_files_say(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('label,text\n1,"a, b"\n0,中文\n', encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(
        '{"w": ["在", "北京"], "t": ["O", "B-LOC"], "a": "x", "b": "y"}\n', encoding="utf-8"
    )
    csv = RowsSettings(train=str(tmp_path / "rows.csv"), format="table", columns={"text": "text", "label": "label"})
    assert [(one.text, one.label) for one in labelled_texts(csv, "train")] == [("a, b", "1"), ("中文", "0")]
    words = RowsSettings(train=str(tmp_path / "rows.jsonl"), format="table", columns={"words": "w", "tags": "t"})
    assert tagged_words(words, "train")[0].words == ("在", "北京")
    pairs = RowsSettings(
        train=str(tmp_path / "rows.jsonl"), format="table", columns={"text": "a", "second": "b"}, swap=True
    )
    assert text_pairs(pairs, "train") == [("y", "x")]
    broken = RowsSettings(train=str(tmp_path / "rows.csv"), format="table", columns={"text": "txt", "label": "label"})
    with pytest.raises(DanluError, match="there is no column txt"):
        labelled_texts(broken, "train")


# --- What cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("classification", {"objective": {"span": 4.0}}, "span has no effect where kind is classification"),
        ("regression", {"objective": {"smoothing": 0.1}}, "smoothing has no effect"),
        ("classification", {"objective": {"temperature": 2.0}}, "without a teacher"),
        ("classification", {"objective": {"kind": "token_classification"}}, "are not for token_classification"),
        ("classification", {"objective": {"kind": "next_token", "weights": {}}}, "which data does not name"),
        ("classification", {"batch": {"window": 64}}, "rows have data.limit"),
        ("classification", {"data": {"vocabulary": None}}, "data.vocabulary is missing"),
        ("several corpora, growing", {"data": {"sources": "text0.txt"}}, "name either sources"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recipes_that_contradict_themselves(kind: str, changes: dict[str, Any], told: str, home: Path) -> None:
    with pytest.raises(ValidationError, match=told):
        recipe(home, kind, **changes)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("classification", {"objective": {"weights": {"baad": 2.0}}}, "no label 'baad' to weigh"),
        ("classification", {"data": {"limit": 4}}, "at most 4 are allowed"),
        ("classification", {"batch": {"rows": 64}}, "data.train: 48 rows are fewer than the 64 of a batch"),
        ("classification", {"validation": {"rows": 4}}, "a measurement needs 8 rows"),
        ("classification", {"model": bert("BertForMaskedLM")}, "needs a model with a head of sequence"),
        ("sequence_to_sequence", {"model": bert("BertForMaskedLM"), "data": {"vocabulary": WORDS}}, "that writes"),
        ("classification", {"data": {"train": "absent"}}, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_runs_that_cannot_be(kind: str, changes: dict[str, Any], told: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=told):
        train(recipe(home, kind, **changes), tmp_path)


def refused(settings: TrainRecipe, out: Path, plan: dict[str, int]) -> str:
    try:
        train(settings, out, plan)
    except DanluError as error:
        return error.what
    return ""


@pytest.mark.parametrize(
    ("kind", "plan", "told"),
    [
        ("classification", {"pipeline": 2}, "pipeline need rows of text that are all of one length"),
        ("contrastive", {"tensor": 2}, "compared with one another"),
    ],
)
def test_plans_that_cannot_carry_rows(kind: str, plan: dict[str, int], told: str, home: Path, tmp_path: Path) -> None:
    assert all(told in said for said in run_ranks(2, refused, recipe(home, kind), tmp_path, plan))


# --- Figures ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_macro_f1_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    wanted, found = zip(*pairs, strict=True)
    assert macro_f1(wanted, found) == pytest.approx(f1_score(wanted, found, average="macro"))


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_correlations_are_scipys(pairs: list[tuple[int, int]]) -> None:
    wanted, found = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    made = correlations(wanted, found)
    if wanted.std() and found.std():
        assert made["pearson"] == pytest.approx(stats.pearsonr(wanted, found).statistic, abs=1e-9)
        assert made["spearman"] == pytest.approx(stats.spearmanr(wanted, found).statistic, abs=1e-9)
    else:
        assert made == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("B-X I-X O B-Y", {("X", 0, 1), ("Y", 3, 3)}),
        ("B-X B-X", {("X", 0, 0), ("X", 1, 1)}),
        ("I-X I-Y", {("X", 0, 0), ("Y", 1, 1)}),
        ("O I-X I-X", {("X", 1, 2)}),
        ("B-X O I-X", {("X", 0, 0), ("X", 2, 2)}),
        ("S-X B-Y E-Y I-Y", {("X", 0, 0), ("Y", 1, 2), ("Y", 3, 3)}),
        ("O O", set()),
    ],
)
def test_entities_begin_and_end_as_conlleval_says(tags: str, wanted: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == wanted


def test_an_entity_counts_only_whole() -> None:
    made = entity_f1([["B-X", "I-X", "O", "B-Y"]], [["B-X", "O", "O", "B-Y"]])
    assert made == {"entity_precision": 0.5, "entity_recall": 0.5, "entity_f1": 0.5}


def test_answers_lose_case_punctuation_and_articles_and_chinese_is_cut_into_characters() -> None:
    assert answer_scores([["The Cat!"]], ["cat"]) == {"exact_match": 1.0, "answer_f1": 1.0}
    made = answer_scores([["a big cat", "dog"], ["北京市"]], ["the cat", "北京"])
    assert made == {"exact_match": 0.0, "answer_f1": pytest.approx((2 / 3 + 4 / 5) / 2)}


def test_chinese_and_english_are_cut_each_in_its_way() -> None:
    assert translation_scores(["我喜欢小猫和小狗。"], ["我 喜欢 小猫 和 小狗。"])["bleu"] == pytest.approx(100)
    assert translation_scores(["the cat sat on the mat"], ["the cat sat on a mat"])["bleu"] < 90
    assert translation_scores(["我喜欢小猫和小狗。"], ["我喜欢小猫和小狗。"], "char")["chrf"] == pytest.approx(100)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As ranks have it, so that sums are made in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
