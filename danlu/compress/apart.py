"""Whether two texts are apart: what a model was fitted to says nothing about how well it fits anything else."""

from __future__ import annotations

from zlib import crc32

from danlu.errors import DanluError

RUN = 40  # characters, spaces left out, that two texts hardly share by chance
ANCHOR = 8  # characters whose checksum says whether a run begins here, so that both texts are cut alike
EVERY = 16  # one place in so many begins a run
MOST = 0.2  # share of the held-out text


def shared(text: str, other: str) -> float:
    """The share of a text's runs of characters that another text holds too; 0 where it is too short for any."""
    runs, known = _runs(text), set(_runs(other))
    return sum(run in known for run in runs) / len(runs) if runs else float(bool(text.strip()) and text in other)


def check_apart(calibration: str, heldout: str) -> None:
    """Raise DanluError where a large part of the held-out text is in the calibration text."""
    share = shared(heldout, calibration)
    if share > MOST:
        what = f"{share:.0%} of the held-out text is in the calibration text: measuring there would only flatter"
        raise DanluError(what, where="--heldout", fix="take documents that are not in the calibration text")


def _runs(text: str) -> list[int]:
    packed = "".join(text.split())
    raw = (packed[start : start + RUN] for start in range(max(len(packed) - RUN + 1, 0)))  # one at a time
    return [hash(run) for run in raw if crc32(run[:ANCHOR].encode("utf-8", "surrogatepass")) % EVERY == 0]
