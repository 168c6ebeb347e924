"""Runs: what a logger is given of a study, one run a trial, and one for its answer.

They follow from the store alone: whoever makes them, and whenever, a trial that has not changed is the same run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from hpo.analysis.answer import Best
from hpo.analysis.answer_text import describe_answer
from hpo.study.records import ENDED, StudyRecord, TrialRecord

ANSWER = "answer"  # the name and the kind of the run that holds the answer
VALUE = "value"  # the metric that holds a trial's value; no trial can report one of this name


@dataclass(frozen=True)
class Point:
    """A point of a learning curve."""

    metric: str
    epoch: int
    value: float  # finite
    time: float  # seconds since 1970


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trial, or the answer of a study, as a logger shows it."""

    study: str  # the study's name
    study_id: str  # its name and its uid, which no other study has; copies of a study share it
    name: str  # such as trial-3
    kind: str  # as `TrialRecord.kind`, or ANSWER
    state: str  # of the trial; of the answer "complete"
    params: Mapping[str, Any]
    points: Sequence[Point]  # by epoch; the value of a trial that has one is among them
    is_recommended: bool  # whether the values are those that the study recommends
    tags: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    began: float = 0.0  # seconds since 1970
    ended: float | None = None

    @property
    def run_id(self) -> str:
        """Name the run among those of all studies, the same whenever it is written."""
        return f"{self.study_id}-{self.name}"

    @cached_property
    def digest(self) -> str:
        """Return a text that changes with whatever is to be shown."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def make_runs(study: StudyRecord, trials: Sequence[TrialRecord], best: Best | None) -> list[Run]:
    """Return the runs of a study: the trials that have begun and, while none is in training, the answer."""
    runs = [_trial_run(study, trial, best) for trial in trials if trial.attempt > 0]
    if best is not None and all(trial.state != "running" for trial in trials):
        runs.append(_answer_run(study, best, time=max((run.ended or run.began for run in runs), default=0.0)))
    return runs


def _trial_run(study: StudyRecord, trial: TrialRecord, best: Best | None) -> Run:
    began = (trial.attempts[0].began if trial.attempts else trial.started) or 0.0
    tags = {"state": trial.state, "kind": trial.kind, "attempt": trial.attempt, "reason": trial.reason}
    tags |= {key: trial.attributes.get(key) for key in ("seed", "host", "device")}
    return Run(
        study=study.name,
        study_id=_study_id(study),
        name=f"trial-{trial.number}",
        kind=trial.kind,
        state=trial.state,
        params=dict(trial.params),
        points=_curve_points(trial, began),
        is_recommended=best is not None and best.is_recommended(trial.params),
        tags={key: str(value) for key, value in tags.items() if value is not None},
        text=trial.reason or "",
        began=began,
        ended=trial.ended if trial.state in ENDED else None,
    )


def _curve_points(trial: TrialRecord, began: float) -> list[Point]:
    """Return the finite points of the curves by epoch, each at the time that its epoch took, and the trial's value."""
    points, time = [], began
    for index, epoch in enumerate(trial.epochs):
        metrics = {name: curve[index] for name, curve in trial.curves.items()}
        time += metrics.get("seconds") or 0.0
        points += [Point(name, epoch, value, time) for name, value in metrics.items() if value is not None]
    if trial.value is not None and trial.state in ENDED:
        points.append(Point(VALUE, max(trial.epochs, default=1), trial.value, time))
    return points


def _answer_run(study: StudyRecord, best: Best, *, time: float) -> Run:
    """Return the recommended values as a run; a response may recommend a rate that no trial has had."""
    value = best.value if best.response is None else best.response.value
    if best.confirmation is not None:
        value = best.confirmation.value
    answer = describe_answer(study, best)
    interval = {} if best.interval is None else dict(zip(("lr_low", "lr_high"), best.interval, strict=True))
    return Run(
        study=study.name,
        study_id=_study_id(study),
        name=ANSWER,
        kind=ANSWER,
        state="complete",
        params=best.recommended,
        points=[Point(name, 0, number, time) for name, number in {VALUE: value, **interval}.items()],
        is_recommended=True,
        tags={"kind": ANSWER},
        text="\n".join([*answer.sentences, *(f"warning: {warning}" for warning in answer.warnings)]),
        began=time,
        ended=time,
    )


def _study_id(study: StudyRecord) -> str:
    return f"{study.name}-{study.origin}"
