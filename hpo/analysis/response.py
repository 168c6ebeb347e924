"""The response: how good a learning rate is, with how much doubt, from the trials of a study; numbers in, numbers out.

The value over log10 of the learning rate is a Gaussian process (Rasmussen and Williams, 2006) with a Matérn 5/2 kernel
and one noise for all trials. The share of trials that diverge is a logistic curve over the same. Neither is fitted
once: both are averaged over a grid of their hyperparameters, each weighed by how well it explains the trials, because
with 20 to 40 trials several explain them well. Whole responses are drawn from both together; a learning rate that
diverges is worth what a diverged trial is. The interval of the best learning rate comes from the argmax of each draw.
`make bench-analysis` measures how often that is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

MIN_RATES = 5  # different learning rates that have a value; with fewer there is no response
MAX_FITTED_POINTS = 100  # of more trials, neighbours count with their mean
NUM_RATES = 161  # of the grid on which the response is known
NUM_DRAWS = 400
CONFIDENCE = 0.9
LENGTHS = (0.2, 0.35, 0.6, 1.0, 1.7)  # decades over which the response bends
AMPLITUDES = (0.1, 0.3, 1.0, 3.0)  # of the response, in standard deviations of the values
NOISES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)  # of a trial, in standard deviations of the values
WIDTHS = (0.01, 0.03, 0.1)  # decades over which trials begin to diverge
OUTLIER_RATE = 0.02  # share of trials that diverge, or do not, whatever their learning rate
BEYOND = 0.3  # decades past the range within which the rate may lie at which half of the trials diverge
NEAR = 0.5  # decades from a trial that completed, within which there is evidence for a learning rate
WORST = 3.0  # a value counts as no worse than this many times as far below the median as the best is above it


@dataclass(frozen=True)
class Observations:
    """What is known of trials, each at log10 of its learning rate; of two values the higher one is better."""

    x: Array  # (N,) of the trials that have a value
    value: Array  # (N,)
    doubt: Array  # (N,) standard deviation of a value that was inferred and not seen, else 0
    diverged: Array  # (M,) log10 of the learning rates of those that diverged
    floor: float  # what a diverged trial is worth


@dataclass(frozen=True)
class EstimatedRate:
    """A learning rate, and the interval that holds it with CONFIDENCE."""

    lr: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Response:
    """The value of a trial over its learning rate. `mean`, `low` and `high` hold one entry for each of `lrs`."""

    lrs: Sequence[float]
    mean: Sequence[float]  # of trials that do not diverge
    low: Sequence[float]  # the mean lies between `low` and `high` with CONFIDENCE
    high: Sequence[float]
    diverging: Sequence[float]  # the share of trials that diverge
    # The learning rate to train with: the plateau's middle, which a wiggle of the mean moves little, or the nearest
    # rate with evidence for it. It lies among the rates of complete trials, within NEAR of one.
    best: float
    value: float  # expected of a trial at `best`, diverging included
    interval: tuple[float, float]  # holds the best learning rate with CONFIDENCE
    plateau: tuple[float, float]  # around the highest expected value near a trial: within one standard error of it
    divergence_lr: (
        EstimatedRate | None
    )  # half of the trials diverge there; None if none did, or only where others train
    sensitivity: float  # how far a learning rate of the range falls short of the best, on average
    noise: float  # the standard deviation of a trial's value about the mean
    draws_of_best: Sequence[float]  # learning rates that may be the best one, all equally likely

    def mirrored(self) -> Response:
        """Return the same response with the sign of all values changed, for studies whose lower values are better."""
        mean, low, high = ([-value for value in curve] for curve in (self.mean, self.high, self.low))
        return replace(self, mean=mean, low=low, high=high, value=-self.value)

    def as_dict(self) -> dict[str, Any]:
        """Return the response as plain data, under the keys that JSON output has always had."""
        return {JSON_KEYS.get(key, key): value for key, value in asdict(self).items()}

    def summary_dict(self) -> dict[str, Any]:
        """Return the same plain data without the curves."""
        return {key: value for key, value in self.as_dict().items() if key not in CURVES}


JSON_KEYS = {"divergence_lr": "edge", "draws_of_best": "tops"}  # field of a Response -> key in JSON
CURVES = frozenset({"lrs", "mean", "low", "high", "diverging", "tops"})  # keys with a long list


def fit_response(trials: Observations, *, low: float, high: float) -> Response | None:
    """Return the response between two learning rates, or None if fewer than MIN_RATES have a value.

    The sensitivity is that of Wortsman et al. (arXiv 2309.14322) with the value in place of the loss: the mean over the
    range, even in log lr, of how far the expected value is below the highest, where diverging counts as the floor.
    Equal trials give equal numbers.
    """
    from threadpoolctl import threadpool_limits

    if len(set(trials.x)) < MIN_RATES:
        return None
    # The matrices are small: several threads take ten times as long, and sum up in an order of their own.
    with threadpool_limits(1, user_api="blas"):
        return _fit(trials, low=low, high=high)


def _fit(trials: Observations, *, low: float, high: float) -> Response:
    import numpy as np
    from scipy.special import expit

    random = np.random.default_rng(0)
    x = np.linspace(np.log10(low), np.log10(high), NUM_RATES)
    trials, size = _scaled(trials)
    curves, noise = _draw_responses(trials, x, random)
    middles, widths = _draw_divergence_curves(trials, x, random)
    diverging = expit((x - middles[:, None]) / widths[:, None])
    worth = curves * (1 - diverging) + trials.floor * diverging
    expected = worth.mean(axis=0)
    completed = trials.x[trials.doubt == 0]
    has_evidence = _has_evidence(completed, x)
    top = int(np.where(has_evidence, expected, -np.inf).argmax())
    behind = expected[top] - expected
    as_good = behind <= (curves[:, [top]] - curves).std(axis=0)  # that it may diverge excuses no shortfall
    first, last = _run_around(top, as_good)
    tail = (1 - CONFIDENCE) / 2
    lrs = 10**x
    draws_of_best = x[worth.argmax(axis=1)]
    interval = _rate_interval(draws_of_best, x)
    interval = interval[0], min(interval[1], float(lrs[-1]))
    best = min(max(float(lrs[(first + last) // 2]), interval[0]), interval[1])
    at_best = int(np.abs(x - np.log10(best)).argmin())
    if not has_evidence[at_best]:
        known = np.flatnonzero(has_evidence[first : last + 1]) + first
        at_best = int(known[np.abs(known - at_best).argmin()])
        best = float(lrs[at_best])
    best = min(max(best, float(10 ** completed.min())), float(10 ** completed.max()))
    interval = min(interval[0], best), max(interval[1], best)
    tried = max(trials.x.max(), *trials.diverged) if len(trials.diverged) else trials.x.max()
    has_divergence = len(trials.diverged) > 0 and np.median(middles) <= tried
    return Response(
        lrs=lrs.tolist(),
        mean=(size * curves.mean(axis=0)).tolist(),
        low=(size * np.quantile(curves, tail, axis=0)).tolist(),
        high=(size * np.quantile(curves, 1 - tail, axis=0)).tolist(),
        diverging=diverging.mean(axis=0).tolist(),
        best=best,
        value=size * float(expected[at_best]),
        interval=interval,
        plateau=(float(lrs[first]), float(lrs[last])),
        divergence_lr=(
            EstimatedRate(float(10 ** np.median(middles)), _rate_interval(middles, x)) if has_divergence else None
        ),
        sensitivity=size * float((expected.max() - expected).mean()),
        noise=size * noise,
        draws_of_best=lrs[worth.argmax(axis=1)].tolist(),
    )


def _has_evidence(completed: Array, x: Array) -> Array:
    """Return for each rate of the grid `x` whether it lies among those of the complete trials, and near one of them."""
    import numpy as np

    half_step = (x[1] - x[0]) / 2
    is_between = (x >= completed.min() - half_step) & (x <= completed.max() + half_step)
    return np.asarray(is_between & (np.abs(x[:, None] - completed).min(axis=1) <= NEAR))


def _scaled(trials: Observations) -> tuple[Observations, float]:
    """Return the trials with values of at most 1 in size, the worst ones clipped, and the factor to scale back by."""
    import numpy as np

    size = float(np.abs(trials.value).max()) or 1.0  # squares of very large values would be infinite
    value = trials.value / size
    # A loss may be of any size, and would leave nothing to see of the others.
    value = np.maximum(value, (1 + WORST) * np.median(value) - WORST * value.max())
    floor = min(trials.floor / size, value.min())
    return replace(trials, value=value, doubt=trials.doubt / size, floor=floor), size


def _run_around(index: int, flags: Sequence[bool] | Array) -> tuple[int, int]:
    """Return the first and the last index of the run of true flags around `index`."""
    first = last = index
    while first > 0 and flags[first - 1]:
        first -= 1
    while last < len(flags) - 1 and flags[last + 1]:
        last += 1
    return first, last


def _rate_interval(draws: Array, x: Array) -> tuple[float, float]:
    """Return the learning rates between which CONFIDENCE of the draws lie, given as log10, on the grid `x`."""
    import numpy as np

    tail = (1 - CONFIDENCE) / 2
    first, last = np.quantile(draws, [tail, 1 - tail])
    half_step = (x[1] - x[0]) / 2  # a rate of the grid stands for those around it
    return float(10 ** max(first - half_step, x[0])), float(10 ** (last + half_step))


def _draw_responses(trials: Observations, x: Array, random: np.random.Generator) -> tuple[Array, float]:
    """Draw responses of trials that do not diverge, (NUM_DRAWS, len(x)); return them and the noise of a trial."""
    import warnings

    import numpy as np
    from scipy.special import softmax
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    x_fitted, value, doubt, count = _grouped(trials)
    mean = value.mean()
    scale = value.std() or 1e-9 * (abs(mean) or 1.0)
    fits, evidence, noises = [], [], []
    for length, amplitude, noise in itertools.product(LENGTHS, AMPLITUDES, NOISES):
        process = GaussianProcessRegressor(
            ConstantKernel(amplitude**2) * Matern(length, nu=2.5),
            alpha=noise**2 / count + (doubt / scale) ** 2,
            optimizer=None,
        ).fit(x_fitted[:, None], (value - mean) / scale)
        fits.append(process)
        noises.append(noise)
        # Log-normal priors: lengths of half a decade to one and amplitudes of about one are the most common.
        prior = -0.5 * (np.log(length / 0.6) / 0.8) ** 2 - 0.5 * np.log(amplitude) ** 2
        evidence.append(process.log_marginal_likelihood_value_ + prior)
    weights = softmax(evidence)
    drawn = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a covariance that rounding has made a little indefinite
        for process, times in zip(fits, random.multinomial(NUM_DRAWS, weights), strict=True):
            if times:
                drawn.append(process.sample_y(x[:, None], times, random_state=int(random.integers(2**31))).T)
    return np.concatenate(drawn) * scale + mean, float(np.sqrt(weights @ np.square(noises)) * scale)


def _grouped(trials: Observations) -> tuple[Array, Array, Array, Array]:
    """Return x, value, doubt and count of the trials with values; of too many, the means of neighbours."""
    import numpy as np

    order = np.argsort(trials.x, kind="stable")
    groups = np.array_split(order, min(MAX_FITTED_POINTS, len(order)))
    means = [[column[group].mean() for group in groups] for column in (trials.x, trials.value)]
    doubt = [float(np.sqrt((trials.doubt[group] ** 2).mean() / len(group))) for group in groups]
    return np.array(means[0]), np.array(means[1]), np.array(doubt), np.array([len(group) for group in groups])


def _draw_divergence_curves(trials: Observations, x: Array, random: np.random.Generator) -> tuple[Array, Array]:
    """Draw logistic curves of the share of diverging trials; return log10 of their middles, and their widths.

    Both are (NUM_DRAWS,). Draw from their posterior on a grid. The prior is flat over middles in the range and a little
    past it.
    """
    import numpy as np
    from scipy.special import expit, softmax

    if not len(trials.diverged):
        return np.full(NUM_DRAWS, np.inf), np.ones(NUM_DRAWS)
    step = x[1] - x[0]
    middles = np.append(x, np.arange(x[-1] + step, x[-1] + BEYOND, step))
    middles, widths = (grid.ravel() for grid in np.meshgrid(middles, WIDTHS, indexing="ij"))

    def share(at: Array) -> Array:
        diverging: Array = expit((at - middles[:, None]) / widths[:, None])
        return OUTLIER_RATE / 2 + (1 - OUTLIER_RATE) * diverging

    evidence = np.log(share(trials.diverged)).sum(axis=1) + np.log(1 - share(trials.x)).sum(axis=1)
    drawn = random.choice(len(middles), NUM_DRAWS, p=softmax(evidence))
    return middles[drawn], widths[drawn]
