"""The samplers as a lookup table: how each is built and what it needs; importing this loads no Optuna.

Every claim of a trial gets a sampler of its own, seeded from the study's seed and the trial's number. So no two workers
draw the same numbers, and an interrupted study draws the same ones when it is resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hpo.search.pruners import INTERLEAVED_TRIALS, PRUNERS
from hpo.search.space import Conditional
from hpo.train.config import derive_seed

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from hpo.search.config import SearchSettings
    from hpo.search.study_views import SearchStudy


def _search_study() -> type[SearchStudy]:
    from hpo.search.study_views import SearchStudy

    return SearchStudy


def _reports_study() -> type[SearchStudy]:
    from hpo.search.study_views import ReportsStudy

    return ReportsStudy


def _values_study() -> type[SearchStudy]:
    from hpo.search.study_views import ValuesStudy

    return ValuesStudy


@dataclass(frozen=True)
class SamplerEntry:
    """One entry of SAMPLERS: how the sampler is built, and what it asks of a space.

    `build(seed, study_seed, spec)`: `seed` differs from trial to trial, `study_seed` does not.
    """

    build: Callable[[int, int, SearchSettings], BaseSampler]
    about: str = field(kw_only=True)  # in the reference
    takes_cases: bool = False  # can search a parameter that depends on another one
    min_ranges: int = 0
    lists_values: bool = False  # makes a list of all values of a range of integers, or with steps
    reads_trials: bool = True  # looks at the trials of the study before it draws
    has_counter: bool = False  # keeps a counter in the study, which one trial at a time may read and write
    begins_spread: bool = False  # learns from its first trials, which are spread over the space
    study_view: Callable[[], type[SearchStudy]] = _search_study  # how the sampler sees the trials before


def _random(seed: int, study_seed: int, spec: SearchSettings) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _tpe(seed: int, study_seed: int, spec: SearchSettings) -> BaseSampler:
    from optuna.samplers import TPESampler

    conditional = any(isinstance(parameter, Conditional) for parameter in spec.search.parameters.values())
    return TPESampler(
        seed=seed, n_startup_trials=num_startup(spec), multivariate=True, group=conditional, constant_liar=True
    )


def _qmc(seed: int, study_seed: int, spec: SearchSettings) -> BaseSampler:
    from optuna.samplers import QMCSampler, RandomSampler

    # One scrambled Sobol sequence for the whole study: every worker must scramble it alike.
    return QMCSampler(
        qmc_type="sobol",
        scramble=True,
        seed=study_seed,
        independent_sampler=RandomSampler(seed=seed),
        warn_independent_sampling=False,
    )


def _gp(seed: int, study_seed: int, spec: SearchSettings) -> BaseSampler:
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed, n_startup_trials=num_startup(spec))


def _cmaes(seed: int, study_seed: int, spec: SearchSettings) -> BaseSampler:
    from optuna.samplers import RandomSampler

    from hpo.search.cmaes import ReplayedCmaEsSampler

    return ReplayedCmaEsSampler(
        seed=seed, independent_sampler=RandomSampler(seed=seed), warn_independent_sampling=False
    )


SAMPLERS: dict[str, SamplerEntry] = {
    "grid": SamplerEntry(
        _random,
        takes_cases=True,
        reads_trials=False,
        about="every combination of the listed values, each exactly once",
    ),  # a grid's points are given with its slots; nothing is left to sample
    "random": SamplerEntry(
        _random,
        takes_cases=True,
        reads_trials=False,
        about="independent draws",
    ),
    "tpe": SamplerEntry(
        _tpe,
        takes_cases=True,
        begins_spread=True,
        study_view=_reports_study,
        about="tree-structured Parzen estimator (Bergstra et al. 2011), multivariate; sees trials in training",
    ),
    "race": SamplerEntry(
        _random,
        reads_trials=False,
        about="successive halving of up to 16 rates, spread evenly over one range, for a budget of epochs",
    ),  # its rates are given with its slots, as those of a grid
    "qmc": SamplerEntry(
        _qmc,
        has_counter=True,
        about="one scrambled Sobol sequence over the ranges",
    ),
    "gp": SamplerEntry(
        _gp,
        lists_values=True,
        begins_spread=True,
        study_view=_values_study,
        about="Gaussian process with expected improvement",
    ),
    "cmaes": SamplerEntry(
        _cmaes,
        min_ranges=2,
        study_view=_values_study,
        about="CMA-ES, for two ranges or more",
    ),
}


def build_sampler(spec: SearchSettings, *, number: int) -> BaseSampler:
    """Return the study's sampler for the trial of this number."""
    study_seed = derive_seed(spec.search.seed, "study")
    return SAMPLERS[spec.search.sampler].build(derive_seed(spec.search.seed, "trial", number), study_seed, spec)


def num_startup(spec: SearchSettings) -> int:
    """Return how many trials a sampler that learns begins with; Optuna's ten would be half of a usual study."""
    # Trials that take turns are all proposed before any of them reports.
    least = INTERLEAVED_TRIALS if PRUNERS[spec.pruner.name].compares_early else 4
    return min(spec.num_trials, max(least, min(10, spec.num_trials // 3)))
