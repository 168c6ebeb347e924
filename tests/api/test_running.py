"""What the public functions that train ask of their executor."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.api import reading, running
from hpo.config.study_spec import StudySpec
from hpo.display.console import make_console
from hpo.display.terminal import LiveDisplay
from hpo.errors import StudyStopped, UserError
from hpo.objective import Trial
from hpo.store.schema import slots_table, studies_table
from hpo.store.store import Store
from hpo.workers.executors import Executor, InProcess, Local, Ray, choose_executor
from hpo.workers.worker_handle import WorkerProcess

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
    for executor in (Local("cpu", workers=2), InProcess("cpu")):
        storage = f"sqlite:///{tmp_path}/{type(executor).__name__}.db"
        result = running.run(make_spec(0.1, 0.2), executor=executor, storage=storage, code_folder=tmp_path)
        answers.append((result.best.params, [(trial.state, trial.value) for trial in result.trials]))
    assert answers == [({"lr": 0.2}, [("complete", 0.1), ("complete", 0.2)])] * 2


def test_a_study_begins_anew_once_the_mended_code_is_checked(
    make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in (("loop", f"import values\n{LOOP}"), ("values", "FACTOR = 1"), ("other", "")):
        (tmp_path / f"{name}.py").write_text(text)
    storage = f"sqlite:///{tmp_path}/hpo.db"

    def run(*, fresh: bool = False) -> list[float | None]:
        caplog.clear()
        executor, spec = InProcess("cpu"), make_spec(0.1, 0.2)
        result = running.run(spec, executor=executor, storage=storage, code_folder=tmp_path, fresh=fresh)
        return [trial.value for trial in result.trials]

    assert run(fresh=True) == run() == [0.1, 0.2]
    (tmp_path / "other.py").write_text("# another study's")
    assert (run(), caplog.messages) == ([0.1, 0.2], [])
    # Of another length than before: within a second Python takes a source of the same length for the same one.
    (tmp_path / "values.py").write_text("FACTOR = (  # mended below")
    with pytest.raises(UserError, match="cannot be imported"):
        run(fresh=True)
    assert run() == [0.1, 0.2], "nothing was deleted"
    (tmp_path / "values.py").write_text("FACTOR = 2.0")
    (tmp_path / "loop.py").write_text("import values\n" + LOOP.replace('["lr"]', '["lr"] * values.FACTOR'))
    assert run() == [0.1, 0.2]
    (message,) = caplog.messages
    assert message.startswith("loop.py and values.py have changed since study s began; ")
    assert (run(fresh=True), caplog.messages) == ([0.2, 0.4], [])


def test_the_short_forms_of_an_executor_are_read() -> None:
    assert choose_executor(None, devices=None, workers=None, in_process=False) == Local()
    assert choose_executor(None, devices="cpu", workers=2, in_process=False) == Local("cpu", workers=2)
    assert choose_executor(None, devices="cpu", workers=None, in_process=True) == InProcess("cpu")
    for executor, workers in ((Local(), 2), (None, 2)):
        with pytest.raises(UserError, match=r"cannot be (used|combined) with"):
            choose_executor(executor, devices=None, workers=workers, in_process=True)


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


def test_a_function_that_workers_cannot_import_trains_in_this_process_alone(tmp_path: Path) -> None:
    def train(trial: Trial) -> None:
        trial.report(1, val_accuracy=trial.params["lr"])

    storage = f"sqlite:///{tmp_path}/hpo.db"
    study = {
        "name": "s",
        "search": {"sampler": "grid", "space": {"lr": [0.1, 0.2]}},
        "training": {"epochs": 1},
        "objective": {"function": train},
    }
    expected = r"^objective\.function is a function that worker processes cannot import .* executor=hpo\.InProcess\(\)$"
    for executor in (Local("cpu"), Ray("ray")):
        with pytest.raises(UserError, match=expected):
            running.run(study, executor=executor, storage=storage)
    assert not (tmp_path / "hpo.db").exists()
    result = running.run(study, executor=InProcess("cpu"), storage=storage)
    assert result.best.value == 0.2
    with pytest.raises(UserError, match=r"only the process that created the study has: call hpo\.run there again"):
        running.resume("s", storage=storage, trials=3, allow=["__main__"])


class NothingIsLeftError(Exception):
    """Ends `serve`, which would wait for ever."""


def test_a_race_whose_trials_wait_for_one_in_training_is_no_work(make_spec: MakeSpec, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/hpo.db"
    store = Store(storage, create=True)
    search = {"sampler": "race", "space": {"lr": {"low": 0.1, "high": 1.0}}}
    study = store.studies.create(make_spec(search=search, epochs=5), metadata={})
    worker = store.workers.add(study.study_id, device="cpu")
    for claim in [store.trials.claim(study, worker) for _ in range(5)][1:]:
        assert claim is not None
        store.trials.report(claim, study.spec, epoch=1, metrics={}, value=0.5)
        store.trials.release(claim)

    def say(message: str) -> None:
        assert message == "waiting for a study"
        raise NothingIsLeftError

    with pytest.raises(NothingIsLeftError):
        running.serve(executor=Local("cpu", workers=1), storage=storage, say=say)


def test_a_store_is_served_study_by_study_and_what_cannot_be_trained_is_passed_over(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    storage = f"sqlite:///{tmp_path}/hpo.db"
    store = Store(storage, create=True)
    for name in ("early", "late"):
        store.studies.create(make_spec(0.1, name=name), metadata={})
    store.studies.create(make_spec(0.1, name="foreign", objective={"function": "elsewhere:train"}), metadata={})
    for table, damage in ((studies_table, {"spec": "[" * 100_000}), (slots_table, {"state": "bogus"})):
        study = store.studies.create(make_spec(0.1, name=f"damaged-{table.name}"), metadata={})
        with store.storage.engine.begin() as connection:
            connection.execute(table.update().where(table.c.study_id == study.study_id).values(damage))
    messages: list[str] = []

    def say(message: str) -> None:
        messages.append(message)
        if message == "waiting for a study":
            raise NothingIsLeftError

    with pytest.raises(NothingIsLeftError):
        running.serve("late", executor=Local("cpu", workers=1), storage=storage, allow=["loop", str(tmp_path)], say=say)
    assert "spec must be a JSON object" in messages[0]
    assert messages[1:3] == ["study late is finished", "study early is finished"]
    assert messages[3].startswith("study foreign is skipped: ")
    assert "elsewhere" in messages[3]
    assert messages[4].startswith("study damaged-hpo_slots is skipped: ")
    assert "state must be one of waiting" in messages[4]
    assert messages[5:] == ["waiting for a study"]
    *sound, unreadable, unknown = reading.studies(storage=storage)
    assert [study["trials"] for study in sound] == [{"complete": 1}, {"complete": 1}, {"waiting": 1}]
    assert "spec must be" in unreadable["damaged"]
    assert "state must be" in unknown["damaged"]


WRONG_ARGUMENTS: list[tuple[Callable[..., Executor], dict[str, Any], str]] = [
    (Local, {"workers": "2"}, "--workers must be an integer, got '2'"),
    (Local, {"workers": 1.5}, "--workers must be an integer, got 1.5"),
    (Local, {"devices": None}, "--devices must be a text such as 'cpu' or 'cuda:0,cuda:1', got None"),
    (InProcess, {"devices": ["cpu"]}, "--devices must be a text such as 'cpu' or 'cuda:0,cuda:1', got ['cpu']"),
    (Ray, {"address": None}, "--on must be ray, auto or ray://HOST:PORT, got None"),
    (Ray, {"devices": 0}, "--devices must be a text such as 'cpu' or 'cuda:0,cuda:1', got 0"),
    (Ray, {"resources": ["num_cpus=2"]}, "--resource must give an amount to each name, got ['num_cpus=2']"),
    (Ray, {"resources": {"memory": "2"}}, "--resource memory must be a number, got '2'"),
]


@pytest.mark.parametrize(("executor", "arguments", "message"), WRONG_ARGUMENTS)
def test_arguments_of_the_wrong_type_are_one_sentence(
    executor: Callable[..., Executor], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        executor(**arguments)


@pytest.mark.parametrize("executor", ["cpu", Local])
def test_what_is_no_executor_is_refused(executor: Any, make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^executor must be an hpo\.Local\(\), hpo\.InProcess\(\) or hpo\.Ray\(\), got"
    ):
        running.run(make_spec(0.1), executor=executor, storage=f"sqlite:///{tmp_path}/hpo.db", code_folder=tmp_path)
    assert not (tmp_path / "hpo.db").exists()


def test_a_check_starts_no_worker(make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `[[compare]]` checks each of its studies before the first one trains."""
    (tmp_path / "loop.py").write_text(LOOP)
    started: list[object] = []
    monkeypatch.setattr(WorkerProcess, "start_early", started.append)
    running.check(make_spec(0.1), executor=Local("cpu"), storage=f"sqlite:///{tmp_path}/hpo.db", code_folder=tmp_path)
    assert started == []


def test_two_projects_in_one_process_are_trained_each_with_its_own_module(tmp_path: Path) -> None:
    values = []
    for folder, value in (("a", 0.1), ("b", 0.7)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "loop.py").write_text(f"def train(trial):\n    trial.report(1, val_accuracy={value})\n")
        (tmp_path / folder / "study.toml").write_text(
            f'name = "{folder}"\nsearch.sampler = "grid"\nsearch.space.lr = [0.1]\ntraining.epochs = 1\n'
            'objective.function = "loop:train"\n'
        )
        storage = f"sqlite:///{tmp_path}/hpo.db"
        result = running.run(tmp_path / folder / "study.toml", executor=InProcess("cpu"), storage=storage)
        values.append(result.best.value)
    assert values == [0.1, 0.7]


def test_a_study_that_is_deleted_while_it_trains_ends_with_a_sentence(make_spec: MakeSpec, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/hpo.db"
    (tmp_path / "loop.py").write_text(
        f"import optuna\ndef train(trial):\n    trial.report(1, val_accuracy=0.5)\n"
        f"    optuna.delete_study(study_name='s', storage={storage!r})\n    trial.report(2, val_accuracy=0.5)\n"
    )
    with LiveDisplay(make_console()) as display, pytest.raises(StudyStopped, match="study 's' was deleted"):
        running.run(
            make_spec(0.1, 0.2),
            executor=InProcess("cpu"),
            storage=storage,
            code_folder=tmp_path,
            watcher=display.watch,
        )
