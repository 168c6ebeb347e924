"""The interface of all launchers, which run the workers of a study somewhere."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, Self, TypeVar

from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.system.devices import Device
from hpo.workers.supervisor import OnTick

Returned = TypeVar("Returned")


class Proof(Protocol):
    """A proof of a device, which has begun."""

    def problem(self) -> str | None:
        """Wait for the proof, and return in a line why the device cannot be used, or None where it computes."""


class Launcher(ABC):
    """The interface of a launcher, which runs workers somewhere.

    A context manager: `run`, `submit` and `call` may be called inside it alone, from the thread that entered it.
    """

    can_be_left = False  # whether `submit` works: the study goes on when this process has ended

    def __init__(
        self,
        devices: str,
        *,
        device_kinds: Collection[str],
        own_devices: Sequence[Device] = (),
        threads: int | None = None,
    ) -> None:
        self.devices = devices  # as --devices names them, where the workers run
        self.threads = threads  # CPU threads of a process, where the user has asked for a number
        self.device_kinds = device_kinds
        self.own_devices = own_devices  # of this machine, where we choose what workers train on

    def proofs(self) -> Mapping[str, Proof]:
        """Return what is being found of devices while the study is checked, by their names; inside it, before `run`."""
        return {}

    def start_early(self) -> None:
        """Start workers that get ready while the study is checked; they end with the launcher where it does not run."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def run(self, store: Store, study: StudyRecord, *, on_tick: OnTick) -> None:
        """Run workers until no slot of the study is left or the study is stopped.

        No worker is left when it returns or raises.

        Args:
            store: The store of the study.
            study: The study.
            on_tick: Called several times a second meanwhile.

        Raises:
            StudyStopped: Workers die again and again, none has a device left that it can use, or Ctrl-C or SIGTERM
                interrupt the process.
        """

    def submit(self, store: Store, study: StudyRecord) -> None:
        """Start workers that do not need this process, and return once they are under way; where `can_be_left`."""
        raise NotImplementedError

    def call(self, function: Callable[..., Returned], *args: Any, on_device: bool = False) -> Returned:
        """Call a function where the workers run, and return or raise what it does.

        Args:
            function: A function of a module that is installed there.
            args: Its arguments.
            on_device: Whether it needs a device, as a worker does.
        """
        return function(*args)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect the numbers of SIGINT and SIGTERM in a list; the third one raises KeyboardInterrupt.

    Outside the main thread the list stays empty, as only that one can handle signals.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 2:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
