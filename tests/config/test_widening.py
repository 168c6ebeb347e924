"""Wider ranges of a study that has been searched: what is refused, and where its further trials begin."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpo.config.study_spec import StudySpec
from hpo.config.widening import num_trials_to_add, parse_widening, points_to_add, widened_spec
from hpo.errors import UserError

SPACE: dict[str, Any] = {
    "lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "batch_size": {"low": 32, "high": 64},
    "momentum": {"low": 0.0, "high": 0.8, "step": 0.2},
    "schedule": ["constant", "cosine"],
}


def spec(**search: Any) -> StudySpec:
    settings = {"trials": 20, "space": SPACE, **search}
    return StudySpec.from_dict({"name": "s", "search": settings, "training": {"optimizer": "sgd"}})


REFUSED = {
    "lr": "--widen must be KEY=LOW:HIGH, such as lr=1e-6:10, got 'lr'",
    "lr=1e-6:inf": "--widen must be KEY=LOW:HIGH",
    "lr=1e-5:1e-1": "--widen lr must include the searched range and more, 1e-05:0.1, got 1e-05:0.1",
    "lr=1e-4:1": "--widen lr must include the searched range and more, 1e-05:0.1, got 0.0001:1",
    "lr=0:1": "search.space.lr.low must be > 0 on a log scale, got 0.0",
    "rl=1e-6:1": "--widen must be one of batch_size, lr, momentum, schedule; got 'rl'",
    "batch_size=16.5:64": "--widen batch_size must be integers, like the searched range, got 16.5:64",
    "momentum=0:0.9": "--widen momentum needs a range without steps in search.space, got",
    "schedule=0:1": "--widen schedule needs a range without steps in search.space, got",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_widened_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(UserError) as caught:
        widened_spec(spec(), dict([parse_widening(text)]))
    assert REFUSED[text] in str(caught.value)


def test_a_grid_has_no_range_to_widen() -> None:
    grid = StudySpec.from_dict({"name": "s", "search": {"sampler": "grid", "space": {"lr": [0.1, 0.2]}}})
    with pytest.raises(UserError, match="--widen does not apply to sampler 'grid'"):
        widened_spec(grid, {"lr": (0.01, 1.0)})


def test_only_the_ends_change_and_trials_are_added_as_densely_as_there_were() -> None:
    before = spec()
    wider = widened_spec(before, dict(map(parse_widening, ["lr=1e-6:10", "batch_size=32:96"])))
    assert wider.search.space["lr"] == {"low": 1e-6, "high": 10.0, "log": True}
    assert wider.search.space["batch_size"] == {"low": 32, "high": 96}
    assert {line.partition(":")[0] for line in before.differences(wider)} == {
        "search.space.lr.low",
        "search.space.lr.high",
        "search.space.batch_size.high",
    }
    only_lr = widened_spec(before, {"lr": (1e-6, 10.0)})
    assert num_trials_to_add(before, only_lr, count=20) == 15  # three decades more than four
    points = [float(point["lr"]) for point in points_to_add(before, only_lr, count=15)]
    assert all(1e-6 <= lr < 1e-5 or 0.1 < lr <= 10 for lr in points)
    assert {math.floor(math.log10(lr)) for lr in points} == {-6, -1, 0}  # each new decade
    assert points_to_add(before, only_lr, count=1) == [{"lr": points[0]}]
    assert points_to_add(before, before, count=9) == []
