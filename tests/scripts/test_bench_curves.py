"""The bench of public curves: what it reads, and that it judges a rate by what was recorded."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPOSITORY)
    return importlib.import_module("scripts.bench.curves")


@pytest.fixture
def task(bench: Any, tmp_path: Path) -> Any:
    """Return a network that is best at 1e-3, and dead at 1e-1; one of its seeds is not finite."""
    finals = {1e-5: 0.4, 1e-4: 0.7, 1e-3: 0.8, 1e-2: 0.6, 1e-1: 0.1}
    runs = [
        {"lr": lr, "seed": 0, "accuracy": [0.1 + (final - 0.1) * epoch / 20 for epoch in range(1, 21)]}
        for lr, final in finals.items()
    ]
    runs.append({**runs[-1], "seed": 1, "accuracy": [None] * 20})
    file = tmp_path / "curves.json.gz"
    file.write_bytes(gzip.compress(json.dumps([{"task": "t", "num_classes": 10, "runs": runs}]).encode()))
    (only,) = bench.read_tasks(file)
    return only


def test_recorded_rates_are_worth_the_end_of_their_curves(task: Any) -> None:
    assert task.num_epochs == 20
    assert task.final.argmax() == 2
    assert task.worth(-3.0) == pytest.approx(0.79, abs=0.02)
    assert task.worth(-3.5) == pytest.approx((task.worth(-4.0) + task.worth(-3.0)) / 2)
    assert task.worth(-1.0) == pytest.approx(0.05, abs=0.01), "what is not finite is worth nothing"


@pytest.mark.parametrize(("how", "most"), [("none", 20), ("asha", 30), ("race", 2)])
def test_a_study_is_judged_by_the_recorded_curves(bench: Any, task: Any, how: str, most: int) -> None:
    one, again = (bench.repeat((task, how, 2.0, 3)) for _ in range(2))
    assert one == again
    assert 0 <= one["trial_regret"] < 0.3
    assert 0 <= one["regret"] < 0.3
    assert 1 < one["trainings"] <= most
    row = bench.summarize([one])
    assert row["mean"] == pytest.approx(100 * one["regret"])
