"""The worker's loop: how it ends, and what it does with the trials that it holds then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from tests.workers.training import HELD, work, working

MakeSpec = Callable[..., StudySpec]
WriteLoop = Callable[[str], None]


def test_a_worker_that_is_to_stop_gives_its_trial_back_at_the_next_report(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    loop(HELD)
    study = store.studies.create(make_spec(0.1, 0.2), metadata={})
    with working(store, study):
        wait_for(lambda: store.trials.get_all(study)[0].epochs)
        store.studies.request_stop(study)
        (tmp_path / "go").touch()
    assert [(trial.state, trial.epochs) for trial in store.trials.get_all(study)] == [
        ("waiting", [1, 2]),
        ("waiting", []),
    ]
    assert store.workers.get_all(study) == []
    store.studies.start(study)
    assert [(trial.state, trial.attempt) for trial in work(store, study)] == [("complete", 2), ("complete", 1)]


def test_a_trial_that_had_its_last_epoch_is_complete_even_where_the_worker_is_to_stop(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("trial.report(trial.epochs, val_accuracy=0.5)")
    study = store.studies.create(make_spec(0.1, 0.2), metadata={})
    trials = work(store, study, should_stop=lambda: store.trials.get_all(study)[0].state != "waiting")
    assert [trial.state for trial in trials] == ["complete", "waiting"]
