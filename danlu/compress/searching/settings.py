"""Settings of the search for a mix of number formats."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from danlu.settings import Settings

Preference = Literal["best", "smallest", "fastest"]


class SearchSettings(Settings):
    """What is tried, and how much is spent on it."""

    types: tuple[str, ...] = Field(
        ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "q4_0", "iq4_nl", "q3_k", "q2_k"),
        min_length=1,
        description="number formats of matrices, as GGML calls them",
    )
    caches: tuple[str, ...] = Field(("f16", "q8_0"), min_length=1, description="number formats of keys and values")
    pruning: tuple[str, ...] = Field(
        ("auto",), description="smaller models to start from too: layers=28,channels=1408 (heads too), auto or none"
    )
    context: int = Field(1024, ge=64, description="tokens that keys and values are held for; counts as memory")
    prefer: Preference | None = Field(
        None, description="what is bettered within the limits; by default quality where memory or speed is limited"
    )
    threads: int | None = Field(None, gt=0, description="computing threads; by default every physical core")
    candidates: int = Field(4, gt=0, description="files that are made and measured, at most")
    minutes: float = Field(30, gt=0, description="after which no further one is begun")
    gradient_tokens: int = Field(2048, ge=512, description="of the calibration text, that tell what each matrix costs")
    calibration_tokens: int = Field(8192, ge=4096, description="of it, that rounding is fitted to")
    refining_passes: int = Field(2, ge=0, description="through a matrix after it is rounded")
    tuning_steps: int = Field(0, ge=0, description="of 2,048 tokens each, that steps and norms then learn in")
    chosen_tokens: int = Field(4096, ge=512, description="of it, kept apart, that candidates are compared on")
    heldout_tokens: int = Field(8192, ge=512, description="that the certificate is measured on")
    repeats: int = Field(6, gt=0, description="timed repeats; the range of six holds the median with 97 % confidence")
    probe_rounds: int = Field(2, gt=0, description="of the clock, where no device profile is given")
    answers: int = Field(20, ge=0, description="long answers whose loops are counted")
    answer_tokens: int = Field(256, ge=32, description="of each")
    sustained: float = Field(0, ge=0, description="seconds of decoding without a pause; 0 leaves it out")
    resamples: int = Field(1000, ge=100, description="bootstrap resamples behind each interval")


FAST = {
    "candidates": 1, "gradient_tokens": 1024, "calibration_tokens": 4096, "refining_passes": 1, "chosen_tokens": 1024,
    "heldout_tokens": 3072, "probe_rounds": 1, "answers": 4, "answer_tokens": 128,
}  # fmt: skip
BEST = {
    "candidates": 1000, "minutes": 120, "gradient_tokens": 8192, "calibration_tokens": 32_768, "tuning_steps": 48,
    "chosen_tokens": 8192, "heldout_tokens": 16_384, "probe_rounds": 3, "sustained": 120,
}  # fmt: skip
