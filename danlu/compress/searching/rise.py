"""How the loss rises with the divergence, and how much of that a limit on the loss allows.

A loss is judged by the upper end of its interval, by the search and by the certificate alike (danlu/device/verdict.py),
so a file is aimed below the limit by what that end will lie above the estimate.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

from danlu.compress.searching.outcome import Outcome
from danlu.device.verdict import upper_end

LOSS = 2.5  # nat a token, of a model whose own is not measured yet
NORMAL = 1.96  # deviations from the mean to the upper end of a 95 % interval
SLOPES = (0.3, 3.0)  # between which a slope is believed


@dataclass(frozen=True)
class Rise:
    """What is known of how the loss rises with the divergence on the text that candidates are compared on.

    Attributes:
        loss: the original's, nat a token.
        slope: nat that the loss rises for each nat of divergence.
        doubt: nat that the upper end of its interval is above that, for the root of each nat of divergence.
    """

    loss: float
    slope: float
    doubt: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], tokens: int) -> Rise:
        """As measured, the median of files. Before there is one: as on a text of the model's own, where the loss rises
        by the divergence, and what a token's loss changes by has, to second order, twice that as its variance.

        Args: tokens: that files are compared on.
        """
        if not outcomes:
            return cls(LOSS, 1.0, NORMAL * sqrt(2 / tokens))
        loss = [each.value("heldout_loss_original") for each in outcomes]
        divergence = [max(each.value("divergence"), 1e-9) for each in outcomes]
        rises = [each.figures["heldout_loss_rise"] for each in outcomes]
        risen = [each["value"] * nats for each, nats in zip(rises, loss, strict=True)]
        above = [(upper_end(each) - each["value"]) * nats for each, nats in zip(rises, loss, strict=True)]
        slope = median(map(operator.truediv, risen, divergence))
        doubt = median(map(operator.truediv, above, map(sqrt, divergence)))
        return cls(median(loss), min(max(slope, SLOPES[0]), SLOPES[1]), max(doubt, 0.0))

    def most_divergence(self, share: float) -> float:
        """The divergence, nat a token, whose rise of the loss is this share at the upper end of its interval."""
        allowed = share * self.loss  # slope D + doubt sqrt(D) = allowed, solved for sqrt(D)
        root = (sqrt(self.doubt**2 + 4 * self.slope * allowed) - self.doubt) / (2 * self.slope)
        return root**2
