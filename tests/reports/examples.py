"""Studies for the tests of the report and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hpo.analysis.answer import find_best
from hpo.reports.figures.data import FigureData
from hpo.reports.figures.table import DrawnFigure, draw_figures, make_figure_data
from hpo.reports.study_report import StudyReport, make_report
from hpo.study.records import StudyRecord, TrialRecord
from tests.analysis.examples import LOG_LR, make_study, make_trials, numbered, trained

MINIMIZED = {"function": "m:f", "metric": "loss", "direction": "minimize"}
CONFIRMED = ([0.71, 0.69, 0.7], [0.58, 0.6, 0.62])  # the values of two learning rates on three seeds
RAMP = {
    "params": {},
    "lrs": [1e-5, 1e-3, 1e-1],
    "losses": [2.3, 2.0, None],
    "falls": 1e-3,
    "lowest": 1e-3,
    "breaks": 1e-1,
    "leaps": 1e-2,
    "edge": 1e-2,
    "low": 1e-4,
    "high": 1e-1,
    "epochs": 0.9,
    "batch_size": 4,
    "seconds": 1.0,
}


def figure_data(study: StudyRecord, trials: Sequence[TrialRecord]) -> FigureData:
    return make_figure_data(study, trials, find_best(study, trials))


def drawn(study: StudyRecord, trials: Sequence[TrialRecord]) -> dict[str, DrawnFigure]:
    return {entry.name: entry for entry in draw_figures(figure_data(study, trials))}


def traces(entry: DrawnFigure, name: str) -> list[Any]:
    return [trace for trace in entry.figure.data if trace.name == name]


def unusual() -> dict[str, tuple[StudyRecord, list[TrialRecord]]]:
    """Return studies with little or with strange things to show, by name."""
    plain, minimized = make_study(), make_study(num_val=None, objective=MINIMIZED)
    loss: dict[str, Any] = {"curves": {"loss": [1e308, None, 3.0]}, "epochs": [1, 2, 3]}
    cases = {"lr": {"by": {"optimizer": {"adam": LOG_LR, "sgd": [0.1, 0.2]}}}, "optimizer": ["adam", "sgd"]}
    by_case = [trained(lr, 0.8, optimizer="adam" if lr < 0.05 else "sgd") for lr in (1e-4, 1e-3, 1e-2, 0.1, 0.2)]
    no_rate = [replace(t, params={"kind": k}) for t, k in zip(make_trials((1, 0.5), (1, 0.7)), "ab", strict=True)]
    words = [replace(t, params={"lr": "high"}) for t in make_trials((1, 0.5), (1, 0.7))]
    return {
        "no trial": (plain, []),
        "all waiting": (plain, make_trials((0.1, "waiting"), (0.2, "waiting"))),
        "one": (plain, numbered(trained(0.1, 0.9))),
        "one that is running": (plain, numbered(trained(0.1, 0.5, state="running", epochs=1))),
        "all diverged": (plain, numbered(*(trained(lr, 0.1, state="diverged", epochs=1) for lr in (0.1, 0.2)))),
        "all failed": (plain, make_trials((0.1, "failed"))),
        "a loss that explodes": (minimized, [replace(t, **loss) for t in make_trials((0.1, 3.0), (0.2, 1e308))]),
        "negative values": (minimized, make_trials((0.1, -3.0), (0.2, -1e-9), (0.3, 0.0))),
        "cases": (make_study(search={"trials": 5, "space": cases}), numbered(*by_case)),
        "no learning rate": (make_study(objective=MINIMIZED, search={"space": {"kind": ["a", "b"]}}), no_rate),
        "a rate in words": (make_study(objective=MINIMIZED, search={"space": {"lr": ["high", "low"]}}), words),
        "equal values": (plain, make_trials(*((lr / 10, 0.5) for lr in range(1, 9)))),
    }


EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def reported(study: StudyRecord, trials: list[TrialRecord]) -> StudyReport:
    return make_report(study, trials, find_best(study, trials), storage="sqlite:////somewhere/hpo.db")


def evil_report() -> StudyReport:
    """Return a report in which every text that a user or a store can choose tries to run a script."""
    study = make_study(
        objective=MINIMIZED | {"metric": EVIL}, search={"space": {"lr": [0.1, 0.2], "kind": [EVIL, "b"]}}
    )
    trials = [
        replace(
            trial,
            params={"lr": lr, "kind": EVIL},
            reason=EVIL,
            error=EVIL,
            epochs=[1],
            curves={EVIL: [0.5]},
            attributes={"host": EVIL, "device": EVIL, "git_revision": EVIL, "versions": {EVIL: EVIL}},
        )
        for trial, lr in zip(make_trials((1, 0.5), (1, 0.7), (1, "failed")), (0.1, 0.2, 0.1), strict=True)
    ]
    return reported(study, trials)
