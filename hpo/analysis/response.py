"""The response: how good a learning rate is, with how much doubt, from the trials of a study; numbers in, numbers out.

Two things are drawn together: the value at the end of training of trials that do not die (`final_values`), and the edge
above which trials die (`divergence_edge`). A trial that dies is worth what a guess is worth. The interval of the best
learning rate comes from the argmax of each draw. The rate to train with is the one that loses least to the best one in
half of the draws, among those for which there is evidence: near one that trained to the end, not above all of these,
and not below all that were tried. `make bench-analysis` measures how often that is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hpo.analysis.divergence_edge import Life, draw_edges
from hpo.analysis.final_values import Curve, FinalValues, draw_final_values
from hpo.analysis.scale import Scale, choose_scale

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]
    Flags = np.ndarray[Any, np.dtype[np.bool_]]

MIN_RATES = 5  # different learning rates that have a value or died; with fewer there is no response
MIN_LIVING_RATES = 3  # of these that have a value
NUM_RATES = 161  # of the grid on which the response is known
CONFIDENCE = 0.9
REACH_DECADES = 0.3  # a rate this far from all good trials that trained to the end is not recommended
CLEARLY_WORSE = 3.0  # standard deviations of a trial behind the best one: such a trial is not good
GUESS_SHARE = 0.05  # values this near to guessing, as a share of the way to the best one, are no better than that
NUM_CONSTANT = 3  # so many equal values in a row are those of a network that always gives the same answer
MAX_DETERMINED_DECADES = 1.5  # a wider interval leaves the best learning rate open
NUM_OUTCOMES = 15  # of a further trial, all equally likely, over which its gain is averaged


@dataclass(frozen=True)
class ObservedTrial:
    """What a trial showed of log10 of its learning rate; of two values the higher one is better."""

    x: float
    state: str  # "complete" | "pruned" | "running" | "diverged"
    epochs: Sequence[int]
    values: Sequence[float]  # finite, after each of `epochs`


@dataclass(frozen=True)
class EstimatedRate:
    """A learning rate, and the interval that holds it with CONFIDENCE."""

    lr: float
    interval: tuple[float, float]


@dataclass(frozen=True, repr=False)
class Response:
    """The value of a trial over its learning rate, at each of `lrs`.

    Attributes:
        lrs: Learning rates, evenly spread on a logarithmic scale.
        mean: The expected value of a trial that does not diverge, at each of `lrs`.
        low: The mean is above this with CONFIDENCE, at each of `lrs`.
        high: The mean is below this with CONFIDENCE, at each of `lrs`.
        trial_low: The value of a trial is above this with CONFIDENCE, at each of `lrs`.
        trial_high: The value of a trial is below this with CONFIDENCE, at each of `lrs`.
        diverging: The share of trials that diverge, at each of `lrs`.
        best: The learning rate to train with, in two digits: it loses least to the best one in half of the draws.
        value: The value that is expected of a trial at `best`, the chance of diverging included.
        interval: The learning rates that hold the best one with 90 % confidence.
        plateau: The learning rates in `interval`, around `best`, that fall short of the highest expected value by no
            more than doubt and noise.
        divergence_lr: The learning rate at which half of the trials diverge, with its interval. None if none diverged
            above the rates that train.
        sensitivity: How far a learning rate from anywhere in the range falls short of the best, on average.
        noise: The standard deviation of the value of a trial about the mean, from seed to seed.
        draws_of_best: Learning rates that may be the best one, all equally likely.
        shortfall: How far `best` is expected to fall short of the best learning rate.
        gain: How much better a trial at `best` is expected to be after one more trial, at the rate that tells most.
        num_diverged: Trials that diverged.
        num_guessing: Trials above the best rate that did not diverge but learned nothing; they count as diverged.
    """

    lrs: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    trial_low: Sequence[float]
    trial_high: Sequence[float]
    diverging: Sequence[float]
    best: float
    value: float
    interval: tuple[float, float]
    plateau: tuple[float, float]
    divergence_lr: EstimatedRate | None
    sensitivity: float
    noise: float
    draws_of_best: Sequence[float]
    shortfall: float
    gain: float
    num_diverged: int = 0
    num_guessing: int = 0

    def __repr__(self) -> str:
        low, high = self.interval
        return f"Response(best={self.best:.2g}, interval={low:.2g} to {high:.2g}, value={self.value:.4g})"

    @property
    def is_determined(self) -> bool:
        """Whether the interval says which learning rate is best: it is not too wide, and not the whole range."""
        low, high = self.interval
        is_all = low <= self.lrs[1] and high >= self.lrs[-2]
        return not is_all and math.log10(high / low) <= MAX_DETERMINED_DECADES

    @property
    def is_flat(self) -> bool:
        """Whether a rate from anywhere falls short by less than two trials of one rate differ."""
        return _is_flat(self.sensitivity, self.noise)

    @property
    def index_of_best(self) -> int:
        """Which of `lrs` is nearest to `best`."""
        return min(range(len(self.lrs)), key=lambda index: abs(math.log(self.lrs[index] / self.best)))

    def mirrored(self) -> Response:
        """Return the same response with the sign of all values changed, for studies whose lower values are better."""
        curves = (self.mean, self.high, self.low, self.trial_high, self.trial_low)
        mean, low, high, trial_low, trial_high = ([-value for value in curve] for curve in curves)
        return replace(
            self, mean=mean, low=low, high=high, trial_low=trial_low, trial_high=trial_high, value=-self.value
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the response as plain data, under the keys that JSON output has always had."""
        return {JSON_KEYS.get(key, key): value for key, value in asdict(self).items()}

    def summary_dict(self) -> dict[str, Any]:
        """Return the same plain data without the curves."""
        return {key: value for key, value in self.as_dict().items() if key not in CURVES}


JSON_KEYS = {"divergence_lr": "edge", "draws_of_best": "tops"}  # field of a Response -> key in JSON
CURVES = frozenset(
    {"lrs", "mean", "low", "high", "trial_low", "trial_high", "diverging", "tops"}
)  # keys with a long list


def fit_response(
    trials: Sequence[ObservedTrial],
    *,
    num_epochs: int,
    low: float,
    high: float,
    floor: float = -math.inf,
    is_share: bool = False,
) -> Response | None:
    """Return the response between two learning rates, or None if fewer than MIN_RATES were tried.

    The sensitivity is that of Wortsman et al. (arXiv 2309.14322) with the value in place of the loss: the mean over the
    range, even in log lr, of how far the expected value is below the highest, where dying counts as the floor. Equal
    trials give equal numbers.

    Args:
        trials: What is known.
        num_epochs: The epochs of a complete trial.
        low: The lowest learning rate of the range.
        high: The highest one.
        floor: What guessing is worth; -inf: not known.
        is_share: Values are meant to lie between 0 and 1, as an accuracy does.
    """
    from threadpoolctl import threadpool_limits

    alive, lives = _tell_dead(trials, num_epochs, floor)
    if len({life.x for life in lives}) < MIN_RATES or len({trial.x for trial in alive}) < MIN_LIVING_RATES:
        return None
    # The matrices are small: several threads take ten times as long, and sum up in an order of their own.
    with threadpool_limits(1, user_api="blas"):
        fitted = _fit(alive, lives, num_epochs=num_epochs, low=low, high=high, floor=floor, is_share=is_share)
    num_diverged = sum(trial.state == "diverged" for trial in trials)
    num_dead = sum(life.dead is not None for life in lives)
    return replace(fitted, num_diverged=num_diverged, num_guessing=num_dead - num_diverged)


def _tell_dead(
    trials: Sequence[ObservedTrial], num_epochs: int, floor: float
) -> tuple[list[ObservedTrial], list[Life]]:
    """Return the trials that have a value and did not die, and how long each trial lived.

    Most networks die without a number that is not finite: above the best learning rate, they guess, or give the same
    answer to all.
    """
    whole = [trial for trial in trials if trial.state == "complete" and trial.values and math.isfinite(floor)]
    best = max(whole, key=lambda trial: (trial.values[-1], -trial.x), default=None)
    alive, lives = [], []
    for trial in trials:
        last = trial.epochs[-1] if trial.epochs else 0
        num_dead = 0
        if best is not None and trial.x > best.x and best.values[-1] - floor > GUESS_SHARE * (1 - floor):
            num_dead = _count_dead(trial.values, floor=floor, best=best.values[-1])
        if trial.state == "diverged":
            lives.append(Life(trial.x, last / num_epochs, min(last + 1, num_epochs) / num_epochs))
        elif num_dead:
            first = trial.epochs[-num_dead]
            lives.append(Life(trial.x, (first - 1) / num_epochs, first / num_epochs))
        elif trial.values:
            alive.append(trial)
            lives.append(Life(trial.x, last / num_epochs))
    return alive, lives


def _count_dead(values: Sequence[float], *, floor: float, best: float) -> int:
    """Return after how many epochs, at the end of a curve, the network was dead; 0: it lived to the end."""
    as_guess = floor + GUESS_SHARE * (best - floor)
    num_guessed = next((count for count, value in enumerate(reversed(values)) if value > as_guess), len(values))
    num_equal = next((count for count, value in enumerate(reversed(values)) if value != values[-1]), len(values))
    is_constant = num_equal >= NUM_CONSTANT and values[-1] < (floor + best) / 2
    return max(num_guessed, num_equal if is_constant else 0)


def _fit(
    alive: Sequence[ObservedTrial],
    lives: Sequence[Life],
    *,
    num_epochs: int,
    low: float,
    high: float,
    floor: float,
    is_share: bool,
) -> Response:
    import numpy as np
    from scipy.special import expit

    random = np.random.default_rng(0)
    x = np.linspace(np.log10(low), np.log10(high), NUM_RATES)
    values = [value for trial in alive for value in trial.values]
    scale = choose_scale(values, is_share=is_share)
    seen = _curves(alive, scale)
    final = draw_final_values(seen, num_epochs=num_epochs, x=x, random=random)
    curves = scale.from_line(final.draws)
    middles, widths = draw_edges(lives, x=x, num_draws=len(curves), random=random)
    dying = expit((x - middles[:, None]) / widths[:, None])
    worst = float(scale.from_line(min(curve.line.min() for curve in seen)))
    dead_value = min(floor, worst) if math.isfinite(floor) else worst
    worth = curves * (1 - dying) + dead_value * dying
    expected = worth.mean(axis=0)
    top = int(expected.argmax())
    behind = expected[top] - expected
    draws_of_best = x[worth.argmax(axis=1)]
    noise = _noise(final, scale)
    has_evidence = _has_evidence(alive, x, noise)
    at_best = _index_of_best(worth, has_evidence)
    sensitivity = float(behind.mean())
    best = _best_rate(alive, float(x[at_best]), is_flat=_is_flat(sensitivity, float(noise[at_best])))
    # That it may diverge excuses no shortfall, and that little is known excuses none that seeds would not make.
    first, last = _run_around(at_best, behind <= np.minimum((curves[:, [top]] - curves).std(axis=0), noise[at_best]))
    tail, lrs = (1 - CONFIDENCE) / 2, 10**x
    low_best, high_best = _interval(draws_of_best, x, best=best)
    has_edge = any(life.dead is not None for life in lives) and np.median(middles) <= max(life.x for life in lives)
    # The same luck at all rates in a draw, so that the band is smooth.
    of_trials = scale.from_line(final.draws + final.noise * random.standard_normal((len(curves), 1)))
    return Response(
        lrs=lrs.tolist(),
        mean=curves.mean(axis=0).tolist(),
        low=np.quantile(curves, tail, axis=0).tolist(),
        high=np.quantile(curves, 1 - tail, axis=0).tolist(),
        trial_low=np.quantile(of_trials, tail, axis=0).tolist(),
        trial_high=np.quantile(of_trials, 1 - tail, axis=0).tolist(),
        diverging=dying.mean(axis=0).tolist(),
        best=best,
        value=float(expected[at_best]),
        interval=(low_best, high_best),
        plateau=(min(max(float(lrs[first]), low_best), best), max(min(float(lrs[last]), high_best), best)),
        divergence_lr=EstimatedRate(float(10 ** np.median(middles)), _rate_interval(middles, x)) if has_edge else None,
        sensitivity=sensitivity,
        noise=float(noise[at_best]),
        draws_of_best=(10**draws_of_best).tolist(),
        shortfall=float((worth.max(axis=1) - worth[:, at_best]).mean()),
        gain=_expected_gain(worth, noise, x, has_evidence=has_evidence),
    )


def _curves(alive: Sequence[ObservedTrial], scale: Scale) -> list[Curve]:
    """Return the curves of trials on the line of a scale, without the worst values."""
    import numpy as np

    lines = scale.clip_worst(scale.to_line([value for trial in alive for value in trial.values]))
    ends = np.cumsum([len(trial.values) for trial in alive])[:-1]
    return [Curve(trial.x, trial.epochs, line) for trial, line in zip(alive, np.split(lines, ends), strict=True)]


def _noise(final: FinalValues, scale: Scale) -> Array:
    """Return the standard deviation of a trial's value about its mean, at each x of the grid."""
    middle = final.draws.mean(axis=0)
    noise: Array = scale.from_line(middle + final.noise / 2) - scale.from_line(middle - final.noise / 2)
    return noise


def _has_evidence(alive: Sequence[ObservedTrial], x: Array, noise: Array) -> Flags:
    """Return for each x of the grid whether a trial near by says that one can train there, and not clearly worse."""
    import numpy as np

    whole = _trained_furthest(alive)
    best = max(whole, key=lambda trial: (trial.values[-1], -trial.x))
    behind = CLEARLY_WORSE * noise[abs(x - best.x).argmin()]
    good = np.array([trial.x for trial in whole if trial.values[-1] >= _value_at(best, trial.epochs[-1]) - behind])
    distance = abs(x[:, None] - good).min(axis=1)
    half_step = (x[1] - x[0]) / 2
    lowest, highest = min(trial.x for trial in alive), max(trial.x for trial in whole)
    is_between = (x >= lowest - half_step) & (x <= highest + half_step)
    evidence: Flags = is_between & (distance <= max(REACH_DECADES, half_step))
    return evidence


def _index_of_best(worth: Array, has_evidence: Flags) -> int:
    """Return which x of the grid to train with: the least median loss where there is evidence."""
    import numpy as np

    loss = worth.max(axis=1, keepdims=True) - worth
    regret = np.median(loss, axis=0) + 1e-3 * loss.mean(axis=0)  # the mean tells equal medians apart
    return int(np.where(has_evidence, regret, np.inf).argmin())


def _is_flat(sensitivity: float, noise: float) -> bool:
    return sensitivity <= noise


def _best_rate(alive: Sequence[ObservedTrial], x: float, *, is_flat: bool) -> float:
    """Return the rate to train with, in two digits: where all are about as good, the nearest that trained to the end.

    No other is known to be better than that one.
    """
    tried = [trial.x for trial in _trained_furthest(alive)]
    if is_flat:
        x = min(tried, key=lambda other: abs(other - x))
    lowest = min(trial.x for trial in alive)
    return min(max(float(f"{10**x:.2g}"), float(10**lowest)), float(10 ** max(tried)))


def _expected_gain(worth: Array, noise: Array, x: Array, *, has_evidence: Flags) -> float:
    """Return how much the best expected value is to rise with one more trial, at the x where that is most.

    This is the knowledge gradient (Frazier, Powell and Dayanik, INFORMS J. on Computing 21, 2009): a trial at one x
    moves the expectation at all of them, by their covariance in the draws. It also is evidence for the rates near it.

    Args:
        worth: The values of each draw at each x.
        noise: The standard deviation of a trial's value about its mean, at each x.
        x: The grid.
        has_evidence: Where a rate may be recommended today.
    """
    import numpy as np
    from scipy.special import ndtri

    size = abs(worth).max() or 1.0  # squares of losses may be too large for a float
    mean, covariance = worth.mean(axis=0) / size, np.cov(worth / size, rowvar=False)
    moves = covariance / np.sqrt(np.diag(covariance) + (noise / size) ** 2 + 1e-30)  # at [x, x of the trial]
    luck = ndtri((np.arange(NUM_OUTCOMES) + 0.5) / NUM_OUTCOMES)
    after = mean[:, None, None] + moves[:, :, None] * luck
    is_known = has_evidence[:, None] | (abs(x[:, None] - x) <= REACH_DECADES)
    best_after = np.where(is_known[:, :, None], after, -np.inf).max(axis=0).mean(axis=1)
    return max(0.0, float(best_after.max() - mean[has_evidence].max()) * size)


def _trained_furthest(alive: Sequence[ObservedTrial]) -> Sequence[ObservedTrial]:
    """Return the trials that are complete, or in training and half as far as the furthest; all, if all were pruned."""
    half = max(trial.epochs[-1] for trial in alive) / 2
    return [trial for trial in alive if trial.state != "pruned" and trial.epochs[-1] >= half] or alive


def _value_at(trial: ObservedTrial, epoch: int) -> float:
    """Return the last value of a trial up to an epoch, or its first one."""
    return next(
        (value for at, value in zip(trial.epochs[::-1], trial.values[::-1], strict=True) if at <= epoch),
        trial.values[0],
    )


def _run_around(index: int, flags: Sequence[bool] | Array) -> tuple[int, int]:
    """Return the first and the last index of the run of true flags around `index`."""
    first = last = index
    while first > 0 and flags[first - 1]:
        first -= 1
    while last < len(flags) - 1 and flags[last + 1]:
        last += 1
    return first, last


def _interval(draws: Array, x: Array, *, best: float) -> tuple[float, float]:
    """Return the interval of the best learning rate, in the range of `x`, and with `best` in it."""
    first, last = _rate_interval(draws, x)
    return min(first, best), max(min(last, float(10 ** x[-1])), best)


def _rate_interval(draws: Array, x: Array) -> tuple[float, float]:
    """Return the learning rates between which CONFIDENCE of the draws lie, given as log10, on the grid `x`."""
    import numpy as np

    tail = (1 - CONFIDENCE) / 2
    first, last = np.quantile(draws, [tail, 1 - tail])
    half_step = (x[1] - x[0]) / 2  # a rate of the grid stands for those around it
    return float(10 ** max(first - half_step, x[0])), float(10 ** (last + half_step))
