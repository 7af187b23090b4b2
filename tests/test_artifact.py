"""Artifacts exist whole or not at all, whatever happens while they are made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import danlu.artifact
from danlu.artifact import CARD, WORK, Artifact, build, code_version, content_id, only_writer, write_aside, write_json
from danlu.errors import DanluError


def make(root: Path, fill, settings=None, inputs=None) -> tuple[Artifact, bool]:
    return build(root, "data", settings=settings or {"rows": 3}, inputs=inputs or {"file": "f00d"}, code="1", fill=fill)


def write_rows(out: Path) -> dict:
    (out / "train").mkdir()
    (out / "train" / "rows.txt").write_text("炼丹\n", encoding="utf-8")
    (out / "heldout.txt").write_text("丹炉\n", encoding="utf-8")
    return {"rows": 1}


def test_the_card_tells_what_was_made_and_from_what(tmp_path: Path) -> None:
    artifact, already = make(tmp_path, write_rows)
    card = json.loads((artifact.path / CARD).read_text(encoding="utf-8"))
    assert not already
    assert artifact.path.name == f"data-{card['id']}"
    assert card["inputs"] == {"file": "f00d"} and card["settings"] == {"rows": 3} and card["figures"] == {"rows": 1}
    assert set(card["files"]) == {"train/rows.txt", "heldout.txt"}
    assert card["files"]["heldout.txt"]["bytes"] == 7
    assert card["peak_memory_bytes"] > 1_000_000 and card["seconds"] >= 0
    assert not list(tmp_path.glob(".data-*")), "the draft is gone"


def test_the_same_ingredients_are_not_cooked_twice(tmp_path: Path) -> None:
    first, _ = make(tmp_path, write_rows)
    second, already = make(tmp_path, lambda out: pytest.fail("made again"))
    assert already and second == first


@pytest.mark.parametrize("changed", [{"settings": {"rows": 4}}, {"inputs": {"file": "beef"}}])
def test_other_ingredients_make_another_artifact(tmp_path: Path, changed: dict) -> None:
    first, _ = make(tmp_path, write_rows)
    second, already = make(tmp_path, write_rows, **changed)
    assert not already and second.path != first.path and first.path.is_dir()


def test_the_id_does_not_depend_on_the_order_of_keys() -> None:
    assert content_id("a", {"x": 1, "y": 2}, {}, "c") == content_id("a", {"y": 2, "x": 1}, {}, "c")
    assert content_id("a", {"x": 1}, {}, "c") != content_id("a", {"x": 1.5}, {}, "c")


def test_a_digest_covers_only_what_is_read(tmp_path: Path) -> None:
    def write_other_heldout(out: Path) -> dict:
        write_rows(out)
        (out / "heldout.txt").write_text("other", encoding="utf-8")
        return {}

    one, _ = make(tmp_path, write_rows)
    other, _ = make(tmp_path, write_other_heldout, settings={"rows": 4})
    assert one.digest_of("train/") == other.digest_of("train/")
    assert one.digest_of("heldout") != other.digest_of("heldout")
    assert one.digest != other.digest


def test_a_crash_leaves_what_can_be_gone_on_from(tmp_path: Path) -> None:
    def crash(out: Path) -> dict:
        (out / WORK).mkdir()
        (out / WORK / "checkpoint").write_text("step 7")
        (out / "metrics.jsonl").write_text("{}\n")
        (out / ".model.1234.aside").mkdir()
        (out / ".model.1234.aside" / "half-written").write_text("x")
        raise RuntimeError("power cut")

    def resume(out: Path) -> dict:
        assert {path.name for path in out.iterdir()} == {WORK, "metrics.jsonl"}
        return write_rows(out) | {"from": (out / WORK / "checkpoint").read_text()}

    with pytest.raises(RuntimeError):
        make(tmp_path, crash)
    assert not list(tmp_path.glob("data-*"))
    artifact, already = make(tmp_path, resume)
    assert not already
    assert artifact.figures["from"] == "step 7" and artifact.card["resumed"] is True
    assert set(artifact.card["files"]) == {"metrics.jsonl", "train/rows.txt", "heldout.txt"}


def test_what_a_kill_left_without_work_is_begun_anew(tmp_path: Path) -> None:
    draft = tmp_path / f".data-{content_id('data', {'rows': 3}, {'file': 'f00d'}, '1')}.building"
    (draft / "train").mkdir(parents=True)
    (draft / "train" / "half-written").write_text("x")
    artifact, _ = make(tmp_path, write_rows)
    assert set(artifact.card["files"]) == {"train/rows.txt", "heldout.txt"}
    assert artifact.card["resumed"] is False


def test_a_mistake_found_early_leaves_nothing(tmp_path: Path) -> None:
    def refuse(out: Path) -> dict:
        (out / "half-written").write_text("x")
        raise DanluError("no rows")

    with pytest.raises(DanluError):
        make(tmp_path, refuse)
    assert not list(tmp_path.iterdir())


def test_damage_is_found(tmp_path: Path) -> None:
    artifact, _ = make(tmp_path, write_rows)
    file = artifact.path / "heldout.txt"
    file.write_bytes(b"x" * 7)
    with pytest.raises(DanluError, match="differs from its checksum"):
        Artifact.load(artifact.path).verify()
    file.write_bytes(b"x")
    with pytest.raises(DanluError, match="has 1 bytes, the card says 7"):
        Artifact.load(artifact.path)
    file.unlink()
    with pytest.raises(DanluError, match="is missing"):
        Artifact.load(artifact.path)
    for damaged in ("{", "[]", '{"files": 3}'):
        (artifact.path / CARD).write_text(damaged)
        with pytest.raises(DanluError, match="card is damaged"):
            Artifact.load(artifact.path)
    (artifact.path / CARD).unlink()
    with pytest.raises(DanluError, match=r"no card\.json"):
        Artifact.load(artifact.path)


def test_the_code_version_covers_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "danlu"
    (home / "train").mkdir(parents=True)
    for name, text in {
        "train/__init__": "",
        "train/stage": "def tune():\n    from danlu.train import loop\n",
        "train/loop": "import danlu.model\nfrom danlu.console import say",
        "model": "from danlu.train.loop import train  # a circle",
        "console": "",
        "report": "from danlu.train import stage",
    }.items():
        (home / f"{name}.py").write_text(text)
    (home / "model.html.j2").write_text("<p>")
    monkeypatch.setattr(danlu.artifact, "HOME", home)
    monkeypatch.setattr(danlu.artifact, "BYSTANDERS", {home / "console.py"})

    def after_changing(name: str) -> str:
        with (home / (name if "." in name else f"{name}.py")).open("a") as file:
            file.write("\n")
        code_version.cache_clear()
        return code_version("train/stage")

    versions = [
        after_changing(name) for name in ("train/stage", "train/loop", "model", "train/__init__", "model.html.j2")
    ]
    assert len(set(versions)) == 5
    assert after_changing("report") == after_changing("console") == versions[-1]
    code_version.cache_clear()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "run.json"
    write_aside(place, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_aside(place, "new")
    assert place.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


HOLD = """
import sys, time
from pathlib import Path
from danlu.artifact import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(root: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_or_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(tmp_path, 0.5) as process:
        with (
            pytest.raises(DanluError, match=f"another danlu \\(process {process.pid}\\)"),
            only_writer(tmp_path, wait=False),
        ):
            pass
        with only_writer(tmp_path):
            assert process.wait(timeout=5) == 0, "the first one was not done"
    assert "waiting for it to finish" in capsys.readouterr().err


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    with hold(tmp_path, 60) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        started = time.monotonic()
        with only_writer(tmp_path, wait=False):
            assert time.monotonic() - started < 1


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(DanluError, match="a directory is needed"), only_writer(tmp_path / "runs" / "a"):
        pass


def test_a_file_needs_its_directory(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="there is no such directory") as caught:
        write_json(tmp_path / "not" / "a.json", {})
    assert str(tmp_path / "not") in str(caught.value) and ".aside" not in str(caught.value)
    assert not list(tmp_path.iterdir())
