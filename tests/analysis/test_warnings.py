"""The warnings of an answer: for each a study that asks for it, and no other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from hpo.analysis.answer import find_best
from hpo.analysis.warnings import WARNINGS
from hpo.study.records import TrialRecord
from tests.analysis.examples import (
    RATES,
    SEARCHED,
    complete,
    flat_race,
    make_study,
    make_trials,
    noise,
    numbered,
    trained,
)

DIVERGED = [trained(lr, 0.1, state="diverged", epochs=1) for lr in RATES]
SOUND = [
    trained(lr, 0.9 - 0.15 * math.log10(lr / 1e-3) ** 2 + noise(index, 0.002)) if lr < 1e-2 else DIVERGED[index]
    for index, lr in enumerate(RATES)
]
RISING = [
    replace(trial, curves={"val_accuracy": [trial.value * epoch / 8 for epoch in range(1, 9)]})
    if trial.value is not None
    else trial
    for trial in SOUND
]


def confirming(state: str, *, kind: str = "confirm") -> TrialRecord:
    return replace(trained(1e-3, 0.8, state=state), kind=kind, replicate=0, reason="because")


def tilted(slope: float) -> list[TrialRecord]:
    return [trained(lr, 0.5 + slope * (math.log10(lr) + 3) + noise(i, 0.002)) for i, lr in enumerate(RATES)]


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        pytest.param(SOUND, set(), id="a sound one"),
        pytest.param(SOUND[3:11:2], {"not-enough"}, id="few rates"),
        pytest.param(tilted(0.1), {"edge-of-range"}, id="the best is at the upper end"),
        pytest.param(tilted(-0.1), {"edge-of-range"}, id="the best is at the lower end"),
        pytest.param(SOUND[:11] + DIVERGED[11:] * 3, {"most-diverged"}, id="too high"),
        pytest.param(complete(lambda lr: 0.6), {"tied"}, id="all are equal but for noise"),
        pytest.param([trained(lr, 0.6) for lr in RATES], {"tied"}, id="all are equal"),
        pytest.param(RISING, {"still-rising"}, id="stopped early"),
        pytest.param(
            [
                replace(trained(lr, 0.95, state="pruned", epochs=4), params={"lr": lr}) if 1e-4 < lr < 5e-3 else trial
                for lr, trial in zip(RATES, SOUND, strict=True)
            ],
            {"pruned-away"},
            id="the best were pruned",
        ),
        pytest.param(
            SOUND + [trained(lr, 0.9, state="pruned", epochs=2) for lr in (8e-4, 9e-4, 1e-3, 1.1e-3, 1.2e-3, 1.3e-3)],
            set(),
            id="of many near the best some were pruned",
        ),
        pytest.param([*SOUND, confirming("diverged")], {"not-confirmed"}, id="what was best broke on another seed"),
        pytest.param(
            [*SOUND, confirming("complete"), confirming("failed", kind="test")], {"not-tested"}, id="no test set"
        ),
        pytest.param([*SOUND, confirming("complete"), confirming("failed")], set(), id="confirmed"),
        pytest.param(complete(lambda lr: 0.1), {"guessing", "tied"}, id="nothing was learnt"),
    ],
)
def test_warnings_come_where_they_should_and_nowhere_else(trials: list[TrialRecord], expected: set[str]) -> None:
    study = make_study(**SEARCHED)
    study = replace(study, metadata={**study.metadata, "num_classes": 10})
    found = find_best(study, numbered(*trials))
    assert found is not None
    assert {warning.kind for warning in found.warnings} == expected
    assert all(warning.text[-1] != "." and "\n" not in warning.text for warning in found.warnings)


@pytest.mark.parametrize(
    ("value", "guess", "expected"),
    [
        (0.9, 0.9, "always naming the largest of 10 classes, which is right for 90.0% of the images"),
        (0.96, 0.9, None),
        (0.1, 0.1, "guessing among 10 classes"),
        (0.1, None, "guessing among 10 classes"),  # a study of an older version
    ],
)
def test_chance_is_the_share_of_the_largest_class(value: float, guess: float | None, expected: str | None) -> None:
    study = make_study(**SEARCHED)
    known = {} if guess is None else {"guess_accuracy": guess}
    study = replace(study, metadata={**study.metadata, "num_classes": 10, **known})
    found = find_best(study, numbered(*complete(lambda lr: value)))
    assert found is not None
    texts = [warning.text for warning in found.warnings if warning.kind == "guessing"]
    assert len(texts) == (expected is not None)
    assert all(f"no better than {expected}: " in text for text in texts)


@pytest.mark.parametrize(
    ("metric", "value", "guess", "words"),
    [
        ("top5", 0.51, 0.5, "guessing, with which the validation top-5 accuracy is 50.00 %"),
        ("macro_f1", 0.1, 0.1, "guessing, with which the validation macro F1 is 0.1"),
        ("macro_f1", 0.3, 0.1, None),
        ("auroc", 0.51, 0.5, "guessing, with which the validation AUROC is 0.5"),
        ("val_loss", 2.31, 2.3, "guessing, with which the validation loss is 2.3"),
        ("val_loss", 2.2, 2.3, None),
        ("auroc", 0.5, None, None),  # a study of an older version
    ],
)
def test_guessing_is_told_in_every_metric(metric: str, value: float, guess: float | None, words: str | None) -> None:
    study = make_study(training={"metric": metric}, search={"space": {"lr": [0.1, 0.2]}})
    known = {} if guess is None else {"guess_value": guess, "num_effective": 300}
    study = replace(study, metadata={**study.metadata, "num_classes": 10, **known})
    found = find_best(study, make_trials((0.1, value)))
    assert found is not None
    texts = [warning.text for warning in found.warnings if warning.kind == "guessing"]
    assert len(texts) == (words is not None)
    assert all(f"the best trial is no better than {words}: " in text for text in texts)


@pytest.mark.parametrize(
    ("settings", "value", "words"),
    [
        ({"guess": 0.1}, 0.1, "validation accuracy is 10.00 %"),
        ({"guess": 0.1}, 0.2, None),
        ({}, 0.1, None),
        ({"guess": 10.0}, 10.0, "validation accuracy is 10"),  # an accuracy in percent
        ({"guess": 0.5, "metric": "dice"}, 0.5, "dice is 0.5"),
        ({"guess": 2.3, "metric": "loss", "direction": "minimize"}, 2.31, "loss is 2.3"),
        ({"guess": 2.3, "metric": "loss", "direction": "minimize"}, 2.1, None),
    ],
)
def test_a_loop_of_ones_own_declares_what_guessing_is_worth(
    settings: dict[str, Any], value: float, words: str | None
) -> None:
    study = make_study(num_val=None, objective={"function": "m:f", **settings}, **SEARCHED)
    metric = study.spec.metric
    trials = [
        replace(trial, value=value + noise(index, 0.01), curves={metric: [value + noise(index, 0.01)]}, epochs=[8])
        for index, trial in enumerate(complete())
    ]
    found = find_best(study, numbered(*trials))
    assert found is not None
    texts = [warning.text for warning in found.warnings if warning.kind == "guessing"]
    assert len(texts) == (words is not None)
    assert all(f"no better than guessing, with which the {words}: " in text for text in texts)


def test_every_warning_has_a_study_that_asks_for_it() -> None:
    table = test_warnings_come_where_they_should_and_nowhere_else.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert set().union(*(case.values[1] for case in table)) == set(WARNINGS)


def test_a_warning_names_what_to_change() -> None:
    rates = {"sampler": "grid", "space": {"lr": RATES}}
    for slope, of_range, of_list in (
        (0.1, "high end of the searched range: widen it with `hpo resume s --widen lr=1e-05:1`", "to 1"),
        (-0.1, "low end of the searched range: widen it with `hpo resume s --widen lr=1e-06:0.1`", "to 1e-06"),
    ):
        for given, expected in ((SEARCHED, of_range), ({"search": rates}, f"widen search.space.lr {of_list}")):
            found = find_best(make_study(**given), numbered(*tilted(slope)))
            assert found is not None
            assert found.warnings[0].text.endswith(expected)


def test_what_a_race_dropped_asks_for_a_larger_race() -> None:
    trials = [
        trained(lr, 0.95, state="pruned", epochs=4) if 1e-4 < lr < 5e-3 else trial
        for lr, trial in zip(RATES, SOUND, strict=True)
    ]
    search = {"sampler": "race", "trainings": 4.0, "space": SEARCHED["search"]["space"]}
    found = find_best(make_study(**SEARCHED | {"search": search}), numbered(*trials))
    assert found is not None
    (text,) = (warning.text for warning in found.warnings if warning.kind == "pruned-away")
    assert text.endswith("where the race has dropped every trial: repeat it with a larger search.trainings")


def test_a_pruned_rate_is_no_better_where_it_is_expected_to_gain_less_than_seeds_differ() -> None:
    """A race whose rates are about as good: whichever it has dropped may have been better, by next to nothing."""
    search = {"sampler": "race", "space": SEARCHED["search"]["space"]}
    found = find_best(make_study(**SEARCHED | {"search": search}), numbered(*flat_race(8)))
    assert found is not None
    assert "pruned-away" not in {warning.kind for warning in found.warnings}


def test_curves_that_gain_half_of_all_in_the_last_quarter_still_rise_however_far_seeds_differ() -> None:
    shares = [0.0, 0.1, 0.2, 0.3, 0.4, 0.51, 0.75, 1.0]
    trials = numbered(
        *(
            replace(trial, value=curve[-1], curves={"val_accuracy": curve})
            for index, trial in enumerate(complete())
            for curve in [[0.3 + noise(index, 0.1) + 0.2 * share for share in shares]]
        )
    )
    found = find_best(make_study(**SEARCHED), trials)
    assert found is not None
    assert found.response is not None
    assert found.response.noise > 0.05, "more than is gained in the last quarter"
    assert "still-rising" in {warning.kind for warning in found.warnings}


def test_that_few_trials_count_is_said_with_what_these_have_in_common() -> None:
    study = make_study(search={"space": {"lr": [0.1, 0.2], "model.dropout": [0.0, 0.5]}})
    rows = [(lr, 0.9, 0.0) for lr in (1e-4, 1e-3, 1e-2, 1e-1)] + [(lr, 0.5, 0.5) for lr in (1e-4, 1e-3)]
    trials = [replace(trained(lr, value), params={"lr": lr, "model.dropout": share}) for lr, value, share in rows]
    found = find_best(study, numbered(*trials))
    assert found is not None
    (text,) = [warning.text for warning in found.warnings if warning.kind == "not-enough"]
    assert text.startswith("only 4 of 6 trials count, those with model.dropout=0: 4 learning rates have a value")


def test_a_race_in_which_all_are_equal_says_that_the_rate_makes_no_difference() -> None:
    """One rate was trained to the end, which tells nothing of where the best one lies."""
    race = []
    for lr in (1.2e-5, 1e-4, 1e-3, 1e-2, 9e-2):
        state, num_epochs = ("complete", 8) if lr == 1e-3 else ("pruned", 2)
        trial = trained(lr, 0.6, state=state, epochs=num_epochs)
        race.append(replace(trial, value=0.6, curves={"val_accuracy": [0.6] * num_epochs}))
    space = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}
    study = make_study(search={"sampler": "race", "space": space}, training={"epochs": 8})
    found = find_best(study, numbered(*race))
    assert found is not None
    (warning,) = found.warnings
    assert warning.kind == "tied"
    assert warning.text == "the learning rate makes no difference: all 5 trials have the same validation accuracy"


def test_the_command_that_widens_a_range_names_the_code_that_it_needs() -> None:
    settings = {**SEARCHED, "model": {"name": "my_nets.small:Net"}, "data": {"name": "my_data:load"}}
    for study, allowed in (
        (make_study(**SEARCHED), ""),
        (make_study(**settings), " --allow my_data --allow my_nets.small"),
    ):
        found = find_best(study, numbered(*tilted(0.1)))
        assert found is not None
        (text,) = [warning.text for warning in found.warnings if warning.kind == "edge-of-range"]
        assert text.endswith(f"widen it with `hpo resume s --widen lr=1e-05:1{allowed}`")


def test_losses_far_from_each_other_are_not_tied() -> None:
    objective = {"function": "m:f", "direction": "minimize"}
    trials = make_trials((1e-4, 5.0), (1e-3, 0.1), (1e-2, 50.0), (1e-1, 900.0))
    found = find_best(make_study(objective=objective), trials)
    assert found is not None
    assert "tied" not in {warning.kind for warning in found.warnings}
