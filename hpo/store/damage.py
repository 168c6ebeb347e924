"""Damage: values in rows of our tables that no hpo has written, found before anything is made of them, and named.

A disk, an editor or another program may change any column. SQLite keeps whatever it is given; Postgres at least the
type of the column.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hpo.errors import UserError
from hpo.store.schema import (
    attempts_table,
    epochs_table,
    meta_table,
    our_tables,
    select_all,
    slots_table,
    studies_table,
    workers_table,
)
from hpo.study.records import KINDS, STATES

LARGEST = sys.float_info.max  # no integer may be larger than every float, either
MAX_SHOWN = 60  # characters of a damaged value
RAMP_KEYS = {"params", "epochs", "lrs", "losses", "low", "high", "falls", "breaks", "leaps"}


class ColumnRule(NamedTuple):
    """What a value must be, in words, and whether it is."""

    words: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def _object_of(value: Any) -> dict[str, Any] | None:
    """Return the JSON object that a text holds, or None for everything else."""
    try:
        found = json.loads(value) if _is_text(value) else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _each(value: Any, holds: Callable[[Any], bool]) -> bool:
    found = _object_of(value)
    return found is not None and all(map(holds, found.values()))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool) or _is_text(value) or is_number(value)


def _is_metadata(value: Any) -> bool:
    found = _object_of(value)
    if found is None or not all(_is_whole(count) for key, count in found.items() if key.startswith("num_")):
        return False
    ramps = found.get("range_test", [])
    return isinstance(ramps, list) and all(isinstance(ramp, dict) and ramp.keys() >= RAMP_KEYS for ramp in ramps)


def _one_of(*values: Any) -> ColumnRule:
    return ColumnRule(
        f"one of {', '.join(map(str, values))}", lambda value: type(value) in (str, int) and value in values
    )


WHOLE = ColumnRule("a whole number from 0 to 2147483647", _is_whole)
FROM_ONE = ColumnRule("a whole number from 1 to 2147483647", lambda value: _is_whole(value) and value > 0)
SECONDS = ColumnRule("a number of seconds from 0 to 1e11", lambda value: is_number(value) and 0 <= value < 1e11)
TEXT = ColumnRule("text in UTF-8", _is_text)
OF_TYPE: dict[type, ColumnRule] = {int: WHOLE, float: SECONDS, str: TEXT}
# The columns of which more is asked than of all those of their type.
STRICTER: dict[sa.Column[Any], ColumnRule] = {
    meta_table.c.value: ColumnRule("the digits of a number", lambda value: _is_text(value) and value.isdecimal()),
    studies_table.c.spec: ColumnRule("a JSON object", lambda value: _object_of(value) is not None),
    studies_table.c.metadata: ColumnRule("a JSON object of whole numbers num_... and range tests", _is_metadata),
    studies_table.c.stop: _one_of("requested", "failure"),
    slots_table.c.kind: _one_of(*KINDS),
    slots_table.c.state: _one_of(*STATES),
    slots_table.c.given: ColumnRule("a JSON object of texts and numbers", lambda value: _each(value, _is_scalar)),
    slots_table.c.exclusive: _one_of(0, 1),
    attempts_table.c.attempt: FROM_ONE,
    epochs_table.c.epoch: FROM_ONE,
    epochs_table.c.attempt: FROM_ONE,
    epochs_table.c.metrics: ColumnRule(
        "a JSON object of finite numbers and nulls",
        lambda value: _each(value, lambda number: number is None or is_number(number)),
    ),
    workers_table.c.pid: FROM_ONE,
}


@functools.cache
def _rules(table: sa.Table) -> Sequence[tuple[sa.Column[Any], Callable[[Any], bool]]]:
    return [(column, _rule(column).holds) for column in table.c]


def _rule(column: sa.Column[Any]) -> ColumnRule:
    return STRICTER.get(column) or OF_TYPE[column.type.python_type]


def find_damage(table: sa.Table, rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield a sentence for each value that cannot be, in rows that begin with the columns of `select_all(table)`.

    The names are those on disk, by which it can be mended.
    """
    rules = _rules(table)
    for row in rows:
        for (column, holds), value in zip(rules, row, strict=False):
            if not (holds(value) or (value is None and column.nullable)):
                yield f"{_row_name(table, row)}: {column.name} must be {_rule(column).words}, got {_shortened(value)}"


def refuse_damage(database_url: object, study: str, table: sa.Table, rows: Iterable[Sequence[Any]]) -> None:
    """Raise UserError for the first value that cannot be in these rows of a study."""
    for problem in find_damage(table, rows):
        raise UserError(f"study {study!r} in {database_url} is damaged: {problem}")


def check_rows(connection: Connection, studies: Mapping[int, str]) -> dict[int | None, list[str]]:
    """Return all damage in our tables by the id of the study; those that belong to none of these have the id None."""
    found: dict[int | None, list[str]] = {}
    keys = connection.execute(sa.select(meta_table.c.key)).scalars().all()
    if "schema_version" not in keys:
        found[None] = [f"{meta_table.name}: it must have the key schema_version, got {_shortened(keys)}"]
    known = set(connection.execute(sa.select(studies_table.c.study_id)).scalars())  # with those that Optuna has deleted
    for table in our_tables.sorted_tables:
        for row in connection.execute(select_all(table)):
            study_id = getattr(row, "study_id", None)
            study_id = study_id if type(study_id) is int and study_id in studies else None
            problems = list(find_damage(table, [row]))
            if study_id is not None:
                problems = [f"study {studies[study_id]!r}: {problem}" for problem in problems]
            elif table is not meta_table and not problems and row.study_id not in known:
                problems = [f"{_row_name(table, row)}: there is no study with the id {_shortened(row.study_id)}"]
            if problems:
                found.setdefault(study_id, []).extend(problems)
    return found


def _row_name(table: sa.Table, row: Sequence[Any]) -> str:
    keys = [
        f"{column.name} {_shortened(value)}" for column, value in zip(table.c, row, strict=False) if column.primary_key
    ]
    return f"{table.name}, {', '.join(keys)}"


def _shortened(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
