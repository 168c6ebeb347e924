"""The figure of the response."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from hpo.analysis.answer import find_best
from hpo.reports.figures.style import fit_card
from tests.analysis.confirmation_examples import again
from tests.analysis.examples import LOG_LR, SEARCHED, make_study, numbered, trained
from tests.reports.examples import drawn, traces

FIVE = (0.5, 0.7, 0.5, 0.72, 0.5)  # the values of five learning rates, which leave open where the best one is


def test_no_curve_is_drawn_where_all_trials_diverged() -> None:
    whole = [trained(lr, 0.9 - 0.1 * (math.log10(lr) + 3) ** 2) for lr in (1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3)]
    dead = [trained(lr, 0.1, state="diverged", epochs=1) for lr in (1e-2, 2e-2, 3e-2, 5e-2, 9e-2)]
    (curve,) = traces(drawn(make_study(**SEARCHED), numbered(*whole, *dead))["response"], "response")
    assert 4e-3 < max(curve.x) <= 1e-2
    assert min(curve.x) == pytest.approx(1e-5)


def test_the_response_shows_every_trial_once_by_its_state_and_what_the_answer_says(large: Any) -> None:
    study, trials, entries = large
    entry = entries["response"]
    for state in ("complete", "pruned", "diverged"):
        shown = sorted(number for trace in traces(entry, state) for number in trace.customdata)
        assert shown == [trial.number for trial in trials if trial.state == state and trial.kind == "search"]
    answer = find_best(study, trials)
    assert answer is not None
    assert len(answer.responses) == 3
    stars = traces(entry, "best by the search, with its 90 % interval")
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


def test_an_answer_that_was_confirmed_has_its_star_there_and_asks_for_no_more_rates() -> None:
    study = make_study(**SEARCHED, confirm={"top": 2, "seeds": 3})
    trials = numbered(*(trained(lr, value) for lr, value in zip((1e-5, 3e-4, 1e-3, 1e-2, 9e-2), FIVE, strict=True)))
    entry = drawn(study, trials)["response"]
    assert "any of these may be best: try more rates" in entry.caption
    assert traces(entry, "plateau") == []
    assert not [shape for shape in entry.figure.layout.shapes if shape.fillcolor]
    confirming = again(trials, [0.85, 0.84, 0.86], [0.84, 0.85, 0.83], params=[{"lr": 3e-4}, {"lr": 1e-3}])
    entry = drawn(study, trials + confirming)["response"]
    assert "try more rates" not in entry.caption
    assert "best learning rate" not in entry.caption
    (star,) = traces(entry, "confirmed")
    assert list(star.x) == [3e-4]
    assert traces(entry, "best, with its 90 % interval") == []
    assert traces(entry, "plateau")


def test_the_whole_band_is_in_the_picture_and_no_mean_where_no_trial_was_trained_to_the_end() -> None:
    whole = [trained(lr, value) for lr, value in ((3e-4, 0.8), (1e-3, 0.9), (3e-3, 0.5))]
    pruned = [trained(lr, 0.1, state="pruned", epochs=1) for lr in (1e-5, 3e-5, 4e-2, 7e-2, 9e-2)]
    entry = drawn(make_study(**SEARCHED), numbered(*whole, *pruned))["response"]
    (band,), (curve,) = traces(entry, "90 % of trials"), traces(entry, "response")
    low, high = entry.figure.layout.yaxis.range
    assert low < min(band.y)
    assert max(band.y) < high
    assert max(band.y) > 0.91
    assert min(band.x) == pytest.approx(1e-5)
    assert max(band.x) == pytest.approx(0.1)
    assert 1.4e-4 < min(curve.x) < 1.6e-4  # 0.3 decades below the lowest that is complete
    assert 5.6e-3 < max(curve.x) < 6.1e-3
    assert "The curve ends where no trial nearby was trained to the end" in entry.caption


@pytest.mark.parametrize("state", ["diverged", "failed", "running", None])
def test_the_caption_names_trials_without_a_value_only_where_there_are_some(state: str | None) -> None:
    trials = [trained(lr, 0.9 - 0.1 * (math.log10(lr) + 3) ** 2) for lr in (1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3)]
    if state is not None:
        trials += [replace(trained(lr, 0.1, state=state, epochs=1), value=None) for lr in (3e-2, 9e-2)]
    entries = drawn(make_study(**SEARCHED), numbered(*trials))
    caption = entries["response"].caption
    assert caption.count("end of the axis") == (state is not None)
    assert (f"Drawn at the end of the axis, as they have no value: 2 {state}." in caption) == (state is not None)
    for entry in entries.values():
        for other in {"diverged", "failed", "running", "pruned"} - {state}:
            assert other not in entry.caption, entry.name


def test_trials_without_a_response_have_a_panel_of_their_own_beside_the_answers() -> None:
    space = {"lr": LOG_LR, "optimizer": ["adam", "sgd"]}
    adam = [
        trained(lr, value, optimizer="adam") for lr, value in zip((1e-5, 3e-4, 1e-3, 1e-2, 9e-2), FIVE, strict=True)
    ]
    study = make_study(search={"trials": 6, "space": space})
    entry = drawn(study, numbered(*adam, trained(1e-3, 0.6, optimizer="sgd")))["response"]
    assert [title.text for title in entry.figure.layout.annotations] == ["optimizer=adam", "other values"]
    assert "With other values: 1 trial, too few" in entry.caption


def test_on_a_card_no_title_of_an_axis_runs_into_the_next_panel() -> None:
    """The panels of a phone are lower than a rotated title is long."""
    space = {"lr": LOG_LR, "optimizer": ["adam", "sgd"]}
    trials = [
        trained(lr, value, optimizer=optimizer)
        for optimizer in ("adam", "sgd")
        for lr, value in zip((1e-5, 3e-4, 1e-3, 1e-2, 9e-2), FIVE, strict=True)
    ]
    figures = drawn(make_study(search={"trials": 10, "space": space}), numbered(*trials))
    for name in ("response", "curves"):
        fit_card(figures[name].figure, name)
    response, curves = figures["response"].figure, figures["curves"].figure
    assert [axis.title.text for axis in response.select_yaxes()] == [None, None]
    assert response.layout.title.text == 'response<br><span style="font-size:12px">val_accuracy</span>'
    assert curves.layout.yaxis.title.text == "val_accuracy", "one panel keeps its title"


def test_panels_of_different_metrics_have_their_titles_above_them_on_a_card() -> None:
    curves = {"val_accuracy": [0.4, 0.6], "train_loss": [2.0, 1.0]}
    trials = numbered(*(replace(trained(lr, 0.6, epochs=2), curves=curves) for lr in (1e-4, 1e-3)))
    figure = drawn(make_study(**SEARCHED), trials)["curves"].figure
    fit_card(figure, "Learning curves")
    assert figure.layout.title.text == "Learning curves"
    assert [axis.title.text for axis in figure.select_yaxes()] == [None, None]
    above = {note.text: note.yref for note in figure.layout.annotations}
    assert above == {"train_loss": "y domain", "val_accuracy": "y2 domain"}


def test_the_legend_says_that_trials_learned_nothing_where_none_diverged() -> None:
    guessing = [replace(trained(lr, 0.1), value=0.1, curves={"val_accuracy": [0.1] * 8}) for lr in (2e-2, 4e-2, 9e-2)]
    study = make_study(**SEARCHED)
    study = replace(study, metadata={**study.metadata, "num_classes": 10})
    below = [trained(lr, value) for lr, value in zip((1e-5, 3e-4, 1e-3, 3e-3, 5e-3), FIVE, strict=True)]
    entry = drawn(study, numbered(*below, *guessing))["response"]
    assert traces(entry, "half learn nothing")
    assert not traces(entry, "half diverge")
