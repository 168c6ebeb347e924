"""A study is written to loggers from its store, once or for as long as it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hpo.api import logging, running
from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped, UserError
from hpo.loggers.runs import Run
from hpo.loggers.table import LOGGERS
from hpo.store.store import Store
from hpo.workers.executors import InProcess

LOOP = """
def train(trial):
    for epoch in range(1, 3):
        trial.report(epoch, val_accuracy=0.3 * epoch)
"""


class Memory:
    """A logger that keeps the digest of each run."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def write(self, runs: Sequence[Run]) -> int:
        new = [run for run in runs if self.digests.get(run.name) != run.digest]
        self.digests |= {run.name: run.digest for run in new}
        return len(new)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory()
    monkeypatch.setitem(LOGGERS, "memory", lambda target: found)
    return found


def test_a_study_is_followed_until_it_has_ended_and_then_has_nothing_new(
    tmp_path: Path, make_spec: Callable[..., StudySpec], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    url, spec, said = f"sqlite:///{tmp_path}/hpo.db", make_spec(0.1, 0.2, epochs=2), list[str]()
    Store(url, create=True).studies.create(spec, metadata={})

    def train(seconds: float) -> None:
        assert not memory.digests
        running.run(spec, storage=url, executor=InProcess("cpu"), code_folder=tmp_path)

    monkeypatch.setattr("hpo.api.logging.time.sleep", train)
    logging.log("s", ["memory"], storage=url, follow=True, say=said.append)
    assert memory.digests.keys() == {"trial-0", "trial-1", "answer"}
    logging.log("s", ["memory"], storage=url, follow=True, say=said.append)
    assert said == [
        "memory: 0 runs, 0 new or changed",
        "memory: 3 runs, 3 new or changed",
        "memory: 3 runs, 0 new or changed",
    ]


def test_a_logger_that_does_not_answer_is_one_sentence(
    url: str, make_spec: Callable[..., StudySpec], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(url, create=True).studies.create(make_spec(0.1), metadata={})

    def refuse(runs: Sequence[Run]) -> int:
        raise ConnectionError("no route to host\nand a traceback")

    monkeypatch.setattr(memory, "write", refuse)
    with pytest.raises(StudyStopped, match=r"^--to memory=x cannot be written: ConnectionError: no route to host$"):
        logging.log("s", ["memory=x"], storage=url)
    with pytest.raises(UserError, match="no study 'other'"):
        logging.log("other", ["memory"], storage=url)
