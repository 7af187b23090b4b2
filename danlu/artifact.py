"""A finished directory with a card: what it was made from, with which settings, and what was measured about it.

An artifact is built in a hidden directory beside its place and renamed when whole, so it exists complete or not at
all. Its name holds the hash of everything that went in; the same ingredients are never cooked twice.
"""

from __future__ import annotations

import ast
import ctypes
import fcntl
import gc
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from danlu import __version__
from danlu.console import say
from danlu.errors import DanluError

CARD = "card.json"
WORK = "work"  # where an unfinished stage keeps what it can resume from; removed before the rename
LIBRARIES = ("torch", "tokenizers", "llama-cpp-python")  # those whose version can change a figure; noted on the card
Figures = dict[str, Any]


def figure(value: float, unit: str, low: float | None = None, high: float | None = None, by: str | None = None) -> dict:
    """A measured number never travels alone: its unit, its 95 % interval where it is an estimate, how it was got."""
    made: dict[str, Any] = {"value": value, "unit": unit}
    if low is not None and high is not None:
        made |= {"low": low, "high": high}
    if by is not None:
        made["by"] = by
    return made


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk.

    Attributes:
        path: its directory.
        card: the parsed card.json: kind, id, inputs, settings, figures, files, code, libraries, machine, made, seconds,
            peak_memory_bytes, resumed.
    """

    path: Path
    card: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.card["kind"])

    @property
    def figures(self) -> Figures:
        return dict(self.card["figures"])

    @property
    def digest(self) -> str:
        """SHA-256 over the files' own hashes: the identity of all that is in here."""
        return self.digest_of("")

    def digest_of(self, *prefixes: str) -> str:
        """The same over the files that start with one of the prefixes: what a later stage reads, and so depends on."""
        files = {name: about["sha256"] for name, about in self.card["files"].items() if name.startswith(prefixes)}
        return hashlib.sha256(canonical(files).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Open a finished artifact; raises DanluError where the card is absent or broken, or a file gone or cut."""
        try:
            card = json.loads((path / CARD).read_text(encoding="utf-8"))
            files = card["files"].items()
        except FileNotFoundError:
            raise DanluError("is no Danlu artifact: it has no card.json", where=path) from None
        except NotADirectoryError:
            raise DanluError("is a file, not an artifact's directory", where=path) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DanluError(
                "the card is damaged", where=path / CARD, fix=f"delete {path} and run the recipe again"
            ) from None
        for name, about in files:
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != about["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes, the card says {about['bytes']:,}"
                raise DanluError(found, where=file, fix=f"delete {path} and run the recipe again")
        return cls(path, card)

    def verify(self) -> None:
        """Compare every file with the SHA-256 in the card; raises DanluError naming the first that differs."""
        for name, about in self.card["files"].items():
            if hash_file(self.path / name) != about["sha256"]:
                fix = f"delete {self.path} and run the recipe again"
                raise DanluError("differs from its checksum in the card", where=self.path / name, fix=fix)


def canonical(value: object) -> str:
    """JSON with one spelling for equal values, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


HOME = Path(__file__).parent
BYSTANDERS = {HOME / f"{name}.py" for name in ("__init__", "artifact", "console", "errors", "settings")}


@cache
def code_version(module: str) -> str:
    """SHA-256 over the source of a module of danlu and of all it imports, directly or not: other code, other artifact.

    Files named after a module, as report.html.j2, belong to it. What only speaks, names or packs (`BYSTANDERS`) does
    not count.

    Args:
        module: its path, as in "train/stage".
    """
    found: set[Path] = set()
    waiting = [HOME / f"{module}.py"]
    while waiting:
        file = waiting.pop()
        if file not in found | BYSTANDERS:
            found |= set(file.parent.glob(f"{file.stem}.*"))
            waiting += _imported(file)
    sources = {str(file.relative_to(HOME)): hash_file(file) for file in found}
    return hashlib.sha256(canonical(sources).encode()).hexdigest()


@cache
def _imported(file: Path) -> list[Path]:
    """The files of danlu that a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    places = [HOME.joinpath(*name.split(".")[1:]) for name in names if name.split(".")[0] == "danlu"]
    return [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]


def check_parent(path: Path) -> None:
    """Raises DanluError where the directory that a file is to lie in is not there: best before minutes are spent."""
    if not path.parent.is_dir():
        raise DanluError("there is no such directory", where=path.parent, fix="make it, or name another place")


def write_aside(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between.

    Raises DanluError where its directory is not there.
    """
    check_parent(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON aside and rename it into place."""
    write_aside(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def user_cache() -> Path:
    """Where Danlu keeps what can be made again and belongs to no artifact."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "danlu"


def sync(path: Path) -> None:
    """Make a file's content, or the names inside a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_writer(root: Path, wait: bool = True) -> Iterator[None]:
    """Hold the one right to write in a run directory; a second process waits, saying so, or is refused.

    The kernel drops the lock with the process, so a killed run leaves nothing to clean up.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DanluError("is a file, and a directory is needed there", where=root, fix="choose another --out") from None
    with (root / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            if not wait:
                raise DanluError(
                    f"another danlu (process {holder}) is working here", where=root, fix="wait for it, or end it"
                ) from None
            say(f"{root}: another danlu (process {holder}) is working here; waiting for it to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def content_id(kind: str, settings: object, inputs: Mapping[str, str], code: str) -> str:
    """The name an artifact gets from its ingredients: 12 hexadecimal digits of a SHA-256."""
    made_from = {"kind": kind, "settings": settings, "inputs": dict(inputs), "code": code}
    return hashlib.sha256(canonical(made_from).encode()).hexdigest()[:12]


def build(
    root: Path,
    kind: str,
    *,
    settings: dict[str, Any],
    inputs: Mapping[str, str],
    code: str,
    fill: Callable[[Path], Figures],
) -> tuple[Artifact, bool]:
    """Return the artifact made of these ingredients, making it if it is not there yet.

    Args:
        root: the run directory; the caller holds `only_writer(root)`.
        kind: the stage's name, the first part of the directory's name.
        settings, inputs, code: the ingredients, hashed into the name. `inputs` maps a role to a digest.
        fill: puts the files into the directory it is given and returns the figures. What it needs to go on from after
            a crash it keeps in the subdirectory `work`, which is removed at the end. Where there is one, it gets the
            directory back as it was left, less hidden files; otherwise it always finds it empty.

    Returns: the artifact, and whether it was already there.
    """
    name = content_id(kind, settings, inputs, code)
    place = root / f"{kind}-{name}"
    if place.is_dir():
        return Artifact.load(place), True
    draft = root / f".{kind}-{name}.building"
    resumed = (draft / WORK).is_dir()
    if resumed:
        say(f"{kind}: going on from where it was cut short")
    draft.mkdir(exist_ok=True)
    _clear(draft)
    _forget_peak_memory()
    started = time.monotonic()
    try:
        figures = fill(draft)
    except BaseException:
        _clear(draft)
        if not any(draft.iterdir()):
            draft.rmdir()
        raise
    seconds = time.monotonic() - started
    shutil.rmtree(draft / WORK, ignore_errors=True)
    card = make_card(
        kind, settings, inputs, code, figures, inventory(draft), seconds=seconds, memory=peak_memory(), resumed=resumed
    )
    write_json(draft / CARD, card)
    sync(draft)
    draft.rename(place)
    sync(root)
    return Artifact(place, card), False


def make_card(
    kind: str,
    settings: object,
    inputs: Mapping[str, str],
    code: str,
    figures: Figures,
    files: dict[str, dict[str, Any]],
    *,
    seconds: float,
    memory: int,
    resumed: bool,
) -> dict[str, Any]:
    """What card.json says; see `Artifact.card`. Ingredients are as of `build`, files as of `inventory`."""
    return {
        "kind": kind,
        "id": content_id(kind, settings, inputs, code),
        "inputs": dict(inputs),
        "settings": settings,
        "figures": figures,
        "files": files,
        "code": code,
        "danlu": __version__,
        "libraries": {library: found for library in LIBRARIES if (found := library_version(library))},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": memory,
        "resumed": resumed,
    }


def _clear(draft: Path) -> None:
    """Remove what a cut-short attempt left half-written: everything, or beside `work` what was being written aside."""
    resumable = (draft / WORK).is_dir()
    for left in list(draft.rglob(".*") if resumable else draft.iterdir()):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def inventory(draft: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, each made durable before it is vouched for."""
    files = {}
    for file in sorted(draft.rglob("*")):
        if file.is_file():
            sync(file)
            files[str(file.relative_to(draft))] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    return files


def library_version(library: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _forget_peak_memory() -> None:
    """Give back what an earlier stage no longer needs, and start the kernel's high-water mark of this process anew.

    The C library keeps freed memory for later unless told otherwise: malloc_trim(3), proc_pid_clear_refs(5); Linux.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # elsewhere the mark is that of the whole process, which is an upper bound
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes this process held in RAM at most, since `_forget_peak_memory`.

    Linux counts into getrusage's maximum what the parent held when it forked, so the kernel's mark of this program's
    own memory is read.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
