"""The search space: ranges, lists, and parameters that depend on another one, parsed from [search.space]."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt

from hpo.errors import UserError, check_keys
from hpo.train.config import Doc

Scalar = str | bool | int | float

NESTED = ("model", "data", "optimizer_options")  # tables in [search.space]
MAX_POINTS = 10_000  # of one range in a grid
MAX_VALUES = 10**9  # of a range with steps; Optuna counts them in decimals of 28 digits
GROUPS = "groups"  # begins the key of a multiplier of training.groups: groups.head.lr
AUTO = "auto"  # in place of the learning rate's range: a range test finds it


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; integers where both are."""

    low: Annotated[float, Doc("The lowest value.")]
    high: Annotated[float, Doc("The highest value.")]
    log: Annotated[bool, Doc("Draw evenly on a logarithmic scale.")] = False
    step: Annotated[float | None, Gt(0), Doc("Distance of the values from each other.")] = None
    points: Annotated[int | None, Ge(2), Doc("For a grid: how many values to take.")] = None

    @property
    def num_points(self) -> int:
        """The number of values in a grid, before integers that fall together are counted once."""
        return self.points or 0 if self.step is None else self._num_steps(self.step)

    @property
    def num_values(self) -> float:
        """The number of values that the range holds; infinite for floats without a step."""
        step = self.step or (1 if self.is_integer else None)
        return math.inf if step is None else self._num_steps(step)

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None)

    def contains(self, value: object) -> bool:
        """Return whether the value is a number of the range; steps aside."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_integer else int | float):
            return False
        return self.low <= value <= self.high

    def extreme_values(self) -> list[Scalar]:
        """Return both ends."""
        return [self.low, self.high]

    def grid_values(self) -> list[Scalar]:
        """Return the values of a grid, evenly spaced (geometrically on a log scale).

        They have six significant digits, or all digits where six would not tell them from each other.
        """
        if self.step is not None:
            exact = [self.low + index * self.step for index in range(self.num_points)]
        else:
            assert self.points is not None
            exact = [self._between(index / (self.points - 1)) for index in range(self.points)]
        rounded = list(dict.fromkeys(self._rounded(value) for value in exact))
        if self.is_integer or len(rounded) == len(exact):
            return [*rounded]
        return [*dict.fromkeys(self._clamped(value) for value in exact)]

    def value_at(self, fraction: float) -> Scalar:
        """Return the value at a fraction in [0, 1) of the range, or of its logarithm."""
        step = self.step or (1 if self.is_integer and not self.log else None)
        if step is not None:
            return min(self.low + int(fraction * self._num_steps(step)) * step, self.high)
        return self._rounded(self._between(fraction))

    def _num_steps(self, step: float) -> int:
        return math.floor((self.high - self.low) / step + 1e-9) + 1

    def _between(self, fraction: float) -> float:
        if not self.log:
            return self.low + (self.high - self.low) * fraction
        ratio = self.high / self.low
        if math.isinf(ratio):  # such as from 1e-200 to 1e200
            return math.exp(math.log(self.low) + (math.log(self.high) - math.log(self.low)) * fraction)
        return float(self.low * ratio**fraction)

    def _rounded(self, value: float) -> float:
        return self._clamped(round(value) if self.is_integer else float(f"{value:.6g}"))

    def _clamped(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def __str__(self) -> str:
        kind = "an integer" if self.is_integer else "a number"
        return f"{kind} from {self.low} to {self.high}"


@dataclass(frozen=True)
class AutoRange(Range):
    """All learning rates that a range test tries, until one was made: `hpo.lr_range` puts its range here."""

    low: float = 1e-7
    high: float = 10.0
    log: bool = True


@dataclass(frozen=True)
class Categorical:
    """One of a list of values."""

    values: tuple[Scalar, ...]

    def contains(self, value: object) -> bool:
        """Return whether the value is in the list; true and false are no numbers."""
        return any(value == listed and isinstance(value, bool) == isinstance(listed, bool) for listed in self.values)

    def extreme_values(self) -> list[Scalar]:
        """Return all values."""
        return list(self.values)

    def grid_values(self) -> list[Scalar]:
        """Return all values."""
        return list(self.values)

    def value_at(self, fraction: float) -> Scalar:
        """Return the value at a fraction in [0, 1) of the list."""
        return self.values[int(fraction * len(self.values))]

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"


@dataclass(frozen=True)
class Conditional:
    """A parameter with a range or list for each value of the parameter `by`; without a case it is not searched."""

    by: str
    cases: Mapping[str, Range | Categorical]

    def extreme_values(self) -> list[Scalar]:
        """Return the extreme values of all cases."""
        return [value for case in self.cases.values() for value in case.extreme_values()]


Parameter = Range | Categorical | Conditional


def is_auto(parameter: Parameter | None) -> bool:
    """Return whether a range test has to find this range, or that of one of its cases."""
    cases = parameter.cases.values() if isinstance(parameter, Conditional) else [parameter]
    return any(isinstance(case, AutoRange) for case in cases)


def value_combinations(
    parameters: Mapping[str, Parameter], values: Callable[[Range | Categorical], Sequence[Scalar]]
) -> Iterator[dict[str, Scalar]]:
    """Yield every combination of `values(parameter)` over the space, the last parameter changing fastest."""
    free = {key: values(parameter) for key, parameter in parameters.items() if not isinstance(parameter, Conditional)}
    for chosen in itertools.product(*free.values()):
        point = dict(zip(free, chosen, strict=True))
        cases = {
            key: values(parameter.cases[str(point[parameter.by])])
            for key, parameter in parameters.items()
            if isinstance(parameter, Conditional) and str(point[parameter.by]) in parameter.cases
        }
        for dependent in itertools.product(*cases.values()):
            yield point | dict(zip(cases, dependent, strict=True))


def grid_points(parameters: Mapping[str, Parameter]) -> list[dict[str, Scalar]]:
    """Return every point of a grid."""
    return list(value_combinations(parameters, lambda parameter: parameter.grid_values()))


def point_at(parameters: Mapping[str, Parameter], fractions: Sequence[float]) -> dict[str, Scalar]:
    """Return the point of the space at these fractions in [0, 1), one for each parameter in turn."""
    fraction_of = dict(zip(parameters, fractions, strict=True))
    point = {
        key: parameter.value_at(fraction_of[key])
        for key, parameter in parameters.items()
        if not isinstance(parameter, Conditional)
    }
    for key, parameter in parameters.items():
        if isinstance(parameter, Conditional) and (case := parameter.cases.get(str(point[parameter.by]))):
            point[key] = case.value_at(fraction_of[key])
    return point


def parse_space(space: Mapping[str, Any], *, grid: bool) -> dict[str, Parameter]:
    """Return the parameters of a table [search.space], by their keys.

    `model.width = ...` and `groups.head.lr = ...` are nested tables in TOML.

    Raises UserError, naming the setting, for what is no parameter.
    """
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if key == GROUPS and isinstance(value, dict):
            for name, inner in value.items():
                flat |= (
                    {f"{key}.{name}.{of}": one for of, one in inner.items()}
                    if isinstance(inner, dict)
                    else {f"{key}.{name}": inner}
                )
        elif key in NESTED and isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    for key in flat:
        if "[" in key:  # what Optuna calls a parameter for one case: lr[adam]
            raise UserError(f"search.space: each key must be without '[', got {key!r}")
    return {key: _parse_parameter(f"search.space.{key}", value, grid=grid) for key, value in flat.items()}


def _parse_parameter(setting: str, value: Any, *, grid: bool) -> Parameter:
    if isinstance(value, dict) and "by" in value:
        return _parse_conditional(setting, value, grid=grid)
    return _parse_case(setting, value, grid=grid)


def _parse_conditional(setting: str, value: dict[str, Any], *, grid: bool) -> Conditional:
    by = value["by"]
    is_one_table = len(value) == 1 and isinstance(by, dict) and len(by) == 1
    if not is_one_table or not all(isinstance(cases, dict) and cases for cases in by.values()):
        raise UserError(
            f"{setting}.by must name one other parameter and its cases, as in by.optimizer.adam = {{ low = ... }}"
        )
    ((other, cases),) = by.items()
    parsed = {}
    for case, inner in cases.items():
        if isinstance(inner, dict) and "by" in inner:
            raise UserError(f"{setting}.by cannot be nested")
        parsed[case] = _parse_case(f"{setting}.by.{other}.{case}", inner, grid=grid)
    return Conditional(by=other, cases=parsed)


def _parse_case(setting: str, value: Any, *, grid: bool) -> Range | Categorical:
    if isinstance(value, list):
        return _parse_list(setting, value)
    if value == AUTO:
        return _parse_auto(setting, grid=grid)
    if isinstance(value, dict):
        return _parse_range(setting, value, grid=grid)
    raise UserError(f"{setting} must be a list of values or {{ low = ..., high = ... }}, got {value!r}")


def _parse_auto(setting: str, *, grid: bool) -> AutoRange:
    if setting.split(".")[2] != "lr":
        raise UserError(f"{setting} must be a list of values or {{ low = ..., high = ... }}; only lr may be 'auto'")
    if grid:
        raise UserError(f"{setting} must be a list, or low, high and points, for sampler 'grid', got 'auto'")
    return AutoRange()


def _parse_list(setting: str, values: list[Any]) -> Categorical:
    if not values:
        raise UserError(f"{setting} must hold at least one value, got []")
    for value in values:
        if not isinstance(value, str | bool) and not _is_finite_number(value):
            raise UserError(f"{setting} must hold finite numbers, texts or booleans, got {value!r}")
    if len({(type(value), value) for value in values}) < len(values):
        raise UserError(f"{setting} must hold each value once, got {values}")
    if len(set(values)) < len(values):  # Optuna, as Python, cannot tell them from each other
        raise UserError(f"{setting} must hold no values that are equal, as 1, 1.0 and true are; got {values}")
    return Categorical(tuple(values))


def _parse_range(setting: str, value: dict[str, Any], *, grid: bool) -> Range:
    check_keys(setting, value, {field.name for field in dataclasses.fields(Range)})
    for key in ("low", "high"):
        if key not in value:
            raise UserError(f"{setting} must have both low and high, got {value}")
    for key in ("low", "high", "step"):
        if value.get(key) is not None and not _is_finite_number(value[key]):
            raise UserError(f"{setting}.{key} must be a finite number, got {value[key]!r}")
    if not isinstance(value.get("log"), bool | None):
        raise UserError(f"{setting}.log must be true or false, got {value['log']!r}")
    low, high, log, step = value["low"], value["high"], bool(value.get("log")), value.get("step")
    _check_bounds(setting, low, high, log=log)
    if step is not None and (log or step <= 0):
        raise UserError(f"{setting}.step must be greater than 0 and not on a log scale, got {step}")
    if step is not None and (high - low) / step >= MAX_VALUES:
        raise UserError(
            f"{setting}.step must not be so small compared with {setting}.high - {setting}.low that there are "
            f"more than {MAX_VALUES:,} values, got {step}"
        )
    _check_points(setting, value.get("points"), has_step=step is not None, grid=grid)
    parsed = Range(low=low, high=high, log=log, step=step, points=value.get("points"))
    if grid and parsed.num_points > MAX_POINTS:
        raise UserError(f"{setting} must have at most {MAX_POINTS:,} points in a grid, got {parsed.num_points:,}")
    return parsed


def _check_bounds(setting: str, low: Any, high: Any, *, log: bool) -> None:
    if low is None or high is None:
        raise UserError(f"{setting} must have both low and high, got low = {low} and high = {high}")
    if log and low <= 0:
        raise UserError(f"{setting}.low must be > 0 on a log scale, got {low}")
    if low >= high:
        raise UserError(f"{setting}.low must be less than {setting}.high, got low = {low} and high = {high}")
    if not _is_finite_number(high - low):
        raise UserError(f"{setting}.high - {setting}.low must be a finite number, got low = {low} and high = {high}")


def _check_points(setting: str, points: Any, *, has_step: bool, grid: bool) -> None:
    if grid and not has_step and (isinstance(points, bool) or not isinstance(points, int) or points < 2):
        raise UserError(
            f"{setting}.points must be at least 2 for sampler 'grid' (or give step, or a list), got {points!r}"
        )
    if points is not None and (has_step or not grid):
        rule = "cannot be combined with step" if has_step else "applies only to sampler 'grid'"
        raise UserError(f"{setting}.points {rule}, got {points!r}")


def _is_finite_number(value: object) -> bool:
    """Return whether the value is a number that a float can hold; an integer can be larger than any float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
