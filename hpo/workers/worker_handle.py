"""A worker's process as its supervisor sees it: given a task, started, watched, asked to leave and killed."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from hpo.study.processes import Cause
from hpo.system.devices import Device, worker_environment
from hpo.system.safe_path import SAFE_PATH
from hpo.train.device_proof import PROOF_S
from hpo.train.imports import ImportAllowlist

TASK_VARIABLE = "HPO_WORKER"  # environment variable with the WorkerTask; anyone could read it on the command line
WAITING_VARIABLE = "HPO_WORKER_WAITS"  # with the number of the pipe into which it writes what it finds of its device
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
    precisions: tuple[str, ...] = ()  # that its device is proven in when it starts early; none: it needs no proof

    def to_json(self) -> str:
        """Return the task as JSON, for the environment of the worker."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerTask:
        """Return the task that `to_json` has written."""
        values = json.loads(text)
        allowed, precisions = ImportAllowlist.from_dict(values["allowed"]), tuple(values["precisions"])
        return cls(**{**values, "allowed": allowed, "precisions": precisions})


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
        self._proof: int | None = None  # the pipe of a process that was started early
        self._deadline_s = 0.0
        self._environment = {
            **os.environ,
            **environment,
            **worker_environment(device, threads=task.threads),
            TASK_VARIABLE: task.to_json(),
        }

    def start(self, *, output: IO[bytes] | int) -> None:
        """Start a process, with standard output and error going to `output`, as subprocess takes it."""
        self._start(output=output)

    def start_early(self) -> None:
        """Start a process that loads what training needs, proves its device, and waits for `begin`."""
        reading, writing = os.pipe()
        self._start(output=subprocess.DEVNULL, pass_fds=[writing], environment={WAITING_VARIABLE: str(writing)})
        os.close(writing)
        self._proof = reading
        self._deadline_s = time.monotonic() + PROOF_S

    def problem(self) -> str | None:
        """Wait for the proof of a process that was started early; return what is wrong with the device, or None.

        A process that died says nothing: whoever starts the next one will see why.
        """
        assert self._proof is not None
        found = b""
        while select.select([self._proof], [], [], max(0.0, self._deadline_s - time.monotonic()))[0]:
            if not (part := os.read(self._proof, 4096)):
                return found.decode(errors="replace") or None
            found += part
        return f"it computed nothing in {PROOF_S:g} s"

    def begin(self, log: Path) -> bool:
        """Have a process that was started early begin its task, and write to this log; return False without one."""
        if not self._close_proof() or (process := self._running()) is None or process.stdin is None:
            return False
        try:
            process.stdin.write(os.fsencode(log) + b"\n")
            process.stdin.flush()
        except OSError:  # it has just ended
            return False
        return True

    def dismiss(self) -> None:
        """End a process that was started early and has not begun."""
        if self._close_proof() and (process := self._running()) is not None:
            _kill(process)
            if process.stdin is not None:
                process.stdin.close()

    def _close_proof(self) -> bool:
        """Stop listening to a process that was started early; return False where none was that has not begun."""
        if self._proof is None:
            return False
        os.close(self._proof)
        self._proof = None
        return True

    def _start(
        self, *, output: IO[bytes] | int, pass_fds: Sequence[int] = (), environment: Mapping[str, str] = {}
    ) -> None:
        self.exit_code = None
        self._popen = subprocess.Popen(
            [sys.executable, *SAFE_PATH, "-m", "hpo.workers.worker_main"],
            env={**self._environment, **environment},
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
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
        """Return whether the process runs its task; once it has ended, kill what the user's code has started there."""
        return self._proof is None and self._running() is not None

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
        """Kill the process and wait a moment for its end."""
        if (process := self._running()) is not None:
            _kill(process)

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


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(subprocess.TimeoutExpired):  # a process that hangs in its driver does not end before the driver
        process.wait(1.0)


def cause_of_death(exit_code: int | None) -> Cause:
    """Return what an exit code says of the trials that the process held; None where nobody saw it end."""
    if exit_code in (None, EXIT_RESTART, EXIT_NO_DEVICE):
        return "gone"
    return "killed" if exit_code in (-signal.SIGKILL, -signal.SIGTERM) else "crashed"


def describe_exit_code(exit_code: int) -> str:
    """Return how a process ended, in words."""
    return f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit code {exit_code}"
