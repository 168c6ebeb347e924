"""Widening a range of a study that has been searched: the spec with the wider range, and where nobody has been."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError, unknown_name
from hpo.search.samplers import num_startup
from hpo.search.space import Range, Scalar

Ends = tuple[float, float]  # of a range, the lower one first


def parse_widening(text: str) -> tuple[str, Ends]:
    """Return the key and the new ends that `KEY=LOW:HIGH` names.

    Raises:
        UserError: The text is not of that form.
    """
    key, _, ends = text.partition("=")
    low, _, high = ends.partition(":")
    try:
        return key, (_end_of_range(low), _end_of_range(high))
    except ValueError:
        raise UserError(f"--widen must be KEY=LOW:HIGH, such as lr=1e-6:10, got {text!r}") from None


def widened_spec(spec: StudySpec, widening: Mapping[str, Ends]) -> StudySpec:
    """Return the spec with these ranges in place of its own, which they must hold.

    Raises:
        UserError: The study has no such range, or one that cannot be widened so.
    """
    if spec.search.sampler in ("grid", "race"):
        raise UserError(f"--widen does not apply to sampler {spec.search.sampler!r}, whose learning rates are given")
    frozen = spec.frozen()
    space = frozen["search"]["space"]
    for key, (low, high) in widening.items():
        if key not in space:
            raise unknown_name("--widen", key, space)
        searched = spec.search.parameters.get(key)
        if not isinstance(searched, Range) or searched.step is not None:
            raise UserError(f"--widen {key} needs a range without steps in search.space, got {space[key]}")
        if low > searched.low or high < searched.high or (low, high) == (searched.low, searched.high):
            raise UserError(
                f"--widen {key} must include the searched range and more, {searched.low:g}:{searched.high:g}, "
                f"got {low:g}:{high:g}"
            )
        if searched.is_integer and not (isinstance(low, int) and isinstance(high, int)):
            raise UserError(f"--widen {key} must be integers, like the searched range, got {low:g}:{high:g}")
        ends = (low, high) if searched.is_integer else (float(low), float(high))
        space[key] |= dict(zip(("low", "high"), ends, strict=True))
    return StudySpec.from_dict(frozen)


def adopt_widened_ranges(spec: StudySpec, stored: StudySpec, widenings: Sequence[Mapping[str, Any]]) -> StudySpec:
    """Return the spec with the stored study's ranges where it still has those from before they were widened.

    Args:
        spec: The spec of whoever runs the study again, perhaps by the file that it was made from.
        stored: The spec in the store.
        widenings: How its ranges were widened, as `StudyRecord.widenings`.
    """
    frozen = spec.frozen()
    space = frozen["search"]["space"]
    known = [ranges for one in widenings for ranges in one["before"].items()]
    for key, before in known:
        if space.get(key) == before and key in stored.search.space:
            space[key] = stored.search.space[key]
    return StudySpec.from_dict(frozen) if known else spec


def num_trials_to_add(spec: StudySpec, wider: StudySpec, *, count: int) -> int:
    """Return how many trials the wider ranges need to be searched as densely as the others were by `count` trials."""
    growth = math.prod(
        _width(new, new.low, new.high) / _width(new, old.low, old.high) for _, old, new in _widened(spec, wider)
    )
    return math.ceil(count * (growth - 1))


def points_to_add(spec: StudySpec, wider: StudySpec, *, count: int) -> list[dict[str, Scalar]]:
    """Return at most `count` values of the widened parameters for trials to begin with, where no trial can have been.

    They are even, and as dense as the trials that a sampler begins with; at least one on each side.
    """
    points: list[dict[str, Scalar]] = []
    for key, old, new in _widened(spec, wider):
        for low, high in ((new.low, old.low), (old.high, new.high)):
            if low < high:
                share = _width(new, low, high) / _width(new, old.low, old.high)
                num_points = max(1, round(num_startup(spec) * share))
                part = Range(low, high, log=new.log)
                points += [{key: part.value_at((index + 0.5) / num_points)} for index in range(num_points)]
    return points[:count]


def _widened(spec: StudySpec, wider: StudySpec) -> list[tuple[str, Range, Range]]:
    """Return each parameter whose range is another one, with the range before and after."""
    pairs = [(key, spec.search.parameters[key], new) for key, new in wider.search.parameters.items()]
    return [
        (key, old, new)
        for key, old, new in pairs
        if isinstance(old, Range) and isinstance(new, Range) and (old.low, old.high) != (new.low, new.high)
    ]


def _width(scale: Range, low: float, high: float) -> float:
    return math.log(high / low) if scale.log else high - low


def _end_of_range(text: str) -> float:
    """Return an integer where the text is one, as TOML does."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError from None
        return number
