"""What every format of every matrix costs: divergence, bytes, seconds; corrected by what whole files measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from danlu.compress.quantizing.mixes import head_of, matrices_of
from danlu.compress.searching.allocate import Choices
from danlu.compress.searching.sensitivity import EMBEDDING, Losses, formats
from danlu.device.profile import DeviceProfile
from danlu.device.stack import bytes_per_weight
from danlu.device.workload import Matrix, Workload
from danlu.model.config import ModelConfig

DIVERGENCE, BYTES, SECONDS = range(3)
DEPTH = 160  # tokens in the cache at which decoding is timed: half of those decoded after the prompt of a measurement
DOUBT = 0.3  # how far a format's own correction is from that of all, as a share, before anything was measured

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Told:
    """What is told of a file before it is made.

    Attributes:
        divergence: nat a token. bytes: of the file. seconds: of a token in decoding.
    """

    divergence: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Costs:
    """What is known of a model's matrices on a device.

    Attributes:
        config: of the model.
        shapes: of its matrices.
        losses: divergence told, nat a token, by rounding.
        inputs: the same by rounding what matrices are multiplied with.
        profile: of the device.
        slopes: of each format, what divergence told is multiplied by.
        pace: what seconds told are multiplied by.
        fixed: bytes of a file that are no matrices.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    losses: Losses
    inputs: Losses
    profile: DeviceProfile
    fixed: int
    slopes: Mapping[str, float]
    pace: float = 1.0

    def of_config(self, config: ModelConfig, types: Sequence[str]) -> Costs:
        """Of another shape of this model, whose divergences are not known and so 0."""
        shapes = matrices_of(config)
        losses = {name: dict.fromkeys(formats(types, shape[-1]), 0.0) for name, shape in shapes.items()}
        return replace(self, config=config, shapes=shapes, losses=losses, inputs=losses)

    def choices(self) -> Choices:
        """All of it for `solve`."""
        names = tuple(self.losses)
        options = tuple(tuple(self.losses[name]) for name in names)
        return Choices(names, options, tuple(self._of(name, forms) for name, forms in zip(names, options, strict=True)))

    def _of(self, name: str, forms: Sequence[str]) -> Floats:
        return np.array([self.of(name, form) for form in forms], np.float64).T

    def of(self, name: str, form: str) -> tuple[float, float, float]:
        """Divergence, bytes and seconds of a matrix in a format."""
        rows, columns = self.shapes[name]
        looked_up = name == EMBEDDING and head_of(self.shapes) != EMBEDDING
        seconds = 0.0 if looked_up else self.pace * self.profile.matrix_seconds(Matrix(form, rows, columns))
        return (
            self.losses[name][form] * self.slopes.get(form, 1.0) + self.inputs[name][form],
            rows * columns * bytes_per_weight(form),
            seconds,
        )

    def told(self, forms: Mapping[str, str], cache: str, own: float) -> Told:
        """Of a whole file, whose divergence beside rounding is `own`."""
        divergence, size, seconds = (float(each) for each in self.totals(forms))
        return Told(divergence + own, size + self.fixed, seconds + self.rest_seconds(cache))

    def rest_seconds(self, cache: str) -> float:
        """Seconds of a token beside matrices."""
        config = self.config
        workload = Workload((), config.layers, config.heads * config.head_width, config.vocab_size)
        return self.pace * self.profile.rest_seconds(workload, depth=DEPTH, cache=cache)

    def cache_bytes(self, cache: str, context: int) -> int:
        """Of keys and values of so many tokens."""
        config = self.config
        return round(2 * config.layers * config.kv_heads * config.head_width * context * bytes_per_weight(cache))

    def totals(self, forms: Mapping[str, str]) -> Floats:
        """Divergence, bytes and seconds of all matrices."""
        return np.array([self.of(name, form) for name, form in forms.items()], np.float64).sum(axis=0)

    def by_format(self, forms: Mapping[str, str]) -> dict[str, float]:
        """The divergence that each format brings, as told before any correction."""
        told: dict[str, float] = {}
        for name, form in forms.items():
            told[form] = told.get(form, 0.0) + self.losses[name][form]
        return told

    def by_inputs(self, forms: Mapping[str, str]) -> float:
        """The divergence that rounding inputs brings, nat a token."""
        return sum(self.inputs[name][form] for name, form in forms.items())

    def corrected(self, told: Sequence[Mapping[str, float]], measured: Sequence[float], pace: float) -> Costs:
        """With what files measured: divergences [files] beside those told by format, and how much slower they were."""
        return replace(self, slopes=slopes(told, measured), pace=pace)


def slopes(told: Sequence[Mapping[str, float]], measured: Sequence[float]) -> dict[str, float]:
    """What each format's divergence must be multiplied by so that sums come near to what was measured.

    One factor for all, and each format's own share of it as far as the files tell (ridge regression towards 1).
    """
    if not measured:
        return {}
    forms = sorted({form for each in told for form in each})
    table = np.array([[each.get(form, 0.0) for form in forms] for each in told])
    wanted = np.asarray(measured, np.float64)
    common = float(np.exp(np.mean(np.log(np.maximum(wanted, 1e-9) / np.maximum(table.sum(axis=1), 1e-12)))))
    share = table * common / np.maximum(wanted, 1e-9)[:, None]
    left = 1.0 - share.sum(axis=1)
    lift = share.T @ np.linalg.solve(share @ share.T + np.eye(len(wanted)) * (0.1 / DOUBT) ** 2, left)
    return {form: common * max(0.2, 1.0 + float(more)) for form, more in zip(forms, lift, strict=True)}
