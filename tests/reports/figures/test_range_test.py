"""The figure of the range tests."""

from __future__ import annotations

from typing import Any

from tests.reports.examples import RAMP, traces


def test_a_range_test_shows_its_ramp_its_signs_and_the_range(large: Any) -> None:
    entry = large[2]["range_test"]
    (ramp,) = traces(entry, "loss")
    assert list(ramp.x) == RAMP["lrs"]
    assert list(ramp.y) == [2.3, 2.0, 3.45]  # what is not finite reaches to the top
    assert {(shape.x0, shape.x1) for shape in entry.figure.layout.shapes} >= {(1e-4, 1e-1), (1e-2, 1e-2)}
    assert "comes from a range test of 0.9 epochs: 0.0001 to 0.1" in entry.caption
