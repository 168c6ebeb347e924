"""Processes: whether the one behind a worker still runs, by its machine, its pid and its start; and heartbeats."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)


def machine_id() -> str:
    """Return an id of the process table that pids belong to: a machine's boot and, in containers, its pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def process_start_s() -> float:
    """Return when this process started, in seconds from the boot; a later process with its pid has another start."""
    return _start_s(psutil.Process())


def is_running(pid: int, *, started: float) -> bool:
    """Return whether the process with this pid and this start, in seconds from the boot, runs on this machine.

    A process that may not be looked at counts as running: where /proc hides the processes of other users (`hidepid`),
    only a signal tells whether there is one. Its lease tells the rest.
    """
    try:
        process = psutil.Process(pid)
        return abs(_start_s(process) - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except psutil.ZombieProcess:
        return False
    except psutil.NoSuchProcess:
        return _is_hidden(pid)


def _is_hidden(pid: int) -> bool:
    """Return whether there is a process with this pid, which /proc does not show to this user."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _start_s(process: psutil.Process) -> float:
    """Return the start in seconds from the boot of the machine: a time of day would move when its clock is set."""
    boot_time = psutil.boot_time()
    return process.create_time() - boot_time


@contextmanager
def heartbeat(beat: Callable[[], None], *, every_s: float) -> Iterator[None]:
    """Call `beat` every so many seconds from a thread, whatever it raises: a dead thread would lose the leases."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            try:
                beat()
            except Exception:  # the database may answer again at the next beat
                logger.exception("the leases could not be renewed")

    thread = threading.Thread(target=run, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
