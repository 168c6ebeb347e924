"""How far a study has come, as its displays show it."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import RenderableType

from hpo.display.console import PlainConsole
from hpo.display.notebook import progress_html
from hpo.display.progress import Pace, amount_done, duration_text, epochs_left, study_progress
from hpo.display.terminal import _live_view
from hpo.study.records import TrialRecord
from tests.analysis.examples import LOG_LR, make_study, numbered, trained

CONFIRMED: dict[str, Any] = {"confirm": {"top": 2, "seeds": 3}, "search": {"trials": 4, "space": {"lr": LOG_LR}}}


def searched(*states: str) -> list[TrialRecord]:
    """Return trials of a search in these states, of ten epochs where they are complete and of two in training."""
    trials = []
    for state in states:
        trial = trained(1.2345e-3, 0.9, state=state)
        epochs = {"waiting": 0, "running": 2, "pruned": 4}.get(state, 10)
        curves = {"val_accuracy": [0.5] * epochs, "train_loss": [1.0] * epochs, "seconds": [60.0] * epochs}
        trials.append(replace(trial, epochs=list(range(1, epochs + 1)), curves=curves))
    return numbered(*trials)


def with_confirmation(*states: str, kind: str = "confirm") -> list[TrialRecord]:
    trials = searched(*["complete"] * 4, *states)
    return trials[:4] + [replace(trial, kind=kind) for trial in trials[4:]]


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        (searched("complete", "running", "waiting", "waiting"), (1, 10, "trials")),
        (searched(*["complete"] * 4), (4, 10, "trials")),
        (with_confirmation("complete", *["waiting"] * 5), (5, 10, "trials")),
        (with_confirmation("complete", "running"), (5, 10, "trials")),
        (with_confirmation("complete", "complete"), (6, 6, "trials")),
        (with_confirmation("running", kind="test"), (4, 4, "trials")),
    ],
)
def test_the_total_includes_the_trials_that_confirm(trials: list[TrialRecord], expected: tuple[int, int, str]) -> None:
    done, total, unit = amount_done(make_study(**CONFIRMED, training={"epochs": 10}), trials)
    assert (done, total, unit) == expected


def test_a_race_is_counted_in_epochs_to_its_end() -> None:
    study = make_study(
        search={"sampler": "race", "space": {"lr": LOG_LR}}, training={"epochs": 10}, confirm={"top": 1, "seeds": 3}
    )
    begun = amount_done(study, searched("running", "waiting"))
    assert begun[0] == 2
    confirming = amount_done(study, with_confirmation("complete", "running", "waiting"))
    assert confirming[1:] == begun[1:]
    assert begun[2] == "epochs"


def test_what_is_left_is_estimated_from_how_long_trials_have_been() -> None:
    study = make_study(search={"trials": 4, "space": {"lr": LOG_LR}}, training={"epochs": 10})
    assert epochs_left(study, searched("complete", "pruned", "running", "waiting")) == 8 + 7
    assert epochs_left(study, searched("running", "waiting")) == 8 + 10
    assert epochs_left(study, searched("complete", "pruned")) == 0


def test_the_time_left_follows_from_the_epochs_that_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hpo.display.progress.time.monotonic", lambda: now[0])
    study, pace = make_study(search={"trials": 2, "space": {"lr": LOG_LR}}, training={"epochs": 10}), Pace()
    assert pace.seconds_left(study, searched("running", "waiting")) is None
    now[0] += 60
    assert pace.seconds_left(study, searched("complete", "waiting")) == 60 / 8 * 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (150, "2.5 min"), (7000, "117 min"), (9000, "2.5 h"), (1e5, "28 h")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def drawn(view: RenderableType, *, width: int) -> str:
    console = PlainConsole(file=io.StringIO(), width=width)
    console.print(view)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_narrow_terminal_shows_each_learning_rate_whole_and_values_in_one_unit() -> None:
    study = make_study(**CONFIRMED, training={"epochs": 10})
    trials = [
        replace(trial, params={**trial.params, "weight_decay": 0.00012345, "model.hidden_width": 128})
        for trial in searched("complete", "running", "running", "waiting")
    ]
    text = drawn(_live_view(study, trials, seconds_left=200.0), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert len(re.findall(r"^ +\d +0\.001234 ", text, re.MULTILINE)) == 2, text
    assert "1/10 trials" in text
    assert "about 3.3 min left" in text
    assert text.count("50.00 %") == 2
    assert "90.00 %" in text
    assert "8.0 min" in text


@pytest.mark.parametrize(
    ("settings", "curves", "is_shown"),
    [
        ({}, {}, True),
        ({"objective": {"function": "m:f"}}, {"train_loss": [0.5]}, True),
        ({"objective": {"function": "m:f"}}, {}, False),
    ],
)
def test_a_loop_that_reports_no_loss_has_no_column_for_it(
    settings: dict[str, Any], curves: dict[str, Any], is_shown: bool
) -> None:
    study = make_study(search=CONFIRMED["search"], **settings)
    trials = [replace(trial, curves={"val_accuracy": [0.5]} | curves) for trial in searched("running", "running")]
    text = drawn(_live_view(study, trials, seconds_left=None), width=80)
    assert ("loss" in text) == is_shown
    assert "50.00 %" in text


def test_a_notebook_shows_the_same_with_texts_as_they_are() -> None:
    study = replace(make_study(**CONFIRMED, training={"epochs": 10}), name="<b>s</b>")
    trials = searched("complete", "running", "waiting", "waiting")
    text = progress_html(study, trials, seconds_left=30.0)
    assert "&lt;b&gt;s&lt;/b&gt;" in text
    assert "1 of 10 trials (1 complete, 1 running, 2 waiting), about 30 s left" in text
    for cell in study_progress(study, trials).rows[0]:
        assert f">{cell}</td>" in text
    assert not re.search(r"<(?!/?(p|b|table|thead|tbody|tr|th|td|progress)\b)", text)
