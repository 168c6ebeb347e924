"""A fuzz of a store: nonsense in each column that is read is named, and takes nothing from other studies."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from hpo.cli.app import main
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.schema import OPTUNA_STUDY_TABLES, OPTUNA_TRIAL_TABLES, meta_table, our_tables
from hpo.store.store import Store
from hpo.study.records import trial_as_dict
from tests.store.helpers import MakeSpec, begin, claim, report

DEEP = "[" * 100_000
NOT_UTF_8 = b"caf\xe9"  # as text; SQLite keeps it
JSON_COLUMNS = {"spec", "facts", "given", "metrics"}
OTHER_JSON = ["[1]", "null", '{"lr": [1]}', '{"lr": 1e999}']
LISTED_COLUMNS = {"kind", "state", "stop"}
READING = (
    ("trials", "s", "--json"),
    ("status", "s"),
    ("list", "--json"),
    ("list",),
    ("trials", "s"),
    ("best", "s"),
    ("export", "s", "--output", "best.json"),
    ("report", "s", "--output", "report.json"),
)
OF_ANOTHER_STUDY = (("trials", "t", "--json"), ("best", "t", "--json"))


def nonsense(column: sa.Column[Any]) -> list[Any]:
    """Return values that no hpo writes to a column."""
    if column.table is meta_table:
        return ["nonsense", b"\xff"]
    if column.name in JSON_COLUMNS or column.name.endswith("_json"):
        return ["nonsense", DEEP, b"{}", NOT_UTF_8, *(OTHER_JSON if column.name in JSON_COLUMNS else [None])]
    if column.name in LISTED_COLUMNS or isinstance(column.type, sa.Enum | sa.DateTime):
        return ["nonsense", b"\xff", 3]
    if column.type.python_type is int:
        return ["nonsense", -1, 1.5, 2**40, b"\xff"]
    if column.type.python_type is float:
        return ["nonsense", 1e300, -5.0, b"\xff"]
    return [b"\xff", NOT_UTF_8]


OPTUNA_TABLES = [*OPTUNA_STUDY_TABLES, *OPTUNA_TRIAL_TABLES]
OUR_COLUMNS = [column for table in our_tables.sorted_tables for column in table.c]
THEIR_COLUMNS = [c for table in OPTUNA_TABLES for c in table.c if not c.primary_key and not c.foreign_keys]
FIRST_CASES = [(column, nonsense(column)[0]) for column in OUR_COLUMNS + THEIR_COLUMNS]
CASES = [(column, value) for column in OUR_COLUMNS for value in nonsense(column)] + FIRST_CASES[-len(THEIR_COLUMNS) :]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the file of a sound store: a study with a trial of each kind of state, and another one."""
    path = tmp_path_factory.mktemp("store") / "hpo.db"
    store = Store(f"sqlite:///{path}", create=True)
    for name in ("s", "t"):
        settings = {"name": name, "search": {"sampler": "grid", "space": {"lr": [0.1, 0.2, 0.3, 0.4]}}}
        study, worker = begin(store, StudySpec.from_dict({**settings, "objective": {"function": "loop:train"}}))
        for value, state in ((0.5, "complete"), (0.6, "complete"), (0.7, "failed")):
            held = claim(store, study, worker)
            store.trials.suggest(held, study.spec, attributes=lambda _: {"seed": 1, "device": "cpu", "host": "here"})
            report(store, held, 0.3, value)
            store.trials.finish(held, state, reason="because", error="Traceback")
        report(store, claim(store, study, worker), 0.3)
        store.storage.set_study_user_attr(study.study_id, "note", "none")
    store.storage.engine.dispose()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("UPDATE hpo_slots SET lease_until = lease_until + 1e6")  # however long the fuzz takes
        connection.execute("UPDATE hpo_workers SET seen_at = seen_at + 1e6")
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    return tmp_path


def hpo(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="hpo")


def damage(path: Path, content: bytes, column: sa.Column[Any], value: Any) -> bool:
    """Put nonsense into a column of the first row of study s, in a sound store; False where SQLite refuses it."""
    path.write_bytes(content)
    table, first = column.table.name, "1" if column.table is meta_table else "study_id = 1"
    if column.table in OPTUNA_TRIAL_TABLES:
        first = "trial_id = (SELECT trial_id FROM trials WHERE study_id = 1)"
    new = "CAST(? AS TEXT)" if value is NOT_UTF_8 else "?"
    row = f"rowid = (SELECT min(rowid) FROM {table} WHERE {first})"
    with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.IntegrityError):
        connection.execute(f"UPDATE {table} SET {column.name} = {new} WHERE {row}", [value])
        connection.commit()
        return True
    return False


def assert_a_sentence_or_an_answer(result: Result, what: object) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), (what, result.exc_info)
    assert result.exit_code == 0 or result.output.startswith("hpo: "), (what, result.output)
    assert "Traceback (most" not in result.output, (what, result.output)


def read_everything(store: Store, name: str) -> None:
    """Read what commands and workers read of a study."""
    study = store.studies.get(name)
    store.workers.reap(study)
    trials = store.trials.get_all(study)
    assert sum(store.trials.counts(study.study_id).values()) == len(trials)
    json.dumps([trial_as_dict(trial) for trial in trials], allow_nan=False)
    assert store.trials.num_left(study) == 1
    assert [worker.alive for worker in store.workers.get_all(study)] == [True]


def test_a_sound_store_of_either_kind_is_not_called_damaged(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2, 0.3))
    for state, last in (("complete", 0.6), ("failed", 0.5), ("diverged", float("inf"))):
        held = claim(store, study, worker)
        report(store, held, float("nan"), last)
        store.trials.finish(held, state, reason="because")
    store.studies.get_or_set_shared(study, "lanes", {"count": 1, "reason": "because"})
    assert store.check() == []
    assert len(store.trials.get_all(study)) == 3


def test_nonsense_in_any_column_is_named_and_takes_nothing_from_other_studies(folder: Path, sound: bytes) -> None:
    path = folder / "hpo.db"
    path.write_bytes(sound)
    store = Store(f"sqlite:///{path}")
    assert store.check() == []
    for name in ("s", "t"):
        read_everything(store, name)
    for column, value in FIRST_CASES:
        store.storage.engine.dispose()
        if not damage(path, sound, column, value):
            continue
        problems = "\n".join(store.check())
        assert column.table.name in problems, column
        assert column.name in problems, column
        assert "study 't'" not in problems, column
        with suppress(UserError):
            read_everything(store, "s")
        read_everything(store, "t")


@pytest.mark.slow
def test_every_command_that_reads_says_so_in_a_sentence_or_has_the_right_answer(folder: Path, sound: bytes) -> None:
    path = folder / "hpo.db"
    path.write_bytes(sound)
    others = {command: hpo(*command).output for command in OF_ANOTHER_STUDY}
    reading, reading_others = cycle(READING), cycle(others.items())
    for column, value in CASES:
        what = f"{column.table.name}.{column.name} = {str(value)[:30]}"
        if not damage(path, sound, column, value):
            continue
        for command in islice(reading, 2):  # others for the next value of this column
            assert_a_sentence_or_an_answer(hpo(*command), (what, command))
        damage(path, sound, column, value)  # reading may have freed a trial whose worker is damaged
        checked = hpo("storage", "check")
        assert isinstance(checked.exception, SystemExit), (what, checked.output)
        assert column.table.name in checked.output, what
        assert column.name in checked.output or "schema_version" in checked.output, what
        if (column.table, column.name) != (meta_table, "value"):
            command, output = next(reading_others)
            assert hpo(*command).output == output, what
