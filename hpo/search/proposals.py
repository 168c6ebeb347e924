"""The values of trials: fixed beforehand, or drawn by Optuna, under its names and ours."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError
from hpo.search.samplers import SAMPLERS, num_startup
from hpo.search.space import Categorical, Conditional, Parameter, Range, Scalar, point_at
from hpo.train.config import derive_seed

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from hpo.search.config import SearchSettings


def fixed_values(spec: SearchSettings) -> list[dict[str, Scalar]]:
    """Return the values of each trial that are fixed before it is claimed: all for a grid, none where it is sampled."""
    if spec.search.sampler == "grid":
        return spec.search.grid
    if spec.search.sampler == "race":
        return _even_points(spec)
    first = [_as_listed(spec, point) for point in spec.search.try_first]
    if SAMPLERS[spec.search.sampler].begins_spread:
        first = first + _spread_points(spec, max(0, num_startup(spec) - len(first)))
    return first + [{} for _ in range(spec.num_trials - len(first))]


def values_left(spec: SearchSettings, tried: Sequence[Mapping[str, Scalar]]) -> list[dict[str, Scalar]]:
    """Return the values of each trial that a study still lacks, given those that its trials were given, in order."""
    values = fixed_values(spec)
    if spec.search.sampler == "grid":
        return [point for point in values if point not in tried]
    return values[len(tried) :]


def _as_listed(spec: SearchSettings, point: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the point with the values of lists as the lists have them: 32.0 is a batch size of 32."""
    listed = {}
    for key, value in point.items():
        parameter = spec.search.parameters[key]
        case = parameter.cases[str(point[parameter.by])] if isinstance(parameter, Conditional) else parameter
        values = case.values if isinstance(case, Categorical) else (value,)
        listed[key] = next((known for known in values if known == value), value)
    return listed


def _even_points(spec: SearchSettings) -> list[dict[str, Scalar]]:
    """Return points in the middles of equal parts of a space of one range."""
    return [point_at(spec.search.parameters, [(index + 0.5) / spec.num_trials]) for index in range(spec.num_trials)]


def _spread_points(spec: SearchSettings, count: int) -> list[dict[str, Scalar]]:
    """Return the first points of a scrambled Sobol sequence; random points leave gaps, which may hold the best rate."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(spec.search.parameters), rng=derive_seed(spec.search.seed, "spread"))
    # A Sobol sequence is balanced by powers of two; the first of its points are as good for any count.
    fractions = sequence.random_base2(max(0, count - 1).bit_length())[:count]
    return [point_at(spec.search.parameters, row.tolist()) for row in fractions]


def optuna_params(spec: SearchSettings, values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the values under the names that the Optuna study knows them by."""
    return {_optuna_name(key, spec.search.parameters[key], values): value for key, value in values.items()}


def values_from_optuna(params: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return Optuna's values under our names, the inverse of `optuna_params`: `lr[adam]` is `lr`."""
    return {name.partition("[")[0]: value for name, value in params.items()}


def check_values(spec: SearchSettings, values: Mapping[str, Any]) -> None:
    """Check values of a trial that come from a store: whoever can write to it may name any code, and any key.

    Raises:
        UserError: The search space has no such key, or does not hold such a value.
    """
    is_grid = spec.search.sampler == "grid"
    for key, value in values.items():
        parameter = spec.search.parameters.get(key)
        if isinstance(parameter, Conditional):
            parameter = parameter.cases.get(str(values.get(parameter.by)))
        if parameter is None or not _holds(_as_recorded(parameter, grid=is_grid), value):
            raise UserError(f"the store gives a trial {key} = {value!r}, which is not in search.space")


def _holds(parameter: Range | Categorical, value: Any) -> bool:
    """Return whether a parameter holds a value, which samplers may round beyond a range's ends by a last digit."""
    if parameter.contains(value):
        return True
    ends = [float(end) for end in parameter.extreme_values()] if isinstance(parameter, Range) else []
    return isinstance(value, float) and any(math.isclose(value, end, rel_tol=1e-9) for end in ends)


def new_trial(spec: SearchSettings, slot: Any) -> FrozenTrial:
    """Return Optuna's trial for a row of hpo_slots that is claimed for the first time.

    Of a trial of the search, the sampler will draw what is not given. Of a trial that confirms, everything is given but
    a searched seed.
    """
    from optuna.trial import FixedTrial, TrialState, create_trial

    from hpo.search.study_views import KIND_ATTRIBUTE

    given = json.loads(slot.given)
    if slot.kind == "search":
        return create_trial(state=TrialState.RUNNING, system_attrs={"fixed_params": given})
    known = FixedTrial(given)
    suggest(known, spec, without={"seed"})
    return create_trial(
        state=TrialState.RUNNING,
        params=known.params,
        distributions=known.distributions,
        user_attrs={KIND_ATTRIBUTE: slot.kind, "replicate": slot.replicate},
    )


def suggest(trial: optuna.trial.BaseTrial, spec: SearchSettings, *, without: Collection[str] = ()) -> dict[str, Scalar]:
    """Draw a value from Optuna for every parameter of the space; those on which others depend come first."""
    values: dict[str, Scalar] = {}
    parameters = spec.search.parameters
    keys = [key for key in parameters if key not in without]
    for key in sorted(keys, key=lambda key: isinstance(parameters[key], Conditional)):
        parameter = parameters[key]
        name = _optuna_name(key, parameter, values)
        if isinstance(parameter, Conditional):
            if str(values[parameter.by]) not in parameter.cases:
                continue
            parameter = parameter.cases[str(values[parameter.by])]
        values[key] = _suggest_value(trial, name, parameter, grid=spec.search.sampler == "grid")
    return values


def searched_ranges(spec: SearchSettings) -> dict[str, BaseDistribution]:
    """Return the ranges of the space as Optuna knows them, by its names."""
    from optuna.distributions import FloatDistribution, IntDistribution

    is_grid = spec.search.sampler == "grid"
    ranges: dict[str, BaseDistribution] = {}
    for key, parameter in spec.search.parameters.items():
        cases: dict[str, Range | Categorical] = {}
        if isinstance(parameter, Conditional):
            cases |= {_optuna_name(key, parameter, {parameter.by: case}): of for case, of in parameter.cases.items()}
        else:
            cases[key] = parameter
        for name, case in cases.items():
            known = _as_recorded(case, grid=is_grid)
            if isinstance(known, Range):
                step = None if is_grid else known.step
                ranges[name] = (
                    IntDistribution(int(known.low), int(known.high), log=known.log, step=int(step or 1))
                    if known.is_integer
                    else FloatDistribution(float(known.low), float(known.high), log=known.log, step=step)
                )
    return ranges


def _suggest_value(trial: optuna.trial.BaseTrial, name: str, parameter: Range | Categorical, *, grid: bool) -> Scalar:
    parameter = _as_recorded(parameter, grid=grid)
    if isinstance(parameter, Categorical):
        choice: Scalar = trial.suggest_categorical(name, list(parameter.values))  # type: ignore[assignment]
        return choice
    step = None if grid else parameter.step  # a grid's points are given, and need not lie on a step
    if parameter.is_integer:
        return trial.suggest_int(name, int(parameter.low), int(parameter.high), log=parameter.log, step=int(step or 1))
    return trial.suggest_float(name, float(parameter.low), float(parameter.high), log=parameter.log, step=step)


def _as_recorded(parameter: Range | Categorical, *, grid: bool) -> Range | Categorical:
    """Return a parameter as Optuna knows it: a grid's list of numbers as a range, so that plots have a true axis."""
    if isinstance(parameter, Range) or not grid:
        return parameter
    numbers = [value for value in parameter.values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(parameter.values):
        return parameter
    low, high = min(numbers), max(numbers)
    return Range(low=low, high=high, log=low > 0 and high / low >= 10)


def _optuna_name(key: str, parameter: Parameter, values: Mapping[str, Scalar]) -> str:
    # Each case is a parameter of its own: SGD's learning rates say nothing about Adam's.
    return f"{key}[{values[parameter.by]}]" if isinstance(parameter, Conditional) else key
