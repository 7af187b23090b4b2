"""What a device asks of a model, and how that is measured."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from danlu.settings import Bytes, Settings, Share


class Target(Settings):
    """What the device asks; what is left out is measured all the same, and not judged."""

    memory: Bytes | None = Field(
        None, gt=0, description="most memory of the process that serves the model, such as 300MB"
    )
    speed: float | None = Field(None, gt=0, description="least tokens a second in decoding, for one user")
    quality_loss: Share | None = Field(
        None, ge=0, description="largest rise of held-out loss against the tuned fp32 model, such as 2%"
    )
    file_size: Bytes | None = Field(None, gt=0, description="largest file, such as 110MB")


class CertifySettings(Settings):
    """How the certificate is measured."""

    context: int = Field(1024, ge=64, description="tokens of context the model is loaded with; memory grows with it")
    threads: int | None = Field(
        None, gt=0, description="computing threads; by default every physical core this process may use"
    )
    prompt_tokens: int = Field(512, gt=0, description="tokens of the prompt whose reading is timed")
    decode_tokens: int = Field(64, gt=0, description="tokens decoded after it, timed too")
    repeats: int = Field(6, gt=0, description="timed repeats; the range of six holds the median with 97 % confidence")
    heldout_tokens: int = Field(
        4096, gt=0, description="held-out tokens whose loss is compared, whole rows drawn once for all models"
    )
    guesses: bool = Field(
        False,
        description="also measure what guessing ahead from the text so far gains in decoding (danlu chat --guess)",
    )
    draft: str | None = Field(
        None,
        min_length=1,
        description="a smaller GGUF with the same vocabulary: also measure what its guesses gain (danlu chat --draft)",
    )
    parity_prompts: int = Field(20, ge=0, description="held-out prompts whose ids and greedy answers are compared")
    parity_tokens: int = Field(64, gt=0, description="tokens of each compared answer")
    resamples: int = Field(1000, ge=100, description="bootstrap resamples behind each interval")

    def beside(self, folder: Path) -> CertifySettings:
        """The same settings with a relative path starting at `folder`, say the recipe's own."""
        if self.draft is None:
            return self
        return self.model_copy(update={"draft": str(folder / Path(self.draft).expanduser())})
