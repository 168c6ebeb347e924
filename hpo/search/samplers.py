"""StudySpec -> Optuna sampler, pruner and suggestions, by lookup tables; importing this loads no Optuna.

Every claim of a trial gets a sampler of its own, seeded from the study's seed and the trial's number: no two workers
draw the same numbers, and a study that is interrupted draws the same ones when it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.search.space import Cases, Choice, Parameter, Range, Scalar, point
from hpo.train.config import derive_seed

if TYPE_CHECKING:
    import optuna
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

    from hpo.config.study_spec import StudySpec


def _as_it_is() -> type[optuna.Study]:
    from hpo.search.study_views import SearchStudy

    return SearchStudy


def _by_reports() -> type[optuna.Study]:
    from hpo.search.study_views import ReportsStudy

    return ReportsStudy


def _by_values() -> type[optuna.Study]:
    from hpo.search.study_views import ValuesStudy

    return ValuesStudy


@dataclass(frozen=True)
class Sampler:
    """A sampler: how it is built, and what a space must be for it.

    `build(seed, study_seed, spec)`: `seed` differs from trial to trial, `study_seed` does not.
    """

    build: Callable[[int, int, StudySpec], BaseSampler]
    conditional: bool = False  # can it search a parameter that depends on another one?
    min_ranges: int = 0
    counts: bool = False  # keeps a counter in the study, which one trial at a time may read and write
    begins_spread: bool = False  # needs some trials to learn from, which are spread over the space
    study: Callable[[], type[optuna.Study]] = _as_it_is  # how it is shown the trials before


TURNS = 8  # trials that take turns of an epoch where the pruner compares them early: it knows more sooner


@dataclass(frozen=True)
class Pruner:
    """A pruner: its options with their defaults (None: see `build`), and how it is built from them and max_epochs.

    `judges` says whether it drops trials after an epoch; after the others nobody waits for its word, which counts all
    the same: a rung that was passed unjudged, in an epoch reported late, is judged with the next one.
    """

    defaults: Mapping[str, Any]
    build: Callable[[dict[str, Any], int], BasePruner]
    judges: Callable[[dict[str, Any], int], bool] = lambda options, epoch: True
    compares_early: bool = False  # with trials in training, so that it does better with several of them side by side


def _random(seed: int, study_seed: int, spec: StudySpec) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _tpe(seed: int, study_seed: int, spec: StudySpec) -> BaseSampler:
    from optuna.samplers import TPESampler

    conditional = any(isinstance(parameter, Cases) for parameter in spec.search.parameters.values())
    return TPESampler(
        seed=seed, n_startup_trials=num_startup(spec), multivariate=True, group=conditional, constant_liar=True
    )


def _qmc(seed: int, study_seed: int, spec: StudySpec) -> BaseSampler:
    from optuna.samplers import QMCSampler, RandomSampler

    # One scrambled Sobol sequence for the whole study: every worker must scramble it alike.
    return QMCSampler(
        qmc_type="sobol", scramble=True, seed=study_seed,
        independent_sampler=RandomSampler(seed=seed), warn_independent_sampling=False,
    )  # fmt: skip


def _gp(seed: int, study_seed: int, spec: StudySpec) -> BaseSampler:
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed, n_startup_trials=num_startup(spec))


def _cmaes(seed: int, study_seed: int, spec: StudySpec) -> BaseSampler:
    from optuna.samplers import RandomSampler

    from hpo.search.cmaes import ReplayedCmaEsSampler

    return ReplayedCmaEsSampler(
        seed=seed, independent_sampler=RandomSampler(seed=seed), warn_independent_sampling=False
    )


SAMPLERS: dict[str, Sampler] = {
    "grid": Sampler(_random, conditional=True),  # a grid's points are given with its slots; nothing is left to sample
    "random": Sampler(_random, conditional=True),
    "tpe": Sampler(_tpe, conditional=True, begins_spread=True, study=_by_reports),
    "qmc": Sampler(_qmc, counts=True),
    "gp": Sampler(_gp, begins_spread=True, study=_by_values),
    "cmaes": Sampler(_cmaes, min_ranges=2, study=_by_values),
}


def _none(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import NopPruner

    return NopPruner()


def _percentile(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import PercentilePruner

    # Optuna's percentile keeps that share of the trials; so does ours.
    return PercentilePruner(
        options.get("percentile", 50.0),
        n_startup_trials=options["startup_trials"],
        n_warmup_steps=options["warmup_epochs"],
    )


def _asha(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import SuccessiveHalvingPruner

    return SuccessiveHalvingPruner(
        min_resource=options["min_epochs"], reduction_factor=options["reduction_factor"], bootstrap_count=0
    )


def _hyperband(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import HyperbandPruner

    # With max_resource="auto" nothing is pruned until one trial has completed.
    return HyperbandPruner(
        min_resource=min(options["min_epochs"], max_epochs),
        max_resource=max_epochs,
        reduction_factor=options["reduction_factor"],
    )


def _patient(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import PatientPruner

    return PatientPruner(None, patience=options["patience"], min_delta=options["min_delta"])


def _threshold(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import ThresholdPruner

    return ThresholdPruner(lower=options["lower"], upper=options["upper"], n_warmup_steps=options["warmup_epochs"])


def _at_rungs(options: dict[str, Any], epoch: int) -> bool:
    """Whether epoch is min_epochs x reduction_factor^k, for k = 0, 1, ..."""
    rung = options["min_epochs"]
    while rung < epoch:
        rung *= options["reduction_factor"]
    return bool(rung == epoch)


PRUNERS: dict[str, Pruner] = {
    "none": Pruner({}, _none, judges=lambda options, epoch: False),
    "median": Pruner({"startup_trials": 5, "warmup_epochs": 1}, _percentile),
    "percentile": Pruner({"percentile": 50.0, "startup_trials": 5, "warmup_epochs": 1}, _percentile),
    "asha": Pruner({"min_epochs": 1, "reduction_factor": 3}, _asha, _at_rungs, compares_early=True),
    "hyperband": Pruner({"min_epochs": 1, "reduction_factor": 3}, _hyperband, _at_rungs, compares_early=True),
    "patient": Pruner({"patience": 3, "min_delta": 0.0}, _patient),
    "threshold": Pruner({"lower": None, "upper": None, "warmup_epochs": 1}, _threshold),
}


def build_sampler(spec: StudySpec, *, number: int) -> BaseSampler:
    """The study's sampler for the trial of this number."""
    study_seed = derive_seed(spec.search.seed, "study")
    return SAMPLERS[spec.search.sampler].build(derive_seed(spec.search.seed, "trial", number), study_seed, spec)


def build_pruner(spec: StudySpec) -> BasePruner:
    """The study's pruner, with our defaults where the study file is silent."""
    return PRUNERS[spec.pruner.name].build(_pruner_options(spec), spec.max_epochs)


def may_prune_after(epoch: int, spec: StudySpec) -> bool:
    """Whether the study's pruner may drop a trial that has come to this epoch."""
    return PRUNERS[spec.pruner.name].judges(_pruner_options(spec), epoch)


def _pruner_options(spec: StudySpec) -> dict[str, Any]:
    return {**PRUNERS[spec.pruner.name].defaults, **spec.pruner.model_dump(exclude={"name"}, exclude_none=True)}


def slots(spec: StudySpec) -> list[dict[str, Scalar]]:
    """What is given of each trial's parameters before it is claimed: all of a grid point, nothing of a sampled one."""
    if spec.search.sampler == "grid":
        return spec.search.grid
    first = spec.search.try_first
    if SAMPLERS[spec.search.sampler].begins_spread:
        first = first + _spread(spec, max(0, num_startup(spec) - len(first)))
    return first + [{} for _ in range(spec.num_trials - len(first))]


def num_startup(spec: StudySpec) -> int:
    """How many trials a sampler that learns begins with; Optuna's ten would be half of a usual study."""
    least = TURNS if PRUNERS[spec.pruner.name].compares_early else 4  # who take turns are proposed before any reports
    return min(spec.num_trials, max(least, min(10, spec.num_trials // 3)))


def _spread(spec: StudySpec, count: int) -> list[dict[str, Scalar]]:
    """The first points of a scrambled Sobol sequence: random ones leave gaps, and in a gap may lie the best rate."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(spec.search.parameters), rng=derive_seed(spec.search.seed, "spread"))
    # Drawn by powers of two, as many as are balanced; the first of them are as good for any count.
    shares = sequence.random_base2(max(0, count - 1).bit_length())[:count]
    return [point(spec.search.parameters, row.tolist()) for row in shares]


def optuna_params(spec: StudySpec, values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The same values under the names that the Optuna study knows them by."""
    return {_optuna_name(key, spec.search.parameters[key], values): value for key, value in values.items()}


def values_from_optuna(params: Mapping[str, Any]) -> dict[str, Scalar]:
    """The inverse of `optuna_params`: `lr[adam]` is `lr`."""
    return {name.partition("[")[0]: value for name, value in params.items()}


def new_trial(spec: StudySpec, slot: Any) -> FrozenTrial:
    """Optuna's trial for a row of hpo_slots that is claimed for the first time.

    What is given of a trial of the search, its sampler will not draw; of one that confirms, everything is given but a
    searched seed.
    """
    from optuna.trial import FixedTrial, TrialState, create_trial

    from hpo.search.study_views import KIND

    given = json.loads(slot.given)
    if slot.kind == "search":
        return create_trial(state=TrialState.RUNNING, system_attrs={"fixed_params": given})
    known = FixedTrial(given)
    suggest(known, spec, without={"seed"})
    return create_trial(
        state=TrialState.RUNNING,
        params=known.params,
        distributions=known.distributions,
        user_attrs={KIND: slot.kind, "replicate": slot.replicate},
    )


def suggest(trial: optuna.trial.BaseTrial, spec: StudySpec, *, without: Collection[str] = ()) -> dict[str, Scalar]:
    """Asks Optuna for every parameter of the space; those on which others depend come first."""
    values: dict[str, Scalar] = {}
    parameters = spec.search.parameters
    wanted = [key for key in parameters if key not in without]
    for key in sorted(wanted, key=lambda key: isinstance(parameters[key], Cases)):
        parameter = parameters[key]
        name = _optuna_name(key, parameter, values)
        if isinstance(parameter, Cases):
            if str(values[parameter.by]) not in parameter.cases:
                continue
            parameter = parameter.cases[str(values[parameter.by])]
        values[key] = _suggest(trial, name, parameter, grid=spec.search.sampler == "grid")
    return values


def _suggest(trial: optuna.trial.BaseTrial, name: str, parameter: Range | Choice, *, grid: bool) -> Scalar:
    if isinstance(parameter, Choice):
        numbers = [
            value for value in parameter.values if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if not grid or len(numbers) < len(parameter.values):
            choice: Scalar = trial.suggest_categorical(name, list(parameter.values))  # type: ignore[assignment]
            return choice
        # A grid's list of numbers is recorded as a range, so that every Optuna plot has a true axis for it.
        low, high = min(numbers), max(numbers)
        parameter = Range(low=low, high=high, log=low > 0 and high / low >= 10)
    step = None if grid else parameter.step  # a grid's points are given, and need not lie on a step
    if parameter.integer:
        return trial.suggest_int(name, int(parameter.low), int(parameter.high), log=parameter.log, step=int(step or 1))
    return trial.suggest_float(name, float(parameter.low), float(parameter.high), log=parameter.log, step=step)


def _optuna_name(key: str, parameter: Parameter, values: Mapping[str, Scalar]) -> str:
    # A parameter of its own for each case: what is learnt about SGD's rates says nothing about Adam's.
    return f"{key}[{values[parameter.by]}]" if isinstance(parameter, Cases) else key
