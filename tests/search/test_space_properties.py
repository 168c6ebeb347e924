"""The space agrees with itself: what a parameter gives it contains, and Optuna's names lead back to ours."""

from __future__ import annotations

import itertools
import re
from typing import Any

import optuna
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpo.config.checks import check_search
from hpo.errors import UserError
from hpo.search.config import PrunerSpec, SearchSpec
from hpo.search.proposals import check_values, fixed_values, optuna_params, suggest, values_from_optuna
from hpo.search.samplers import SAMPLERS, build_sampler
from hpo.search.space import Categorical, Conditional, Parameter, Range, grid_points, parse_space, point_at

quick = settings(derandomize=True, deadline=None, max_examples=80)
fractions = st.floats(0, 1, exclude_max=True)
names = st.text("abcxyz_.", min_size=1, max_size=4)
scalars = st.one_of(st.booleans(), st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6), st.text(max_size=4))
lists = st.lists(scalars, min_size=1, max_size=5, unique_by=lambda value: (type(value), value))


@st.composite
def ranges(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a range as a study file has it; not every one is valid."""
    is_log = draw(st.booleans())
    numbers = draw(st.sampled_from([st.integers(-(10**18), 10**18), st.floats(-1e300, 1e300), st.floats(0, 1e-3)]))
    low, high = sorted([draw(numbers), draw(numbers)])
    table: dict[str, Any] = {"low": low, "high": high}
    if is_log:
        return table | {"log": True}
    if draw(st.booleans()) and low < high:
        parts = draw(st.integers(1, 50))
        table["step"] = max(1, (high - low) // parts) if isinstance(low, int) else (high - low) / parts
    return table


@st.composite
def conditionals(draw: st.DrawFn) -> dict[str, Any]:
    """Draw two parameters, of which one has a case for some values of the other."""
    choices = draw(st.lists(st.sampled_from(["adam", "sgd", 1, 0.5, True]), min_size=1, max_size=4, unique_by=str))
    cases = {str(choice): draw(st.one_of(ranges(), lists)) for choice in choices if draw(st.booleans())}
    assume(cases)
    return {"choice": choices, "dependent": {"by": {"choice": cases}}}


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a space as a study file has it."""
    space: dict[str, Any] = draw(st.dictionaries(names, st.one_of(ranges(), lists), max_size=3))
    if draw(st.booleans()):
        space |= draw(conditionals())
    assume(space)
    return space


class Settings:
    """A study's settings, as samplers read them."""

    name = "s"
    pruner = PrunerSpec()
    max_epochs = 1

    def __init__(self, search: SearchSpec) -> None:
        self.search = search
        self.num_trials = search.num_trials


def parsed(space: dict[str, Any], *, grid: bool = False) -> dict[str, Parameter]:
    try:
        return parse_space(space, grid=grid)
    except UserError:
        assume(False)
        raise


def case_of(parameter: Parameter, point: dict[str, Any]) -> Range | Categorical:
    return parameter.cases[str(point[parameter.by])] if isinstance(parameter, Conditional) else parameter


@quick
@given(table=ranges(), fraction=fractions)
def test_a_range_contains_its_ends_and_what_it_gives(table: dict[str, Any], fraction: float) -> None:
    parameter = parsed({"x": table})["x"]
    assert isinstance(parameter, Range)
    for value in (*parameter.extreme_values(), parameter.value_at(0), parameter.value_at(fraction)):
        assert parameter.contains(value)
    assert not parameter.contains(True)
    assert not parameter.contains(parameter.low - max(1, abs(parameter.low)))


@quick
@given(table=ranges(), first=fractions, second=fractions)
def test_a_range_is_drawn_in_order(table: dict[str, Any], first: float, second: float) -> None:
    parameter = parsed({"x": table})["x"]
    assert isinstance(parameter, Range)
    low, high = (parameter.value_at(fraction) for fraction in sorted([first, second]))
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    assert low <= high


@quick
@given(table=ranges(), points=st.integers(2, 60))
def test_a_grid_of_a_range_has_its_points_in_order_within_it(table: dict[str, Any], points: int) -> None:
    if "step" not in table:
        table = table | {"points": points}
    parameter = parsed({"x": table}, grid=True)["x"]
    assert isinstance(parameter, Range)
    values = parameter.grid_values()
    assert values == sorted(set(values))
    assert all(parameter.contains(value) for value in values)
    is_coarse = parameter.is_integer or parameter.high - parameter.low < 1e-9 * abs(
        parameter.high
    )  # points fall together
    assert len(values) == parameter.num_points or (is_coarse and len(values) < parameter.num_points)
    if "step" not in table:
        width = float(parameter.high - parameter.low)
        assert [values[0], values[-1]] == pytest.approx([parameter.low, parameter.high], rel=1e-5, abs=1e-5 * width)


@quick
@given(values=lists, fraction=fractions)
def test_a_list_contains_and_gives_each_of_its_values(values: list[Any], fraction: float) -> None:
    parameter = parsed({"x": values})["x"]
    assert isinstance(parameter, Categorical)
    assert all(parameter.contains(value) for value in values)
    assert parameter.value_at(fraction) in values
    assert parameter.grid_values() == parameter.extreme_values() == values
    assert [parameter.value_at((index + 0.5) / len(values)) for index in range(len(values))] == values


@quick
@given(space=spaces(), data=st.data())
def test_a_point_of_a_space_has_the_parameters_that_its_values_ask_for(
    space: dict[str, Any], data: st.DataObject
) -> None:
    parameters = parsed(space)
    point = point_at(parameters, data.draw(st.lists(fractions, min_size=len(parameters), max_size=len(parameters))))
    for key, parameter in parameters.items():
        is_asked = not isinstance(parameter, Conditional) or str(point[parameter.by]) in parameter.cases
        assert (key in point) == is_asked
        assert not is_asked or case_of(parameter, point).contains(point[key])


@quick
@given(space=spaces(), data=st.data())
def test_optunas_names_of_values_lead_back_to_ours(space: dict[str, Any], data: st.DataObject) -> None:
    parameters = parsed(space)
    point = point_at(parameters, data.draw(st.lists(fractions, min_size=len(parameters), max_size=len(parameters))))
    params = optuna_params(Settings(SearchSpec(space=space)), point)
    assert len(params) == len(point)
    assert values_from_optuna(params) == point


@pytest.mark.filterwarnings("ignore::UserWarning")  # Optuna moves the end of a range to its last step, and says so
@quick
@given(space=spaces(), data=st.data())
def test_optuna_is_asked_for_the_values_of_a_point_under_those_names(
    space: dict[str, Any], data: st.DataObject
) -> None:
    parameters = parsed(space)
    point = point_at(parameters, data.draw(st.lists(fractions, min_size=len(parameters), max_size=len(parameters))))
    spec = Settings(SearchSpec(space=space))
    trial = optuna.trial.FixedTrial(optuna_params(spec, point))
    assert suggest(trial, spec) == point


@quick
@given(space=spaces(), points=st.integers(2, 4))
def test_a_grid_is_every_combination_once(space: dict[str, Any], points: int) -> None:
    for table in space.values():
        if isinstance(table, dict) and "low" in table:
            table.pop("step", None)
            table["points"] = points
    parameters = {key: value for key, value in parsed(space, grid=True).items() if not isinstance(value, Conditional)}
    grid = grid_points(parameters)
    sizes = [len(parameter.grid_values()) for parameter in parameters.values()]
    expected = 1
    for size in sizes:
        expected *= size
    assert len(grid) == expected
    assert len({tuple((type(value), value) for value in point.values()) for point in grid}) == expected


@quick
@given(space=spaces(), trials=st.integers(1, 30), sampler=st.sampled_from(["random", "tpe"]))
def test_there_is_a_set_of_fixed_values_for_each_trial(space: dict[str, Any], trials: int, sampler: str) -> None:
    parameters = parsed(space)
    fixed = fixed_values(Settings(SearchSpec(space=space, trials=trials, sampler=sampler)))
    assert len(fixed) == trials
    for point in fixed:
        assert all(case_of(parameters[key], point).contains(value) for key, value in point.items())


SPACE = {
    "lr": {"low": 1e-3, "high": 1.0, "log": True},
    "batch_size": {"low": 8, "high": 64},
    "optimizer": ["adam", "sgd", True],
    "momentum": {"by": {"optimizer": {"sgd": {"low": 0.0, "high": 0.9}}}},
}


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"lr": 0.1, "batch_size": 8, "optimizer": "sgd", "momentum": 0.9}, None),
        ({"lr": 1.0000000000000002, "optimizer": True}, None),  # samplers round
        ({"lr": 1.01}, "lr = 1.01"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": "0.1"}, "lr = '0.1'"),
        ({"batch_size": 8.5}, "batch_size = 8.5"),
        ({"batch_size": True}, "batch_size = True"),
        ({"optimizer": "os:system"}, "optimizer = 'os:system'"),
        ({"optimizer": 1}, "optimizer = 1"),
        ({"optimizer": "adam", "momentum": 0.5}, "momentum = 0.5"),
        ({"momentum": 0.5}, "momentum = 0.5"),
        ({"model.name": "os:system"}, "model.name = 'os:system'"),
        ({"model.command": "rm -r /"}, "model.command = 'rm -r /'"),
    ],
)
def test_a_store_gives_a_trial_only_what_the_space_holds(values: dict[str, Any], refused: str | None) -> None:
    search = Settings(SearchSpec(sampler="random", space=SPACE))
    if refused is None:
        check_values(search, values)
    else:
        with pytest.raises(UserError, match=f"^the store gives a trial {re.escape(refused)}, which is not in search"):
            check_values(search, values)


def test_a_grids_list_of_numbers_holds_the_rates_between_them_as_a_confirmation_trains() -> None:
    search = Settings(SearchSpec(sampler="grid", space={"lr": [0.1, 0.3], "optimizer": ["sgd"]}))
    check_values(search, {"lr": 0.2})
    with pytest.raises(UserError, match=r"lr = 0\.4"):
        check_values(search, {"lr": 0.4})


@pytest.mark.filterwarnings("ignore")  # of what Optuna calls experimental, and of ends that it moves
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_space_that_is_accepted_can_be_searched(sampler: str) -> None:
    for high, step in itertools.product([1.0, 1e300, 2**31, 2**62], [None, 1e-300, 1e-30, 1e-17, 1e-9, 0.3, 2.0]):
        table = {"low": type(high)(0), "high": high} | ({} if step is None else {"step": step})
        try:
            search = SearchSpec(sampler=sampler, trials=5, space={"x": table, "y": {"low": 0.0, "high": 1.0}})
            check_search(search)
        except UserError:
            continue
        settings = Settings(search)
        study = optuna.create_study(sampler=build_sampler(settings, number=0))
        for point in [*fixed_values(settings)[:4], {}]:
            study.enqueue_trial(optuna_params(settings, point))
            trial = study.ask()
            values = suggest(trial, settings)
            assert all(case_of(search.parameters[key], values).contains(value) for key, value in values.items())
            study.tell(trial, 0.5)
