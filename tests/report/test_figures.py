"""The figures: each shows what was found and says it in words, whatever the study is like."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from hpo.analysis.answer import find_best
from hpo.report.figures.curves import MAX_CURVES
from hpo.report.figures.data import FigureData
from hpo.report.figures.style import STATE_STYLES, THEMES
from hpo.report.figures.table import FIGURES, DrawnFigure, draw_figures, make_figure_data
from hpo.study.records import Attempt, StudyRecord, TrialRecord
from scripts.bench.report import make_study as make_large
from tests.analysis.test_answer import LOG_LR, complete, make_study, make_trials, numbered, trained

MINIMIZED = {"function": "m:f", "metric": "loss", "direction": "minimize"}

CONFIRMED = ([0.71, 0.69, 0.7], [0.58, 0.6, 0.62])  # the values of two learning rates on three seeds
RAMP = {
    "params": {}, "lrs": [1e-5, 1e-3, 1e-1], "losses": [2.3, 2.0, None], "falls": 1e-3, "lowest": 1e-3, "breaks": 1e-1,
    "leaps": 1e-2, "edge": 1e-2, "low": 1e-4, "high": 1e-1, "epochs": 0.9, "batch_size": 4, "seconds": 1.0,
}  # fmt: skip


def found(study: StudyRecord, trials: Sequence[TrialRecord]) -> FigureData:
    return make_figure_data(study, trials, find_best(study, trials))


def drawn(study: StudyRecord, trials: Sequence[TrialRecord]) -> dict[str, DrawnFigure]:
    return {entry.name: entry for entry in draw_figures(found(study, trials))}


def traces(entry: DrawnFigure, name: str) -> list[Any]:
    return [trace for trace in entry.figure.data if trace.name == name]


@pytest.fixture(scope="module")
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


def test_a_study_of_several_parameters_has_every_figure_and_each_says_its_numbers(large: Any) -> None:
    assert list(large[2]) == list(FIGURES)
    for entry in large[2].values():
        assert re.search(r"\d", entry.caption), entry.name
        assert entry.caption.endswith(".")
        assert entry.figure.layout.height


def test_the_response_shows_every_trial_once_by_its_state_and_what_the_answer_says(large: Any) -> None:
    study, trials, entries = large
    entry = entries["response"]
    for state in ("complete", "pruned", "diverged"):
        shown = sorted(number for trace in traces(entry, state) for number in trace.customdata)
        assert shown == [trial.number for trial in trials if trial.state == state and trial.kind == "search"]
    answer = find_best(study, trials)
    assert answer is not None
    assert len(answer.responses) == 3
    stars = traces(entry, "best, with its 90% interval")
    assert {star.x[0] for star in stars} == {response.best for _, response in answer.responses}
    for star in stars:
        (interval,) = (response.interval for _, response in answer.responses if response.best == star.x[0])
        assert star.x[0] + star.error_x.array[0] == pytest.approx(interval[1])
        assert star.x[0] - star.error_x.arrayminus[0] == pytest.approx(interval[0])
    shaded = [(shape.x0, shape.x1) for shape in entry.figure.layout.shapes if shape.type == "rect"]
    for _, response in answer.responses:
        assert response.plateau in shaded
        assert response.divergence_lr is not None
        assert response.divergence_lr.interval in shaded


def test_the_confirmation_shows_every_seed_its_mean_and_the_test_set(large: Any) -> None:
    entry = large[2]["confirmation"]
    (seeds,), (means,) = traces(entry, "a seed"), traces(entry, "mean, with its standard error")
    assert sorted(seeds.x) == sorted(value for values in CONFIRMED for value in values)
    assert list(means.x) == [0.7, 0.6]  # the winner's first
    assert means.error_x.value > 0
    (tests,) = traces(entry, "on the test set")
    assert list(tests.x) == [0.5] * 3
    assert "Best learning rate: " in entry.caption
    assert "is not told apart from it" in entry.caption or "really is worse" in entry.text


def test_a_range_test_shows_its_ramp_its_signs_and_the_range(large: Any) -> None:
    entry = large[2]["range_test"]
    (ramp,) = traces(entry, "loss")
    assert list(ramp.x) == RAMP["lrs"]
    assert list(ramp.y) == [2.3, 2.0, 3.45]  # what is not finite reaches to the top
    assert {(shape.x0, shape.x1) for shape in entry.figure.layout.shapes} >= {(1e-4, 1e-1), (1e-2, 1e-2)}
    assert "comes from a range test of 0.9 epochs: 0.0001 to 0.1" in entry.caption


def test_every_state_has_a_symbol_and_a_pattern_of_its_own() -> None:
    states = [look for name, look in STATE_STYLES.items() if name != "other"]
    assert len({look.symbol for look in STATE_STYLES.values()}) == len(STATE_STYLES)
    assert len({look.pattern for look in states}) == len(states)
    assert len({look.colour for look in states}) == len(states)


def luminance(colour: str) -> float:
    """Relative, as WCAG 2 has it."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#14171d"])
def test_marks_stand_out_from_a_light_and_from_a_dark_page(page: str) -> None:
    for name, look in STATE_STYLES.items():
        light, dark = sorted((luminance(look.colour), luminance(page)), reverse=True)
        least = 3.0 if name not in ("pruned", "running") else 2.0  # orange and purple on white; their shapes are solid
        assert (light + 0.05) / (dark + 0.05) >= least, name
    assert set(THEMES) == {"light", "dark"}


def test_learning_curves_are_one_line_a_trial_coloured_by_its_rate_with_a_gap_where_a_number_is_not_finite() -> None:
    trials = numbered(*complete())
    trials[3] = replace(
        trials[3], curves={"val_accuracy": [0.1, None, 0.3], "train_loss": [None] * 3}, epochs=[1, 2, 3]
    )
    entry = drawn(make_study(search={"trials": 16, "space": {"lr": LOG_LR}}), trials)["curves"]
    lines = [trace for trace in entry.figure.data if trace.x[0] is not None]
    points = {
        (number, x): y
        for trace in lines if trace.yaxis == "y2"
        for number, x, y in zip(trace.customdata, trace.x, trace.y, strict=True) if x is not None
    }  # fmt: skip
    for trial in trials:
        for epoch, value in zip(trial.epochs, trial.curves["val_accuracy"], strict=True):
            assert points[trial.number, epoch] == (None if value is None else pytest.approx(value, rel=1e-3))
    colours = [trace.line.color for trace in lines if trace.yaxis == "y2"]
    assert len(set(colours)) == len(colours) > 5
    assert entry.figure.layout.coloraxis.cmin == pytest.approx(-5)


def test_of_very_many_trials_some_curves_are_drawn_and_that_is_said() -> None:
    study, trials = make_large(MAX_CURVES + 50, 3)
    entry = drawn(study, trials)["curves"]
    lines = {n for trace in entry.figure.data for n in trace.customdata or ()}
    assert len(lines) == MAX_CURVES
    assert f"{MAX_CURVES} of them are drawn" in entry.caption


def test_the_epochs_are_all_accounted_for(large: Any) -> None:
    _, trials, entries = large
    by_rate = [trace for trace in entries["epochs"].figure.data if trace.yaxis == "y"]
    assert sum(sum(trace.y) for trace in by_rate) == sum(len(trial.epochs) for trial in trials)
    ends = [trace for trace in entries["epochs"].figure.data if trace.yaxis == "y2"]
    assert sum(sum(trace.y) for trace in ends) == len(trials)


def test_the_history_says_when_the_best_value_came(large: Any) -> None:
    study, trials, entries = large
    answer = find_best(study, trials)
    assert answer is not None
    assert f"came with trial {answer.trial}" in entries["history"].text
    (line,) = traces(entries["history"], "best so far")
    assert list(line.y) == sorted(line.y)


def test_importance_is_of_what_was_searched_and_a_parameter_that_does_nothing_matters_little(large: Any) -> None:
    shares = found(*large[:2]).importances
    assert set(shares) == {"lr", "optimizer", "batch_size"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["batch_size"] < shares["lr"]
    assert found(make_study(), numbered(*complete())).importances == {}


def test_attempts_that_overlap_have_rows_of_their_own_and_each_device_keeps_to_its_own() -> None:
    def attempt(device: str, began: float, ended: float | None, outcome: str | None = "complete") -> Attempt:
        return Attempt(1, "w", "host", device, began, ended, 0, 0, outcome, None, None)

    tries = [attempt("cuda:0", 0, 10), attempt("cuda:0", 5, 12, "lost"), attempt("cuda:0", 10, None, None)]
    tries += [attempt("cuda:1", 1, 2), attempt("cuda:1", 2, 3)]
    trials = [replace(t, attempts=[a]) for t, a in zip(make_trials(*[(0.1, 0.5)] * 5), tries, strict=True)]
    entry = drawn(make_study(), trials)["timeline"]
    bars = [
        (y, base, base + length)
        for trace in entry.figure.data
        for y, base, length in zip(trace.y, trace.base, trace.x, strict=True)
    ]
    assert sorted(bars) == [(0, 0, 10), (0, 10, 12), (1, 5, 12), (2, 1, 2), (2, 2, 3)]
    assert list(entry.figure.layout.yaxis.ticktext) == ["host cuda:0", "host cuda:1"]
    assert {trace.name for trace in entry.figure.data} == {"complete", "other", "running"}


def unusual() -> dict[str, tuple[StudyRecord, list[TrialRecord]]]:
    """Studies with little to show, or strange things."""
    plain, minimized = make_study(), make_study(num_val=None, objective=MINIMIZED)
    loss = {"curves": {"loss": [1e308, None, 3.0]}, "epochs": [1, 2, 3]}
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


@pytest.mark.parametrize("name", unusual())
def test_whatever_a_study_is_like_its_figures_are_drawn_and_hold_only_numbers(name: str) -> None:
    study, trials = unusual()[name]
    for entry in drawn(study, trials).values():
        assert entry.caption
        json.dumps(json.loads(entry.figure.to_json()), allow_nan=False)
        for trace in entry.figure.data:
            for values in (trace.x, trace.y):
                assert not any(isinstance(value, float) and not math.isfinite(value) for value in values)


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    study = make_study(objective=MINIMIZED, search={"space": {"lr": [0.1, 0.2], "kind": ["<a href='x'>y</a>", "b"]}})
    trials = [replace(t, params={"lr": 0.1, "kind": "<a href='x'>y</a>"}) for t in make_trials((1, 0.5), (1, 0.7))]
    for entry in drawn(study, trials).values():
        assert "<a href" not in entry.figure.to_json().replace("\\u003c", "<")
