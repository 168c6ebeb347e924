"""Whether the process behind a worker still runs, told from its machine, its pid and its start; signs of life."""

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
    """Which process table a pid belongs to: the boot of a machine and, in containers, the namespace of its pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def process_start_s() -> float:
    """When this process was started, which tells it from a later one of the same pid."""
    return _started(psutil.Process())


def is_running(pid: int, *, started: float) -> bool:
    """Whether the process that had this pid and start runs on this machine."""
    try:
        process = psutil.Process(pid)
        return abs(_started(process) - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _started(process: psutil.Process) -> float:
    """Seconds from the boot of the machine: a time of day would move when its clock is set."""
    boot_time = psutil.boot_time()
    return process.create_time() - boot_time


@contextmanager
def heartbeat(beat: Callable[[], None], *, every_s: float) -> Iterator[None]:
    """Calls `beat` every so many seconds from a thread, whatever it raises: a dead thread would lose the leases."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            try:
                beat()
            except Exception:  # the database may be back at the next beat
                logger.exception("the leases could not be renewed")

    thread = threading.Thread(target=run, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
