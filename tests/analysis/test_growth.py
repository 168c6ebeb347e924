"""Where the range of learning rates should grow, and where it should not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hpo.analysis.answer import find_best
from hpo.analysis.growth import MAX_GROWTHS, find_grown_range
from hpo.study.records import WIDENED, StudyRecord, TrialRecord
from tests.analysis.examples import LOG_LR, complete, hill, make_study, numbered, trained

GREW = {"before": {"lr": LOG_LR}, "after": {"lr": LOG_LR}, "grew": True}


def growing(**search: Any) -> StudyRecord:
    search = {"trials": 16, "space": {"lr": LOG_LR}, "grow": True, **search}
    return make_study(search=search, training={"epochs": 8})


def grown(study: StudyRecord, trials: list[TrialRecord]) -> tuple[float, float] | None:
    return find_grown_range(study, trials, find_best(study, trials))


@pytest.mark.parametrize(("top", "expected"), [(1e-6, (1e-6, 1e-1)), (1e-3, None), (1.0, (1e-5, 1.0))])
def test_it_grows_by_a_decade_at_the_end_that_the_best_rates_touch(
    top: float, expected: tuple[float, float] | None
) -> None:
    found = grown(growing(), numbered(*complete(lambda lr: hill(lr, top))))
    assert found == (None if expected is None else pytest.approx(expected))
    assert grown(growing(grow=False), numbered(*complete(lambda lr: hill(lr, top)))) is None


def test_it_does_not_grow_past_what_diverges_nor_for_ever() -> None:
    rising = complete(lambda lr: hill(lr, 1.0))
    diverged = trained(0.09, 0.1, state="diverged", epochs=2)
    assert grown(growing(), numbered(*rising, diverged)) is None
    falling = complete(lambda lr: hill(lr, 1e-6))
    assert grown(growing(), numbered(*falling, diverged)) == pytest.approx((1e-6, 1e-1))
    study = growing()
    often = replace(study, metadata={**study.metadata, WIDENED: [GREW] * MAX_GROWTHS})
    assert grown(often, numbered(*rising)) is None
    by_hand = replace(study, metadata={**study.metadata, WIDENED: [{**GREW, "grew": False}] * MAX_GROWTHS})
    assert grown(by_hand, numbered(*rising)) is not None


def test_a_doubt_about_an_end_that_the_recommended_rate_is_far_from_is_no_reason() -> None:
    study, trials = growing(), numbered(*complete(lambda lr: hill(lr, 1.0)))
    found = find_best(study, trials)
    assert found is not None
    assert found.response is not None
    draws = [*found.response.draws_of_best[:100], *[1e-5] * 300]
    doubtful = replace(found, response=replace(found.response, draws_of_best=draws))
    assert find_grown_range(study, trials, doubtful) is None


def test_without_an_answer_nothing_grows() -> None:
    assert grown(growing(), numbered(*complete()[:3])) is None
