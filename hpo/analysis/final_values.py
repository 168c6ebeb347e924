"""The value at the end of training over the learning rate, from the curves of all trials, whole ones or not.

The value over log10 of the learning rate and the log of the epoch is a Gaussian process (Rasmussen and Williams, 2006;
over both at once: Swersky et al., Freeze-Thaw Bayesian Optimization, arXiv 1406.3896). It is the sum of what epochs
bring at all learning rates and of what this one brings. Most of the latter lasts from the first epoch to the last: a
rate that is far behind early is seldom the best one in the end. So a pruned trial counts with what the others gained
since, and stays behind them by about as much. A trial is off by the luck of its seed, which lasts as long as what its
learning rate brings, or fades; and off at each epoch by as much as its own curve is rough. Seeds matter more where
curves are rougher. The process is not fitted once: it is averaged over a grid of its hyperparameters, each weighed by
how well it explains the curves, because with 20 to 40 trials several explain them well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

NUM_DRAWS = 400
NUM_FITTED_POINTS = 240  # at most, of all curves; those of more trials than that are averaged with their neighbours'
NUM_POINTS_OF_CURVE = 6  # at most, after epochs that are evenly apart on a log scale
LENGTHS = (0.35, 0.6, 1.0, 1.8)  # decades of the learning rate over which the value bends
EPOCH_LENGTHS = (3.0, 8.0)  # powers of e of the epoch over which that of all learning rates bends
LASTING_SHARES = (0.5, 0.9)  # of the variance of what depends on the learning rate: the same after every epoch
CHANGE_LENGTH = 3.0  # powers of e of the epoch over which the rest of it bends
AMPLITUDES = (0.03, 0.1, 0.3, 1.0, 2.0)  # of what depends on the learning rate, in standard deviations of all points
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of a trial with a curve of usual roughness, in the same
GRIDS: tuple[tuple[Any, ...], ...] = (EPOCH_LENGTHS, LASTING_SHARES, LENGTHS, AMPLITUDES, NOISES, (False, True))
NEGLIGIBLE = 20.0  # of the log evidence behind the best: such a choice counts as good as nothing
USUAL_LENGTH = 0.7  # decades, of the log-normal prior
LEAST_USUAL_NOISE = 0.05  # of the log-normal prior where curves are smooth, in standard deviations of all points
FADING_LENGTH = 1.0  # powers of e of the epoch over which the luck of a seed bends where it fades
FADING_POWER = 0.3  # it is then in proportion to the epoch to the power of minus this
SEED_OVER_ROUGHNESS = 1.5  # how much more two seeds differ than two epochs of a curve
WARP_SIZES = (math.inf, 1.0)  # in standard deviations of all values
WARP_PENALTY = 3.0  # of the log evidence: without a reason the line is not warped
LARGEST_WARPED = 30.0  # below the best value; its exponential is no infinite number
TRUST = 0.6  # what points say counts as this share of them would: those of a curve say less than as many trials
JITTER = 1e-8  # of variances, against rounding
MISFIT = 0.01  # of each point, in standard deviations of all points
AVERAGED = 0.2  # a point is the mean over this last share of its epochs
SMOOTHED_DECADES = 0.3  # over which roughness is averaged
MIN_ROUGH = 4  # values from which a roughness is known


@dataclass(frozen=True)
class Curve:
    """The values of a trial on the line of a `Scale`, after each of `epochs`, at log10 of its learning rate."""

    x: float
    epochs: Sequence[int]
    line: Array


@dataclass(frozen=True)
class FinalValues:
    """What the end of training may bring, on the line of a `Scale`, at each x of a grid."""

    draws: Array  # (NUM_DRAWS, len(x))
    noise: Array  # (len(x),) standard deviation of a trial's last value about that


@dataclass(frozen=True)
class _Points:
    x: Array
    time: Array  # log of the share of all epochs
    line: Array
    trial: Any  # number of the trial of each point
    variance: Array  # by the roughness of the curve
    roughness: Array  # of the trials about there, relative to the usual one


def draw_final_values(
    curves: Sequence[Curve], *, num_epochs: int, x: Array, random: np.random.Generator
) -> FinalValues:
    """Draw from what is known of the values after `num_epochs`."""
    import numpy as np
    from scipy.special import softmax

    curves = sorted(curves, key=lambda curve: (len(curve.epochs), curve.x, *curve.line))
    models = [_Model(curves, warp, num_epochs) for warp in _warps(curves)]
    fits_of = [model.fits() for model in models]
    fits = [(model, fit) for model, found in zip(models, fits_of, strict=True) for fit in found]
    weights = softmax(TRUST * np.array([fit.evidence for _, fit in fits]))
    counts = random.multinomial(NUM_DRAWS, weights)
    drawn = [model.draw(fit, x, int(times), random) for (model, fit), times in zip(fits, counts, strict=True) if times]
    draws = np.concatenate(drawn)
    middle = draws.mean(axis=0)
    noises = np.concatenate([model.noises_at(found, x, middle) for model, found in zip(models, fits_of, strict=True)])
    return FinalValues(draws, np.sqrt(weights @ noises**2))


@dataclass(frozen=True)
class _Warp:
    """A line on which steps count the less the further they are below the best value, or equally (`size` is inf).

    One process with the same slopes and the same noise everywhere would smooth the top by what it sees far below.
    """

    top: float
    size: float  # this far below the top a step counts half; inf: the same everywhere

    def apply(self, line: Array) -> Array:
        import numpy as np

        if math.isinf(self.size):
            return line
        behind = (self.top - line) / self.size
        warped: Array = np.where(behind > 0, -np.log1p(behind.clip(0)), -behind)
        return warped

    def invert(self, warped: Array) -> Array:
        import numpy as np

        if math.isinf(self.size):
            return warped
        line: Array = self.top - self.size * np.where(warped < 0, np.expm1(-warped.clip(-LARGEST_WARPED, 0)), -warped)
        return line

    def log_slopes(self, warped: Array) -> float:
        """Return the sum of the logs of by how much steps grow at these numbers."""
        return 0.0 if math.isinf(self.size) else float(warped.clip(None, 0).sum() - len(warped) * math.log(self.size))


def _warps(curves: Sequence[Curve]) -> list[_Warp]:
    import numpy as np

    last = max(curve.epochs[-1] for curve in curves)
    top = max(float(curve.line[-1]) for curve in curves if curve.epochs[-1] == last)
    spread = float(np.concatenate([curve.line for curve in curves]).std())
    return [_Warp(top, size * spread) for size in WARP_SIZES] if spread else [_Warp(top, math.inf)]


_Cell = tuple[Any, ...]  # a choice of each of GRIDS


def _neighbours(cell: _Cell) -> Iterator[_Cell]:
    """Yield the choices that differ in one hyperparameter, by one step of its grid."""
    for axis, grid in enumerate(GRIDS):
        at = grid.index(cell[axis])
        for other in grid[max(at - 1, 0) : at] + grid[at + 1 : at + 2]:
            yield (*cell[:axis], other, *cell[axis + 1 :])


@dataclass(frozen=True)
class _Fit:
    """A process with one choice of its hyperparameters, and how well it explains the points."""

    epoch_length: float
    share: float
    length: float
    amplitude: float
    noise: float
    is_fading: bool
    evidence: float


class _Model:
    """The processes over the points of curves on one warped line."""

    def __init__(self, curves: Sequence[Curve], warp: _Warp, num_epochs: int) -> None:
        curves = [replace(curve, line=warp.apply(curve.line)) for curve in curves]
        self._warp, self._roughness = warp, _Roughness(curves)
        self._points = points = _points(curves, self._roughness, num_epochs)
        self._mean = float(points.line.mean())
        self._scale = float(points.line.std()) or 1e-9 * (abs(self._mean) or 1.0)
        self._values = (points.line - self._mean) / self._scale

    def fits(self) -> list[_Fit]:
        """Weigh the choices of the hyperparameters that explain the points nearly as well as the best one found.

        From a few that are far apart the search goes on to the neighbours of all that are good: most of the grid
        explains many points far worse than the best.
        """
        fits: dict[_Cell, _Fit] = {}
        new = set(itertools.product(*(grid[1::2] or grid for grid in GRIDS)))
        fit = self._fitting()
        while new:
            fits |= {cell: fit(*cell) for cell in sorted(new)}
            least = max(found.evidence for found in fits.values()) - NEGLIGIBLE
            new = {near for cell, found in fits.items() if found.evidence > least for near in _neighbours(cell)}
            new -= fits.keys()
        return [fits[cell] for cell in sorted(fits)]

    def _fitting(self) -> Callable[..., _Fit]:
        """Return the function that weighs one choice of the hyperparameters, in the order of GRIDS."""
        import numpy as np
        from scipy.linalg import solve_triangular

        points, values = self._points, self._values
        usual_noise = max(SEED_OVER_ROUGHNESS * self._roughness.usual / self._scale, LEAST_USUAL_NOISE)
        apart, apart_in_time = abs(points.x[:, None] - points.x), abs(points.time[:, None] - points.time)
        gained = {length: _matern(apart_in_time, length) for length in EPOCH_LENGTHS}
        lasting = {share: _lasting(apart_in_time, share) for share in LASTING_SHARES}
        near = {length: _matern(apart, length) for length in LENGTHS}
        lucks = {kind: self._luck(*kind) for kind in itertools.product(LASTING_SHARES, (False, True))}
        own = self._own()
        of_warp = self._warp.log_slopes(points.line) - len(values) * math.log(self._scale)
        of_warp -= 0 if math.isinf(self._warp.size) else WARP_PENALTY

        def fit(
            epoch_length: float, share: float, length: float, amplitude: float, noise: float, is_fading: bool
        ) -> _Fit:
            depends = amplitude**2 * lasting[share] * near[length]
            root = np.linalg.cholesky(gained[epoch_length] + depends + noise**2 * lucks[share, is_fading] + own)
            whitened = solve_triangular(root, values, lower=True)
            # Log-normal priors: the values of usual networks are the most common.
            prior = (
                math.log(length / USUAL_LENGTH) / 0.7,
                math.log(amplitude) / 1.5,
                math.log(noise / usual_noise) / 1.5,
            )
            misfit = 0.5 * (whitened @ whitened + math.hypot(*prior) ** 2)
            evidence = of_warp - misfit - np.log(np.diag(root)).sum()
            return _Fit(epoch_length, share, length, amplitude, noise, is_fading, evidence)

        return fit

    def draw(self, fit: _Fit, x: Array, times: int, random: np.random.Generator) -> Array:
        """Draw values at the end of training, at each x, as they are on the line."""
        import numpy as np
        from scipy.linalg import solve_triangular

        points, at_end = self._points, np.zeros(len(x))
        off = fit.noise**2 * self._luck(fit.share, fit.is_fading) + self._own()
        root = np.linalg.cholesky(_alike(fit, points.x, points.time, points.x, points.time) + off / TRUST)
        explained = solve_triangular(root, _alike(fit, points.x, points.time, x, at_end), lower=True)
        covariance = _alike(fit, x, at_end, x, at_end) - explained.T @ explained
        spread = np.linalg.cholesky(covariance + JITTER * np.diag(np.diag(covariance) + 1)).T
        expected = explained.T @ solve_triangular(root, self._values, lower=True)
        drawn = expected + random.standard_normal((times, len(x))) @ spread
        return self._warp.invert(drawn * self._scale + self._mean)

    def _luck(self, share: float, is_fading: bool) -> Array:
        """Return how alike points are by the luck of their seed, which fades, or lasts as what a rate brings does."""
        import numpy as np

        points = self._points
        apart_in_time = abs(points.time[:, None] - points.time)
        size = points.roughness * (np.exp(-FADING_POWER * points.time) if is_fading else 1)
        alike = _matern(apart_in_time, FADING_LENGTH) if is_fading else _lasting(apart_in_time, share)
        luck: Array = (points.trial[:, None] == points.trial) * np.outer(size, size) * alike
        return luck

    def _own(self) -> Array:
        """Return the covariance of what each point is off by on its own, as its curve is rough."""
        import numpy as np

        return np.diag(self._points.variance / self._scale**2 + MISFIT**2)

    def noises_at(self, fits: Sequence[_Fit], x: Array, line: Array) -> Array:
        """Return the standard deviation of a trial's last value at each x, by each fit, where the mean is `line`."""
        import numpy as np

        relative, warped = self._roughness.relative_at(x), self._warp.apply(line)
        noises = []
        for fit in fits:
            usual = math.hypot(fit.noise * self._scale, self._roughness.usual, MISFIT * self._scale)
            half = usual / 2 * relative
            noises.append(self._warp.invert(warped + half) - self._warp.invert(warped - half))
        return np.array(noises)


class _Roughness:
    """How rough the curves are: the standard deviation of a value about the smooth curve through its neighbours."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        import numpy as np

        of_curves = [(curve.x, roughness_of(curve.line)) for curve in curves]
        known = np.array(sorted((x, math.log(rough)) for x, rough in of_curves if rough > 0)).reshape(-1, 2)
        self.usual = float(np.exp(known[:, 1].mean())) if len(known) else 0.0  # 0: not known
        # Of too many curves neighbours count with their mean: they are compared with each other.
        groups = np.array_split(known, min(len(known), NUM_FITTED_POINTS)) if len(known) else []
        self._x, self._log = np.array([group.mean(axis=0) for group in groups]).reshape(-1, 2).T
        self._sizes = np.array([len(group) for group in groups])

    def relative_at(self, x: Any) -> Array:
        """Return how rough the curves about log10 of learning rates are, relative to the usual roughness."""
        import numpy as np

        x = np.asarray(x)
        if not self.usual:
            return np.ones(len(x))
        weights = self._sizes * np.exp(-0.5 * ((x[:, None] - self._x) / SMOOTHED_DECADES) ** 2)
        # One curve of the usual roughness is added everywhere.
        logs = (weights @ self._log + math.log(self.usual)) / (weights.sum(axis=1) + 1)
        relative: Array = np.exp(logs) / self.usual
        return relative


def roughness_of(line: Sequence[float] | Array) -> float:
    """Return the roughness of the later half of a curve by its second differences, or 0 if it is too short for that."""
    import numpy as np

    later = line[len(line) // 2 :]
    return float(np.sqrt(np.square(np.diff(later, 2)).mean() / 6)) if len(later) >= MIN_ROUGH else 0.0


def _points(curves: Sequence[Curve], roughness: _Roughness, num_epochs: int) -> _Points:
    import numpy as np

    count = min(max(NUM_FITTED_POINTS // len(curves), 1), NUM_POINTS_OF_CURVE)
    relative = roughness.relative_at([curve.x for curve in curves])
    rows = [
        (
            curve.x,
            math.log(curve.epochs[last - 1] / num_epochs),
            curve.line[first:last].mean(),
            index,
            (relative[index] * roughness.usual) ** 2 / (last - first),
            relative[index],
        )
        for index, curve in enumerate(curves)
        for first, last in _windows(curve, count)
    ]
    # Of too many trials, which have a point each, neighbours count with their mean.
    groups = (
        np.array_split(np.array(rows), NUM_FITTED_POINTS)
        if len(curves) > NUM_FITTED_POINTS
        else np.array(rows)[:, None]
    )
    x, time, line, _, variance, rough = np.array([group.mean(axis=0) for group in groups]).T
    sizes = np.array([len(group) for group in groups])
    trials = np.array([group[0][3] for group in groups])
    return _Points(x, time, line, trials, variance / sizes, rough / np.sqrt(sizes))


def _windows(curve: Curve, count: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) of the values of each point of a curve, of which the last point ends at its end."""
    import numpy as np

    length = len(curve.line)
    lasts = sorted({round(last) for last in np.geomspace(1, length, count)}) if count > 1 else [length]
    windows, before = [], 0
    for last in lasts:
        windows.append((min(max(before, int(last * (1 - AVERAGED))), last - 1), last))
        before = last
    return windows


def _alike(fit: _Fit, x: Array, time: Array, other_x: Array, other_time: Array) -> Array:
    """Return the covariance of the process at two sets of learning rates and times, without what trials are off by."""
    apart_in_time = abs(time[:, None] - other_time)
    depends = fit.amplitude**2 * _matern(abs(x[:, None] - other_x), fit.length)
    return _matern(apart_in_time, fit.epoch_length) + depends * _lasting(apart_in_time, fit.share)


def _lasting(apart_in_time: Array, share: float) -> Array:
    """Return how alike what a learning rate brings is at two times, of which `share` is the same at all times."""
    return share + (1 - share) * _matern(apart_in_time, CHANGE_LENGTH)


def _matern(distance: Array, length: float) -> Array:
    """Return the Matérn 5/2 correlation."""
    import numpy as np

    scaled = math.sqrt(5) * abs(distance) / length
    correlation: Array = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    return correlation
