"""Other versions of the tables."""

from __future__ import annotations

import pytest

from hpo.errors import UserError
from hpo.store import database, schema
from hpo.store.store import Store
from hpo.store.urls import parse_url
from tests.store.helpers import MakeSpec, begin, claim, report, trial


def make_version_1(store: Store) -> None:
    with store.storage.engine.begin() as connection:
        for statement in (
            "ALTER TABLE hpo_slots DROP COLUMN kind",
            "ALTER TABLE hpo_slots DROP COLUMN replicate",
            "ALTER TABLE hpo_slots DROP COLUMN tested",
            "ALTER TABLE hpo_slots DROP COLUMN failures",
            "ALTER TABLE hpo_slots DROP COLUMN alone",
            "ALTER TABLE hpo_slots DROP COLUMN pruned_at",
            "DROP TABLE hpo_attempts",
            "UPDATE hpo_meta SET value = '1' WHERE key = 'schema_version'",
        ):
            connection.exec_driver_sql(statement)


def test_a_store_of_an_older_version_is_refused_until_it_is_upgraded_and_then_goes_on(
    store: Store, make_spec: MakeSpec, url: str
) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    report(store, claim(store, study, worker), 0.5)
    make_version_1(store)
    for create in (False, True):
        with pytest.raises(UserError, match=r"schema version 1, and this hpo needs 3: .*`hpo storage upgrade`"):
            Store(url, create=create)
    assert database.upgrade(parse_url(url)) == [
        "our tables: from version 1 to 3",
        f"Optuna's tables: version {store.storage.get_current_version()} already",
    ]
    assert database.upgrade(parse_url(url))[0] == "our tables: version 3 already"
    upgraded = Store(url)
    assert trial(upgraded, study).epochs == [1]
    assert claim(upgraded, study, worker).number == 1
    assert upgraded.problems(study) == []


def test_upgrading_an_empty_database_makes_the_tables(url: str) -> None:
    assert database.upgrade(parse_url(url)) == [
        f"made the tables of {parse_url(url)}, schema version {schema.SCHEMA_VERSION}"
    ]
    assert Store(url).studies.get_all() == []


def test_a_store_of_a_newer_version_is_not_upgraded(store: Store) -> None:
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo_meta SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(UserError, match=r"schema version 99, and this hpo knows up to 3: upgrade hpo"):
        database.upgrade(store.url)
