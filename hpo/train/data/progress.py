"""How far the reading of images has come, in the log: in a worker's, or shown by the command that checks a study."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

LOG_EVERY_S = 5.0


class ReadingProgress:
    """Logs every LOG_EVERY_S how many of `total` images were read."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._next_s = time.monotonic() + LOG_EVERY_S

    def add(self, count: int) -> None:
        """Note that `count` more were read."""
        self._done += count
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LOG_EVERY_S
            logger.info("reading %s the images: %s of %s", self._what, f"{self._done:,}", f"{self._total:,}")
