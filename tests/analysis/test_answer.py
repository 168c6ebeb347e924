"""The answer: which trial is best, and which learning rates did as well."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from hpo.analysis.answer import find_best, find_response
from hpo.analysis.answer_text import answer_lines, describe_answer
from hpo.analysis.text import difference_text, interval_text, no_answer_text
from tests.analysis.examples import (
    LOG_LR,
    RATES,
    SEARCHED,
    complete,
    flat_race,
    hill,
    make_study,
    make_trials,
    numbered,
    trained,
)


def test_no_complete_trial_no_answer() -> None:
    assert find_best(make_study(), make_trials((0.1, "diverged"), (0.2, "failed"), (0.3, "running"))) is None


def test_the_best_is_the_highest_value_or_the_lowest_where_that_is_asked_for() -> None:
    trials = make_trials((0.1, 0.5), (0.2, 0.7), (0.3, 0.6))
    found = find_best(make_study(), trials)
    assert found is not None
    assert (found.trial, found.params, found.value, found.interval) == (1, {"lr": 0.2}, 0.7, (0.2, 0.2))
    found = find_best(make_study(num_val=None, objective={"function": "m:f", "direction": "minimize"}), trials)
    assert found is not None
    assert (found.trial, found.params, found.value, found.interval) == (0, {"lr": 0.1}, 0.5, None)


@pytest.mark.parametrize(
    ("rows", "interval"),
    [
        # 0.90 on 400 images has a standard error of 0.015
        ([(1e-4, 0.80), (1e-3, 0.89), (3e-3, 0.90), (1e-2, 0.886)], (1e-3, 1e-2)),
        ([(1e-4, 0.895), (1e-3, 0.80), (3e-3, 0.90)], (3e-3, 3e-3)),  # a worse one in between ends it
        ([(1e-3, 0.89), (3e-3, 0.90), (1e-2, "diverged"), (2e-2, 0.90)], (1e-3, 3e-3)),
        ([(1e-3, "pruned"), (3e-3, 0.90), (1e-2, 0.89)], (3e-3, 1e-2)),
        ([(1e-3, "failed"), (2e-3, 0.89), (3e-3, 0.90)], (2e-3, 3e-3)),
        ([(1e-4, 0.89), (1e-3, "failed"), (3e-3, 0.90)], (1e-4, 3e-3)),  # a failure says nothing about its rate
    ],
)
def test_the_interval_is_what_was_tried_around_the_best_within_one_standard_error(
    rows: list[tuple[float, float | str]], interval: tuple[float, float]
) -> None:
    found = find_best(make_study(), make_trials(*rows))
    assert found is not None
    assert found.interval == interval


@pytest.mark.parametrize(
    ("metric", "known", "expected"),
    [
        ("auroc", {"num_effective": 400}, (0.1, 0.2)),
        ("auroc", {}, None),
        ("top5", {}, (0.1, 0.2)),
        ("val_loss", {"guess_value": 2.3}, None),
    ],
)
def test_what_does_as_well_follows_from_the_number_of_images_in_every_metric_of_images(
    metric: str, known: dict[str, float], expected: tuple[float, float] | None
) -> None:
    study = make_study(training={"metric": metric}, search={"space": {"lr": [0.1, 0.2, 0.4]}})
    study = replace(study, metadata={**study.metadata, "num_classes": 10, **known})
    found = find_best(study, make_trials((0.1, 0.9), (0.2, 0.89), (0.4, 0.8)))
    assert found is not None
    assert found.interval == expected


def test_other_optimizers_do_not_count_towards_the_interval() -> None:
    trials = make_trials((1e-3, 0.90), (3e-3, 0.91), optimizer="adam") + make_trials((1e-2, 0.905), optimizer="sgd")
    study = make_study(search={"space": {"lr": [0.1, 0.2], "optimizer": ["adam", "sgd"]}})
    found = find_best(study, trials)
    assert found is not None
    assert found.interval == (1e-3, 3e-3)


def test_neither_do_other_values_of_a_listed_number_and_replicates_count_with_their_mean() -> None:
    study = make_study(search={"space": {"lr": [0.1, 0.2], "batch_size": [32, 256], "seed": [0, 1]}})
    trials = make_trials((1e-3, 0.90), (1e-2, 0.895), batch_size=32, seed=0)
    trials += make_trials((1e-3, 0.5), batch_size=256, seed=0)
    trials += make_trials((1e-3, 0.7), (1e-2, 0.889), batch_size=32, seed=1)
    found = find_best(study, trials)
    assert found is not None
    assert found.interval == (1e-3, 1e-2)
    worse = find_best(study, trials + make_trials((1e-2, 0.6), batch_size=32, seed=2))
    assert worse is not None
    assert worse.interval == (1e-3, 1e-3)


def test_with_enough_learning_rates_the_answer_is_the_responses() -> None:
    found = find_best(make_study(**SEARCHED), numbered(*complete()))
    assert found is not None
    assert found.response is not None
    assert found.lr == found.response.best == pytest.approx(1e-3, rel=0.4)
    assert found.interval == found.response.interval
    assert found.responses == [({}, found.response)]
    assert json.loads(json.dumps(found.as_dict()))["response"]["interval"] == list(found.response.interval)


def test_an_answer_that_is_open_says_so_and_one_that_is_not_does_not() -> None:
    study = make_study(**SEARCHED)
    for value, is_open in ((hill, False), (lambda lr: 0.6, True)):
        found = find_best(study, numbered(*complete(value)))
        assert found is not None
        assert found.response is not None
        first = answer_lines(study, found)[0]
        assert first.startswith(f"best learning rate: {found.lr:.2g}")
        assert ("not determined" in first) == is_open == (not found.as_dict()["determined"])
        lines = {line.label: line.note for line in describe_answer(study, found).lines}
        assert ("try more rates" in lines["90 % interval"]) == is_open
        assert ("from seed to seed" in lines["expected"]) == (not is_open), "of an open answer the noise is not known"


@pytest.mark.parametrize("whole", [2, 7, 13])
def test_where_all_rates_are_as_good_the_recommended_one_was_trained_to_the_end(whole: int) -> None:
    found = find_best(make_study(**SEARCHED), numbered(*flat_race(whole)))
    assert found is not None
    assert found.response is not None
    assert found.response.is_flat
    assert found.is_recommended({"lr": RATES[whole]})


def test_a_headline_does_not_sound_sure_where_the_best_may_lie_beyond_the_range_or_was_pruned() -> None:
    study = make_study(**SEARCHED)
    rising = complete(lambda lr: 0.5 + 0.1 * (math.log10(lr) + 3))
    pruned = [
        trained(lr, hill(lr), state="pruned", epochs=7) if 1e-4 < lr < 5e-3 else trial
        for lr, trial in zip(RATES, complete(), strict=True)
    ]
    for trials, doubt in ((rising, "beyond the searched range"), (pruned, "expected elsewhere"), (complete(), "")):
        found = find_best(study, numbered(*trials))
        assert found is not None
        text = describe_answer(study, found)
        assert (" so far, but " in text.headline) == bool(doubt)
        assert text.headline.endswith(doubt)
        assert ("were dropped" in text.lines[0].note) == (doubt == "expected elsewhere")


@pytest.mark.parametrize(
    ("num_diverged", "num_guessing", "label", "note"),
    [
        (3, 0, "half diverge at", ""),
        (0, 3, "half learn nothing at", ""),
        (2, 1, "half diverge at", "; 1 trial that learned nothing counts as diverged"),
        (1, 2, "half diverge at", "; 2 trials that learned nothing count as diverged"),
    ],
)
def test_trials_that_only_guess_are_not_said_to_diverge(
    num_diverged: int, num_guessing: int, label: str, note: str
) -> None:
    study = make_study(**SEARCHED)
    study = replace(study, metadata={**study.metadata, "num_classes": 10})
    high = [2e-2, 5e-2, 9e-2]
    diverged = [trained(lr, 0.1, state="diverged", epochs=1) for lr in high[:num_diverged]]
    guessing = [trained(lr, 0.1) for lr in high[num_diverged:]]
    guessing = [replace(trial, value=0.1, curves={"val_accuracy": [0.1] * 8}) for trial in guessing]
    below = [trial for trial in complete() if trial.params["lr"] < 1e-2]
    found = find_best(study, numbered(*below, *diverged, *guessing))
    assert found is not None
    assert found.response is not None
    assert found.response.divergence_lr is not None
    text = describe_answer(study, found)
    (edge,) = [line for line in (*text.lines, *text.details) if line.label.startswith("half")]
    assert (edge.label, edge.note) == (label, interval_text(found.response.divergence_lr.interval) + note)
    assert (found.response.num_diverged, found.response.num_guessing) == (num_diverged, num_guessing)


@pytest.mark.parametrize(
    ("settings", "has_edge"),
    [({}, False), ({"guess": 0.1}, True), ({"guess": 0.1, "metric": "dice"}, True)],
)
def test_a_loop_that_declares_what_guessing_is_worth_has_an_edge_where_trials_only_guess(
    settings: dict[str, Any], has_edge: bool
) -> None:
    study = make_study(num_val=None, objective={"function": "m:f", **settings}, **SEARCHED)
    high = [replace(trained(lr, 0.1), value=0.1, curves={"val_accuracy": [0.1] * 8}) for lr in (2e-2, 5e-2, 9e-2)]
    trials = [
        replace(trial, curves={study.spec.metric: trial.curves["val_accuracy"]})
        for trial in (*(trial for trial in complete() if trial.params["lr"] < 1e-2), *high)
    ]
    found = find_best(study, numbered(*trials))
    assert found is not None
    assert found.response is not None
    assert (found.response.divergence_lr is not None) == has_edge
    text = describe_answer(study, found)
    labels = [line.label for line in (*text.lines, *text.details)]
    assert ("half learn nothing at" in labels) == has_edge


@pytest.mark.parametrize("num_complete", [1, 2, 16])
def test_only_the_best_of_several_complete_trials_is_optimistic(num_complete: int) -> None:
    study = make_study(**SEARCHED)
    trials = [
        trial if index < num_complete else trained(trial.params["lr"], 0.5, state="pruned", epochs=4)
        for index, trial in enumerate(complete())
    ]
    found = find_best(study, numbered(*trials))
    assert found is not None
    text = describe_answer(study, found)
    (line,) = [line for line in (*text.lines, *text.details) if line.label == "best trial"]
    expected = f", optimistic: the best of {num_complete}" if num_complete > 1 else " %"
    assert line.note.endswith(expected)


def test_a_study_whose_trials_all_diverged_says_from_where_on_and_why() -> None:
    diverged = [
        replace(trial, reason="train_loss = nan in epoch 1")
        for trial in make_trials((1e-3, "diverged"), (1e-2, "diverged"))
    ]
    assert no_answer_text(diverged) == (
        "no complete trial to choose from: 2 diverged (train_loss = nan in epoch 1): "
        "search learning rates below 0.001, or check the loss and the data"
    )
    failed = make_trials((1e-3, "diverged"), (1e-2, "failed"))
    assert no_answer_text(failed) == "no complete trial to choose from: 1 diverged, 1 failed"


def test_differences_of_accuracies_are_given_to_a_hundredth_of_a_point() -> None:
    study = make_study(**SEARCHED)
    assert difference_text(study, 3e-12, of=0.5) == "0 percentage points"
    assert difference_text(study, -3e-12, 0.00061, 0.0123, of=0.5) == "0 to 0.06 to 1.2 percentage points"
    assert difference_text(make_study(**SEARCHED), 3e-12, of=5.0) == "3e-12"


def test_a_lower_value_is_better_where_that_is_asked_for() -> None:
    objective = {"function": "m:f", "direction": "minimize", "metric": "val_accuracy"}
    found = find_best(
        make_study(num_val=None, objective=objective, search=SEARCHED["search"]),
        numbered(*complete(lambda lr: 1 - hill(lr))),
    )
    assert found is not None
    assert found.response is not None
    assert found.response.best == pytest.approx(1e-3, rel=0.4)
    assert found.response.value == pytest.approx(0.1, abs=0.02)


def test_a_pruned_trial_counts_with_what_the_others_have_gained_since() -> None:
    study = make_study(**SEARCHED)
    pruned = [trained(lr, hill(lr), state="pruned", epochs=2) for lr in RATES if lr < 1e-4]
    whole = [trained(lr, hill(lr)) for lr in RATES if lr > 1e-4]
    found = find_response(study, numbered(*pruned, *whole))
    assert found is not None
    at = [index for index, lr in enumerate(found.lrs) if lr < 5e-5]
    seen = [found.mean[index] - hill(found.lrs[index]) for index in at]
    assert max(map(abs, seen)) < 0.1  # after two epochs they had reached 0.87 of it
    alone = find_response(study, numbered(*whole))
    assert alone is not None
    width, width_alone = (sum(f.high[i] - f.low[i] for i in at) for f in (found, alone))
    assert width < width_alone


def test_each_optimizer_has_its_own_response() -> None:
    space = {"lr": LOG_LR, "optimizer": ["adam", "sgd"]}
    study = make_study(search={"trials": 32, "space": space}, training={"epochs": 8})
    trials = complete(optimizer="adam") + complete(lambda lr: hill(lr, 1e-2) - 0.1, optimizer="sgd")
    found = find_best(study, numbered(*trials))
    assert found is not None
    tops = {params["optimizer"]: response.best for params, response in found.responses}
    assert tops == {"adam": pytest.approx(1e-3, rel=0.5), "sgd": pytest.approx(1e-2, rel=0.5)}
    assert found.lr == tops["adam"]


def test_a_range_of_its_own_for_each_optimizer_is_the_responses_range() -> None:
    cases = {"by": {"optimizer": {"adam": {**LOG_LR, "high": 1e-2}, "sgd": LOG_LR}}}
    study = make_study(search={"trials": 32, "space": {"optimizer": ["adam", "sgd"], "lr": cases}})
    trials = [trial for trial in complete(optimizer="adam") if trial.params["lr"] < 1e-2]
    found = find_response(study, numbered(*trials))
    assert found is not None
    assert found.lrs[0] == pytest.approx(1e-5)
    assert found.lrs[-1] == pytest.approx(1e-2)


def test_a_study_without_a_learning_rate_has_no_response_and_no_warning_about_it() -> None:
    study = make_study(search={"space": {"batch_size": [16, 32, 64]}}, training={"lr": 1e-3})
    trials = [replace(trial, params={"batch_size": 16 * 2**i}) for i, trial in enumerate(complete()[:3])]
    found = find_best(study, numbered(*trials))
    assert found is not None
    assert (found.lr, found.interval, found.response, found.warnings) == (None, None, None, [])


def test_a_list_of_values_under_cases_makes_groups_of_its_own() -> None:
    momenta = {"by": {"optimizer": {"sgd": [0.0, 0.9]}}}
    space = {"lr": LOG_LR, "optimizer": ["sgd", "adam"], "momentum": momenta}
    study = make_study(search={"trials": 32, "space": space, "sampler": "random"}, training={"epochs": 8})
    trials = complete(optimizer="sgd", momentum=0.0) + complete(
        lambda lr: hill(lr, 1e-4), optimizer="sgd", momentum=0.9
    )
    found = find_best(study, numbered(*trials))
    assert found is not None
    assert [params["momentum"] for params, _ in found.responses] == [0.0, 0.9]


def test_a_best_trial_without_a_number_for_a_rate_is_answered_by_itself() -> None:
    trials = [*complete()[:6], replace(trained(1e-3, 0.99), params={"lr": "warm"})]
    found = find_best(make_study(), numbered(*trials))
    assert found is not None
    assert str(found.lr) == "warm"
    assert found.response is None
