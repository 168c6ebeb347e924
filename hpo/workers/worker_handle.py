"""The process of a worker as its supervisor sees it: what it is told, started, watched, asked to leave, killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from hpo.config.import_policy import ImportAllowlist
from hpo.study.processes import Cause
from hpo.system.devices import Device, worker_environment

TASK_VARIABLE = "HPO_WORKER"  # environment variable with the Assignment; not on the command line, where anyone reads it
LEAVE = b"\n"  # on its standard input: leave; the end of that means that its supervisor is no more
DRAIN_S = 30.0  # how long a loop of the user's may take to come to its next report before it is left in its epoch
EXIT_RESTART = 75  # there may be work left that a new process can go on with (EX_TEMPFAIL)


@dataclasses.dataclass(frozen=True)
class WorkerTask:
    """What a worker process is started with."""

    storage: str
    study: str
    device: str  # as users name it, and as it is recorded
    torch_device: str  # as torch names it in the worker's process
    threads: int
    allowed: ImportAllowlist  # whose code it may import
    host: str | None = None  # as it is recorded; None: the machine's name
    outlives: bool = (
        True  # whether it may end its epoch when its supervisor dies, or its device is given to others then
    )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerTask:
        values = json.loads(text)
        modules, folders = (tuple(values["allowed"][key]) for key in ("modules", "folders"))
        return cls(**{**values, "allowed": ImportAllowlist(modules, folders)})


class WorkerProcess:
    """One worker process, in a session of its own, which can be started again.

    Its `exit_code` is None while it runs, and as subprocess has it afterwards.
    """

    def __init__(
        self, assignment: WorkerTask, device: Device, *, environment: Mapping[str, str] = {}, folder: Path | None = None
    ) -> None:
        self.exit_code: int | None = None
        self._folder = folder  # that it works in
        self._popen: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            **environment,
            **worker_environment(device, threads=assignment.threads),
            TASK_VARIABLE: assignment.to_json(),
            "PYTHONSAFEPATH": "1",  # or the working directory would come before the folders that are allowed
            "PYTHONPATH": os.pathsep.join(
                filter(None, [*assignment.allowed.python_path(), os.environ.get("PYTHONPATH")])
            ),
        }

    def start(self, *, output: IO[bytes] | int) -> None:
        """Starts it, with standard output and error where subprocess is told to."""
        self.exit_code = None
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "hpo.workers.worker_main"],
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int | None:
        """Of the process that runs, or of the last one."""
        return None if self._popen is None else self._popen.pid

    @property
    def output(self) -> IO[bytes] | None:
        """What it writes, where it was started with a pipe."""
        return self._started.stdout

    def is_running(self) -> bool:
        if self._popen is None or self.exit_code is not None:
            return False
        self.exit_code = self._popen.poll()
        if self.exit_code is not None:
            if self._popen.stdin is not None:
                self._popen.stdin.close()
            with suppress(ProcessLookupError):  # what the user's code has started there must not outlive it
                os.killpg(self._popen.pid, signal.SIGKILL)
        return self.exit_code is None

    def ask_to_leave(self) -> None:
        if self.is_running():
            stdin = self._started.stdin
            assert stdin is not None
            with suppress(OSError):  # it has just ended
                if not stdin.closed:
                    stdin.write(LEAVE)
                    stdin.close()
            self._started.terminate()

    def kill(self) -> None:
        if self.is_running():
            self._started.kill()
            self._started.wait()

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        assert self._popen is not None
        return self._popen


def cause_of_death(exit_code: int | None) -> Cause:
    """What an exit code says of the trials that its process had; None is a process that nobody saw end."""
    if exit_code in (None, EXIT_RESTART, -signal.SIGTERM):
        return "gone"
    return "killed" if exit_code == -signal.SIGKILL else "crashed"


def ending(exit_code: int) -> str:
    """How a process ended, in words."""
    return f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit code {exit_code}"
