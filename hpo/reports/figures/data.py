"""The data that figures are drawn of, and what several figures show of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.analysis.answer import Best
from hpo.analysis.scale import WORST
from hpo.analysis.text import params_text, plural, value_text
from hpo.analysis.trials import is_rate
from hpo.reports.figures.style import escape_plotly
from hpo.study.records import StudyRecord, TrialRecord
from hpo.train.metrics import is_percent


@dataclass(frozen=True)
class FigureData:
    """What figures are drawn of; `importances` of the parameters are empty if unknown."""

    study: StudyRecord
    trials: Sequence[TrialRecord]  # of the search
    best: Best | None
    importances: Mapping[str, float]
    others: Sequence[TrialRecord] = ()  # those that confirm or test

    @property
    def all_trials(self) -> list[TrialRecord]:
        """The trials of the search and the others."""
        return [*self.trials, *self.others]

    @property
    def is_accuracy(self) -> bool:
        """Whether the values are accuracies, shown in percent."""
        values = [trial.value for trial in self.trials if trial.value is not None]
        return is_percent(self.study.spec.metric) and all(0 <= value <= 1 for value in values)


def rate_of(trial: TrialRecord) -> float | None:
    """Return the learning rate of a trial, if it has one; a user's own loop may call anything `lr`."""
    rate: Any = trial.params.get("lr")
    return float(rate) if is_rate(rate) else None


def value_axis(data: FigureData, **settings: Any) -> dict[str, Any]:
    """Return an axis of the study's metric."""
    form = {"tickformat": "~%"} if data.is_accuracy else {"exponentformat": "e"}
    return {"title": {"text": escape_plotly(data.study.spec.metric)}, **form, **settings}


def hover_settings(data: FigureData, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """Return the settings of a trace with a mark for each trial that show its label under the pointer.

    Several figures have the same labels. `meta` tells a page that it may keep one of each trial.
    """
    return {
        "text": [trial_label(data, trial) for trial in trials],
        "customdata": [trial.number for trial in trials],
        "meta": {"labelled": True},
        "hovertemplate": "%{text}<extra></extra>",
    }


def trial_label(data: FigureData, trial: TrialRecord) -> str:
    """Return what is shown of a trial under the pointer."""
    study = data.study
    value = "" if trial.value is None else f"<br>{escape_plotly(study.spec.metric)} {value_text(trial.value, study)}"
    epochs = plural(len(trial.epochs), "epoch")
    return f"trial {trial.number}, {trial.state}, {epochs}<br>{escape_plotly(params_text(trial.params))}{value}"


def shown_bounds(data: FigureData, values: Sequence[float]) -> tuple[float, float]:
    """Return the values between which an axis runs; those beyond are drawn at its ends.

    Otherwise one exploded trial would hide all others. The rule is the response's: a value is shown as no worse than
    WORST times as far from the median as the best one is.
    """
    low, high = min(values), max(values)
    middle = statistics.median(values)
    if data.is_accuracy:
        low, high = max(0.0, low), min(1.0, high)
    elif data.study.spec.direction == "minimize":
        high = min(high, middle + WORST * (middle - low) or high)
    else:
        low = max(low, middle - WORST * (high - middle) or low)
    if not (math.isfinite(low) and math.isfinite(high)):
        return min(values), max(values)
    return low, high


def room_beyond(low: float, high: float) -> float:
    """Return how far an axis runs beyond the lowest and the highest value, also if they are the same."""
    return (high - low) * 0.06 or abs(high) * 0.06 or 1.0
