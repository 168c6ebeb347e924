"""Studies and trials for the tests of the analysis and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from hpo.config.study_spec import StudySpec
from hpo.study.records import StudyRecord, TrialRecord


def make_study(num_val: int | None = 400, **settings: Any) -> StudyRecord:
    spec = StudySpec.from_dict({"name": "s", "search": {"space": {"lr": [0.1, 0.2]}}, **settings})
    return StudyRecord(1, "s", spec, {} if num_val is None else {"num_val": num_val}, None, None, 0.0)


def make_trials(*rows: tuple[float, float | str], **params: Any) -> list[TrialRecord]:
    """Return trials from (learning rate, value), or (learning rate, state) for those that did not complete."""
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


def reporting(*rows: tuple[float, Sequence[float | None]], state: str = "running", **params: Any) -> list[TrialRecord]:
    """Return trials in training, from (learning rate, accuracy after each epoch)."""
    return [
        replace(trial, curves={"val_accuracy": curve}, epochs=range(1, len(curve) + 1))
        for trial, (_, curve) in zip(make_trials(*((lr, state) for lr, _ in rows), **params), rows, strict=True)
    ]


LOG_LR = {"low": 1e-5, "high": 1e-1, "log": True}
RATES = tuple(10 ** (-5 + 4 * index / 15) for index in range(16))
SEARCHED: dict[str, Any] = {"search": {"trials": 16, "space": {"lr": LOG_LR}}, "training": {"epochs": 8}}


def hill(lr: float, top: float = 1e-3) -> float:
    return 0.9 - 0.05 * math.log10(lr / top) ** 2


def curve(value: float, epochs: int = 8, *, speed: float = 1.0) -> list[float]:
    """Return an accuracy that reaches `value` in eight epochs, earlier if `speed` is high."""
    return [value * (1 - math.exp(-speed * epoch)) / (1 - math.exp(-speed * 8)) for epoch in range(1, epochs + 1)]


def trained(lr: float, value: float, *, state: str = "complete", epochs: int = 8, **params: Any) -> TrialRecord:
    values = curve(value, epochs)
    trial = reporting((lr, values), state=state, **params)[0]
    return replace(trial, value=values[-1] if state in ("complete", "pruned") else None)


def numbered(*trials: TrialRecord) -> list[TrialRecord]:
    return [replace(trial, number=number) for number, trial in enumerate(trials)]


RANDOM = Random(0)
NOISE = [RANDOM.gauss(0, 1) for _ in RATES]


def noise(index: int, size: float = 0.004) -> float:
    return size * NOISE[index]


def complete(value: Any = hill, **params: Any) -> list[TrialRecord]:
    return [trained(lr, value(lr) + noise(index), **params) for index, lr in enumerate(RATES)]


def flat_race(whole: int) -> list[TrialRecord]:
    """Return trials at RATES that differ by noise alone, of which one was trained to the end."""
    ends = [("complete", 8) if index == whole else ("pruned", 2) for index in range(len(RATES))]
    return [
        trained(lr, 0.6 + noise(index, 0.003), state=state, epochs=epochs)
        for index, (lr, (state, epochs)) in enumerate(zip(RATES, ends, strict=True))
    ]
