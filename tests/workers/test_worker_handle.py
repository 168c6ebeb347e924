"""A worker's process as its supervisor sees it: its task, and what its end says of its trials."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpo.system.devices import Device, torch_device
from hpo.train.imports import ImportAllowlist
from hpo.workers.worker_handle import EXIT_RESTART, WorkerProcess, WorkerTask, cause_of_death, describe_exit_code
from tests.workers.sick_gpu import needs_no_gpu, tells_why


def test_a_worker_is_given_its_task_whole() -> None:
    allowed = ImportAllowlist(("loop",), ("/studies",), ("net:build",), ("/studies", "/here"))
    task = WorkerTask(
        "sqlite:///hpo.db", "s", "cuda:1", "cuda:0", 3, allowed, "node-1", outlives=False, precisions=("auto", "fp32")
    )
    assert WorkerTask.from_json(task.to_json()) == task


def early(tmp_path: Path, device: Device, *precisions: str) -> WorkerProcess:
    """Start a worker early, for a store that is not there."""
    allowed = ImportAllowlist()
    url = f"sqlite:///{tmp_path}/absent\x1b.db"
    task = WorkerTask(url, "s", device.name, torch_device(device), 1, allowed, precisions=precisions)
    worker = WorkerProcess(task, device)
    worker.start_early()
    return worker


CPU = Device("cpu", "cpu", "a CPU", None)
SICK = Device("cuda:0", "cuda", "NVIDIA H100", None, uuid="GPU-aaaa0000")


def test_a_worker_that_was_started_early_waits_until_it_is_told_to_begin_and_then_writes_to_its_log(
    tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    worker = early(tmp_path, CPU, "fp32")
    assert worker.problem() is None
    assert not worker.is_running()
    log = tmp_path / "worker.log"
    assert worker.begin(log)
    assert not worker.begin(log)  # it has begun
    wait_for(lambda: not worker.is_running())
    assert worker.exit_code == 1
    assert "absent\\x1b.db; `hpo run` makes one" in log.read_text()


@pytest.mark.parametrize("precisions", [(), ("fp32",)], ids=["own loop", "engine"])
def test_a_worker_that_was_started_early_for_nothing_is_dismissed(tmp_path: Path, precisions: tuple[str, ...]) -> None:
    worker = early(tmp_path, CPU, *precisions)
    assert worker.pid is not None
    worker.dismiss()
    assert not psutil.pid_exists(worker.pid)
    assert not worker.begin(tmp_path / "worker.log")
    worker.dismiss()


def test_a_worker_that_was_started_early_ends_with_its_supervisor(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    worker = early(tmp_path, CPU)
    process = worker._popen
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=500) == 0
    worker.dismiss()


def test_a_worker_that_loads_torch_and_is_asked_to_leave_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any]
) -> None:
    (tmp_path / "torch.py").write_text(
        "import pathlib, time\n(pathlib.Path(__file__).parent / 'loads').touch()\ntime.sleep(10_000)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = early(tmp_path, CPU, "fp32")
    wait_for((tmp_path / "loads").exists)
    assert worker.begin(tmp_path / "worker.log")
    worker.ask_to_leave()
    try:
        wait_for(lambda: not worker.is_running())
    finally:
        worker.kill()
    assert worker.exit_code == -signal.SIGTERM


@needs_no_gpu
def test_a_worker_that_was_started_early_says_that_its_device_cannot_be_used(tmp_path: Path) -> None:
    worker = early(tmp_path, SICK, "fp32")
    problem = worker.problem()
    assert problem is not None
    assert tells_why(problem)
    worker.dismiss()


@pytest.mark.slow
@needs_no_gpu
def test_a_worker_that_was_told_to_begin_before_its_device_failed_ends_as_one_whose_device_fails_later(
    tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    worker = early(tmp_path, SICK, "fp32")
    assert worker.begin(tmp_path / "worker.log")
    wait_for(lambda: not worker.is_running())
    assert worker.exit_code == EXIT_RESTART


def test_a_log_may_have_any_name_that_a_file_may_have(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    worker = early(tmp_path, CPU)
    log = tmp_path / os.fsdecode(b"worker \xff.log")
    assert worker.begin(log)
    wait_for(lambda: not worker.is_running())
    assert "absent\\x1b.db" in log.read_text(), "a log obeys no text, also in a traceback"


def test_a_worker_that_hangs_before_it_begins_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(10_000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("hpo.workers.worker_handle.PROOF_S", 0.2)
    worker = early(tmp_path, CPU, "fp32")
    assert worker.problem() == "it computed nothing in 0.2 s"
    worker.dismiss()


@pytest.mark.parametrize(
    ("exit_code", "cause"),
    [
        (None, "gone"),
        (EXIT_RESTART, "gone"),
        (-signal.SIGTERM, "killed"),
        (-signal.SIGKILL, "killed"),
        (-signal.SIGSEGV, "crashed"),
        (1, "crashed"),
    ],
)
def test_only_an_end_that_nobody_asked_for_counts_against_the_trials(exit_code: int | None, cause: str) -> None:
    assert cause_of_death(exit_code) == cause


def test_an_end_is_described_by_its_signal_or_its_exit_code() -> None:
    assert describe_exit_code(-signal.SIGKILL) == "by SIGKILL"
    assert describe_exit_code(3) == "with exit code 3"
