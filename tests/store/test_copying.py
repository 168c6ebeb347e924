"""Copies of a study in another store."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import pytest

from hpo.errors import UserError
from hpo.store.copying import copy_study
from hpo.store.store import Store
from tests.rows import slow_except
from tests.store.helpers import Interruption, MakeSpec, begin, claim, everything, interrupted, optuna_trials, report


@pytest.mark.parametrize("sampler", slow_except(["grid", "tpe"], "tpe"))
def test_a_copied_study_is_the_same_and_goes_on_in_the_other_store(
    store: Store, make_spec: MakeSpec, tmp_path: Path, sampler: str
) -> None:
    spec = make_spec(*[n / 10 for n in range(1, 7)]) if sampler == "grid" else make_spec(search={"trials": 6})
    study, worker = begin(store, spec)
    for value, state in ((0.5, "complete"), (0.4, "pruned"), (math.nan, "diverged"), (0.7, "failed")):
        held = claim(store, study, worker)
        report(store, held, 0.3, value)
        store.trials.finish(held, state, reason="because")
    running = claim(store, study, worker)
    report(store, running, 0.3)
    target = Store(f"sqlite:///{tmp_path}/other.db", create=True)
    begin(target, make_spec(0.1, name="another"))  # so that no id is the same by chance
    with pytest.raises(UserError, match="is in training"):
        copy_study(store.database, target.database, study, metadata={**study.metadata, "uid": "0123abcd"})
    store.trials.release(running)
    copied = copy_study(store.database, target.database, study, metadata={**study.metadata, "uid": "0123abcd"})
    before, after = store.trials.get_all(study), target.trials.get_all(copied)
    assert [(t.state, t.params, t.value, t.curves) for t in before] == [
        (t.state, t.params, t.value, t.curves) for t in after
    ]
    assert [t.params for t in optuna_trials(target)] == [t.params for t in optuna_trials(store)]
    assert target.problems(copied) == []
    assert (copied.spec, copied.key) == (study.spec, "s-0123abcd")
    again = claim(target, copied, target.workers.add(copied.study_id, device="cpu"))
    assert (again.number, again.attempt) == (4, 2)
    with pytest.raises(UserError, match="holds a study 's' already"):
        copy_study(store.database, target.database, study, metadata={**study.metadata, "uid": "0123abce"})


def test_a_copy_that_is_interrupted_leaves_nothing(store: Store, make_spec: MakeSpec, tmp_path: Path) -> None:
    study, worker = begin(store, make_spec(0.1, 0.2))
    held = claim(store, study, worker)
    report(store, held, 0.3)
    store.trials.release(held)
    target = Store(f"sqlite:///{tmp_path}/other.db", create=True)
    before = everything(target)
    for at in range(200):
        with suppress(Interruption), interrupted(target, at=at):
            copy_study(store.database, target.database, study, metadata={**study.metadata, "uid": "0123abcd"})
            break
        assert everything(target) == before
    assert at > 5
    assert everything(target) != before
