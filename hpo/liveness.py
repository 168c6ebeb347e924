"""Whether the process behind a worker still runs, told from its machine, its pid and when that pid was started."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil


def machine() -> str:
    """Which process table a pid belongs to: the boot of a machine and, in containers, the namespace of its pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def process_started() -> float:
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
