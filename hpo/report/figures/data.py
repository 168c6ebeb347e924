"""What figures are drawn of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.analysis.answer import Best
from hpo.analysis.text import params_text, value_text
from hpo.analysis.trials import is_rate
from hpo.study.records import StudyRecord, TrialRecord

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

from hpo.report.figures.style import escape_plotly

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class FigureData:
    """What a study has found, which figures are drawn of; `importances` of parameters are empty where unknown."""

    study: StudyRecord
    trials: Sequence[TrialRecord]  # of the search
    best: Best | None
    importances: Mapping[str, float]
    others: Sequence[TrialRecord] = ()  # those that confirm

    @property
    def all_trials(self) -> list[TrialRecord]:
        return [*self.trials, *self.others]

    @property
    def is_accuracy(self) -> bool:
        values = [trial.value for trial in self.trials if trial.value is not None]
        return self.study.spec.metric.endswith("accuracy") and all(0 <= value <= 1 for value in values)


def rate_of(trial: TrialRecord) -> float | None:
    """Its learning rate, where it has one: a loop of the user's may call anything `lr`."""
    rate: Any = trial.params.get("lr")
    return float(rate) if is_rate(rate) else None


def hover_settings(findings: FigureData, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """Of a trace with a mark for each trial: what is shown where a pointer rests on it.

    The same text stands in several figures: a page may keep one of each trial, and `meta` says that it can.
    """
    return {
        "text": [trial_label(findings, trial) for trial in trials],
        "customdata": [trial.number for trial in trials],
        "meta": {"labelled": True},
        "hovertemplate": "%{text}<extra></extra>",
    }


def trial_label(findings: FigureData, trial: TrialRecord) -> str:
    """What is shown of a trial where a pointer rests on it."""
    study = findings.study
    value = "" if trial.value is None else f"<br>{escape_plotly(study.spec.metric)} {value_text(trial.value, study)}"
    epochs = f"{len(trial.epochs)} epoch{'s' * (len(trial.epochs) != 1)}"
    return f"trial {trial.number}, {trial.state}, {epochs}<br>{escape_plotly(params_text(trial.params))}{value}"


def shown_bounds(findings: FigureData, values: Sequence[float]) -> tuple[float, float]:
    """Between which values the axis runs; what is beyond is shown at its end, or one exploded trial hides the others.

    The same rule as the response's: no worse than three times as far from the median as the best is.
    """
    import statistics

    from hpo.analysis.response import WORST

    low, high = min(values), max(values)
    middle = statistics.median(values)
    if findings.is_accuracy:
        low, high = max(0.0, low), min(1.0, high)
    elif findings.study.spec.direction == "minimize":
        high = min(high, middle + WORST * (middle - low) or high)
    else:
        low = max(low, middle - WORST * (high - middle) or low)
    if not (math.isfinite(low) and math.isfinite(high)):
        return min(values), max(values)
    return low, high


def value_axis(findings: FigureData, **settings: Any) -> dict[str, Any]:
    """An axis of what is searched for."""
    form = {"tickformat": ".0%"} if findings.is_accuracy else {"exponentformat": "e"}
    return {"title": {"text": escape_plotly(findings.study.spec.metric)}, **form, **settings}
