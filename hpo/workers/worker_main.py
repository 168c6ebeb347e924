"""The main program of a worker's process; its supervisor's side is `hpo.workers.worker_handle`."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from hpo.config.import_policy import allowed_for
from hpo.errors import StudyStopped, UserError
from hpo.store.database import Unreachable
from hpo.store.retry import OUTAGE_S, RetryPolicy, outlast
from hpo.store.store import Store
from hpo.system.readable import ReadableFormatter, prepare_output
from hpo.workers.worker import Worker
from hpo.workers.worker_device import DeviceFailed, WorkerDevice
from hpo.workers.worker_handle import (
    DRAIN_S,
    EXIT_NO_DEVICE,
    EXIT_RESTART,
    LEAVE,
    TASK_VARIABLE,
    WAITING_VARIABLE,
    WorkerTask,
)

logger = logging.getLogger(__name__)

SUPERVISOR_S = 1.0  # how long after a signal the word of the supervisor that sent it may arrive
LEAVE_S = 5.0  # how long releasing trials and signing off may take when an epoch is left in its middle


def _open_once_up(url: str, *, until: Callable[[], bool]) -> Store:
    """Open the store once its database answers: a worker may be started while that is down."""
    store = outlast(lambda: Store(url), RetryPolicy(OUTAGE_S, until), errors=Unreachable)
    return store.retrying(for_s=OUTAGE_S, until=until)


def run_worker_process() -> None:
    """Run one worker until it is done, or SIGTERM, LEAVE or the end of its standard input tells it to leave."""
    task = WorkerTask.from_json(os.environ.pop(TASK_VARIABLE))
    if (pipe := os.environ.pop(WAITING_VARIABLE, None)) is not None:
        _wait_to_begin(task, int(pipe))  # it holds no trial yet, so that SIGTERM may end it at once
    stop = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.by_signal.set())
    workers: list[Worker] = []
    arguments = (_take_standard_input(), workers, stop, task.outlives)
    threading.Thread(target=_follow_supervisor, args=arguments, daemon=True, name="supervisor").start()
    sys.addaudithook(partial(_refuse_signals_to_itself, os.getpid()))
    # Processes that the user's code forks must die of SIGTERM: multiprocessing sends it to its own and waits for them.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    _set_up_log()
    store = _open_once_up(task.storage, until=stop.is_set)
    study = store.studies.get(task.study)
    allowed = allowed_for(study.spec, task.allowed)
    worker = Worker(
        store,
        study,
        device=task.device,
        torch_device=task.torch_device,
        should_stop=stop.is_set,
        was_killed=stop.is_from_elsewhere,
        host=task.host,
    )
    workers.append(worker)
    if study.spec.has_recipe:
        import torch

        torch.set_num_threads(task.threads)
    with allowed.importable():
        exit_code = _run_to_exit_code(worker)
    if stop.is_set() and exit_code != EXIT_NO_DEVICE:
        # It was told to leave, perhaps not by its supervisor, so there may be work left. Where the store did not answer
        # at that moment, leaving failed; that is no crash that its trials could be blamed for.
        exit_code = EXIT_RESTART
    with suppress(Exception):  # the user's code may have closed them
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)  # threads that the user's code has left behind must not delay the end


class StopRequest:
    """Whether this process was told to leave: by its supervisor, or by a signal from anybody."""

    def __init__(self) -> None:
        self.by_signal = threading.Event()
        self.by_supervisor = threading.Event()
        self._patience_s = SUPERVISOR_S

    def is_set(self) -> bool:
        """Return whether it was told to leave."""
        return self.by_signal.is_set() or self.by_supervisor.is_set()

    def is_from_elsewhere(self) -> bool:
        """Return whether it was told so by a signal that its supervisor did not send."""
        if not self.by_signal.is_set():
            return False
        patience_s, self._patience_s = self._patience_s, 0.0
        return not self.by_supervisor.wait(patience_s)


class NoStandardInput(io.TextIOWrapper):
    """The standard input of a worker, which has none: a line of it is an error, in words that its trial ends with."""

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """Raise EOFError."""
        raise EOFError("a worker has no standard input: remove input() from the training code")


def _take_standard_input() -> int:
    """Return a descriptor of this process's standard input, which its supervisor writes to, and put none in its place.

    The user's code would wait there for ever, and take what is meant for us.
    """
    supervisor = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = NoStandardInput(open(0, "rb", closefd=False))  # noqa: SIM115 (open as long as the process)
    return supervisor


def _refuse_signals_to_itself(pid: int, event: str, arguments: tuple[Any, ...]) -> None:
    """Raise, as an audit hook of this worker, where code in this process is about to end or stop it by a signal.

    It would be started again, train the same trial, and send the signal again.
    """
    if event in ("os.kill", "os.killpg") and os.getpid() == pid:
        target, number = arguments
        if target in (pid, 0, -pid) and number in (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):
            raise UserError(
                f"the training code sends {signal.Signals(number).name} to its own worker process; "
                "an exception ends the trial, return ends its training"
            )


def _wait_to_begin(task: WorkerTask, pipe: int) -> None:
    """Load what training needs, prove the device, write what is wrong with it, and wait for the path of the log.

    The process ends here where the device cannot be used, or the supervisor has nothing for it to do.
    """
    try:
        if task.precisions:
            import torch

            import hpo.workers.lane_runner  # noqa: F401

            torch.set_num_threads(task.threads)
        WorkerDevice(task.device, torch_device=task.torch_device, precisions=task.precisions).prove()
    except DeviceFailed as failure:
        with suppress(BrokenPipeError):  # the supervisor has begun without it: the next process says why
            os.write(pipe, failure.reason.encode(errors="backslashreplace"))
        os._exit(EXIT_RESTART)
    os.close(pipe)
    path = b""
    while (letter := os.read(0, 1)) not in (b"", b"\n"):  # no more than this line: what follows may tell it to leave
        path += letter
    if not path or not letter:
        os._exit(0)
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for output in (1, 2):
        os.dup2(log, output)
    os.close(log)


def _set_up_log() -> None:
    """Write what this process and its libraries have to say to standard error, its log, without control characters."""
    import optuna

    prepare_output(encoding="utf-8")
    handler = logging.StreamHandler()
    handler.setFormatter(ReadableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()


def _run_to_exit_code(worker: Worker) -> int:
    """Run the worker and return the exit code of its process."""
    try:
        worker.run()
    except SystemExit:
        return EXIT_RESTART
    except DeviceFailed as failure:
        logger.error("%s", failure)
        return EXIT_NO_DEVICE if failure.is_given_up else EXIT_RESTART
    except StudyStopped as stopped:
        logger.warning("%s", stopped)
    except Exception:
        logger.exception("the worker failed")
        return 1
    return 0


def _follow_supervisor(supervisor: int, workers: Sequence[Worker], stop: StopRequest, outlives: bool) -> None:
    """Wait until the supervisor says so or is no more; then have the worker leave, and end the process in time.

    Without a worker yet, it waits for a database that does not answer, and ends at once.
    """
    received = os.read(supervisor, 1)
    if received != LEAVE and not outlives:
        os.killpg(os.getpid(), signal.SIGKILL)  # with what the user's code has started, which uses the device too
    stop.by_supervisor.set()
    if not workers:
        os._exit(EXIT_RESTART)
    time.sleep(DRAIN_S)
    # In a thread of its own, because a frozen database must not keep this process for ever.
    leaving = threading.Thread(target=workers[0].leave, daemon=True)
    leaving.start()
    leaving.join(LEAVE_S)
    os._exit(0)


if __name__ == "__main__":
    run_worker_process()
