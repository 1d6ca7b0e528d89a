"""Updates that a sudden gradient would spoil, left out where a stage asks for it."""

import math
import statistics
from dataclasses import dataclass, field

WINDOW = 50
"""Norms that are remembered."""
MIN_NORMS = 10
"""Norms that must be known before one can stand out."""
MOST_IN_A_ROW = 3
"""Skipped updates after which the next one is made: what lasts is no spike."""


@dataclass
class SpikeGuard:
    """Tells spikes from the gradient norms (before clipping) of the last updates.

    A norm is a spike where it is larger than `factor` times the median of those that were remembered, which holds under
    any scale of the loss. Norms that are not finite are left to whoever handles them.
    """

    factor: float
    norms: list[float] = field(default_factory=list)
    """The newest last. Kept in checkpoints, as the next."""
    in_a_row: int = 0
    last_median: float = 0.0
    """Of the last spike."""

    def accepts(self, norm: float) -> bool:
        """Tell whether to update with a gradient of this norm, and remember it if so."""
        if not math.isfinite(norm):
            return True
        median = statistics.median(self.norms) if len(self.norms) >= MIN_NORMS else math.inf
        if norm > self.factor * median and self.in_a_row < MOST_IN_A_ROW:
            self.in_a_row, self.last_median = self.in_a_row + 1, median
            return False
        self.in_a_row = 0
        self.norms[:] = [*self.norms[-WINDOW + 1 :], norm]
        return True
