"""Settings of the evaluate stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from danlu.settings import Settings


class EvaluateSettings(Settings):
    """How the model is measured before and after tuning."""

    tokens: int | None = Field(
        16_384, gt=0, description="held-out tokens scored at most, whole rows drawn by the seed; null scores all"
    )
    answers: int = Field(24, ge=0, description="held-out prompts answered by both models; 0 generates none")
    max_new_tokens: int = Field(64, gt=0, description="tokens of a generated answer at most")
    batch: int = Field(24, gt=0, description="answers generated side by side")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="what both models compute in; auto takes bf16 where the processor has it"
    )
    resamples: int = Field(1000, ge=100, description="bootstrap resamples behind each interval")
