"""All formats that weights can be rounded to here, and which one stands in where rows do not fill a format's blocks."""

from __future__ import annotations

from danlu.compress.quantizing.formats import plain, superblocks
from danlu.compress.quantizing.formats.plain import Plain
from danlu.compress.quantizing.formats.superblocks import Super
from danlu.errors import DanluError, one_of

Format = Plain | Super
FORMATS: dict[str, Format] = {
    each.kind.name.lower(): each
    for each in (
        plain.Q8_0, superblocks.Q6_K, superblocks.Q5_K, plain.Q5_1, plain.Q5_0, superblocks.Q4_K, plain.Q4_1,
        plain.Q4_0, plain.IQ4_NL, superblocks.Q3_K, superblocks.Q2_K, superblocks.TQ2_0, plain.Q1_0,
    )
}  # fmt: skip
# As llama.cpp's own quantizer does: of 32 weights a block, with at least as many bits.
STAND_INS = {
    "q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "iq4_nl", "q2_k": "iq4_nl", "tq2_0": "q4_0",
    "q1_0": "q4_0",
}  # fmt: skip


def format_of(name: str, where: str = "--type") -> Format:
    """By GGML's name, in any case. Raises DanluError with the nearest names where there is none.

    Args: where: what the name was given as.
    """
    found = FORMATS.get(name.lower())
    if found is None:
        fix = one_of(name.lower(), list(FORMATS))
        raise DanluError(f"weights cannot be rounded to {name}", where=where, fix=fix)
    return found


def fitting(form: Format, columns: int) -> Format | None:
    """The format, or what stands in for it, whose blocks rows of so many columns fill; None where none's do."""
    for each in (form, FORMATS.get(STAND_INS.get(form.kind.name.lower(), ""))):
        if each is not None and columns % each.block == 0:
            return each
    return None
