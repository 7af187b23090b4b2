"""Recipe -> stages -> artifacts: what is done is skipped, what broke goes on, and a missed target is said at the end.

A stage's artifact is named by its settings, its code and what it reads: change one setting, and only what depends on
it is made again. Whether anything is to be done is decided from hashes alone, without loading PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.artifact import (
    CARD,
    Artifact,
    Figures,
    build,
    canonical,
    code_version,
    content_id,
    hash_file,
    library_version,
    only_writer,
    write_aside,
    write_json,
)
from danlu.checks import check_draft, check_packages, check_room, check_target
from danlu.console import say
from danlu.errors import DanluError
from danlu.recipe import RecipeFile

if TYPE_CHECKING:
    from danlu.model.checkpoint import Checkpoint

RUN = "run.json"
PAGE = "report.html"
CERTIFICATE = "certificate.json"
DIGESTS = ".digests.json"
WEIGHT_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")  # of a Hugging Face directory, what is read


@dataclass(frozen=True)
class Step:
    """One stage ready to be made.

    Attributes:
        settings, inputs: what goes into its name; `inputs` maps a role to a digest.
        module: of danlu, whose code (and what it imports) decides the result.
        fill: puts the files into a directory and returns the figures.
    """

    settings: dict[str, Any]
    inputs: dict[str, str]
    module: str
    fill: Callable[[Path], Figures]


@dataclass
class Run:
    """A recipe being carried out in a directory; `made` holds the artifacts so far, in order."""

    file: RecipeFile
    root: Path
    made: dict[str, Artifact] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)  # stages that had work to do this time

    @cached_property
    def digests(self) -> DigestCache:
        return DigestCache(self.root / DIGESTS)

    @cached_property
    def home(self) -> Path:
        """Where the recipe's relative paths start."""
        return self.file.path.resolve().parent

    @cached_property
    def base_path(self) -> Path:
        """The checkpoint the recipe starts from, found on this machine or fetched.

        Where it was found is remembered: a hub id is looked up once, and a run stays with the revision it began with.
        """
        named = self.file.recipe.model.base
        beside = self.home / Path(named).expanduser()
        return self.digests.found(str(beside) if beside.exists() else named)

    @cached_property
    def base_digest(self) -> str:
        """SHA-256 of the base's files."""
        if self.base_path.is_file():
            return self.digests.of(self.base_path)
        files = sorted(file for file in self.base_path.iterdir() if file.suffix in WEIGHT_FILES and file.is_file())
        return _sha256({file.name: self.digests.of(file) for file in files})

    @cached_property
    def base(self) -> Checkpoint:
        from danlu.model.checkpoint import Checkpoint

        return Checkpoint.open(self.base_path)

    @cached_property
    def tuned(self) -> Checkpoint:
        from danlu.model.checkpoint import Checkpoint

        return Checkpoint.open(self.made["tune"].path / "model")

    @property
    def certificate(self) -> dict[str, Any]:
        """What was certified; empty before that."""
        return _read_json(self.made["certify"].path / CERTIFICATE) if "certify" in self.made else {}

    def make(self, stage: str, until: str) -> None:
        """Make one stage's artifact, or find it made."""
        step = STEPS[stage](self)
        code = code_version(step.module)
        name = content_id(stage, step.settings, step.inputs, code)
        if not self.fresh and not (self.root / f"{stage}-{name}").is_dir():
            self.check(STAGES[STAGES.index(stage) : STAGES.index(until) + 1])
        artifact, already = build(
            self.root, stage, settings=step.settings, inputs=step.inputs, code=code, fill=step.fill
        )
        self.made[stage] = artifact
        if already:
            say(f"{stage}: already done ({artifact.path.name})")
            return
        self.fresh.append(stage)
        card = artifact.card
        memory = card["peak_memory_bytes"] / 1e9
        say(f"{stage}: done in {card['seconds']:.1f} s, peak memory {memory:.2f} GB ({artifact.path.name})")

    def check(self, stages: Sequence[str]) -> None:
        """Raise DanluError for what would end these stages later: a missing library, no model, no room, no hope."""
        check_packages(self.file.recipe, stages)
        check_room(self.root, self.base.config, self.file.recipe, stages)
        if "compress" in stages or "certify" in stages:
            check_target(self.file, self.base.config)
        if "certify" in stages:
            check_draft(self.file, self.home)

    def raise_if_missed(self) -> None:
        """Raise TargetMissed if the certificate says so: which lines, and by how much."""
        if not self.certificate.get("passed", True):
            from danlu.device.certify import missed

            if error := missed(self.certificate, self.made["certify"].path / CERTIFICATE):
                raise error

    def summary(self) -> dict[str, Any]:
        """The run as JSON-ready values."""
        stages = [
            {
                "stage": stage,
                "directory": str(artifact.path),
                "done": "now" if stage in self.fresh else "already",
                "seconds": artifact.card["seconds"],
                "peak_memory_bytes": artifact.card["peak_memory_bytes"],
                "figures": artifact.figures,
            }
            for stage, artifact in self.made.items()
        ]
        return {"run": str(self.root), "stages": stages, "passed": self.certificate.get("passed")}

    def record(self) -> None:
        """Write run.json, unless it says the same already."""
        stages = {stage: artifact.path.name for stage, artifact in self.made.items()}
        place = self.root / RUN
        before = _read_json(place)
        earlier = dict(list(before.get("stages", {}).items())[: len(stages)])
        if earlier == stages and before.get("recipe") == self.file.recipe.plain():
            return  # the same run, perhaps further than it was asked to go this time
        recipe = {"file": str(self.file.path), "recipe": self.file.recipe.plain()}
        write_json(place, {"name": self.file.recipe.name, **recipe, "stages": stages})

    def put_report(self) -> None:
        """Copy the report to where people look for it, unless it lies there already."""
        made, shown = self.made["report"].path / PAGE, self.root / PAGE
        if not shown.is_file() or hash_file(shown) != hash_file(made):
            write_aside(shown, made.read_text(encoding="utf-8"))

    def mention_leftovers(self) -> None:
        """Say what attempts with other settings, stopped before their end, still take on the disk."""
        for draft in sorted(self.root.glob(".*.building")):
            size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
            say(f"{draft}: unfinished, of other settings, {size / 1e6:,.0f} MB; delete it if it is not wanted")


def run_recipe(file: RecipeFile, out: Path | None = None, until: str = "report", wait: bool = True) -> Run:
    """Carry out a recipe up to a stage, and return the run; `raise_if_missed` on it says whether the target is met.

    Args:
        file: the recipe.
        out: the run's directory; None: runs/NAME.
        until: the last stage to do, one of STAGES.
        wait: wait for another process at work in the directory, or raise DanluError.
    """
    root = out or Path("runs") / file.recipe.name
    with only_writer(root, wait):
        run = Run(file, root)
        for stage in STAGES[: STAGES.index(until) + 1]:
            run.make(stage, until)
            run.record()
        if "report" in run.made:
            run.put_report()
            run.mention_leftovers()
    return run


# --- The stages: what each reads, and which code makes it -----------------------------------------------------------

_TUNED, _HELDOUT = ("tune", ("model/",)), ("data", ("heldout",))
READS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {  # stage -> role -> (earlier stage, the files read of it)
    "data": {},
    "tune": {"data": ("data", ("train/",))},
    "evaluate": {"tuned": _TUNED, "data": _HELDOUT},
    "compress": {"tuned": _TUNED, "data": _HELDOUT},
    "certify": {"tuned": _TUNED, "data": _HELDOUT, "model": ("compress", ("model.gguf",))},
}


def digests_read(stage: str, made: Mapping[str, Artifact]) -> dict[str, str]:
    """Role -> digest of what a stage reads of earlier artifacts, and so must be made again for."""
    if stage == "report":  # of every artifact its card, times and all
        return {earlier: hash_file(made[earlier].path / CARD) for earlier in made if earlier != "report"}
    return {role: made[earlier].digest_of(*files) for role, (earlier, files) in READS[stage].items()}


def _data(run: Run) -> Step:
    from danlu.data.sources import fingerprint

    settings, seed = run.file.recipe.data, run.file.recipe.seed
    located = settings.beside(run.home)
    found = fingerprint(located, run.digests.of)
    sources = {name.removeprefix(f"{run.home}/"): digest for name, digest in found.items()}

    def fill(out: Path) -> Figures:
        from danlu.data.build import build_data

        return build_data(located, run.base.tokenizer, out, seed)

    inputs = {"base": run.base_digest, "sources": _sha256(sources)}
    return Step({**settings.plain(), "seed": seed}, inputs, "data/build", fill)


def _tune(run: Run) -> Step:
    settings, seed, data = run.file.recipe.tune, run.file.recipe.seed, run.made["data"]

    def fill(out: Path) -> Figures:
        from danlu.train.stage import tune

        return tune(settings, run.base, data.path, out, seed)

    inputs = {"base": run.base_digest, **digests_read("tune", run.made)}
    return Step({**settings.plain(), "seed": seed}, inputs, "train/stage", fill)


def _evaluate(run: Run) -> Step:
    settings, seed, data = run.file.recipe.evaluate, run.file.recipe.seed, run.made["data"]

    def fill(out: Path) -> Figures:
        from danlu.evaluate.stage import evaluate

        return evaluate(settings, run.base, run.tuned, data.path, out, seed)

    inputs = {"base": run.base_digest, **digests_read("evaluate", run.made)}
    return Step({**settings.plain(), "seed": seed}, inputs, "evaluate/stage", fill)


def _compress(run: Run) -> Step:
    settings, target, data = run.file.recipe.compress, run.file.recipe.target, run.made["data"]

    def fill(out: Path) -> Figures:
        from danlu.compress.presets.stage import compress

        return compress(settings, target, run.tuned, data.path, out)

    inputs = {"machine": machine(), **digests_read("compress", run.made)}
    return Step({**settings.plain(), "target": target.plain()}, inputs, "compress/presets/stage", fill)


def _certify(run: Run) -> Step:
    settings, target, data = run.file.recipe.certify, run.file.recipe.target, run.made["data"]
    exported, located = run.made["compress"], settings.beside(run.home)

    def fill(out: Path) -> Figures:
        from danlu.device.certify import certify

        return certify(located, target, run.tuned, exported.path / "model.gguf", data.path, out)

    inputs = {"machine": machine(), **digests_read("certify", run.made)}
    if located.draft is not None:
        inputs["draft"] = run.digests.of(Path(located.draft))
    return Step({**settings.plain(), "target": target.plain()}, inputs, "device/certify", fill)


def _report(run: Run) -> Step:
    name, artifacts = run.file.recipe.name, dict(run.made)

    def fill(out: Path) -> Figures:
        from danlu.report import write_report

        return write_report(out, artifacts, name)

    return Step({"name": name}, digests_read("report", artifacts), "report", fill)


STEPS: dict[str, Callable[[Run], Step]] = {
    "data": _data,
    "tune": _tune,
    "evaluate": _evaluate,
    "compress": _compress,
    "certify": _certify,
    "report": _report,
}
STAGES = tuple(STEPS)


def artifacts_of(root: Path) -> dict[str, Path]:
    """Stage -> the artifact's directory, in order, as run.json of a run's directory names them."""
    try:
        return {stage: root / name for stage, name in json.loads((root / RUN).read_text("utf-8"))["stages"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DanluError("is damaged", where=root / RUN, fix="run the recipe again") from None


# --- Digests --------------------------------------------------------------------------------------------------------


class DigestCache:
    """What took long to find out, remembered in a file: SHA-256 of files, and where models were found.

    A digest holds for as long as the file's size, time of change and inode stay the same.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        remembered = _read_json(place)
        self.files: dict[str, list[Any]] = remembered.get("files", {})
        self.models: dict[str, str] = remembered.get("models", {})

    def of(self, path: Path) -> str:
        """The digest of a file; read anew only where the file has changed."""
        status = path.stat()
        seen = [status.st_size, status.st_mtime_ns, status.st_ino]
        name = str(path.resolve())
        if self.files.get(name, [])[:3] != seen:
            self.files[name] = [*seen, hash_file(path)]
            self._remember()
        return str(self.files[name][3])

    def found(self, model: str) -> Path:
        """Where a model lies, by the name a recipe gives it."""
        known = self.models.get(model)
        if known is None or not Path(known).exists():
            from danlu.model.checkpoint import find_checkpoint

            self.models[model] = str(find_checkpoint(model))
            self._remember()
        return Path(self.models[model])

    def _remember(self) -> None:
        write_json(self.place, {"files": self.files, "models": self.models})


def machine() -> str:
    """SHA-256 of what a measured speed depends on: the processor, its cores, and the engine's version."""
    from danlu.device.probe import processor

    engine = library_version("llama-cpp-python")
    return _sha256({"processor": processor(), "cores": os.cpu_count(), "engine": engine})


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _read_json(place: Path) -> dict[str, Any]:
    """A JSON object of the run directory; empty where it is absent or damaged, for it can be made again."""
    try:
        value = json.loads(place.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
