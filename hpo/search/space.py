"""The search space: ranges, lists, and parameters that depend on another one, read from [search.space]."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.errors import UserError, check_keys

Scalar = str | bool | int | float

MAX_POINTS = 10_000  # of one range in a grid
AUTO = "auto"  # in place of the learning rate's range: a range test finds it


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; integers where both are. `points` is their number in a grid."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    points: int | None = None

    @property
    def num_points(self) -> int:
        """How many values a grid has, before integers that fall together are counted once."""
        return self.points or 0 if self.step is None else self._num_steps(self.step)

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None)

    def contains(self, value: object) -> bool:
        number = isinstance(value, int if self.is_integer else int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high  # type: ignore[operator]

    def extreme_values(self) -> list[Scalar]:
        return [self.low, self.high]

    def grid_values(self) -> list[Scalar]:
        """The values of a grid: evenly spaced (geometrically on a log scale), rounded to six significant digits."""
        if self.step is not None:
            values = [self.low + index * self.step for index in range(self.num_points)]
        else:
            assert self.points is not None
            values = [self._between(index / (self.points - 1)) for index in range(self.points)]
        return list(dict.fromkeys(self._rounded(value) for value in values))

    def value_at(self, share: float) -> Scalar:
        """The value at a share in [0, 1) of the range, or of its logarithm."""
        step = self.step or (1 if self.is_integer and not self.log else None)
        if step is not None:
            return min(self.low + int(share * self._num_steps(step)) * step, self.high)
        return self._rounded(self._between(share))

    def _num_steps(self, step: float) -> int:
        return math.floor((self.high - self.low) / step + 1e-9) + 1

    def _between(self, share: float) -> float:
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + (self.high - self.low) * share

    def _rounded(self, value: float) -> int | float:
        return round(value) if self.is_integer else min(max(float(f"{value:.6g}"), self.low), self.high)

    def __str__(self) -> str:
        return f"{'an integer' if self.is_integer else 'a number'} from {self.low} to {self.high}"


@dataclass(frozen=True)
class AutoRange(Range):
    """All learning rates that a range test tries, until one has been made: `hpo.lr_range` puts its range here."""

    low: float = 1e-7
    high: float = 10.0
    log: bool = True


@dataclass(frozen=True)
class Categorical:
    """One of a list of values."""

    values: tuple[Scalar, ...]

    def contains(self, value: object) -> bool:
        return value in self.values

    def extreme_values(self) -> list[Scalar]:
        return list(self.values)

    def grid_values(self) -> list[Scalar]:
        return list(self.values)

    def value_at(self, share: float) -> Scalar:
        """The value at a share in [0, 1) of the list."""
        return self.values[int(share * len(self.values))]

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"


@dataclass(frozen=True)
class Conditional:
    """A parameter with a range or list for each value of the parameter `by`; without a case it is not searched."""

    by: str
    cases: Mapping[str, Range | Categorical]

    def extreme_values(self) -> list[Scalar]:
        return [value for case in self.cases.values() for value in case.extreme_values()]


Parameter = Range | Categorical | Conditional


def is_auto(parameter: Parameter | None) -> bool:
    """Whether a range test is to find this range, or that of one of its cases."""
    cases = parameter.cases.values() if isinstance(parameter, Conditional) else [parameter]
    return any(isinstance(case, AutoRange) for case in cases)


def value_combinations(
    parameters: Mapping[str, Parameter], values: Callable[[Range | Categorical], Sequence[Scalar]]
) -> Iterator[dict[str, Scalar]]:
    """Every combination of `values(parameter)` over the space, the last parameter changing fastest."""
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
    """Every point of a grid."""
    return list(value_combinations(parameters, lambda parameter: parameter.grid_values()))


def point_at(parameters: Mapping[str, Parameter], shares: Sequence[float]) -> dict[str, Scalar]:
    """The point of the space at these shares in [0, 1), one for each parameter in turn."""
    at = dict(zip(parameters, shares, strict=True))
    values = {key: free.value_at(at[key]) for key, free in parameters.items() if not isinstance(free, Conditional)}
    for key, dependent in parameters.items():
        if isinstance(dependent, Conditional) and (case := dependent.cases.get(str(values[dependent.by]))):
            values[key] = case.value_at(at[key])
    return values


def parse_space(space: Mapping[str, Any], *, grid: bool) -> dict[str, Parameter]:
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if key in ("model", "data") and isinstance(value, dict):  # model.width = ... is a nested table in TOML
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return {key: _parse_parameter(f"search.space.{key}", value, grid=grid) for key, value in flat.items()}


def _parse_parameter(setting: str, value: Any, *, grid: bool) -> Parameter:
    if isinstance(value, list):
        return _parse_choice(setting, value)
    if value == AUTO:
        return _parse_auto(setting, grid=grid)
    if not isinstance(value, dict):
        raise UserError(f"{setting} must be a list of values or {{ low = ..., high = ... }}, got {value!r}")
    if "by" not in value:
        return _parse_range(setting, value, grid=grid)
    by = value["by"]
    if len(value) != 1 or not isinstance(by, dict) or len(by) != 1 or not all(isinstance(v, dict) for v in by.values()):
        raise UserError(
            f"{setting}.by must name one other parameter and its cases, as in by.optimizer.adam = {{ low = ... }}"
        )
    ((other, cases),) = by.items()
    parsed = {case: _parse_parameter(f"{setting}.by.{other}.{case}", inner, grid=grid) for case, inner in cases.items()}
    if any(isinstance(case, Conditional) for case in parsed.values()):
        raise UserError(f"{setting}.by cannot be nested")
    return Conditional(by=other, cases=parsed)  # type: ignore[arg-type]


def _parse_auto(setting: str, *, grid: bool) -> AutoRange:
    if setting.split(".")[2] != "lr":
        raise UserError(f"{setting} must be a list of values or {{ low = ..., high = ... }}; 'auto' is for lr alone")
    if grid:
        raise UserError(f"{setting} must be a list, or low, high and points, for sampler 'grid', got 'auto'")
    return AutoRange()


def _parse_choice(setting: str, values: list[Any]) -> Categorical:
    if not values:
        raise UserError(f"{setting} must hold at least one value, got []")
    for value in values:
        if not isinstance(value, str | bool | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{setting} must hold finite numbers, texts or booleans, got {value!r}")
    if len({(type(value), value) for value in values}) < len(values):
        raise UserError(f"{setting} must hold each value once, got {values}")
    return Categorical(tuple(values))


def _parse_range(setting: str, value: dict[str, Any], *, grid: bool) -> Range:
    check_keys(setting, value, {field.name for field in dataclasses.fields(Range)})
    for key in ("low", "high"):
        if key not in value:
            raise UserError(f"{setting} must have both low and high, got {value}")
    low, high, log, step, points = (value.get(key) for key in ("low", "high", "log", "step", "points"))
    for key, number in (("low", low), ("high", high), ("step", step)):
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number)
        ):
            raise UserError(f"{setting}.{key} must be a finite number, got {number!r}")
    if not isinstance(log, bool | None):
        raise UserError(f"{setting}.log must be true or false, got {log!r}")
    assert low is not None
    assert high is not None
    if log and low <= 0:
        raise UserError(f"{setting}.low must be > 0 on a log scale, got {low}")
    if low >= high:
        raise UserError(f"{setting}.low must be less than {setting}.high, got low = {low} and high = {high}")
    if step is not None and (log or step <= 0):
        raise UserError(f"{setting}.step must be greater than 0 and not on a log scale, got {step}")
    if grid and step is None and (isinstance(points, bool) or not isinstance(points, int) or points < 2):
        raise UserError(
            f"{setting}.points must be at least 2 for sampler 'grid' (or give step, or a list), got {points!r}"
        )
    if points is not None and (step is not None or not grid):
        raise UserError(
            f"{setting}.points has no meaning {'beside step' if step is not None else 'but for a grid'}, got {points!r}"
        )
    parsed = Range(low=low, high=high, log=bool(log), step=step, points=points)
    if grid and parsed.num_points > MAX_POINTS:
        raise UserError(f"{setting} must have at most {MAX_POINTS:,} points in a grid, got {parsed.num_points:,}")
    return parsed
