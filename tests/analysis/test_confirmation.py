"""The result of a confirmation: the winner, its expected value and error, the runner-up, and what the answer says."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from hpo.analysis.answer import find_best
from hpo.analysis.answer_text import answer_lines, confirmation_lines
from hpo.analysis.comparison import compare_answers
from hpo.analysis.confirmation import Confirmation, exclude_worse, find_confirmation
from hpo.analysis.text import rate_text
from hpo.config.sections import ConfirmSpec
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.study.records import StudyRecord
from tests.analysis.confirmation_examples import again, make_study, make_trial, make_trials
from tests.analysis.examples import SEARCHED, complete, hill, numbered
from tests.analysis.examples import make_study as make_searched


def confirmed(study: StudyRecord, *values: Sequence[float | str]) -> Confirmation:
    """Return the confirmation of 1e-3, 1e-2... with these values."""
    searched = make_trials((1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8), (1e-1, 0.4))
    params = [{"lr": rate} for rate in (1e-3, 1e-2, 1e-4)[: len(values)]]
    found = find_confirmation(study, searched + again(searched, *values, params=params), search_value=0.9)
    assert found is not None
    return found


def test_the_winner_has_the_highest_mean_and_seeds_that_diverge_come_last() -> None:
    found = confirmed(make_study(), [0.90, 0.80, 0.85], [0.90, 0.91, 0.89])
    assert found.winner.params == {"lr": 1e-2}
    assert found.winner.mean == pytest.approx(0.90)
    found = confirmed(make_study(), [0.90, 0.80, 0.85], [0.99, 0.99, "diverged"])
    assert found.winner.params == {"lr": 1e-3}
    assert found.candidates[1].num_diverged == 1
    minimized = make_study(objective={"function": "m:f", "metric": "loss", "direction": "minimize"})
    found = confirmed(minimized, [0.3, 0.3, 0.3], [0.2, 0.2, 0.2])
    assert found.winner.params == {"lr": 1e-2}
    assert found.inflation < 0  # 0.9 was worse than that


@pytest.mark.parametrize(("other", "is_worse"), [([0.80, 0.91, 0.86], True), ([0.80, 0.94, 0.87], False)])
def test_the_runner_up_is_compared_seed_by_seed(other: list[float | str], is_worse: bool) -> None:
    found = confirmed(make_study(), [0.82, 0.93, 0.89], other)  # far more from seed to seed than between the two
    assert found.runner_up is not None
    assert found.runner_up.is_worse == is_worse
    assert found.runner_up.interval[0] < found.runner_up.difference < found.runner_up.interval[1]


def test_a_rate_that_left_the_race_is_behind_others_and_the_answer_says_who_got_how_many_seeds() -> None:
    study = make_study(top=2, seeds=5)
    found = confirmed(study, [0.90, 0.89, 0.91, 0.70, 0.70], [0.85, 0.84, 0.86])  # its mean is the better one by now
    assert found.winner.params == {"lr": 1e-3}
    assert found.runner_up is not None
    assert found.runner_up.is_worse
    assert found.runner_up.difference == pytest.approx(0.05)
    seeds = [line for line in confirmation_lines(study, found) if line.label == "seeds"]
    assert [str(line) for line in seeds] == [
        "lr=0.001 on 5; lr=0.01 on 3 (of at most 5: rates that are clearly worse get no more)"
    ]
    every = confirmed(make_study(top=2, seeds=3), [0.90, 0.89, 0.91], [0.85, 0.84, 0.86])
    assert "seeds" not in {line.label for line in confirmation_lines(make_study(top=2, seeds=3), every)}


def test_nothing_is_said_before_all_have_ended_or_where_none_completed() -> None:
    searched = make_trials((1e-3, 0.9), (1e-2, 0.8))
    unfinished: list[list[float | str]] = [[0.8, "running"], ["failed", "failed"]]
    for values in unfinished:
        trials = searched + again(searched, values, params=[{"lr": 1e-3}])
        assert find_confirmation(make_study(), trials, search_value=0.9) is None
    assert find_confirmation(make_study(), searched, search_value=0.9) is None


def test_one_seed_that_completed_gives_a_mean_without_an_error() -> None:
    found = confirmed(make_study(), [0.8, "failed", "failed"])
    assert (found.value, found.standard_error, found.runner_up) == (0.8, None, None)


@pytest.mark.parametrize("num_seeds", [2, 5])
@pytest.mark.parametrize("spread", [0.0, 0.003, 0.05])
def test_the_confirmed_value_is_within_its_error_two_times_out_of_three(spread: float, num_seeds: int) -> None:
    """Hold also if the rates are equally good, so that the winner is the luckiest; see `make bench-analysis`."""
    random = np.random.default_rng(0)
    within, errors, naive, verdicts = [], [], [], []
    for _ in range(400):
        truths = [0.8, 0.8 - spread, 0.8 - 2 * spread]
        values = [[*(truth + 0.01 * random.normal(size=num_seeds))] for truth in truths]
        found = confirmed(make_study(3, num_seeds), *values)
        assert found.runner_up is not None
        verdicts.append(found.runner_up.is_worse and found.runner_up.params["lr"] == 1e-3)
        truth = truths[[1e-3, 1e-2, 1e-4].index(found.winner.params["lr"])]
        assert found.standard_error is not None
        assert found.winner.mean is not None
        within.append(abs(found.value - truth) <= found.standard_error)
        errors.append(found.value - truth)
        naive.append(found.winner.mean - truth)
    assert 0.62 < statistics.fmean(within) < 0.9  # two thirds, less twice its standard error with so many
    assert statistics.fmean(verdicts) < 0.1  # the truly best one, called worse
    if spread == 0:
        assert abs(statistics.fmean(errors)) < statistics.fmean(naive) / 2


@pytest.mark.parametrize("truths", [[0.8, 0.8], [0.8, 0.8, 0.8], [0.8, 0.8, 0.7]])
def test_of_equally_good_rates_the_second_is_seldom_called_worse(truths: list[float]) -> None:
    """Hold whatever the number of rates that are compared, of which the winner is the luckiest."""
    random = np.random.default_rng(0)
    verdicts = []
    for _ in range(1000):
        found = confirmed(make_study(3, 3), *([*(truth + 0.01 * random.normal(size=3))] for truth in truths))
        assert found.runner_up is not None
        verdicts.append(found.runner_up.is_worse)
    assert statistics.fmean(verdicts) < 0.06


def test_the_answer_says_it() -> None:
    study = make_study()
    trials = make_trials((1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8))
    trials += again(trials, [0.82, 0.83, 0.84], [0.79, 0.80, 0.82], params=[{"lr": 1e-3}, {"lr": 1e-2}])
    found = find_best(study, trials)
    assert found is not None
    text = "\n".join(answer_lines(study, found))
    assert text.startswith("best learning rate: 0.001, confirmed on 3 fresh seeds\n")
    assert re.search(
        r"confirmed: +82\.\d+ % \(validation accuracy, ± [\d.]+ percentage points, on 3 fresh seeds\)", text
    )
    assert re.search(r"best trial: +#1, lr=0\.001 \(.* 7[\d.]* percentage points better than confirmed\)", text)
    assert re.search(r"mean of seeds: +83\.00 % \(too high, as the best of several; expect 82\.\d+ %\)", text)
    assert re.search(r"runner-up: +lr=0\.01 \(really is worse: ", text)
    assert json.loads(json.dumps(found.as_dict()))["confirmation"]["runner_up"]["is_worse"] is True


def test_a_confirmed_headline_keeps_the_doubt_of_a_best_rate_beyond_the_range() -> None:
    study, confirm = make_searched(**SEARCHED), {"top": 2, "seeds": 3}
    study = replace(study, spec=study.spec.model_copy(update={"confirm": ConfirmSpec(**confirm)}))
    doubt = ", confirmed on 3 fresh seeds, but the best may lie beyond the searched range"
    for value, is_doubted in ((lambda lr: 0.5 + 0.1 * (math.log10(lr) + 3), True), (hill, False)):
        trials = numbered(*complete(value))
        best = dict(max(trials, key=lambda trial: trial.value or 0.0).params)
        found = find_best(study, trials + again(trials, [0.8, 0.81, 0.82], params=[best]))
        assert found is not None
        headline = answer_lines(study, found)[0]
        assert headline.startswith(f"best learning rate: {rate_text(best['lr'])}, confirmed on 3 fresh seeds")
        assert headline.endswith(doubt) == is_doubted


@pytest.mark.parametrize(
    ("metric", "curves", "line"),
    [
        ("auroc", {"test_accuracy": [0.5], "test_auroc": [0.75]}, "test AUROC: 0.75 (not used for selection)"),
        ("top5", {"test_top5": [0.75]}, "test top-5 accuracy: 75.00 % (not used for selection)"),
        ("val_loss", {"test_loss": [1.5]}, "test loss: 1.5 (not used for selection)"),
        ("auroc", {"test_accuracy": [0.5]}, "test accuracy: 50.00 % (not used for selection)"),  # of an older version
    ],
)
def test_the_test_set_is_told_in_the_studys_metric(metric: str, curves: dict[str, list[float]], line: str) -> None:
    study, trials = make_study(training={"metric": metric}), make_trials((1e-3, 0.5))
    trials += again(trials, [0.5, 0.6], params=[{"lr": 1e-3}])
    trials.append(make_trial(3, {"lr": 1e-3}, 0.5, kind="test", tested=1, curves=curves))
    found = find_confirmation(study, trials, search_value=0.5)
    assert found is not None
    assert [found.test_metric, found.test_value] == [list(curves)[-1], list(curves.values())[-1][-1]]
    assert line in [f"{shown.label}: {shown}" for shown in confirmation_lines(study, found)]


def test_values_that_are_all_alike_are_as_uncertain_as_a_picture_and_huge_ones_no_error() -> None:
    found = confirmed(make_study(), [0.8, 0.8, 0.8], [0.8, 0.8, 0.8])
    assert found.standard_error is not None
    assert found.standard_error > 0  # there are 400 images
    assert found.runner_up is not None
    assert not found.runner_up.is_worse
    minimized = make_study(objective={"function": "m:f", "metric": "loss", "direction": "minimize"})
    found = confirmed(minimized, [1e300, 2e300], [3e300, 1e305])
    assert found.winner.params == {"lr": 1e-3}


def test_what_wins_may_be_another_optimizer_and_the_answer_is_all_of_that() -> None:
    space = {"optimizer": ["adam", "sgd"], "lr": {"low": 1e-5, "high": 1.0, "log": True}}
    study = make_study(search={"sampler": "random", "trials": 12, "space": space})
    rows = [("adam", 10**x, 0.9 - 0.1 * (x + 3) ** 2) for x in (-5, -4, -3.5, -3, -2.5, -2)]
    rows += [("sgd", 10**x, 0.8 - 0.1 * (x + 1) ** 2) for x in np.linspace(-5, 0, 21)]
    trials = [make_trial(n, {"optimizer": name, "lr": lr}, value) for n, (name, lr, value) in enumerate(rows)]
    params = [{"optimizer": "adam", "lr": 1e-3}, {"optimizer": "sgd", "lr": 0.1}]
    trials += again(trials, [0.6, 0.61, 0.62], [0.79, 0.8, 0.81], params=params)
    found = find_best(study, trials)
    assert found is not None
    assert found.recommended == {"optimizer": "sgd", "lr": 0.1}
    assert found.params["optimizer"] == "adam"  # of the best trial, as it was
    assert found.interval is not None
    assert found.interval[0] > 1e-2
    text = "\n".join(answer_lines(study, found))
    assert text.startswith("best learning rate: 0.1 (optimizer sgd), confirmed on 3 fresh seeds")
    assert "best by the trials of the search alone, with optimizer=sgd" in text


def test_a_confirmation_that_failed_is_said() -> None:
    study = make_study()
    trials = make_trials((1e-4, 0.5), (1e-3, 0.9), (1e-2, 0.8))
    failed = again(trials, ["diverged", "diverged"], params=[{"lr": 1e-3}])
    found = find_best(study, trials + failed)
    assert found is not None
    assert "not-confirmed" in {warning.kind for warning in found.warnings}
    done = again(trials, [0.8, 0.81], params=[{"lr": 1e-3}])
    tests = [make_trial(5 + n, {"lr": 1e-3}, "failed", kind="test", replicate=n, tested=3 + n) for n in range(2)]
    found = find_best(study, trials + done + tests)
    assert found is not None
    assert {"not-confirmed", "not-tested"} & {warning.kind for warning in found.warnings} == {"not-tested"}


@pytest.mark.parametrize(
    ("confirm", "message"),
    [
        ({"top": 0}, "confirm.top must be at least 1, got 0"),
        ({"seeds": 1}, "confirm.seeds must be between 2 and 1,000, got 1"),
        ({"tops": 3}, "confirm.tops"),
    ],
)
def test_mistakes_are_one_sentence(make_spec: Callable[..., StudySpec], confirm: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_spec(0.1, confirm=confirm)


@pytest.mark.parametrize(("share_of_worse", "share_of_winner"), [(0.3, 0.6), (0.6, 0.3)])
def test_a_rate_that_really_is_worse_does_equally_well_nowhere(share_of_worse: float, share_of_winner: float) -> None:
    study, trials = make_searched(**SEARCHED, confirm={"top": 2, "seeds": 3}), numbered(*complete(lambda lr: 0.8))
    before = find_best(study, trials)
    assert before is not None
    assert before.response is not None
    first, last = before.response.plateau
    worse, winner = (float(f"{first * (last / first) ** share:.2g}") for share in (share_of_worse, share_of_winner))
    values: list[list[float | str]] = [[0.90, 0.91, 0.92], [0.70, 0.71, 0.72]]
    confirming = again(trials, *values, params=[{"lr": winner}, {"lr": worse}])
    found = find_best(study, trials + confirming)
    assert "tied" in {warning.kind for warning in before.warnings}
    assert found is not None
    assert found.response is not None
    assert found.confirmation is not None
    low, high = found.response.plateau
    assert low <= winner <= high
    assert not float(rate_text(low)) <= worse <= float(rate_text(high))
    assert found.responses[0][1] is found.response  # of the figures and of the comparison
    assert "tied" not in {warning.kind for warning in found.warnings}
    (compared,) = compare_answers([(study, trials + confirming, found)]).studies
    assert compared.plateau == found.response.plateau
    assert "tied" not in compared.warnings
    equal = again(trials, [0.80, 0.82, 0.81], [0.81, 0.80, 0.80], params=[{"lr": winner}, {"lr": worse}])
    not_told_apart = find_best(study, trials + equal)
    assert not_told_apart is not None
    assert not_told_apart.response is not None
    assert not_told_apart.response.plateau == before.response.plateau


def test_without_a_response_the_rates_that_did_as_well_leave_out_a_worse_one_too() -> None:
    trials = make_trials((1e-4, 0.9), (1e-3, 0.9), (1e-2, 0.9))
    trials += again(trials, [0.82, 0.83, 0.84], [0.69, 0.70, 0.72], params=[{"lr": 1e-2}, {"lr": 1e-3}])
    found = find_best(make_study(), trials)
    assert found is not None
    assert found.interval == pytest.approx((10**-2.5, 1e-2))


def test_where_all_that_did_equally_well_lies_beyond_a_worse_rate_the_winner_stands_alone() -> None:
    assert exclude_worse((1e-4, 1e-3), worse=[1e-3], winner=1e-2) == (1e-2, 1e-2)
    assert exclude_worse((2e-3, 2e-2), worse=[1e-3], winner=1e-2) == (2e-3, 2e-2)
    assert exclude_worse((1e-4, 1e-1), worse=[1e-3, 4e-2], winner=1e-2) == pytest.approx((10**-2.5, 2e-2))


def test_what_left_the_race_over_seeds_does_equally_well_nowhere_either() -> None:
    study = make_searched(**SEARCHED, confirm={"top": 3, "seeds": 5})
    trials = numbered(*complete(lambda lr: 0.8))
    before = find_best(study, trials)
    assert before is not None
    assert before.response is not None
    first, last = before.response.plateau
    rates = [float(f"{first * (last / first) ** share:.2g}") for share in (0.5, 0.7, 0.2)]
    values: list[list[float | str]] = [[0.9, 0.91, 0.92, 0.9, 0.91], [0.9, 0.9, 0.92, 0.91, 0.9], [0.7, 0.71, 0.72]]
    found = find_best(study, trials + again(trials, *values, params=[{"lr": rate} for rate in rates]))
    assert found is not None
    assert found.confirmation is not None
    assert [rate.params["lr"] for rate in found.confirmation.worse] == rates[2:]
    assert found.response is not None
    assert found.response.plateau == pytest.approx((math.sqrt(rates[2] * found.recommended["lr"]), last))
