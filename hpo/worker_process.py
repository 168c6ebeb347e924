"""The process of a worker: what it is told by whoever starts it, through its environment, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from hpo.database import Unreachable
from hpo.outage import LONGEST_PAUSE_S, OUTAGE_S
from hpo.store import Store
from hpo.trust import Allowed
from hpo.worker import EXIT_RESTART, Worker

logger = logging.getLogger(__name__)

ASSIGNMENT = "HPO_WORKER"  # environment variable with the Assignment; not on the command line, where anyone reads it
DRAIN_S = 30.0  # how long a loop of the user's may take to come to its next report before it is left in its epoch
LEAVE_S = 5.0  # how long giving trials back and signing off may take then


@dataclass(frozen=True)
class Assignment:
    """What a worker process is started with."""

    storage: str
    study: str
    device: str  # as users name it, and as it is recorded
    torch_device: str  # as torch names it in the worker's process
    threads: int
    allowed: Allowed  # whose code it may import


def _read_assignment(text: str) -> Assignment:
    """The inverse of `json.dumps(dataclasses.asdict(assignment))`."""
    values = json.loads(text)
    modules, folders = (tuple(values["allowed"][key]) for key in ("modules", "folders"))
    return Assignment(**{**values, "allowed": Allowed(modules, folders)})


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
    """One worker, ended by SIGTERM or by the end of its standard input."""
    assignment = _read_assignment(os.environ.pop(ASSIGNMENT))
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
        store, study, device=assignment.device, torch_device=assignment.torch_device, should_stop=stop.is_set
    )  # fmt: skip

    def outlive_nobody() -> None:
        os.read(0, 1)  # returns when the supervisor closes its end, or is no more
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
