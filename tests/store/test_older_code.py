"""A store that an earlier version of the code has left opens, reads the same, and goes on."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from hpo.store.store import Store
from hpo.study.records import trial_as_dict

# Written by commit f2ad8bd, whose code had other names for some columns. The study is a grid of four learning rates:
# one trial complete, one out of memory, one released after an epoch, one never claimed.
DUMP = Path(__file__).parent / "store_f2ad8bd.sql"
ATTEMPT = {"worker_id": "784144735de6", "host": "here", "device": "cpu", "furthest": 0, "note": None}
ATTEMPTS: list[dict[str, Any]] = [  # as `hpo trials --json` of that commit has them, without the times
    {"attempt": 1, "went_on_from": 0, "outcome": "complete", "error": None, **ATTEMPT},
    {"attempt": 1, "went_on_from": None, "outcome": "out of memory", "error": "Traceback", **ATTEMPT},
    {"attempt": 1, "went_on_from": 0, "outcome": "released", "error": None, **ATTEMPT},
]
TRIALS: list[dict[str, Any]] = [
    {"state": "complete", "value": 0.75, "params": {"lr": 0.1}, "val_accuracy": [0.5, 0.75], "seed": 1},
    {"state": "waiting", "value": None, "params": {"lr": 0.2}, "val_accuracy": [0.25], "seed": 2},
    {"state": "waiting", "value": None, "params": {"lr": 0.3}, "val_accuracy": [0.6], "seed": 3},
    {"state": "waiting", "value": None, "params": {"lr": 0.4}, "val_accuracy": []},
]


def test_a_store_of_earlier_code_reads_the_same_and_goes_on(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "hpo.db")
    connection.executescript(DUMP.read_text())
    connection.close()
    store = Store(f"sqlite:///{tmp_path}/hpo.db")
    study = store.studies.get("s")
    assert study.metadata["num_val"] == 7
    assert study.spec.training.tf32 is False  # a key that it was stored without
    assert store.problems(study) == []
    trials = json.loads(json.dumps([trial_as_dict(trial) for trial in store.trials.get_all(study)]))
    for trial, expected in zip(trials, TRIALS, strict=True):
        assert {key: trial[key] for key in expected} == expected
    attempts = [attempt for trial in trials for attempt in trial["attempts"]]
    assert [{k: v for k, v in one.items() if k not in ("began", "ended")} for one in attempts] == ATTEMPTS

    worker = store.workers.add(study.study_id, device="cpu")
    for number, attempt in ((2, 2), (3, 1), (1, 2)):  # the one that ran out of memory comes last
        claim = store.trials.claim(study, worker)
        assert claim is not None
        assert (claim.number, claim.attempt) == (number, attempt)
        values = store.trials.suggest(claim, study.spec, attributes=lambda _: {"seed": 4})
        assert values == TRIALS[number]["params"]
        store.trials.report(claim, study.spec, epoch=2, metrics={"val_accuracy": 0.5}, value=0.5)
        store.trials.finish(claim, "complete", reason="")
    assert store.trials.counts(study.study_id) == {"complete": 4}
    assert store.trials.best(study, 1) == [(0, 0.75)]
    assert store.problems(study) == []
