"""Where workers run, behind one interface."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from hpo.store.studies import Store
from hpo.study.records import StudyRecord
from hpo.workers.supervisor import Watch

if TYPE_CHECKING:
    pass


Answer = TypeVar("Answer")


class Launcher(ABC):
    """Runs workers somewhere. A context manager: what `run` and `ask` need is there inside."""

    can_be_left = False  # whether a study can go on when this process has ended, by `submit`

    def __init__(self, request: str, *, kinds: Collection[str]) -> None:
        self.request = request  # the value of --devices where workers run
        self.kinds = kinds  # of those devices

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def run(self, store: Store, study: StudyRecord, *, watch: Watch) -> None:
        """Runs workers until no slot of the study is left or the study is stopped.

        Raises StudyStopped where that cannot be reached: workers that die again and again, or an interruption by
        Ctrl-C or SIGTERM. No worker is left when it returns or raises.
        """

    def submit(self, store: Store, study: StudyRecord) -> None:
        """Has the workers run without this process, and returns once they are under way; where `can_be_left`."""
        raise NotImplementedError

    def ask(self, question: Callable[..., Answer], *args: Any, on_device: bool = False) -> Answer:
        """What a function returns, or raises, where workers run; `on_device`, with a device as they have."""
        return question(*args)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them, up to the third. Does nothing outside the main thread."""
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
