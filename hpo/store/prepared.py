"""Statements that are built once, with named values: to build one takes ten times as long as to execute it.

SQLAlchemy keeps the SQL of a statement that it has seen before, but finds that out sooner where it is the same object.
Statements with several rows of values are compiled every time; so each row has a statement of its own here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.store.database import join_statements
from hpo.study.records import Claim

# Called with the name of the dialect and the shape; returns statements that change different rows, or one that reads.
Build = Callable[..., Sequence[Any]]
CLAIM = ("study_id", "number", "attempt", "trial_id", "worker_id")
NamedRow = dict[str, sa.BindParameter[Any]]


def execute_prepared(
    connection: Connection, build: Build, values: Mapping[str, Any], *shape: Any
) -> sa.CursorResult[Any]:
    """Execute what a function of a module builds, in Postgres in one round trip; return the last statement's result.

    Args:
        connection: Where.
        build: The function.
        values: The values by the names that its statements give them.
        shape: What the statements depend on besides, such as a number of rows.
    """
    *others, last = _prepare(build, connection.dialect.name, *shape)
    for other in others:
        connection.execute(other, values)
    return connection.execute(last, values)


@functools.lru_cache(maxsize=500)
def _prepare(build: Build, dialect_name: str, *shape: Any) -> list[Any]:
    return join_statements(dialect_name, build(dialect_name, *shape))


def named_rows(name: str, columns: Iterable[str], count: int) -> list[NamedRow]:
    """Return rows of named values, which `row_values` gives."""
    return [{column: sa.bindparam(f"{name}_{index}_{column}") for column in columns} for index in range(count)]


def row_values(name: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values of rows by the names that `named_rows` gives them."""
    return {f"{name}_{index}_{column}": value for index, row in enumerate(rows) for column, value in row.items()}


def named_claim(name: str) -> Claim:
    """Return a claim of named values, which `claim_values` gives, for the conditions on the rows of a claim."""
    return Claim(*(cast(Any, sa.bindparam(f"{name}_{of}")) for of in CLAIM))


def claim_values(name: str, claim: Claim) -> dict[str, Any]:
    """Return the values of a claim by the names that `named_claim` gives them."""
    return {f"{name}_{of}": getattr(claim, of) for of in CLAIM}
