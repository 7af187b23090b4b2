"""Checkpoints of a run under way: written aside, checksummed, and resumed from bit for bit.

A checkpoint is one safetensors file with the optimizer's state and one JSON file with the step and the checksum. The
JSON file comes last, so a checkpoint without one never happened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from danlu.artifact import hash_file, sync, write_json
from danlu.console import say, warn
from danlu.errors import DanluError


def save(home: Path, step: int, tensors: Mapping[str, Tensor], keep: int) -> None:
    """Save the state after `step` steps into `home` and remove all but the last `keep` checkpoints.

    Raises DanluError where the disk is full; what was saved before stays as it was.
    """
    home.mkdir(parents=True, exist_ok=True)
    weights, note = _files(home, step)
    aside = weights.with_suffix(".aside")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
        sync(aside)
        aside.replace(weights)
        write_json(note, {"step": step, "sha256": hash_file(weights)})
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        last = _saved(home)
        kept = f"the checkpoint of step {last[-1]} stays" if last else "there is no earlier checkpoint"
        raise DanluError(
            f"the checkpoint of step {step} cannot be written ({error}); {kept}",
            where=home,
            fix="free some space on the disk and run the same command again",
        ) from None
    for old in _saved(home)[:-keep]:
        for file in reversed(_files(home, old)):
            file.unlink(missing_ok=True)


def resume(home: Path) -> tuple[int, dict[str, Tensor]] | None:
    """The newest whole checkpoint as (steps done, tensors), or None. A damaged one is passed over, aloud."""
    for step in reversed(_saved(home)):
        weights, note = _files(home, step)
        try:
            known = json.loads(note.read_text(encoding="utf-8"))["sha256"]
            if hash_file(weights) != known:
                raise ValueError("its checksum differs")
            tensors = load_file(weights)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warn(f"{weights}: the checkpoint of step {step} is damaged ({error}); using the one before")
            continue
        say(f"tune: goes on after step {step}")
        return step, tensors
    return None


def _saved(home: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    return sorted(int(note.stem.removeprefix("step-")) for note in home.glob("step-*.json"))


def _files(home: Path, step: int) -> tuple[Path, Path]:
    return home / f"step-{step:08d}.safetensors", home / f"step-{step:08d}.json"
