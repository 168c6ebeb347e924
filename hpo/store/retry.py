"""Outages of the database: the errors that show one, and the retrying of methods until it has passed."""

from __future__ import annotations

import functools
import logging
import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import optuna
import sqlalchemy as sa

logger = logging.getLogger(__name__)

OUTAGE_S = 600.0  # how long workers wait for a database that does not answer
PASSING_IN_SQLITE = ("locked", "busy", "is full", "disk I/O error", "unable to open")
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0  # between two tries, on average


class StoreFailed(Exception):
    """The database could not do what was asked; nothing was changed."""


# What reading from, or writing to, a store may raise when the database is at fault.
STORE_ERRORS = (StoreFailed, sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


@dataclass(frozen=True)
class RetryPolicy:
    """How long calls are retried while the database does not answer: `for_s` seconds, or until `until()` is true."""

    for_s: float = 0.0
    until: Callable[[], bool] = lambda: False


class HasRetryPolicy(Protocol):
    """An object whose methods may be decorated with `retry_on_outage`."""

    @property
    def retry(self) -> RetryPolicy:
        """How its methods are retried."""


Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
Self = TypeVar("Self", bound="HasRetryPolicy")


def retry_on_outage(
    method: Callable[Concatenate[Self, Arguments], Answer],
) -> Callable[Concatenate[Self, Arguments], Answer]:
    """Retry a method as `outlast` does, by its object's policy; raise StoreFailed where the database is at fault.

    This is safe for methods that change all or nothing. Where a commit succeeded and its answer was lost, most of them
    find their work done; a slot that was claimed comes back when its lease is over, and the end of a trial, which is
    in the store, raises ClaimLost.
    """

    @functools.wraps(method)
    def try_again(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        try:
            return outlast(lambda: method(self, *args, **kwargs), self.retry, errors=STORE_ERRORS, passes=is_outage)
        except STORE_ERRORS as error:
            raise StoreFailed(database_message(error)) from error

    return try_again


def outlast(
    call: Callable[[], Answer],
    policy: RetryPolicy,
    *,
    errors: type[Exception] | tuple[type[Exception], ...],
    passes: Callable[[Exception], bool] = lambda error: True,
) -> Answer:
    """Return what a call does, tried again after longer and longer pauses while the database does not answer.

    A pause is drawn at random, so that workers that lost a database together do not come back to it in step.

    Args:
        call: What is tried.
        policy: How long.
        errors: What the call raises where it may be tried again; all else is raised at once.
        passes: Whether such an error may pass.
    """
    began, pause_s = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return call()
        except errors as error:
            if not passes(error) or time.monotonic() - began > policy.for_s or policy.until():
                raise
            if pause_s == FIRST_PAUSE_S:
                logger.warning("the store does not answer, waiting for it: %s", database_message(error))
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def database_message(error: BaseException) -> str:
    """Return what the database said, in one line."""
    cause = getattr(error, "orig", None) or (None if isinstance(error, StoreFailed) else error.__cause__) or error
    return " ".join(str(getattr(cause, "orig", None) or cause).split())


def is_outage(error: BaseException | None) -> bool:
    """Return whether the database was locked, cut off or shut down, which passes, and not the request wrong."""
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
