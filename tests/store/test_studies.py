"""Studies: created, joined, enlarged, stopped and started."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import optuna
import pytest
import sqlalchemy as sa

from hpo.errors import StudyStopped, UserError
from hpo.store import schema
from hpo.store.store import Store
from tests.rows import slow_except
from tests.store.helpers import MakeSpec, begin, claim, everything, report, url_of


def test_a_created_study_is_read_back_with_its_spec_and_facts(store: Store, make_spec: MakeSpec) -> None:
    spec = make_spec(0.1, 0.2, pruner={"name": "median"})
    store.studies.create(spec, metadata={"num_val": 7})
    study = Store(url_of(store)).studies.get("s")
    assert (study.spec, study.metadata["num_val"], study.stop) == (spec, 7, None)
    assert store.trials.counts(study.study_id) == {"waiting": 2}


def test_joining_the_same_spec_gives_the_same_study_and_changes_no_slot(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    claim(store, study, worker)
    assert store.studies.create(make_spec(0.1, 0.2), metadata={}).study_id == study.study_id
    assert store.trials.counts(study.study_id) == {"running": 1, "waiting": 1}


def test_joining_with_other_settings_is_refused_with_each_difference_and_nothing_written(
    store: Store, make_spec: MakeSpec
) -> None:
    store.studies.create(make_spec(0.1, 0.2), metadata={})
    before = everything(store)
    with pytest.raises(UserError, match=r"training\.epochs: 3 in the study, 5 here") as refusal:
        store.studies.create(make_spec(0.1, 0.2, epochs=5, pruner={"name": "asha"}), metadata={})
    assert "pruner.name: 'none' in the study, 'asha' here" in str(refusal.value)
    assert everything(store) == before


def test_an_unknown_study_is_refused_with_the_names_of_the_others(store: Store, make_spec: MakeSpec) -> None:
    for name in ("b", "a"):
        store.studies.create(make_spec(0.1, name=name), metadata={})
    with pytest.raises(UserError, match=r"no study 'c' in .*; there are: a, b$"):
        store.studies.get("c")
    assert sorted(study.name for study in store.studies.get_all()) == ["a", "b"]


def test_enlarging_adds_waiting_slots_and_keeps_what_was_trained(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(search={"trials": 2}))
    done = claim(store, study, worker)
    report(store, done, 0.5)
    store.trials.finish(done, "complete", reason="")
    store.searches.enlarge(study, 4)
    study = store.studies.get("s")
    assert study.spec.num_trials == 4
    assert [t.state for t in store.trials.get_all(study)] == ["complete", "waiting", "waiting", "waiting"]
    with pytest.raises(UserError, match=r"at least 4.* got 3"):
        store.searches.enlarge(study, 3)
    grid = store.studies.create(make_spec(0.1, name="grid"), metadata={})
    with pytest.raises(UserError, match="cannot enlarge a grid"):
        store.searches.enlarge(grid, 4)


def test_a_stopped_study_gives_no_slot_until_it_is_started_again(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    held = claim(store, study, worker)
    store.studies.request_stop(study)
    assert store.studies.is_stopping(study.study_id)
    assert store.trials.claim(study, worker) is None
    report(store, held, 0.5)  # who holds a slot may still end it
    store.trials.finish(held, "complete", reason="")
    store.studies.start(study)
    assert not store.studies.is_stopping(study.study_id)
    assert store.trials.claim(study, worker) is not None


def test_several_may_enlarge_a_study_at_once(store: Store, make_spec: MakeSpec) -> None:
    study, _ = begin(store, make_spec(search={"trials": 2}))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Store(url_of(store)).searches.enlarge(study, 9), range(4)))
    assert store.trials.counts(study.study_id) == {"waiting": 9}
    assert store.studies.get("s").spec.num_trials == 9


@pytest.mark.parametrize("column", ["spec", "metadata"])
@pytest.mark.parametrize("content", slow_except(["{broken", "[1]", "{}"], "{broken"))
def test_one_damaged_study_does_not_keep_anybody_from_the_others(
    store: Store, make_spec: MakeSpec, column: str, content: str
) -> None:
    store.studies.create(make_spec(0.1, name="good"), metadata={})
    bad = store.studies.create(make_spec(0.1, name="bad"), metadata={})
    with store.storage.engine.begin() as connection:
        connection.execute(
            schema.studies_table.update().where(schema.studies_table.c.study_id == bad.study_id), {column: content}
        )
    assert [study.name for study in store.studies.get_all()] == ["good"]
    (damage,) = store.studies.load_all()[1].values()
    assert "study 'bad'" in damage
    (problem,) = store.check()
    assert "study 'bad'" in problem
    with pytest.raises(UserError, match="study 'bad'"):
        store.studies.get("bad")


def delete_by(who: str, store: Store, name: str) -> None:
    if who == "hpo":
        store.studies.delete(name)
    else:
        optuna.delete_study(study_name=name, storage=url_of(store))


@pytest.mark.parametrize("who", ["hpo", "optuna"])
def test_a_deleted_study_leaves_nothing_and_can_be_made_anew(store: Store, make_spec: MakeSpec, who: str) -> None:
    empty = everything(store)
    study, worker = begin(store, make_spec(0.1, 0.2))
    report(store, claim(store, study, worker), 0.5)
    store.workers.reap(study, dead=dict.fromkeys(store.workers.in_training(study), "gone"))
    delete_by(who, store, "s")
    opened = Store(url_of(store), create=True)
    assert {table: rows for table, rows in everything(opened).items() if table != "alembic_version"} == {
        table: rows for table, rows in empty.items() if table != "alembic_version"
    }
    again, worker = begin(opened, make_spec(0.1, 0.2, epochs=7))
    assert opened.trials.counts(again.study_id) == {"waiting": 2}
    with suppress(StudyStopped):  # a worker that has not noticed must not train the new one's trials
        assert opened.trials.claim(study, worker) is None
    with pytest.raises(StudyStopped, match="study 's' was deleted"):
        store.studies.check_exists(study)


@pytest.mark.parametrize("is_here", [True, False])
def test_a_process_that_read_a_deleted_study_shows_the_values_of_the_next_one(
    store: Store, make_spec: MakeSpec, is_here: bool
) -> None:
    reader = store if is_here else Store(url_of(store))
    for value in (0.9, 0.1):
        study, worker = begin(store, make_spec(0.1, 0.2))
        held = claim(store, study, worker)
        report(store, held, value)
        store.trials.finish(held, "complete", reason="")
        assert [t.value for t in reader.trials.get_all(reader.studies.get("s"))] == [value, None]
        store.studies.delete("s")


def test_another_study_of_optunas_is_not_taken_for_the_one_that_was_deleted(store: Store, make_spec: MakeSpec) -> None:
    begin(store, make_spec(0.1))
    delete_by("optuna", store, "s")
    optuna.create_study(study_name="s", storage=url_of(store))
    assert store.studies.get_all() == []
    with pytest.raises(UserError, match="that hpo did not make"):
        store.studies.create(make_spec(0.1), metadata={})


def test_a_study_in_training_is_not_deleted(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1))
    claim(store, study, worker)
    with pytest.raises(UserError, match="1 trials in training; end them with: hpo stop s"):
        store.studies.delete("s")
    with pytest.raises(UserError, match="no study 'other'"):
        store.studies.delete("other")


def test_failed_trials_are_tried_again_under_their_numbers(store: Store, make_spec: MakeSpec) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    for _ in range(2):
        store.trials.finish(claim(store, study, worker), "failed", reason="no luck", failure_key="same")
    elsewhere = Store(url_of(store))
    assert [t.state for t in elsewhere.trials.get_all(study)] == ["failed", "failed"]  # and it keeps Optuna's in mind
    store.studies.retry_failed(study)
    held = [claim(opened, study, worker) for opened in (store, elsewhere)]
    assert [(one.number, one.attempt) for one in held] == [(0, 2), (1, 2)]
    for opened, one in zip((store, elsewhere), held, strict=True):
        report(opened, one, 0.5)
        opened.trials.finish(one, "complete", reason="")
    for opened in (store, elsewhere):
        assert [(t.state, t.value, t.error) for t in opened.trials.get_all(study)] == [("complete", 0.5, None)] * 2
    assert store.problems(study) == []


def test_all_studies_and_their_counts_are_read_by_as_many_statements_as_one(store: Store, make_spec: MakeSpec) -> None:
    statements = list[str]()

    def num_statements() -> int:
        statements.clear()
        studies, damages = store.studies.load_all()
        counts = store.studies.counts(studies)
        assert damages == {}
        assert [counts[study.study_id] for study in studies] == [store_counts[study.study_id] for study in studies]
        return len(statements)

    store_counts = {}
    sa.event.listen(store.storage.engine, "before_cursor_execute", lambda *of: statements.append(of[2]))
    found = []
    for name in ("a", "b", "c"):
        study, worker = begin(store, make_spec(0.1, 0.2, name=name))
        if name == "b":
            claim(store, study, worker)
        store_counts[study.study_id] = store.trials.counts(study.study_id)
        found.append(num_statements())
    assert store_counts[study.study_id] == {"waiting": 2}
    assert found == [8, 8, 8]
