"""Which dimension of each weight tensor-parallel processes share out, for every family: all are stacks of one block.

What makes several outputs for one stream is cut by output (the rows of [out, in]), what sums them up again by input;
in between no process needs what another has (arXiv:1909.08053, section 3). Of banks of experts each expert is cut so.
"""

from __future__ import annotations

import re

SPLITS = (
    (r"(attention|cross)\.(query|key|value)\.(weight|bias)", 0),  # heads
    (r"(attention|cross)\.output\.weight", 1),
    (r"experts\.(gate|up)\.(weight|bias)", 1),  # [experts, out, in], [experts, out]
    (r"experts\.down\.weight", 2),
    (r"(feedforward|shared)\.(gate|up)\.(weight|bias)", 0),
    (r"(feedforward|shared)\.down\.weight", 1),
    (r"relative\.weight", 1),  # [buckets, heads]
    (r"embedding\.tokens\.weight", 0),  # words
    (r"head\.(weight|bias)", 0),
)


def split_of(name: str) -> int | None:
    """The dimension along which a weight of this name is cut; None for what every process holds whole."""
    return next((dim for pattern, dim in SPLITS if re.search(rf"(^|\.){pattern}$", name)), None)
