"""The race: which learning rates train on, and how far, so that a budget of epochs finds the best of a range.

Rates that are evenly apart train to the same epoch, a rung, before any of them trains further. Those with the best
values at the rung train on, fewer at each: successive halving (Jamieson and Talwalkar, arXiv 1502.07943).

Nothing is kept of a race but its trials. Who trains on follows from their curves, whatever the order in which they were
reported: any worker may ask at any time, also after a kill.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.search.config import SearchSettings

RUNG_SHARES = (0.02, 0.06, 0.2, 0.5, 1.0)  # of the epochs of a complete trial
NUM_KEPT = (4, 3, 2, 1)  # trials that train on to each rung but the first
MIN_STARTERS, MAX_STARTERS = 5, 16
NUM_AVERAGED = 2  # one epoch's value is noisy
OPEN = ("waiting", "running")


@dataclass(frozen=True)
class Course:
    """What a race may spend: a complete trial has `num_epochs`, and all trials together have at most `budget` epochs.

    Past the budget, trials train on only until one of them is complete.
    """

    num_epochs: int
    budget: int

    @property
    def rungs(self) -> list[int]:
        """The epochs after which trials wait for each other, and the last epoch."""
        return sorted({max(1, int(share * self.num_epochs)) for share in RUNG_SHARES})

    def num_kept(self, rung: int) -> int:
        """Return how many trials train on to a rung that is not the first."""
        return NUM_KEPT[self.rungs.index(rung) - len(self.rungs)]

    @property
    def num_starters(self) -> int:
        """The number of rates at the start, as many as the budget allows; it may be less than MIN_STARTERS."""
        return min(MAX_STARTERS, (self.budget - self._num_epochs_after_first) // self.rungs[0])

    @property
    def least_trainings(self) -> float:
        """The smallest `search.trainings` for MIN_STARTERS, in two decimals."""
        least_epochs = self._num_epochs_after_first + MIN_STARTERS * self.rungs[0]
        return math.ceil(100 * least_epochs / self.num_epochs) / 100

    @property
    def _num_epochs_after_first(self) -> int:
        """The epochs of all trials together after the first rung."""
        return sum(self.num_kept(rung) * (rung - before) for before, rung in pairwise(self.rungs))


@dataclass(frozen=True)
class Racer:
    """A trial of a race: its state, and what it reported after each epoch; higher values and lower losses are better.

    `losses` break ties. They are needed after the rungs alone, and where they are known.
    """

    number: int
    lr: float
    state: str
    values: Mapping[int, float]
    losses: Mapping[int, float] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """The last epoch that it reported; 0 before the first."""
        return self._epochs[-1] if self._epochs else 0

    def epoch_at(self, goal: int) -> int:
        """Return the first epoch from `goal` on that it reported, or its last one before that."""
        index = bisect_left(self._epochs, goal)
        return self._epochs[index] if index < len(self._epochs) else self.epoch

    def value_at(self, goal: int) -> float:
        """Return the value that it is compared by at a rung."""
        known = self._epochs[: bisect_right(self._epochs, self.epoch_at(goal))][-NUM_AVERAGED:]
        value = statistics.fmean(self.values[epoch] for epoch in known) if known else -math.inf
        return value if math.isfinite(value) else -math.inf

    @cached_property
    def _epochs(self) -> list[int]:
        return sorted(self.values)


def course_of(spec: SearchSettings) -> Course | None:
    """Return the course of a study's race, or None where its sampler is another one."""
    if spec.search.sampler != "race":
        return None
    return Course(spec.max_epochs, budget=math.floor(spec.search.num_trainings * spec.max_epochs + 1e-9))


def find_goals(course: Course, racers: Sequence[Racer]) -> dict[int, int] | None:
    """Return the epoch to which each trial trains now, by its number, or None where the race is over.

    The race is run again from its start, leg by leg, to the first one that a trial has yet to finish.
    """
    goals = {racer.number: course.rungs[0] for racer in racers}
    while not any(trains_on(course, racer, goals) for racer in racers):
        leg = _next_leg(course, racers, goals)
        if not leg:
            return None
        goals |= leg
    return goals


def trains_on(course: Course, racer: Racer, goals: Mapping[int, int]) -> bool:
    """Return whether a trial has yet to reach its goal; of the last epoch, its end is part."""
    goal = goals[racer.number]
    return racer.state in OPEN and (racer.epoch < goal or goal == course.num_epochs)


def _next_leg(course: Course, racers: Sequence[Racer], goals: Mapping[int, int]) -> dict[int, int]:
    """Return who trains on from these goals, and to which epoch, by their numbers; nobody at the end of the race.

    Of the trials that have come furthest, the best train on. Once these have ended, those behind them do, as long as
    the budget lasts, and beyond it while none is complete.
    """
    ended: list[Racer] = []
    waiting: list[Racer] = []
    for racer in racers:
        is_done = goals[racer.number] == course.num_epochs or racer.epoch == racer.epoch_at(goals[racer.number])
        (ended if racer.state not in OPEN and is_done else waiting).append(racer)
    if not waiting:
        return {}
    furthest = max(goals[racer.number] for racer in waiting)
    goal = next(rung for rung in course.rungs if rung > furthest)
    left = course.budget - sum(racer.epoch_at(goals[racer.number]) for racer in racers)
    count = min(course.num_kept(goal), max(0, left // (goal - furthest)))
    if not any(racer.state == "complete" for racer in ended):
        count = max(1, count)
    best = _best_first([racer for racer in waiting if goals[racer.number] == furthest], racers, rung=furthest)
    return {racer.number: goal for racer in best[:count]}


def _best_first(some: Sequence[Racer], racers: Sequence[Racer], *, rung: int) -> list[Racer]:
    """Return some of the trials, those with the best values at a rung first.

    Before anything is learnt, all values may be the same: then those with the lower loss, and the middle rates.
    """
    rates = sorted(racer.lr for racer in racers)
    middle = (len(rates) - 1) / 2

    def rank(racer: Racer) -> tuple[float, float, float, float]:
        from_middle = abs(rates.index(racer.lr) - middle)
        return -racer.value_at(rung), racer.losses.get(racer.epoch_at(rung), math.inf), from_middle, racer.lr

    return sorted(some, key=rank)
