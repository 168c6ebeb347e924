"""Processes: which count as running, also where this user may not look at them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import psutil
import pytest

from hpo.system.processes import is_running, process_start_s


@pytest.mark.parametrize(
    ("error_of_signal", "is_alive"), [(PermissionError, True), (ProcessLookupError, False), (None, True)]
)
def test_where_proc_hides_a_process_a_signal_tells_whether_it_runs(
    monkeypatch: pytest.MonkeyPatch, error_of_signal: type[OSError] | None, is_alive: bool
) -> None:
    """As another user sees it where /proc is mounted with `hidepid`."""

    def hide(pid: int) -> Any:
        raise psutil.NoSuchProcess(pid)

    def send(_pid: int, _signal: int) -> None:
        if error_of_signal is not None:
            raise error_of_signal

    monkeypatch.setattr(psutil, "Process", hide)
    monkeypatch.setattr(os, "kill", send)
    assert is_running(4321, started=1.0) == is_alive


def test_a_process_that_may_not_be_looked_at_counts_as_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_process: psutil.Process) -> float:
        raise psutil.AccessDenied

    started = process_start_s()
    monkeypatch.setattr(psutil.Process, "create_time", refuse)
    assert is_running(os.getpid(), started=started)


def test_a_process_that_has_ended_does_not_run_even_before_its_parent_has_seen_that() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time() - psutil.boot_time()
    assert is_running(process.pid, started=started)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(process.pid, started=started)
    process.communicate()
    assert not is_running(process.pid, started=started)
