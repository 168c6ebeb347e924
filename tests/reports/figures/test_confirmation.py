"""The figure of the confirmation."""

from __future__ import annotations

from typing import Any

from tests.reports.examples import CONFIRMED, traces


def test_the_confirmation_shows_every_seed_its_mean_and_the_test_set(large: Any) -> None:
    entry = large[2]["confirmation"]
    (seeds,), (means,) = traces(entry, "a seed"), traces(entry, "mean, with its standard error")
    assert sorted(seeds.x) == sorted(value for values in CONFIRMED for value in values)
    assert list(means.x) == [0.7, 0.6]  # the winner's first
    assert means.error_x.value > 0
    (tests,) = traces(entry, "on the test set")
    assert list(tests.x) == [0.5] * 3
    assert "Confirmed: " in entry.caption
    assert "not told apart" in entry.caption or "really is worse" in entry.caption
