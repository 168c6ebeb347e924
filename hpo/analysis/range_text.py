"""What an answer says of the range tests that set its range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.config.study_spec import StudySpec
from hpo.search.space import Conditional, Parameter, Range, Scalar

if TYPE_CHECKING:
    from hpo.study.records import StudyRecord


from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.study.records import StudyRecord


RANGE_TEST_KEY = "range_test"  # its name among a study's facts


def range_test_lines(
    study: StudyRecord, *, best: float | None = None, params: Mapping[str, Any] | None = None
) -> list[str]:
    """What a study's answer says of its range tests, a line for each; where `best` is in that of its `params`."""
    lines = []
    for found in study.facts.get(RANGE_TEST_KEY, ()):
        listed = ", ".join(f"{key} {value}" for key, value in found["params"].items())
        low, high = found["low"], found["high"]
        line = f"the range of learning rates{f' with {listed}' if listed else ''} comes from a range test of "
        line += f"{found['epochs']:.2g} epochs: {low:.2g} to {high:.2g} ({signs_text(found)})"
        searched = active_parameter(study.spec, "lr", found["params"])
        if isinstance(searched, Range) and (f"{searched.low:.2g}", f"{searched.high:.2g}") != (
            f"{low:.2g}",
            f"{high:.2g}",
        ):
            low, high = float(searched.low), float(searched.high)
            line += f", within the {low:.2g} to {high:.2g} that were searched"
        if best is not None and params is not None and found["params"].items() <= dict(params).items():
            line += f"; {position_text(best, low, high)}"
        lines.append(line)
    return lines


def signs_text(found: Mapping[str, Any]) -> str:
    """What a ramp showed, in words; `found` as `Ramp.as_dict` gives it."""
    seen = [("the loss falls from", found["falls"]), ("breaks at", found["breaks"]), ("leaps from", found["leaps"])]
    return ", ".join(f"{what} {lr:.2g}" for what, lr in seen if lr is not None) or "nothing broke"


def position_text(best: float, low: float, high: float) -> str:
    """Where a learning rate sits in a range, on its log scale."""
    if not low <= best <= high:
        return f"the best one, {best:.2g}, is outside of that"
    up, down = math.log10(best / low), math.log10(high / best)
    return f"the best one is {up:.1f} decades above its low end and {down:.1f} below its high end"


def active_parameter(spec: StudySpec, key: str, values: Mapping[str, Scalar]) -> Parameter | None:
    parameter = spec.search.parameters[key]
    return parameter.cases.get(str(values[parameter.by])) if isinstance(parameter, Conditional) else parameter


MAX_SHOWN_LOSS = 1.5  # times the loss at the start: what is above is drawn there, or a broken loss would hide the rest


def clip_losses(losses: Sequence[float | None]) -> list[float]:
    """The losses of a ramp as far as they are."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not finite:
        return []
    top = MAX_SHOWN_LOSS * max(finite[0], min(finite))
    return [top if loss is None or not math.isfinite(loss) else min(loss, top) for loss in losses]
