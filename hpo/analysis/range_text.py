"""Texts and numbers of the range tests that set the range of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.analysis.text import interval_text
from hpo.config.study_spec import StudySpec
from hpo.search.space import Conditional, Parameter, Range, Scalar
from hpo.study.records import StudyRecord

RANGE_TEST_KEY = "range_test"  # of a study's metadata
MAX_SHOWN_LOSS = 1.5  # times the loss at the start; a broken loss would hide the rest


def range_test_lines(
    study: StudyRecord, *, best: float | None = None, params: Mapping[str, Any] | None = None
) -> list[str]:
    """Return a sentence for each range test of a study.

    The sentence of the test that `params` belong to also says where the learning rate `best` is in its range.
    """
    lines = []
    for test in study.metadata.get(RANGE_TEST_KEY, ()):
        subject = "the range of learning rates"
        if test["params"]:
            subject += f" with {', '.join(f'{key} {value}' for key, value in test['params'].items())}"
        low, high = test["low"], test["high"]
        line = f"{subject} comes from a range test of {test['epochs']:.2g} epochs: {interval_text((low, high))} "
        line += f"({signs_text(test)})"
        searched = active_parameter(study.spec, "lr", test["params"])
        if isinstance(searched, Range) and interval_text((searched.low, searched.high)) != interval_text((low, high)):
            low, high = float(searched.low), float(searched.high)
            line += f", within the {interval_text((low, high))} that were searched"
        if best is not None and params is not None and test["params"].items() <= dict(params).items():
            line += f"; {position_text(best, low, high)}"
        lines.append(line)
    return lines


def signs_text(test: Mapping[str, Any]) -> str:
    """Return the signs that a ramp showed; `test` is the plain data that `Ramp.as_dict` returns."""
    seen = [("the loss falls from", test["falls"]), ("breaks at", test["breaks"]), ("leaps from", test["leaps"])]
    return ", ".join(f"{what} {lr:.2g}" for what, lr in seen if lr is not None) or "nothing broke"


def position_text(best: float, low: float, high: float) -> str:
    """Return where a learning rate is in a range, on its log scale."""
    if not low <= best <= high:
        return f"the best one, {best:.2g}, is outside of that"
    up, down = math.log10(best / low), math.log10(high / best)
    return f"the best one is {up:.1f} decades above its low end and {down:.1f} below its high end"


def active_parameter(spec: StudySpec, key: str, values: Mapping[str, Scalar]) -> Parameter | None:
    """Return the parameter `key` of the search space, of a conditional one the case that `values` select."""
    parameter = spec.search.parameters[key]
    return parameter.cases.get(str(values[parameter.by])) if isinstance(parameter, Conditional) else parameter


def clip_losses(losses: Sequence[float | None]) -> list[float]:
    """Return the losses of a ramp for a plot, with all above MAX_SHOWN_LOSS, or not finite, at that height."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not finite:
        return []
    top = MAX_SHOWN_LOSS * max(finite[0], min(finite))
    return [top if loss is None or not math.isfinite(loss) else min(loss, top) for loss in losses]
