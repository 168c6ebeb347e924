"""Databases that do not answer: which errors say so, and methods that are tried again until it has passed."""

from __future__ import annotations

import functools
import logging
import sqlite3
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import optuna
import sqlalchemy as sa

logger = logging.getLogger(__name__)

OUTAGE_S = 600.0  # how long workers wait for a database that does not answer
PASSING_IN_SQLITE = ("locked", "busy", "is full", "disk I/O error", "unable to open")
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0  # between two tries


class StoreFailed(Exception):
    """The database could not do what was asked; nothing was changed."""


# What reading from, or writing to, a store may raise when the database is at fault.
STORE_ERRORS = (StoreFailed, sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


class Patient(Protocol):
    """What has methods that are tried again: for how long, and a question that ends it earlier."""

    patience_s: float
    give_up: Callable[[], bool]


Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
Self = TypeVar("Self", bound="Patient")


def retry_on_outage(
    method: Callable[Concatenate[Self, Arguments], Answer],
) -> Callable[Concatenate[Self, Arguments], Answer]:
    """A method that is tried again, after longer and longer pauses, while the database does not answer.

    Safe for each of them: it changes all or nothing, and where its success was not heard of, it finds that done.
    """

    @functools.wraps(method)
    def try_again(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        began, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return method(self, *args, **kwargs)
            except STORE_ERRORS as error:
                if not is_outage(error) or time.monotonic() - began > self.patience_s or self.give_up():
                    raise StoreFailed(plain(error)) from error
                if pause_s == FIRST_PAUSE_S:
                    logger.warning("the store does not answer, waiting for it: %s", plain(error))
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    return try_again


def plain(error: BaseException) -> str:
    """What the database said, in a line."""
    cause = getattr(error, "orig", None) or (None if isinstance(error, StoreFailed) else error.__cause__) or error
    return " ".join(str(getattr(cause, "orig", None) or cause).split())


def is_outage(error: BaseException | None) -> bool:
    """Whether the database was locked, cut off or shut down, which passes, rather than asked for something wrong."""
    while error is not None:
        if isinstance(error, sa.exc.DBAPIError):
            if isinstance(error.orig, sqlite3.Error):  # which calls a missing table operational, too
                return any(words in str(error.orig) for words in PASSING_IN_SQLITE)
            # The second is how psycopg hears that the server ended a transaction that was left open.
            passing = sa.exc.OperationalError | sa.exc.InternalError | sa.exc.InterfaceError
            return isinstance(error, passing) or error.connection_invalidated
        # No connection of the pool came free; or Optuna tried again on one that was lost inside a transaction.
        if isinstance(error, sa.exc.TimeoutError | sa.exc.PendingRollbackError):
            return True
        error = error.__cause__
    return False
