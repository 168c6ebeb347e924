"""A trial as people see it."""

from __future__ import annotations

from dataclasses import replace

from hpo.study.records import Attempt
from tests.analysis.confirmation_examples import make_trial


def test_a_trial_took_as_long_as_its_latest_attempt_not_until_the_end_of_its_race() -> None:
    attempt = Attempt(
        attempt=2,
        worker_id="w",
        host=None,
        device=None,
        began=100.0,
        ended=103.0,
        last_epoch=1,
        resumed_from=1,
        outcome="released",
        error=None,
        note=None,
    )
    trial = replace(make_trial(0, {"lr": 0.1}, 0.5), started=100.0, ended=150.0)
    assert replace(trial, attempts=[attempt]).duration_s == 3.0
    assert trial.duration_s == 50.0
    assert replace(trial, attempts=[replace(attempt, ended=None)], ended=None).duration_s is None
