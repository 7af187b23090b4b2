"""From a recipe to a certified model: once, only what is needed, and never two at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from danlu.artifact import Artifact
from danlu.pipeline import READS, STAGES, DigestCache
from tests.conftest import Project


@pytest.fixture
def copy(finished: Project, tmp_path: Path) -> Project:
    """The finished project, free to be changed."""
    shutil.copytree(finished.home, tmp_path / "copy", symlinks=True)
    return Project(tmp_path / "copy")


def stages(run: Path) -> dict[str, str]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]


def made_anew(project: Project, *words: str) -> set[str]:
    """The stages that had work to do when the recipe is carried out with these words."""
    before = stages(project.run)
    ended = project.here("run", project.recipe, "--json", *words)
    assert ended.returncode == 0, ended.stderr
    assert all((project.run / name).is_dir() for name in before.values()), "an old artifact is gone"
    return {stage["stage"] for stage in json.loads(ended.stdout)["stages"] if stage["done"] == "now"}


def test_a_run_leaves_whole_artifacts_and_a_report(finished: Project) -> None:
    assert list(stages(finished.run)) == ["data", "tune", "evaluate", "compress", "certify", "report"]
    for name in stages(finished.run).values():
        Artifact.load(finished.run / name).verify()
    for file in ("data/train/tokens.npy", "tune/model/model.safetensors", "evaluate/answers.jsonl",
                 "compress/model.gguf", "certify/certificate.json"):  # fmt: skip
        stage, _, rest = file.partition("/")
        assert (finished.run / stages(finished.run)[stage] / rest).is_file()
    assert "<html" in (finished.run / "report.html").read_text(encoding="utf-8")
    visible = {path.name for path in finished.run.iterdir() if not path.name.startswith(".")}
    assert visible == {*stages(finished.run).values(), "run.json", "report.html"}


def test_a_second_run_does_nothing_and_loads_no_torch(copy: Project) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in copy.run.rglob("*") if path.name != ".lock"}

    copy.here("run", copy.recipe)  # a copied model has another inode, and is hashed again
    before = times()
    code = "import sys\nfrom danlu.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", code, "run", "recipe.yaml"], cwd=copy.home, capture_output=True, text=True, check=False
    )
    assert time.monotonic() - started < 10
    assert ended.returncode == 0, ended.stderr
    assert [line.split(":")[1].split(" (")[0] for line in ended.stderr.splitlines()[:6]] == [" already done"] * 6
    assert times() == before


def test_a_changed_setting_makes_anew_what_depends_on_it(copy: Project) -> None:
    assert made_anew(copy, "--set", "certify.repeats=1") == {"certify", "report"}
    assert made_anew(copy, "--set", "tune.steps=3", "--until", "tune") == {"tune"}
    assert list(stages(copy.run)) == ["data", "tune"], "run.json tells of the present recipe alone"
    assert made_anew(copy) == set(), "and back"
    assert list(stages(copy.run)) == list(STAGES)


def test_what_comes_out_the_same_is_not_carried_further(copy: Project) -> None:
    """Another file of the same rows: the data is made again, and as its tokens are the same, the weights are not."""
    with (copy.home / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n\n")
    assert made_anew(copy, "--until", "tune") == {"data"}


def test_the_second_of_two_runs_waits_or_is_refused(project: Project) -> None:
    words = [sys.executable, "-m", "danlu", "run", "recipe.yaml", "--until", "tune"]
    with subprocess.Popen(words, cwd=project.home, stderr=subprocess.PIPE, text=True) as first:
        patience = time.monotonic() + 60
        while not (project.run / ".lock").exists() or not (project.run / ".lock").read_text():
            assert time.monotonic() < patience
            time.sleep(0.02)
        refused = project.danlu("run", project.recipe, "--until", "tune", "--no-wait")
        waited = project.danlu("run", project.recipe, "--until", "tune")
        _, said = first.communicate()
    assert first.returncode == 0, said
    assert refused.returncode == 2
    assert f"runs/tiny: another danlu (process {first.pid}) is working here" in refused.stderr
    assert waited.returncode == 0
    assert "waiting for it to finish" in waited.stderr and waited.stderr.count("already done") == 2


def test_a_missed_target_says_which_and_by_how_much(copy: Project) -> None:
    words = ("run", copy.recipe, "--set", "target.memory=20MB", "--set", "target.quality_loss=90%")
    for _ in range(2):  # the second run does nothing, and says the same
        ended = copy.here(*words)
        assert ended.returncode == 1, ended.stderr
        assert "Traceback" not in ended.stderr
        told = ended.stderr[ended.stderr.index("danlu: ") :]
        assert "the target is missed" in told and "memory" in told and "MB" in told and "held-out" not in told
    assert ended.stderr.count("already done") == len(STAGES)
    certificate = json.loads((copy.run / stages(copy.run)["certify"] / "certificate.json").read_text())
    assert certificate["passed"] is False
    assert (copy.run / "report.html").is_file()


def test_paths_start_at_the_recipe_wherever_one_stands(copy: Project, tmp_path: Path) -> None:
    elsewhere = Project(tmp_path)
    ended = elsewhere.here("run", copy.recipe, "--out", copy.run, "--until", "data")
    assert ended.returncode == 0, ended.stderr
    assert "data: already done" in ended.stderr


def test_json_is_all_there_is_on_standard_output(finished: Project) -> None:
    told = json.loads(finished.here("run", finished.recipe, "--json").stdout)
    assert [stage["stage"] for stage in told["stages"]] == list(STAGES)
    assert told["passed"] is True and {stage["done"] for stage in told["stages"]} == {"already"}


def test_show_tells_the_lineage_with_intervals(finished: Project) -> None:
    hops = json.loads(finished.here("show", finished.run, "--json").stdout)
    assert [hop["kind"] for hop in hops] == list(STAGES)
    table = finished.here("show", finished.run, "--verify").stdout
    assert "heldout loss change" in table and "95 % interval" in table and "verified: " in table
    one = finished.here("show", finished.run / stages(finished.run)["evaluate"]).stdout
    assert "heldout loss before" in one and "tune-" not in one


def test_show_finds_what_does_not_fit_together(copy: Project) -> None:
    tuned = copy.run / stages(copy.run)["tune"]
    weights = tuned / "model" / "model.safetensors"
    broken = bytearray(weights.read_bytes())
    broken[-1] ^= 1
    weights.write_bytes(broken)
    assert copy.here("show", copy.run).returncode == 0
    ended = copy.here("show", copy.run, "--verify")
    assert ended.returncode == 2 and "model.safetensors: differs from its checksum" in ended.stderr
    card = json.loads((copy.run / stages(copy.run)["evaluate"] / "card.json").read_text())
    card["inputs"]["tuned"] = "0" * 64
    weights.write_bytes(bytes(broken[:-1]) + bytes([broken[-1] ^ 1]))
    (copy.run / stages(copy.run)["evaluate"] / "card.json").write_text(json.dumps(card))
    ended = copy.here("show", copy.run, "--verify")
    assert ended.returncode == 2 and "was made from another tuned than this run holds" in ended.stderr
    ended = copy.here("show", copy.home)
    assert ended.returncode == 2 and "is neither a run nor an artifact" in ended.stderr


def test_export_writes_any_type(finished: Project, tmp_path: Path) -> None:
    ended = finished.here("export", finished.run, "--type", "Q4_0", "--out", tmp_path / "a.gguf", "--json")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["bytes"] == (tmp_path / "a.gguf").stat().st_size and "tune-" in told["from"]
    ended = finished.here("export", finished.run, "--type", "q9", "--out", tmp_path / "b.gguf")
    assert ended.returncode == 2 and "q9 is no type" in ended.stderr
    assert not (tmp_path / "b.gguf").exists()


def test_what_a_stage_reads_was_made_before_it() -> None:
    for stage, roles in READS.items():
        for earlier, _ in roles.values():
            assert STAGES.index(earlier) < STAGES.index(stage)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "rows", tmp_path / "cache.json"
    file.write_text("a")
    first = DigestCache(cache).of(file)
    monkeypatch.setattr("danlu.pipeline.hash_file", lambda path: f"read {path.read_text()}")
    assert DigestCache(cache).of(file) == first
    file.write_text("b")
    os.utime(file, ns=(1, 1))
    assert DigestCache(cache).of(file) == "read b"
    cache.write_text("no json")
    assert DigestCache(cache).of(file) == "read b", "a damaged cache is no obstacle"
