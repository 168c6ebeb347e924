"""The store as a whole: its folders and its check."""

from __future__ import annotations

import pytest

from hpo.errors import UserError
from hpo.store import schema
from hpo.store.store import Store
from tests.store.helpers import Change, MakeSpec, begin, claim, report


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
        "Optuna's trial 1 of study 's' has no slot",
    ]


def test_a_name_from_a_store_cannot_name_a_folder_elsewhere(store: Store, make_spec: MakeSpec) -> None:
    store.studies.create(make_spec(0.1), metadata={})
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE studies SET study_name = '../../evil'")
    with pytest.raises(UserError, match=r"study '../../evil' in .* is damaged: its spec names it 's'"):
        store.studies.get("../../evil")
