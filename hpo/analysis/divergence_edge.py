"""The edge of divergence: the learning rate at which half of the trials die before their end.

The share of trials that die is a logistic curve over log10 of the learning rate. Just above the edge they die late: a
trial that is pruned young says that its rate is survived so long, and little of the end. So the edge after a part of
the training lies higher, by so many decades for each power of e that the part is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

WIDTHS = (0.01, 0.03, 0.1)  # decades over which trials begin to die
DELAYS = (0.02, 0.1, 0.2, 0.3)  # decades that the edge falls while the training gets e times as long
OUTLIER_RATE = 0.02  # share of trials that die, or do not, whatever their learning rate
BEYOND = 0.3  # decades past the range within which the edge may lie


@dataclass(frozen=True)
class Life:
    """How long a trial lived, as a share of all epochs, at log10 of its learning rate."""

    x: float
    alive: float  # it was alive then; 0: never
    dead: float | None = None  # it was dead then; None: it was never seen dead


def draw_edges(lives: Sequence[Life], *, x: Array, num_draws: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Draw edges; return log10 of their learning rates, infinite if no trial died, and their widths: (num_draws,) each.

    The prior is flat over rates in the grid `x` and a little past it.
    """
    import numpy as np
    from scipy.special import expit, softmax

    if all(life.dead is None for life in lives):
        return np.full(num_draws, np.inf), np.ones(num_draws)
    step = x[1] - x[0]
    middles = np.append(x, np.arange(x[-1] + step, x[-1] + BEYOND, step))
    middles, widths, delays = (grid.ravel() for grid in np.meshgrid(middles, WIDTHS, DELAYS, indexing="ij"))

    def dead_by(life: Life, share: float) -> Any:
        return expit((life.x - middles + delays * math.log(share)) / widths) if share > 0 else 0.0

    evidence = np.zeros(len(middles))
    for life in sorted(lives, key=lambda life: (life.x, life.alive, life.dead or 0.0)):
        if life.dead is None:
            likelihood = 1 - dead_by(life, life.alive)
        else:
            likelihood = np.maximum(dead_by(life, life.dead) - dead_by(life, life.alive), 0)
        evidence += np.log(OUTLIER_RATE / 2 + (1 - OUTLIER_RATE) * likelihood)
    drawn = random.choice(len(middles), num_draws, p=softmax(evidence))
    return middles[drawn], widths[drawn]
