"""Damage: values in rows of our tables and Optuna's that neither has written, found and named.

A disk, an editor or another program may change any column. SQLite keeps whatever it is given; Postgres at least the
type of the column. Rows are checked before anything is made of them. Of the trials that Optuna reads, it checks most.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from types import NoneType
from typing import Any, NamedTuple

import sqlalchemy as sa
from optuna.distributions import json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Connection

from hpo.errors import UserError
from hpo.store.schema import (
    OPTUNA_STUDY_TABLES,
    OPTUNA_TRIAL_TABLES,
    attempts_table,
    epochs_table,
    intermediate_values,
    meta_table,
    optuna_trials,
    our_tables,
    select_all,
    select_raw,
    slots_table,
    studies_table,
    trial_values,
    workers_table,
)
from hpo.study.records import CODE, KINDS, SEARCH_END, STATES, WIDENED

LARGEST = sys.float_info.max  # no integer may be larger than every float, either
READ_JSON = json.JSONDecoder().raw_decode  # returns what a text begins with, and where that ends
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


def read_metrics(texts: Sequence[Any]) -> list[dict[str, float | None]] | None:
    """Return what each text of the column `metrics` holds, or None if one is no object of finite numbers and nulls.

    A large study has hundreds of thousands of them: no statement of Python runs for each number.
    """
    try:
        # As `json.loads`, which looks for blanks around each text.
        decoded = [READ_JSON(text) for text in texts]
        numbers = list(chain.from_iterable(metrics.values() for metrics, _ in decoded))
        is_sound = (
            [end for _, end in decoded] == list(map(len, texts))
            and set(map(type, numbers)) <= {int, float, NoneType}
            and all(map(math.isfinite, filter(None, numbers)))
            and _is_text("".join(texts))
        )
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    return [metrics for metrics, _ in decoded] if is_sound else None


def _is_object_of_scalars(value: Any) -> bool:
    found = _object_of(value)
    return found is not None and all(map(_is_scalar, found.values()))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool) or _is_text(value) or is_number(value)


def _is_widening(value: Any) -> bool:
    is_whole = isinstance(value, dict) and value.keys() >= {"before", "after", "grew"}
    return is_whole and all(isinstance(value[when], dict) for when in ("before", "after"))


def _is_metadata(value: Any) -> bool:
    found = _object_of(value)
    if found is None or not all(_is_whole(count) for key, count in found.items() if key.startswith("num_")):
        return False
    if not _is_text(found.get(SEARCH_END, "")):
        return False
    widened = found.get(WIDENED, [])
    if not isinstance(widened, list) or not all(_is_widening(one) for one in widened):
        return False
    if not isinstance(found.get(CODE, {}), dict):
        return False
    ramps = found.get("range_test", [])
    return isinstance(ramps, list) and all(isinstance(ramp, dict) and ramp.keys() >= RAMP_KEYS for ramp in ramps)


def _is_json(value: Any) -> bool:
    try:
        json.loads(value if _is_text(value) else "")
    except (ValueError, RecursionError):
        return False
    return True


def _is_distribution(value: Any) -> bool:
    try:
        json_to_distribution(value if _is_text(value) else "")
    except Exception:  # Optuna's are of several kinds
        return False
    return True


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, datetime) or bool(datetime.fromisoformat(value))
    except (TypeError, ValueError):
        return False


def _one_of(*values: Any) -> ColumnRule:
    return ColumnRule(
        f"one of {', '.join(map(str, values))}", lambda value: type(value) in (str, int) and value in values
    )


WHOLE = ColumnRule("a whole number from 0 to 2147483647", _is_whole)
FROM_ONE = ColumnRule("a whole number from 1 to 2147483647", lambda value: _is_whole(value) and value > 0)
SECONDS = ColumnRule("a number of seconds from 0 to 1e11", lambda value: is_number(value) and 0 <= value < 1e11)
TEXT = ColumnRule("text in UTF-8", _is_text)
TIME = ColumnRule("a date and time", _is_time)
OF_TYPE: dict[type, ColumnRule] = {int: WHOLE, float: SECONDS, str: TEXT, datetime: TIME}
NUMBER = ColumnRule("a number", is_number)
FIRST = _one_of(0)
# The columns of which more is asked than of all those of their type.
STRICTER: dict[sa.Column[Any], ColumnRule] = {
    meta_table.c.value: ColumnRule("the digits of a number", lambda value: _is_text(value) and value.isdecimal()),
    studies_table.c.spec: ColumnRule("a JSON object", lambda value: _object_of(value) is not None),
    studies_table.c.metadata: ColumnRule(
        "a JSON object of whole numbers num_..., texts, widenings, range tests and digests of code", _is_metadata
    ),
    studies_table.c.stop: _one_of("requested", "failure"),
    slots_table.c.kind: _one_of(*KINDS),
    slots_table.c.state: _one_of(*STATES),
    slots_table.c.given: ColumnRule("a JSON object of texts and numbers", _is_object_of_scalars),
    slots_table.c.exclusive: _one_of(0, 1),
    attempts_table.c.attempt: FROM_ONE,
    epochs_table.c.epoch: FROM_ONE,
    epochs_table.c.attempt: FROM_ONE,
    epochs_table.c.metrics: ColumnRule(
        "a JSON object of finite numbers and nulls", lambda value: read_metrics([value]) is not None
    ),
    workers_table.c.pid: FROM_ONE,
    optuna_trials.c.state: _one_of(*(state.name for state in TrialState)),
    trial_values.c.value: NUMBER,
    trial_values.c.objective: FIRST,
    intermediate_values.c.intermediate_value: NUMBER,
}
for _table in (*OPTUNA_STUDY_TABLES, *OPTUNA_TRIAL_TABLES):
    STRICTER |= {
        _table.c[name]: rule
        for name, rule in {
            "value_json": ColumnRule("JSON", _is_json),
            "distribution_json": ColumnRule("a distribution of Optuna's", _is_distribution),
            "param_value": NUMBER,
            "direction": _one_of(*(direction.name for direction in StudyDirection)),
            "value_type": _one_of("FINITE", "INF_POS", "INF_NEG"),
            "intermediate_value_type": _one_of("FINITE", "INF_POS", "INF_NEG", "NAN"),
        }.items()
        if name in _table.c
    }


# Of Optuna's columns; it declares more, which it always fills.
MAY_BE_NULL = {
    optuna_trials.c.datetime_start,
    optuna_trials.c.datetime_complete,
    trial_values.c.value,
    intermediate_values.c.intermediate_value,
}


def _may_be_null(column: sa.Column[Any]) -> bool:
    return column in MAY_BE_NULL if column.table.metadata is not our_tables else bool(column.nullable)


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
            if not (holds(value) or (value is None and _may_be_null(column))):
                yield f"{_row_name(table, row)}: {column.name} must be {_rule(column).words}, got {_shortened(value)}"


def refuse_damage(database_url: object, study: str, table: sa.Table, rows: Sequence[Sequence[Any]]) -> None:
    """Raise UserError for the first value that cannot be in these rows of a study.

    Each different value of a column is checked once: most columns of a large study have few.
    """
    for (column, holds), values in zip(_rules(table), zip(*rows, strict=True), strict=False):
        different = set(zip(map(type, values), values, strict=True))  # 1 and 1.0 are equal
        if not all(holds(value) or (value is None and _may_be_null(column)) for _, value in different):
            problem = next(find_damage(table, rows))
            raise UserError(f"study {study!r} in {database_url} is damaged: {problem}")


def refuse_damage_of_optuna(
    database_url: object, study: str, study_id: int, connection: Connection, tables: Sequence[sa.Table]
) -> None:
    """Raise UserError for the first value that cannot be in the rows of a study in these tables of Optuna's."""
    for table in tables:
        query = select_raw(table)
        # All at once: a result that is left in its middle keeps SQLite's lock.
        rows = connection.execute(query.where(query.selected_columns.whose == study_id)).all()
        refuse_damage(database_url, study, table, rows)


def check_trial(trial: FrozenTrial) -> None:
    """Raise TypeError where Optuna has read a trial with names or numbers that are none."""
    names = [*trial.params, *trial.user_attrs, *trial.system_attrs]
    numbers = [*(trial.values or ()), *trial.intermediate_values.values()]
    if not all(type(name) is str for name in names) or not all(type(number) is float for number in numbers):
        raise TypeError(f"trial {trial.number} is damaged")
    if type(trial.number) is not int or any(isinstance(value, bytes) for value in trial.params.values()):
        raise TypeError(f"trial {trial.number} is damaged")


def check_rows(connection: Connection, studies: Mapping[int, str]) -> dict[int | None, list[str]]:
    """Return all damage in the tables by the id of the study; rows of ours that are no study's have the id None."""
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
    for table in (*OPTUNA_STUDY_TABLES, *OPTUNA_TRIAL_TABLES):
        for row in connection.execute(select_raw(table)):
            if row.whose in studies and (problems := list(find_damage(table, [row]))):
                name = studies[row.whose]
                found.setdefault(row.whose, []).extend(f"study {name!r}: {problem}" for problem in problems)
    return found


def _row_name(table: sa.Table, row: Sequence[Any]) -> str:
    keys = [
        f"{column.name} {_shortened(value)}" for column, value in zip(table.c, row, strict=False) if column.primary_key
    ]
    return f"{table.name}, {', '.join(keys)}"


def _shortened(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
