"""A race at its ledger: trials wait at rungs, and the same ones train on however many workers there are and die."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord
from tests.store.helpers import Change, begin, expire, only_sqlite, optuna_trials, trial

LR = {"low": 1e-5, "high": 1.0, "log": True}
Value = Callable[[float, int], float]


def race_spec(**sections: Any) -> StudySpec:
    """Return a race of five rates, which may have ten epochs: rungs are the epochs 1, 2 and 5."""
    settings = {"search": {"sampler": "race", "space": {"lr": LR}}, "training": {"epochs": 5}}
    return StudySpec.from_dict({"name": "s", "objective": {"function": "loop:train"}} | settings | sections)


def value_of(lr: float, epoch: int) -> float:
    """Return an accuracy that is best at 1e-4 in the first epoch, and at 1e-2 from then on."""
    return 0.9 - 0.1 * abs(LOG[lr] - (1 if epoch == 1 else 2)) - 0.1 / epoch


LOG = {1e-5 * 10 ** (index + 0.5): index for index in range(5)}
LOG = {float(f"{lr:.6g}"): index for lr, index in LOG.items()}


def train(store: Store, study: StudyRecord, claimed: Claim, *, value: Value = value_of) -> str:
    """Train a trial until it should stop or is complete, as a worker does; return the last verdict."""
    lr = store.trials.suggest(claimed, study.spec, attributes=lambda _: {})["lr"]
    last = store.trials.last_report(claimed)
    for epoch in range(1 + (0 if last is None else last[0]), 6):
        verdict = store.trials.report(
            claimed, study.spec, epoch=epoch, metrics={}, value=value(lr, epoch), may_prune=epoch < 5
        )
        if verdict != "go on":
            store.trials.release(claimed)
            return verdict
    store.trials.finish(claimed, "complete", reason="")
    return "complete"


def ends(store: Store, study: StudyRecord) -> list[tuple[str, list[int]]]:
    return [(trial.state, list(trial.epochs)) for trial in store.trials.get_all(study)]


ENDS = [("pruned", [1]), ("pruned", [1, 2]), ("complete", [1, 2, 3, 4, 5]), ("pruned", [1]), ("pruned", [1])]


def test_trials_wait_for_each_other_and_the_losers_end_with_the_race(store: Store) -> None:
    study, worker = begin(store, race_spec())
    claims = [store.trials.claim(study, worker) for _ in range(5)]
    first, *_, last = claims
    assert first is not None
    assert last is not None
    assert [train(store, study, claimed) for claimed in claims[:-1] if claimed] == ["wait"] * 4
    assert store.trials.counts(study.study_id) == {"waiting": 4, "running": 1}
    assert store.workers.num_claimable(study) == 0, "they wait for the fifth"
    assert store.trials.claim(study, worker) is None
    assert train(store, study, last) == "wait"
    assert store.workers.num_claimable(study) == 2
    second = [store.trials.claim(study, worker) for _ in range(3)]
    assert [claimed and claimed.number for claimed in second] == [1, 2, None]
    assert [train(store, study, claimed) for claimed in second if claimed] == ["wait", "complete"], "it leads at once"
    assert store.workers.num_claimable(study) == 4, "those that lost end with the next claim"
    assert store.trials.claim(study, worker) is None
    assert ends(store, study) == ENDS
    assert store.trials.num_left(study) == 0
    assert trial(store, study, 1).reason == "dropped by the race after epoch 2"
    assert trial(store, study, 1).value == pytest.approx(value_of(trial(store, study, 1).params["lr"], 2))
    assert [t.state for t in optuna_trials(store)].count(TrialState.PRUNED) == 4
    assert store.problems(study) == []


@pytest.mark.parametrize("num_workers", [1, 3, 8])
@only_sqlite
def test_workers_that_die_change_nothing_in_a_race(store: Store, change: Change, num_workers: int) -> None:
    """Check it for workers at any epoch, whose trials go on from any epoch before."""
    draw = random.Random(num_workers)
    study, _ = begin(store, race_spec())
    workers = [store.workers.add(study.study_id, device="cpu") for _ in range(num_workers)]
    held: dict[str, Claim] = {}
    next_epoch: dict[str, int] = {}
    while store.trials.num_left(study):
        worker = draw.choice(workers)
        if worker not in held:
            if (claimed := store.trials.claim(study, worker)) is not None:
                store.trials.suggest(claimed, study.spec, attributes=lambda _: {})
                last = store.trials.last_report(claimed)
                held[worker], next_epoch[worker] = claimed, draw.randint(1, 1 + (0 if last is None else last[0]))
            continue
        claimed, epoch = held[worker], next_epoch[worker]
        if epoch == 6:
            store.trials.finish(held.pop(worker), "complete", reason="")
            continue
        if draw.random() < 0.15:
            expire(store, held.pop(worker), change)
            store.workers.reap(study)
            continue
        value = value_of(trial(store, study, claimed.number).params["lr"], epoch)
        verdict = store.trials.report(claimed, study.spec, epoch=epoch, metrics={}, value=value, may_prune=epoch < 5)
        next_epoch[worker] += 1
        if verdict == "wait":
            store.trials.release(held.pop(worker))
    assert ends(store, study) == ENDS
    assert store.problems(study) == []


@only_sqlite
def test_a_stop_wins_over_a_rung(store: Store) -> None:
    study, worker = begin(store, race_spec())
    claimed = store.trials.claim(study, worker)
    assert claimed is not None
    store.studies.request_stop(study)
    assert train(store, study, claimed) == "stop"
    store.studies.start(study)
    numbers = []
    while (claimed := store.trials.claim(study, worker)) is not None:
        numbers.append(claimed.number)
        train(store, study, claimed)
    assert numbers[:4] == [1, 2, 3, 4], "the first one waits at its rung all the same"
    assert ends(store, study) == ENDS


@only_sqlite
def test_the_lower_loss_leads_where_values_are_the_same(store: Store) -> None:
    """Check it for a metric of which lower values are better, too, and for losses that are not finite."""
    objective = {"function": "loop:train", "metric": "mistakes", "direction": "minimize"}
    study, worker = begin(store, race_spec(objective=objective))
    for _ in range(5):
        claimed = store.trials.claim(study, worker)
        assert claimed is not None
        lr = store.trials.suggest(claimed, study.spec, attributes=lambda _: {})["lr"]
        loss = float("inf") if LOG[lr] == 2 else abs(LOG[lr] - 3.4)
        metrics = {"mistakes": 0.9, "val_loss": loss}
        assert store.trials.report(claimed, study.spec, epoch=1, metrics=metrics, value=0.9) in ("wait", "go on")
        store.trials.release(claimed)
    both = [store.trials.claim(study, worker) for _ in range(3)]
    assert [claimed and claimed.number for claimed in both] == [3, 4, None]


@only_sqlite
def test_accuracies_that_guessing_may_have_decide_nothing(store: Store) -> None:
    """Check that the lower loss leads among them, and that a higher accuracy leads whatever its loss."""
    settings = race_spec().frozen()
    settings.pop("objective")
    spec = StudySpec.from_dict(settings)
    metadata = {"num_classes": 10, "guess_accuracy": 0.1, "num_val": 100}
    study = store.studies.create(spec, metadata=metadata)
    worker = store.workers.add(study.study_id, device="cpu")
    for accuracy, loss in ((0.12, 2.31), (0.08, 2.27), (0.125, 2.3), (0.1, 2.29), (0.15, 2.4)):
        claimed = store.trials.claim(study, worker)
        assert claimed is not None
        store.trials.suggest(claimed, spec, attributes=lambda _: {})
        metrics = {"val_accuracy": accuracy, "val_loss": loss}
        store.trials.report(claimed, spec, epoch=1, metrics=metrics, value=accuracy)
        store.trials.release(claimed)
    both = [store.trials.claim(study, worker) for _ in range(3)]
    assert [claimed and claimed.number for claimed in both] == [1, 4, None]


@only_sqlite
def test_a_trial_that_failed_and_is_tried_again_joins_the_race_that_was_over(store: Store) -> None:
    study, worker = begin(store, race_spec())
    failed = False
    while (claimed := store.trials.claim(study, worker)) is not None:
        if claimed.number == 2 and not failed:
            store.trials.finish(claimed, "failed", reason="a bad day")
            failed = True
        else:
            train(store, study, claimed)
    assert [state for state, _ in ends(store, study)] == ["pruned", "complete", "failed", "pruned", "pruned"]
    store.studies.retry_failed(study)
    while (claimed := store.trials.claim(study, worker)) is not None:
        train(store, study, claimed)
    assert [state for state, _ in ends(store, study)].count("complete") >= 1
    assert store.trials.num_left(study) == 0
    assert store.problems(study) == []


@only_sqlite
def test_an_enqueued_trial_joins_the_race(store: Store) -> None:
    import optuna

    study, worker = begin(store, race_spec())
    for _ in range(5):
        claimed = store.trials.claim(study, worker)
        assert claimed is not None
        train(store, study, claimed)
    optuna.load_study(study_name="s", storage=store.storage).enqueue_trial({"lr": 0.02})
    assert store.workers.num_claimable(study) >= 1
    LOG[0.02] = 2
    while (claimed := store.trials.claim(study, worker)) is not None:
        train(store, study, claimed)
    assert len(ends(store, study)) == 6
    assert [state for state, _ in ends(store, study)].count("complete") == 1
    assert store.problems(study) == []


@only_sqlite
def test_a_race_cannot_be_enlarged_by_trials(store: Store) -> None:
    from hpo.errors import UserError

    study, _ = begin(store, race_spec())
    with pytest.raises(UserError, match="--trials cannot enlarge a race; study 's' has a budget of epochs"):
        store.searches.enlarge(study, 20)
    assert store.studies.create(race_spec(), metadata={}).study_id == study.study_id
