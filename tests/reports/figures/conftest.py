"""A study that has every figure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpo.reports.figures.table import DrawnFigure
from hpo.study.records import StudyRecord, TrialRecord
from scripts.bench.report import make_study as make_large
from tests.reports.examples import CONFIRMED, RAMP, drawn


@pytest.fixture(scope="session")
def large() -> tuple[StudyRecord, list[TrialRecord], dict[str, DrawnFigure]]:
    study, trials = make_large(90, 20)
    study = replace(study, metadata={**study.metadata, "range_test": [RAMP]})
    best_two = sorted((t for t in trials if t.state == "complete"), key=lambda t: t.value or 0)[-2:]
    trials += [
        replace(trial, number=90 + 3 * index + seed, kind="confirm", replicate=seed, value=value)
        for index, (trial, values) in enumerate(zip(best_two, CONFIRMED, strict=True))
        for seed, value in enumerate(values)
    ]
    tested = [trial for trial in trials if trial.kind == "confirm" and trial.number < 93]
    trials += [
        replace(trial, number=trial.number + 6, kind="test", tested=trial.number, curves={"test_accuracy": [None, 0.5]})
        for trial in tested
    ]
    return study, trials, drawn(study, trials)
