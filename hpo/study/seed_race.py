"""The race over seeds: which of the learning rates that are confirmed are trained on another seed, and which are not.

All rates are trained on the first seeds. From then on each seed ends with a look: a rate that really is worse than the
leader gets no more, and the confirmation ends once nobody is left beside the leader. "Really worse" is a paired t-test,
seed by seed. Looking again and again makes a wrong verdict more likely, so all looks share VERDICT_ERROR, which bounds
the error of all of them together (Bonferroni). Half of it is kept for the last look, in the manner of Haybittle
(British J. of Radiology 44, 1971) and Peto et al. (British J. of Cancer 34, 1976): a verdict in between needs a clear
case, and one at the end is little the weaker for having looked before.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_SEEDS = 3  # on which every rate is trained; of two differences the deviation is hardly known
VERDICT_ERROR = 0.05  # that a rate is called worse by luck alone


@dataclass(frozen=True)
class SeedResults:
    """What came of a rate on the seeds that it was trained on, in the order of the seeds."""

    values: Sequence[float | None]  # the higher, the better; None: did not complete
    num_diverged: int

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts rates with as many seeds, the best one first."""
        known = [value for value in self.values if value is not None]
        return self.num_diverged, -statistics.fmean(known) if known else math.inf


@dataclass(frozen=True)
class Lead:
    """By how much one rate leads another one on the same seeds, with an interval for the true lead."""

    mean: float
    interval: tuple[float, float]

    @property
    def is_certain(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.interval[0] > 0


def find_lead(first: SeedResults, second: SeedResults, *, max_seeds: int, grain: float) -> Lead | None:
    """Return the lead of the first rate, or None if fewer than two seeds completed for both.

    Args:
        first: One rate.
        second: Another one, perhaps with fewer seeds.
        max_seeds: The number of seeds that a rate can have.
        grain: The smallest difference that two values can have. Differences that are alike are still that uncertain.
    """
    from scipy.special import stdtrit

    pairs = zip(first.values, second.values, strict=False)
    differences = [won - lost for won, lost in pairs if won is not None and lost is not None]
    count = len(differences)
    if count < 2:
        return None
    mean = statistics.fmean(differences)
    # hypot: a loss may be of any size.
    deviation = math.hypot(*(difference - mean for difference in differences)) / math.sqrt(count - 1)
    error = error_of_look(min(len(first.values), len(second.values)), max_seeds=max_seeds)
    reach = float(stdtrit(count - 1, 1 - error / 2)) * max(deviation, grain / math.sqrt(6)) / math.sqrt(count)
    return Lead(mean, (mean - reach, mean + reach))


def error_of_look(num_seeds: int, *, max_seeds: int) -> float:
    """Return the share of VERDICT_ERROR that the look after so many seeds may have."""
    num_early = max_seeds - FIRST_SEEDS
    if num_early <= 0:
        return VERDICT_ERROR
    return VERDICT_ERROR / 2 if num_seeds >= max_seeds else VERDICT_ERROR / 2 / num_early


def racing_on(rates: Sequence[SeedResults], *, max_seeds: int, grain: float) -> list[int]:
    """Return which of the rates are to be trained on another seed; none: the confirmation is over.

    A single rate is trained on all seeds, since there its value is what is asked for.

    Args:
        rates: The rates that are confirmed. Those with fewer seeds than others have left the race before.
        max_seeds: As in `find_lead`.
        grain: As in `find_lead`.
    """
    num_seeds = max(len(rate.values) for rate in rates)
    racing = [index for index, rate in enumerate(rates) if len(rate.values) == num_seeds]
    leader = min(racing, key=lambda index: rates[index].rank)
    left = [
        index
        for index in racing
        if index == leader or not _is_worse(rates[index], rates[leader], max_seeds=max_seeds, grain=grain)
    ]
    return left if len(left) > 1 or len(rates) == 1 else []


def _is_worse(rate: SeedResults, leader: SeedResults, *, max_seeds: int, grain: float) -> bool:
    more_diverged = rate.num_diverged - leader.num_diverged
    if more_diverged:  # which ranks it below, as long as the leader does not diverge as often on the seeds to come
        return more_diverged > max_seeds - len(rate.values)
    lead = find_lead(leader, rate, max_seeds=max_seeds, grain=grain)
    return lead is not None and lead.is_certain
