"""Whether a worker should leave: its process was told to, or its study is stopping."""

from __future__ import annotations

import time
from collections.abc import Callable

EPOCH_GRACE_S = 20.0  # how long a worker that was told to leave may take to end its epoch, whose work is then saved


class StopSignal:
    """Whether a worker should leave, and whether it should do so in the middle of an epoch.

    `is_told()` says whether the process was told to end. It may be called before every step of training.
    `was_killed()` says whether a signal told it so that is as good as a kill: its supervisor did not send it.
    """

    def __init__(self, is_told: Callable[[], bool], *, was_killed: Callable[[], bool] = lambda: False) -> None:
        self._is_told = is_told
        self.was_killed = was_killed
        self._is_study_stopping = False
        self._first_seen_s: float | None = None  # when `must_abort` first saw that the process was told to end

    def study_is_stopping(self) -> None:
        """Have the worker leave because its study is stopping."""
        self._is_study_stopping = True

    def is_set(self) -> bool:
        """Return whether the worker should claim no more trials, and leave once its epoch has ended."""
        return self._is_study_stopping or self._is_told()

    def must_abort(self) -> bool:
        """Return whether to leave in the middle of an epoch: the process was told to end, and the epoch does not."""
        if not self._is_told():
            return False
        if self._first_seen_s is None:
            self._first_seen_s = time.monotonic()
        return time.monotonic() - self._first_seen_s > EPOCH_GRACE_S
