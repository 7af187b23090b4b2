"""What a model of the 7B class would do on a named phone, told from what this model does here.

Canalys calls a phone an AI phone where such a model answers with at least 10 tokens a second. No phone is measured:
decoding reads every weight for every token, so the share of the bandwidth that is reached here is taken to hold there.
"""

from __future__ import annotations

from typing import Any

from danlu.artifact import figure

CLASS = 7e9  # weights
BAR = 10.0  # token/s
# Gigabytes a second that the memory can give, by data sheet: width of the bus times LPDDR's rate.
PHONES = {
    "Snapdragon 8 Gen 3 (64 bits of LPDDR5X-9600)": 76.8,
    "Apple A17 Pro (64 bits of LPDDR5-6400)": 51.2,
    "Snapdragon 7 Gen 3 (32 bits of LPDDR5-6400)": 25.6,
}


def extrapolate(bits: float, share: float, device: tuple[str, float] | None = None) -> dict[str, Any]:
    """Figures of token/s by device, each said to be an extrapolation.

    Args:
        bits: of a weight of this file, all that is read for a token counted.
        share: of the bandwidth measured here that decoding reaches.
        device: another one: its name, and the bandwidth that its profile measured, GB/s. It stands first.
    """
    named = [(name, bandwidth, "by data sheet") for name, bandwidth in PHONES.items()]
    if device is not None:
        named.insert(0, (*device, "as its profile measured"))
    size = CLASS * bits / 8
    figures = {}
    for name, bandwidth, source in named:
        rate = bandwidth * 1e9 * share / size
        met = "reaches" if rate >= BAR else "misses"
        by = (
            f"extrapolated, not measured: 7 billion weights of {bits:.2f} bits, {size / 1e9:.2f} GB a token, at "
            f"{share:.0%}, as reached here, of {bandwidth:.1f} GB/s {source}; {met} Canalys' {BAR:.0f} token/s"
        )
        figures[name] = figure(rate, "token/s", by=by)
    return figures
