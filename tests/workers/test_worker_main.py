"""A worker's process: what it is told, and what the user's code may not do to it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.system.devices import Device
from hpo.train.imports import ImportAllowlist
from hpo.workers import worker_main
from hpo.workers.worker_handle import EXIT_RESTART, WorkerProcess, WorkerTask

if TYPE_CHECKING:
    from tests.conftest import Hpo

MakeSpec = Callable[..., StudySpec]

MISCHIEF = """
import os, signal, sys

def train(trial):
    trial.report(1, val_accuracy=0.5)
    match trial.number:
        case 0:
            input()
        case 1:
            breakpoint()
        case 2:
            os.kill(os.getpid(), signal.SIGTERM)
        case 3:
            sys.stdout.close()
            os.close(1)
            trial.report(2, val_accuracy=0.6)
"""


def test_what_a_loop_does_to_its_worker_is_the_failure_of_its_trial(
    hpo: Hpo, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)  # 0 turns breakpoint() off, as its user wants it
    hpo.write(make_spec(0.1, 0.2, 0.3, 0.4, epochs=2, search={"retries": 0}), MISCHIEF)
    exit_code, output = hpo.run("run", "study.toml", "--devices", "cpu")
    assert exit_code == 0, output
    store = Store(hpo.url)
    *failed, fine = store.trials.get_all(store.studies.get("s"))
    assert [(trial.state, trial.attempt) for trial in failed] == [("failed", 1)] * 3
    assert [str(trial.reason).partition(":")[0] for trial in failed] == ["EOFError", "UserError", "UserError"]
    for trial, words in zip(failed, ("no standard input", "the debugger", "sends SIGTERM to its own"), strict=True):
        assert words in str(trial.reason)
    assert (fine.state, fine.attempt) == ("complete", 1)


def test_only_signals_that_would_end_or_stop_this_process_are_refused() -> None:
    pid = os.getpid()
    for event, target in (("os.kill", pid), ("os.kill", 0), ("os.kill", -pid), ("os.killpg", pid)):
        with pytest.raises(UserError, match=r"^the training code sends SIGTERM to its own worker process"):
            worker_main._refuse_signals_to_itself(pid, event, (target, signal.SIGTERM))
    worker_main._refuse_signals_to_itself(pid, "os.kill", (pid, 0))
    worker_main._refuse_signals_to_itself(pid, "os.kill", (pid, signal.SIGUSR1))
    worker_main._refuse_signals_to_itself(pid, "os.kill", (pid + 1, signal.SIGTERM))
    worker_main._refuse_signals_to_itself(pid, "open", ("file", "r", 0))
    worker_main._refuse_signals_to_itself(pid + 1, "os.kill", (pid, signal.SIGTERM))  # a process that it has forked


def test_a_signal_is_from_elsewhere_where_no_word_of_the_supervisor_comes_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_main, "SUPERVISOR_S", 0.01)
    stop = worker_main.StopRequest()
    assert (stop.is_set(), stop.is_from_elsewhere()) == (False, False)
    stop.by_signal.set()
    assert (stop.is_set(), stop.is_from_elsewhere()) == (True, True)
    stop.by_supervisor.set()
    assert (stop.is_set(), stop.is_from_elsewhere()) == (True, False)


def test_a_worker_whose_database_is_silent_ends_with_its_supervisor(
    tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://hpo@127.0.0.1:{silent.getsockname()[1]}/hpo"
        task = WorkerTask(url, "s", "cpu", "cpu", 1, ImportAllowlist((), ()))
        worker = WorkerProcess(task, Device("cpu", "cpu", "a CPU", None))
        with (tmp_path / "log").open("wb") as log:
            worker.start(output=log)
        connection, _ = silent.accept()
        process = worker._popen
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        try:
            wait_for(lambda: not worker.is_running())
        finally:
            worker.kill()
            connection.close()
    assert worker.exit_code == EXIT_RESTART, (tmp_path / "log").read_text()
