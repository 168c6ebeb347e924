"""What the public functions that train ask of their executor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.api import reading, running
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.workers.executors import Executor, InProcess, Local, Ray

MakeSpec = Callable[..., StudySpec]

LOOP = """
def train(trial):
    for epoch in range(1, trial.epochs + 1):
        if trial.report(epoch, val_accuracy=trial.params["lr"]):
            return
"""


def test_a_study_gets_the_same_answer_from_every_executor_of_this_machine(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    answers = []
    for executor in (None, Local("cpu", workers=2), InProcess("cpu")):
        storage = f"sqlite:///{tmp_path}/{type(executor).__name__}.db"
        result = running.run(make_spec(0.1, 0.2), executor=executor, storage=storage, code_folder=tmp_path)
        answers.append((result.best.params, [(trial.state, trial.value) for trial in result.trials]))
    assert answers == [({"lr": 0.2}, [("complete", 0.1), ("complete", 0.2)])] * 3


@pytest.mark.parametrize("executor", [Local(), InProcess(), Ray("ray")])
def test_a_study_is_not_left_to_what_ends_with_this_process(
    executor: Executor, make_spec: MakeSpec, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^--detach needs a Ray that outlives this command"):
        running.submit(make_spec(), executor=executor, storage=f"sqlite:///{tmp_path}/hpo.db")


def test_the_number_of_workers_is_checked_where_it_is_given() -> None:
    for make in (Local, Ray):
        with pytest.raises(UserError, match=r"^--workers must be at least 1, got 0$"):
            make(workers=0)


class NothingIsLeftError(Exception):
    """Ends `serve`, which would wait for ever."""


def test_a_store_is_served_study_by_study_and_what_cannot_be_trained_is_passed_over(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    storage = f"sqlite:///{tmp_path}/hpo.db"
    store = Store(storage, create=True)
    for name in ("early", "late"):
        store.studies.create(make_spec(0.1, name=name), metadata={})
    store.studies.create(make_spec(0.1, name="foreign", objective={"function": "elsewhere:train"}), metadata={})
    messages: list[str] = []

    def say(message: str) -> None:
        messages.append(message)
        if message == "waiting for a study":
            raise NothingIsLeftError

    with pytest.raises(NothingIsLeftError):
        running.serve("late", executor=Local("cpu", workers=1), storage=storage, allow=["loop", str(tmp_path)], say=say)
    assert messages[:2] == ["study late is finished", "study early is finished"]
    assert messages[2].startswith("study foreign is passed over: ")
    assert "elsewhere" in messages[2]
    assert messages[3:] == ["waiting for a study"]
    assert [study["trials"] for study in reading.studies(storage=storage)] == [
        {"complete": 1},
        {"complete": 1},
        {"waiting": 1},
    ]
