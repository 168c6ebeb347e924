"""Fixtures for the tests of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.api import running
from hpo.config.study_spec import StudySpec
from hpo.reports.study_report import StudyReport
from hpo.store.store import Store
from hpo.workers.executors import InProcess
from scripts.bench.report import make_study as make_large
from tests.reports.examples import reported

LOOP = """
def train(trial):
    for epoch in range(1, trial.epochs + 1):
        if trial.report(epoch, val_accuracy=1 - abs(trial.params["lr"] - 0.3) - 0.1 / epoch, train_loss=1 / epoch):
            return
"""


@pytest.fixture(scope="session")
def small() -> StudyReport:
    return reported(*make_large(60, 10))


@pytest.fixture
def trained(tmp_path: Path, make_spec: Callable[..., StudySpec]) -> Store:
    """Return a store with a study that has run, of seven learning rates."""
    (tmp_path / "loop.py").write_text(LOOP)
    url = f"sqlite:///{tmp_path}/hpo.db"
    spec = make_spec(*(lr / 10 for lr in range(1, 8)))
    running.run(spec, storage=url, executor=InProcess("cpu"), code_folder=tmp_path)
    return Store(url)
