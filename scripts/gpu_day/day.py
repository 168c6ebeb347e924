"""The day: sections in the order of their worth, each a process with a time limit, within one budget.

A crash, a hang or a device that no longer answers costs its section alone. This process imports no torch, so nothing
that a section meets can stop it; the table is made of what is on disk, also after SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpo.system.devices import STREAMS_ENVIRONMENT
from scripts.gpu_day.figures import BEGAN, LONGEST_TEXT, Figures
from scripts.gpu_day.table import write_table

SCRIPT = Path(__file__).resolve().parent
BUDGET_S = 470.0
LEAST_S = 5.0  # that a section is worth starting for
# Each section and the seconds that it may take. What earlier ones leave over is for the later ones, too.
SECTIONS = {
    "facts": 22,
    "proof": 12,
    "waits": 16,
    "plain": 16,
    "captured": 40,
    "rates": 70,
    "article": 40,
    "processes": 45,
    "resume": 22,
    "probe": 22,
    "memory": 35,
    "product": 30,
    "checkpoints": 14,
    "pinning": 16,
    "convolutions": 24,
    "profile": 16,
    "queues": 30,
}
OUT_OF_TIME = "out of time"


@dataclass(frozen=True, kw_only=True)
class Day:
    """How a day is to be run."""

    folder: Path
    sections: Sequence[str]
    is_tiny: bool = False
    packages: Path | None = None
    budget_s: float = BUDGET_S
    limits: dict[str, int] | None = None  # of the sections, in seconds; None: SECTIONS


def run_day(day: Day) -> None:
    """Run the sections one after another; print the table at the end, however it comes."""
    day.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _run_sections(day)
    finally:
        print("\n" + write_table(day.folder), flush=True)


def _run_sections(day: Day) -> None:
    own_figures = Figures(day.folder, "day")
    limits = day.limits or SECTIONS
    deadline = time.monotonic() + day.budget_s
    for index, name in enumerate(day.sections):
        left_s = deadline - time.monotonic()
        if left_s < LEAST_S:
            own_figures.say(name, {"code": "no time was left"})
            continue
        later_s = sum(limits[later] for later in day.sections[index + 1 :])
        limit_s = min(left_s, max(limits[name], left_s - later_s))
        start_s = time.monotonic()
        log = day.folder / f"{name}.log"
        code = _run_section(day, name, log=log, limit_s=limit_s)
        own_figures.say(name, {"code": code, "seconds": round(time.monotonic() - start_s, 1)})
        if code != 0:
            own_figures.say(f"{name}.end", log.read_text(errors="replace")[-LONGEST_TEXT:])


def _run_section(day: Day, name: str, *, log: Path, limit_s: float) -> int | str:
    """Run a section in a process group of its own; return its exit code, negative for a signal, or OUT_OF_TIME."""
    Figures(day.folder, name).say(BEGAN, time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    command = [sys.executable, str(SCRIPT), "--out", str(day.folder), "--section", name]
    command += ["--started-at", str(time.time()), "--budget", f"{limit_s:.1f}"]
    if day.is_tiny:
        command += ["--tiny"]
    if day.packages is not None:
        command += ["--packages", str(day.packages)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**STREAMS_ENVIRONMENT, **os.environ},  # as a worker has it
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a section: itself, and the processes that it started."""
    with suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
