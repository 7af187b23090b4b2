"""The lineage of a model: each artifact of a run, what it was made from, and what was measured about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.artifact import CARD, Artifact
from danlu.console import result, table
from danlu.errors import DanluError
from danlu.figures import show_amount, show_range, show_seconds, show_value
from danlu.pipeline import RUN, artifacts_of, digests_read


@dataclass(frozen=True)
class Hop:
    """One artifact on the way from raw data to the certificate."""

    stage: str
    artifact: Artifact

    def summary(self) -> dict[str, Any]:
        """The card without its list of files, and where it lies."""
        return {"path": str(self.artifact.path)} | {k: v for k, v in self.artifact.card.items() if k != "files"}


def lineage(directory: Path, verify: bool = False) -> list[Hop]:
    """The hops of a run's directory in order, or the one of an artifact's directory.

    With `verify`, every file is compared with its checksum, and every hop with what the hop before it holds.
    Raises DanluError where there is no run and no artifact, or where something does not fit together.
    """
    if (directory / RUN).is_file():
        hops = [Hop(stage, Artifact.load(path)) for stage, path in artifacts_of(directory).items()]
    elif (directory / CARD).is_file():
        artifact = Artifact.load(directory)
        hops = [Hop(artifact.kind, artifact)]
    else:
        raise DanluError(
            "is neither a run nor an artifact", where=directory, fix="give a directory that danlu run made"
        )
    if verify:
        for hop in hops:
            hop.artifact.verify()
        if (directory / RUN).is_file():
            _verify_chain(hops)
    return hops


def _verify_chain(hops: list[Hop]) -> None:
    """Each card names by digest what its stage read; that must be what lies there now."""
    made = {hop.stage: hop.artifact for hop in hops}
    for hop in hops:
        for role, digest in digests_read(hop.stage, made).items():
            if hop.artifact.card["inputs"].get(role) != digest:
                fix = "run the recipe again: what depends on it is made anew"
                raise DanluError(f"was made from another {role} than this run holds", where=hop.artifact.path, fix=fix)


def print_lineage(hops: list[Hop], verified: bool) -> None:
    """The hops as one table on standard output: figures with their intervals."""
    rows: list[tuple[str, str, str]] = []
    for number, hop in enumerate(hops):
        card = hop.artifact.card
        cost = f"{show_seconds(card['seconds'])}, {show_amount(card['peak_memory_bytes'], 'bytes')}"
        rows.append((hop.artifact.path.name, cost, ""))
        rows += [(f"  from {role}", digest[:12], "") for role, digest in card["inputs"].items()]
        rows += [(f"  {name}", value, interval) for name, value, interval in figure_rows(hop.artifact.figures)]
        if number < len(hops) - 1:
            rows.append(("", "", ""))
    table("made, in this order", ("artifact", "value", "95 % interval"), rows)
    if verified:
        files = sum(len(hop.artifact.card["files"]) for hop in hops)
        result(f"verified: {files} files match their checksums, and every hop was made from the one before")


def figure_rows(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, value, interval) of every figure, however nested; lists are counted."""
    for key, about in figures.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(about, Mapping) and "value" in about:
            yield name, show_value(about), show_range(about)
        elif isinstance(about, Mapping):
            yield from figure_rows(about, f"{name}, ")
        elif isinstance(about, list | tuple):
            yield name, f"{len(about)} entries", ""
        else:
            yield name, show_amount(about), ""
