"""A worker's process as its supervisor sees it: given a task, started, watched, asked to leave and killed."""

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

TASK_VARIABLE = "HPO_WORKER"  # environment variable with the WorkerTask; anyone could read it on the command line
LEAVE = b"\n"  # on the worker's standard input: leave. The end of that input means that the supervisor is no more.
DRAIN_S = 30.0  # how long a user's loop may take to reach its next report before it is left in the middle of its epoch
EXIT_RESTART = 75  # exit code where a new process may have work left to do (EX_TEMPFAIL)
EXIT_NO_DEVICE = 69  # exit code where no new process should be started on the same device (EX_UNAVAILABLE)


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
    # Whether it may end its epoch after its supervisor has died. It may not where others are given its device then.
    outlives: bool = True

    def to_json(self) -> str:
        """Return the task as JSON, for the environment of the worker."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerTask:
        """Return the task that `to_json` has written."""
        values = json.loads(text)
        modules, folders = (tuple(values["allowed"][key]) for key in ("modules", "folders"))
        return cls(**{**values, "allowed": ImportAllowlist(modules, folders)})


class WorkerProcess:
    """One worker process at a time, in a session of its own, which can be started again.

    `exit_code` is None while it runs, and as subprocess has it once `is_running` has seen that it ended. `folder` is
    the directory that it works in.
    """

    def __init__(
        self, task: WorkerTask, device: Device, *, environment: Mapping[str, str] = {}, folder: Path | None = None
    ) -> None:
        self.exit_code: int | None = None
        self._folder = folder
        self._popen: subprocess.Popen[bytes] | None = None
        python_path = [*task.allowed.python_path(), os.environ.get("PYTHONPATH")]
        self._environment = {
            **os.environ,
            **environment,
            **worker_environment(device, threads=task.threads),
            TASK_VARIABLE: task.to_json(),
            "PYTHONSAFEPATH": "1",  # or the working directory would come before the folders that are allowed
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        }

    def start(self, *, output: IO[bytes] | int) -> None:
        """Start a process, with standard output and error going to `output`, as subprocess takes it."""
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
        """The pid of the process that runs, or else of the last one."""
        return None if self._popen is None else self._popen.pid

    @property
    def output(self) -> IO[bytes] | None:
        """What the process writes, where it was started with a pipe."""
        return None if self._popen is None else self._popen.stdout

    def is_running(self) -> bool:
        """Return whether the process runs; once it has ended, kill what the user's code has started there."""
        return self._running() is not None

    def ask_to_leave(self) -> None:
        """Have the process save and release its trials and end."""
        if (process := self._running()) is None:
            return
        with suppress(OSError):  # it has just ended
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.write(LEAVE)
                process.stdin.close()
        process.terminate()

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        if (process := self._running()) is not None:
            process.kill()
            process.wait()

    def _running(self) -> subprocess.Popen[bytes] | None:
        process = self._popen
        if process is None or self.exit_code is not None:
            return None
        self.exit_code = process.poll()
        if self.exit_code is None:
            return process
        if process.stdin is not None:
            process.stdin.close()
        with suppress(ProcessLookupError):  # nothing that the user's code has started there may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        return None


def cause_of_death(exit_code: int | None) -> Cause:
    """Return what an exit code says of the trials that the process held; None where nobody saw it end."""
    if exit_code in (None, EXIT_RESTART, EXIT_NO_DEVICE, -signal.SIGTERM):
        return "gone"
    return "killed" if exit_code == -signal.SIGKILL else "crashed"


def describe_exit_code(exit_code: int) -> str:
    """Return how a process ended, in words."""
    return f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit code {exit_code}"
