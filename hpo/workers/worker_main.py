"""What the process of a worker does (hpo.workers.worker_handle is its supervisor's side of it), and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from hpo.store.database import Unreachable
from hpo.store.retry import LONGEST_PAUSE_S, OUTAGE_S
from hpo.store.studies import Store
from hpo.workers.worker import Worker
from hpo.workers.worker_handle import DRAIN_S, EXIT_RESTART, LEAVE, TASK_VARIABLE, WorkerTask

logger = logging.getLogger(__name__)

LEAVE_S = 5.0  # how long giving trials back and signing off may take, where an epoch is left in its middle


def _open_patiently(url: str, *, give_up: Callable[[], bool]) -> Store:
    """The store, once its database answers; a worker may be started while that is down."""
    began = time.monotonic()
    while True:
        try:
            return Store(url, patience_s=OUTAGE_S, give_up=give_up)
        except Unreachable as error:
            if time.monotonic() - began > OUTAGE_S or give_up():
                raise
            logger.warning("%s; trying again", error)
            time.sleep(LONGEST_PAUSE_S / 5)


def main() -> None:
    """One worker, ended by SIGTERM or by what stands, or ends, at its standard input."""
    assignment = WorkerTask.from_json(os.environ.pop(TASK_VARIABLE))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    # Processes that the user's code forks must die of SIGTERM: multiprocessing ends its own by it, and waits for them.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    store = _open_patiently(assignment.storage, give_up=stop.is_set)
    study = store.study(assignment.study)
    assignment.allowed.check(study.spec)
    worker = Worker(
        store, study, device=assignment.device, torch_device=assignment.torch_device, should_stop=stop.is_set,
        host=assignment.host,
    )  # fmt: skip

    def outlive_nobody() -> None:
        told = os.read(0, 1)  # returns when the supervisor says so, or is no more
        if told != LEAVE and not assignment.outlives:
            os.killpg(os.getpid(), signal.SIGKILL)  # what the user's code has started has the device, too
        stop.set()
        time.sleep(DRAIN_S)
        # In a thread of its own: a database that is frozen must not keep this process for ever.
        leaving = threading.Thread(target=worker.leave, daemon=True)
        leaving.start()
        leaving.join(LEAVE_S)
        os._exit(0)

    threading.Thread(target=outlive_nobody, daemon=True, name="supervisor").start()
    if study.spec.objective is None:
        import torch

        torch.set_num_threads(assignment.threads)
    exit_code = 0
    try:
        worker.run()
    except SystemExit:
        exit_code = EXIT_RESTART
    except Exception:
        logger.exception("the worker failed")
        exit_code = 1
    if stop.is_set():
        # Told to leave, perhaps not by its supervisor: the work may not be done. Where the store did not answer at
        # that moment, leaving failed, and that is no crash that its trial could be blamed for.
        exit_code = EXIT_RESTART
    # Threads that the user's code has left behind must not hold up the end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
