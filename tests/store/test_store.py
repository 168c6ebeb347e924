"""The store as a whole: its folders and its check."""

from __future__ import annotations

import pytest

from hpo.errors import UserError
from hpo.store import schema
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord
from tests.store.helpers import Change, MakeSpec, begin, claim, meanwhile, only_sqlite, report, url_of


def test_what_ledger_and_optuna_do_not_agree_on_is_found(store: Store, make_spec: MakeSpec, change: Change) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2, 0.3))
    for _ in range(2):
        held = claim(store, study, worker)
        report(store, held, 0.5)
        store.trials.finish(held, "complete", reason="")
    assert store.problems(study) == []
    change(store, schema.slots_table.update().where(schema.slots_table.c.number == 0).values(state="failed"))
    change(store, schema.slots_table.update().where(schema.slots_table.c.number == 1).values(trial_id=None))
    assert store.problems(study) == [
        "trial 0 of study 's' is failed, and to Optuna trial 0, COMPLETE",
        "Optuna's trial 1 of study 's' has no slot: the answer does not count it",
    ]


def test_a_name_from_a_store_cannot_name_a_folder_elsewhere(store: Store, make_spec: MakeSpec) -> None:
    store.studies.create(make_spec(0.1), metadata={})
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE studies SET study_name = '../../evil'")
    with pytest.raises(UserError, match=r"study '../../evil' in .* is damaged: .* spec names it 's'"):
        store.studies.get("../../evil")


@only_sqlite
def test_the_check_finds_nothing_wrong_with_a_study_that_others_train_meanwhile(
    store: Store, make_spec: MakeSpec
) -> None:
    other = Store(url_of(store))
    for at in range(6):
        study, worker = begin(store, make_spec(0.1, 0.2, name=f"s{at}"))
        held = claim(other, study, worker)
        report(other, held, 0.5)

        def go_on(study: StudyRecord = study, worker: str = worker, held: Claim = held) -> None:
            other.trials.finish(held, "complete", reason="")
            claim(other, study, worker)

        with meanwhile(store, go_on, at=at):
            assert store.problems(study) == []


@only_sqlite
def test_the_trials_of_a_study_are_read_as_they_are_at_one_instant(store: Store, make_spec: MakeSpec) -> None:
    """A trial that is complete has its value, and one that is not has none, whenever another process ends it."""
    other = Store(url_of(store))
    for at in range(6):
        study, worker = begin(store, make_spec(0.1, name=f"s{at}"))
        held = claim(other, study, worker)
        report(other, held, 0.5)

        def end(held: Claim = held) -> None:
            report(other, held, 0.6, first=2)
            other.trials.finish(held, "complete", reason="")

        with meanwhile(store, end, at=at):
            (read,) = store.trials.get_all(study)
        assert (read.state, read.value, len(read.epochs), "ended" in read.attributes) in (
            ("running", None, 1, False),
            ("complete", 0.6, 2, True),
        )
