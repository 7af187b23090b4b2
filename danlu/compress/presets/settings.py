"""Settings of the compress stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from danlu.settings import Settings

# llama.cpp's file types that need no importance matrix, by the names its quantizer knows.
FileType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


class CompressSettings(Settings):
    """Which number formats are tried, and which of those that meet the target is kept."""

    types: tuple[FileType, ...] = Field(
        ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_nl", "q4_0"),
        min_length=1,
        description="llama.cpp's file types to try",
    )
    prefer: Literal["smallest", "fastest"] = Field(
        "smallest", description="which of the candidates that meet the target is kept"
    )
    context: int = Field(1024, ge=64, description="tokens of context each candidate is loaded with")
    threads: int | None = Field(
        None, gt=0, description="computing threads; by default every physical core this process may use"
    )
    prompt_tokens: int = Field(128, gt=0, description="tokens of the prompt whose reading is timed")
    decode_tokens: int = Field(48, gt=0, description="tokens decoded after it, timed too")
    repeats: int = Field(3, gt=0, description="timed repeats, of which the median counts")
    heldout_tokens: int = Field(
        3072,
        gt=0,
        description="held-out tokens each candidate is scored on, whole rows drawn once for all",
    )
    resamples: int = Field(1000, ge=100, description="bootstrap resamples behind each interval")
