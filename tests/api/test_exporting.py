"""What is exported is what the answer recommends, whether a trial has had it or not, or the trial that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.api import exporting, reading, running
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.workers.executors import InProcess

LOOP = """
def train(trial):
    trial.report(1, val_accuracy=0.9 - 2 * (trial.params["lr"] - 0.35) ** 2)
"""


@pytest.fixture
def storage(tmp_path: Path, make_spec: Callable[..., StudySpec]) -> str:
    """Return a store with a study whose best rate lies between two that were trained."""
    (tmp_path / "loop.py").write_text(LOOP)
    url = f"sqlite:///{tmp_path}/hpo.db"
    spec = make_spec(0.13, 0.22, 0.28, 0.42, 0.51, 0.63, 0.74, epochs=1)
    running.run(spec, storage=url, executor=InProcess("cpu"), code_folder=tmp_path)
    return url


def test_the_export_trains_the_recommended_rate_or_the_trial_that_is_asked_for(storage: str, tmp_path: Path) -> None:
    answer = reading.best("s", storage=storage)
    trials = reading.trials("s", storage=storage)
    assert answer.lr not in [trial["params"]["lr"] for trial in trials]
    assert 0.28 < float(answer.lr or 0) < 0.42
    spec = StudySpec.from_dict(exporting.export("s", storage=storage))
    assert (spec.name, spec.search.space) == ("s-best", {"lr": [answer.lr], "seed": [trials[answer.trial]["seed"]]})
    spec = StudySpec.from_dict(exporting.export("s", trial=1, storage=storage))
    assert (spec.name, spec.search.space) == ("s-trial-1", {"lr": [0.22], "seed": [trials[1]["seed"]]})
    path = tmp_path / "best.json"
    path.write_text("{'what': 'The best trial of study s'}")  # by an older version
    exporting.write_export("s", path, storage=storage)
    exporting.write_export("s", path, storage=storage)
    written = json.loads(path.read_text())
    assert written["spec"]["search"]["space"]["lr"] == [written["lr"]] == [written["recommended"]["lr"]] == [answer.lr]
    assert written["best_trial"] == {"number": answer.trial, "params": answer.params, "value": answer.value}


def test_a_trial_that_is_not_there_is_one_message(storage: str) -> None:
    with pytest.raises(UserError, match="--trial must be the number of a trial of the study, 0 to 6, got 7"):
        exporting.export("s", trial=7, storage=storage)
