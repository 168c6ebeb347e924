"""The answer: which trial is best, and which learning rates did as well."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from hpo.analysis.answer import find_best, find_response
from hpo.analysis.peak import Peak, find_peak
from hpo.analysis.trials import best_trial, standard_error
from hpo.analysis.warnings import WARNINGS
from hpo.config.study_spec import StudySpec
from hpo.study.records import StudyRecord, TrialRecord


def make_study(num_val: int | None = 400, **settings: Any) -> StudyRecord:
    spec = StudySpec.from_dict({"name": "s", "search": {"space": {"lr": [0.1, 0.2]}}, **settings})
    return StudyRecord(1, "s", spec, {} if num_val is None else {"num_val": num_val}, None, None, 0.0)


def make_trials(*rows: tuple[float, float | str], **params: Any) -> list[TrialRecord]:
    """Trials from (learning rate, value), or (learning rate, state) for those that did not complete."""
    return [
        TrialRecord(
            number=number,
            state="complete" if isinstance(result, float) else result,
            params={"lr": lr, **params},
            value=result if isinstance(result, float) else None,
            attempt=1,
            reason=None,
            error=None,
            worker_id=None,
            attributes={},
            started=None,
            ended=None,
        )
        for number, (lr, result) in enumerate(rows)
    ]


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


def test_among_equal_values_the_lower_validation_loss_wins() -> None:
    trials = make_trials((0.1, 0.9), (0.2, 0.9), (0.3, 0.9))
    for trial, loss in zip(trials, (0.5, 0.3, None), strict=True):
        trial.curves["val_loss"] = [1.0, loss]  # type: ignore[index]
    found = best_trial(make_study(), trials)
    assert found is not None
    assert found.number == 1


@pytest.mark.parametrize(
    ("rows", "interval"),
    [
        # 0.90 on 400 pictures has a standard error of 0.015
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


def test_the_standard_error_is_the_binomial_one_and_not_zero_at_100_percent() -> None:
    assert standard_error(0.9, 10_000) == pytest.approx(math.sqrt(0.9 * 0.1 / 10_000), rel=1e-2)
    assert 0.005 < standard_error(1.0, 144) < 0.02


def reporting(*rows: tuple[float, list[float | None]], state: str = "running", **params: Any) -> list[TrialRecord]:
    """Trials in training, from (learning rate, accuracy after each epoch)."""
    return [
        replace(trial, curves={"val_accuracy": curve}, epochs=range(1, len(curve) + 1))
        for trial, (_, curve) in zip(make_trials(*((lr, state) for lr, _ in rows), **params), rows, strict=True)
    ]


def parabola(lr: float, top: float) -> float:
    return 0.9 - 0.1 * math.log10(lr / top) ** 2


def peak_lr(study: StudyRecord, trials: list[TrialRecord]) -> float | None:
    found = find_peak(study, trials)
    return None if found is None else found.lr


def test_the_peak_is_the_top_of_a_parabola_through_the_trials_around_the_best() -> None:
    rates = (1e-5, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 9e-2)
    rows = [(lr, [parabola(lr, 8e-4)]) for lr in rates[1:-1]]
    far = [(rates[0], [0.1]), (rates[-1], [0.1])]  # more than a decade away: no part of it
    assert peak_lr(make_study(), reporting(*rows, *far)) == pytest.approx(8e-4)
    downward = [(lr, [-accuracy]) for lr, (accuracy,) in rows]
    objective = {"function": "m:f", "direction": "minimize", "metric": "val_accuracy"}
    assert peak_lr(make_study(objective=objective), reporting(*downward)) == pytest.approx(8e-4)


def test_a_peak_outside_what_was_tried_is_at_its_edge() -> None:
    rows = [(lr, [parabola(lr, 1e-1)]) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    assert peak_lr(make_study(), reporting(*rows)) == pytest.approx(8e-3)


@pytest.mark.parametrize("rates", [(1e-3,), (1e-3, 2e-3, 4e-3), (1e-3, 1e-3, 1e-3, 2e-3, 4e-3)])
def test_too_few_rates_for_a_parabola_leave_the_best(rates: tuple[float, ...]) -> None:
    assert peak_lr(make_study(), reporting(*((lr, [parabola(lr, 1.5e-3)]) for lr in rates))) in (1e-3, 2e-3)


def test_a_response_that_bends_upward_leaves_the_best() -> None:
    rows = [(lr, [0.9 + 0.1 * math.log10(lr / 1e-3) ** 2]) for lr in (5e-4, 1e-3, 2e-3, 5e-3)]
    assert find_peak(make_study(), reporting(*rows)) == Peak(5e-3, 1, fitted=False)


def test_trials_are_compared_after_as_many_epochs_as_five_of_them_have_come_to() -> None:
    long = [(lr, [0.1, parabola(lr, 3e-3), 0.0]) for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
    last = (6e-3, [0.1, parabola(6e-3, 3e-3)])
    short = [(lr, [0.95]) for lr in (3e-4, 4e-4)]  # their first epoch was good, and nobody's second is known
    assert find_peak(make_study(), reporting(*long, last, *short)) == Peak(pytest.approx(3e-3), 2, fitted=True)


def test_only_trials_like_the_best_count_and_none_that_failed_or_has_no_number() -> None:
    rows = [(lr, [parabola(lr, 1e-3)]) for lr in (3e-4, 6e-4, 1.5e-3, 3e-3)]
    space = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}, "optimizer": ["adam", "sgd"]}
    study = make_study(search={"space": space, "trials": 9})
    others = reporting((5e-3, [0.8]), (6e-3, [0.8]), optimizer="sgd")
    failed = reporting((2e-3, [0.99]), state="failed", optimizer="adam")
    unknown = reporting((2.5e-3, [None]), optimizer="adam")
    every = [*reporting(*rows, optimizer="adam"), *others, *failed, *unknown]
    numbered = [replace(trial, number=number) for number, trial in enumerate(every)]
    assert peak_lr(study, numbered) == pytest.approx(1e-3)
    assert peak_lr(study, numbered[-2:]) is None
    assert peak_lr(study, make_trials((0.1, "waiting"))) is None


@pytest.mark.parametrize("lrs", [("low", "high"), (-3.0, -1.0), (0, 0.0), (True, False)])
def test_where_a_loop_calls_something_else_lr_there_is_no_peak(lrs: tuple[Any, ...]) -> None:
    trials = reporting(*((lr, [0.5]) for lr in lrs))
    assert find_peak(make_study(), trials) is None


def test_a_metric_as_large_as_a_float_holds_is_no_crash() -> None:
    rows = [(lr, [1e308 * (1 - lr)] * 3) for lr in (1e-4, 2e-4, 4e-4, 8e-4)]
    assert peak_lr(make_study(), reporting(*rows)) in (None, 1e-4)


# The response of a study's trials

LOG_LR = {"low": 1e-5, "high": 1e-1, "log": True}
RATES = tuple(10 ** (-5 + 4 * index / 15) for index in range(16))
SEARCHED = {"search": {"trials": 16, "space": {"lr": LOG_LR}}, "training": {"epochs": 8}}


def hill(lr: float, top: float = 1e-3) -> float:
    return 0.9 - 0.05 * math.log10(lr / top) ** 2


def curve(value: float, epochs: int = 8, *, speed: float = 1.0) -> list[float]:
    """An accuracy that comes to `value` in eight epochs, and is there early where `speed` is high."""
    return [value * (1 - math.exp(-speed * epoch)) / (1 - math.exp(-speed * 8)) for epoch in range(1, epochs + 1)]


def trained(lr: float, value: float, *, state: str = "complete", epochs: int = 8, **params: Any) -> TrialRecord:
    values = curve(value, epochs)
    trial = reporting((lr, values), state=state, **params)[0]  # type: ignore[list-item]
    return replace(trial, value=values[-1] if state in ("complete", "pruned") else None)


def numbered(*trials: TrialRecord) -> list[TrialRecord]:
    return [replace(trial, number=number) for number, trial in enumerate(trials)]


NOISE = [random.gauss(0, 1) for random in [Random(0)] for _ in RATES]


def noise(index: int, size: float = 0.004) -> float:
    return size * NOISE[index]


def complete(value: Any = hill, **params: Any) -> list[TrialRecord]:
    return [trained(lr, value(lr) + noise(index), **params) for index, lr in enumerate(RATES)]


def test_with_enough_learning_rates_the_answer_is_the_responses() -> None:
    found = find_best(make_study(**SEARCHED), numbered(*complete()))
    assert found is not None
    assert found.response is not None
    assert found.lr == found.response.best == pytest.approx(1e-3, rel=0.4)
    assert found.interval == found.response.interval
    assert found.responses == [({}, found.response)]
    assert json.loads(json.dumps(found.as_dict()))["response"]["interval"] == list(found.response.interval)


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
    assert max(map(abs, seen)) < 0.1  # after two epochs they had come to 0.87 of it
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
    assert (found.lrs[0], found.lrs[-1]) == (pytest.approx(1e-5), pytest.approx(1e-2))


# Warnings: for each a study that asks for it, and no other

DIVERGED = [trained(lr, 0.1, state="diverged", epochs=1) for lr in RATES]
SOUND = [
    trained(lr, 0.9 - 0.15 * math.log10(lr / 1e-3) ** 2 + noise(index, 0.002)) if lr < 1e-2 else DIVERGED[index]
    for index, lr in enumerate(RATES)
]
RISING = [
    replace(trial, curves={"val_accuracy": [trial.value * epoch / 8 for epoch in range(1, 9)]})
    if trial.value is not None else trial
    for trial in SOUND
]  # fmt: skip


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
        pytest.param(complete(lambda lr: 0.6), {"tied", "edge-of-range"}, id="all are equal"),
        pytest.param(RISING, {"still-rising"}, id="stopped early"),
        pytest.param(
            SOUND + [trained(lr, 0.9, state="pruned", epochs=2) for lr in (8e-4, 9e-4, 1e-3, 1.1e-3, 1.2e-3, 1.3e-3)],
            {"pruned-away"},
            id="the best were pruned",
        ),
        pytest.param([*SOUND, confirming("diverged")], {"not-confirmed"}, id="what was best broke on another seed"),
        pytest.param(
            [*SOUND, confirming("complete"), confirming("failed", kind="test")], {"not-tested"}, id="no test set"
        ),
        pytest.param([*SOUND, confirming("complete"), confirming("failed")], set(), id="confirmed"),
        pytest.param(complete(lambda lr: 0.1), {"guessing", "tied", "edge-of-range"}, id="nothing was learnt"),
    ],
)
def test_warnings_come_where_they_should_and_nowhere_else(trials: list[TrialRecord], expected: set[str]) -> None:
    study = make_study(**SEARCHED)
    study = replace(study, metadata={**study.metadata, "num_classes": 10})
    found = find_best(study, numbered(*trials))
    assert found is not None
    assert {warning.kind for warning in found.warnings} == expected
    assert all(warning.text[-1] != "." and "\n" not in warning.text for warning in found.warnings)


def test_every_warning_has_a_study_that_asks_for_it() -> None:
    table = test_warnings_come_where_they_should_and_nowhere_else.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert set().union(*(case.values[1] for case in table)) == set(WARNINGS)


def test_a_warning_names_what_to_change() -> None:
    study = make_study(**SEARCHED)
    for slope, bound in ((0.1, "high end of what was searched: widen search.space.lr to 1"), (-0.1, "to 1e-06")):
        found = find_best(study, numbered(*tilted(slope)))
        assert found is not None
        assert bound in found.warnings[0].text


def test_a_study_without_a_learning_rate_has_no_response_and_no_warning_about_it() -> None:
    study = make_study(search={"space": {"batch_size": [16, 32, 64]}}, training={"lr": 1e-3})
    trials = [replace(trial, params={"batch_size": 16 * 2**i}) for i, trial in enumerate(complete()[:3])]
    found = find_best(study, numbered(*trials))
    assert found is not None
    assert (found.lr, found.interval, found.response, found.warnings) == (None, None, None, [])


def test_losses_far_from_each_other_are_not_tied() -> None:
    objective = {"function": "m:f", "direction": "minimize"}
    trials = make_trials((1e-4, 5.0), (1e-3, 0.1), (1e-2, 50.0), (1e-1, 900.0))
    found = find_best(make_study(objective=objective), trials)
    assert found is not None
    assert "tied" not in {warning.kind for warning in found.warnings}


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
    assert (found.lr, found.response) == ("warm", None)
