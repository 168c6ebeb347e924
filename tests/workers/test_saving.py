"""Saving takes at most its share of a trial's training, and a kill costs no more than that allows."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hpo.config.study_spec import StudySpec
from hpo.search.pruners import PRUNERS, is_rung, may_prune_after
from hpo.store.store import Store
from hpo.train.checkpoint import CheckpointFolder
from hpo.train.config import EpochResult
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.plain import PlainEngine
from hpo.workers.saving import MAX_SAVING_SHARE, SavingCost, SavingSchedule
from tests.workers.training import engine_study, work


class KnownCost(SavingCost):
    """A cost that is given."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.given = seconds

    def seconds(self) -> float:
        return self.given


def saved_epochs(
    epochs_s: Iterable[float], every: Any = "auto", *, cost_s: float = 0.0, rungs: Iterable[int] = ()
) -> list[int]:
    """Return after which epochs a trial is saved, one of whose epochs takes so long, on its share of the device."""
    schedule = SavingSchedule(every, cost=KnownCost(cost_s), epoch=0, is_rung={*rungs}.__contains__)
    found: list[int] = []
    for epoch, seconds in enumerate(epochs_s, 1):
        schedule.add_epoch(epoch, seconds=seconds)
        assert schedule.has_unsaved
        if schedule.is_due():
            schedule.note_saved()
            assert not schedule.has_unsaved
            found.append(epoch)
    return found


@pytest.mark.parametrize("seed", range(50))
def test_saving_takes_at_most_its_share_and_a_kill_costs_little_more_than_that_allows(seed: int) -> None:
    draw = random.Random(seed)
    cost_s, epoch_s = 10 ** draw.uniform(-3, 3), 10 ** draw.uniform(-3, 3)
    epochs_s = [epoch_s * draw.uniform(0.1, 1.9) for _ in range(60)]
    saved = saved_epochs(epochs_s, cost_s=cost_s)
    assert len(saved) * cost_s <= MAX_SAVING_SHARE * sum(epochs_s) * (1 + 1e-9)
    for before, after in itertools.pairwise([0, *saved, len(epochs_s) + 1]):
        # A kill after the report of an epoch, and before its checkpoint is on disk, costs these; the last is whole.
        unsaved_s = epochs_s[before:after]
        assert sum(unsaved_s[:-1]) <= cost_s / MAX_SAVING_SHARE * (1 + 1e-9)


def test_the_documents_say_what_saving_and_a_kill_cost() -> None:
    docs = Path(__file__).parents[2] / "docs"
    times = f"at most {1 / MAX_SAVING_SHARE:.0f} times as long as saving it takes"
    assert times in (docs / "guides/distributed.md").read_text()
    share = f"at most {MAX_SAVING_SHARE * 100:.0f} % of its time"
    assert share in (docs / "concepts/resume.md").read_text()


def test_a_number_of_epochs_means_exactly_that() -> None:
    assert saved_epochs([1e-9] * 8, 3, cost_s=1e9, rungs=[4]) == [3, 6]


def test_auto_saves_at_each_rung_whatever_that_costs() -> None:
    assert saved_epochs([1.0] * 10, cost_s=1e9, rungs=[1, 3, 9]) == [1, 3, 9]
    assert saved_epochs([1.0] * 12, cost_s=0.2, rungs=[3]) == [3, 7, 11]


def test_a_trial_that_was_resumed_has_nothing_to_save() -> None:
    assert not SavingSchedule("auto", cost=SavingCost(), epoch=3, is_rung=lambda epoch: True).has_unsaved


def test_a_rung_is_one_of_few_epochs_at_which_the_pruner_judges(make_spec: Callable[..., StudySpec]) -> None:
    for name in PRUNERS:
        options = {"lower": 0.1} if name == "threshold" else {}
        spec = make_spec(0.1, epochs=9, pruner={"name": name, **options})
        rungs = [epoch for epoch in range(1, 10) if is_rung(epoch, spec)]
        assert rungs == ([1, 3, 9] if name in ("asha", "hyperband") else [])
        assert all(may_prune_after(epoch, spec) for epoch in rungs)


def test_one_slow_file_does_not_make_saving_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are of a clock that this test sets."""
    now_s = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    cost = SavingCost()
    assert cost.seconds() == 0.0
    for snapshot_s, file_s in [(0.01, 0.1), (0.01, 3600.0), (0.02, 0.2)]:
        with cost.timing_snapshot():
            now_s += snapshot_s
        with cost.timing_file():
            now_s += file_s
    with pytest.raises(OSError, match="full"), cost.timing_file():
        raise OSError("the disk is full")
    assert cost.seconds() == pytest.approx(0.21)


# With a worker


@pytest.fixture
def slow_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each epoch of a lane take a second, by its own account."""
    import dataclasses

    run_epoch = LaneEngine.run_epoch

    def timed(self: LaneEngine) -> list[EpochResult]:
        return [dataclasses.replace(result, seconds=1.0) for result in run_epoch(self)]

    monkeypatch.setattr(LaneEngine, "run_epoch", timed)


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the trial and the epoch of each checkpoint that is written, in order."""
    written: list[tuple[int, int]] = []
    save = CheckpointFolder.save

    def noting(self: CheckpointFolder, checkpoint: Any) -> None:
        save(self, checkpoint)
        written.append((int(self.url.rpartition("/")[2]), checkpoint.epoch))

    monkeypatch.setattr(CheckpointFolder, "save", noting)
    return written


def costs(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have saving take so long, as soon as a file was written."""
    monkeypatch.setattr(SavingCost, "seconds", lambda self: seconds if self._files_s else 0.0)


@pytest.mark.usefixtures("slow_epochs", "prompt_reports")
def test_a_worker_saves_as_often_as_saving_is_cheap(
    store: Store, monkeypatch: pytest.MonkeyPatch, saves: list[tuple[int, int]]
) -> None:
    """The first epoch shows what it costs: 0.15 s, of which 5 % are of three epochs; and the last is saved."""
    costs(monkeypatch, 0.15)
    work(store, engine_study(store, 1e-3, epochs=9))
    assert saves == [(0, 1), (0, 4), (0, 7), (0, 9)]


@pytest.mark.slow
@pytest.mark.usefixtures("slow_epochs", "prompt_reports")
def test_trials_of_a_stack_share_the_time_that_saving_may_take(
    store: Store, monkeypatch: pytest.MonkeyPatch, saves: list[tuple[int, int]]
) -> None:
    costs(monkeypatch, 0.05)
    study = engine_study(store, 1e-4, 3e-4, 1e-3, epochs=8, lanes=3, keep_best=3)
    trials = work(store, study)
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert sorted(saves) == [(number, epoch) for number in range(3) for epoch in (1, 4, 7, 8)]


@pytest.mark.usefixtures("slow_epochs", "prompt_reports")
def test_what_a_kill_cost_is_said_in_epochs_and_seconds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    costs(monkeypatch, 0.2)
    study = engine_study(store, 1e-3, epochs=6)
    run_epoch, killed = PlainEngine.run_epoch, ["once"]

    def killed_in_the_fourth(self: PlainEngine) -> list[EpochResult]:
        assert self._lane is not None
        if self._lane.epoch == 3 and killed:
            killed.pop()
            raise ValueError("as a kill costs")
        return run_epoch(self)

    monkeypatch.setattr(PlainEngine, "run_epoch", killed_in_the_fourth)
    (trial,) = work(store, study)
    assert (trial.state, trial.epochs) == ("complete", [1, 2, 3, 4, 5, 6])
    assert [attempt.resumed_from for attempt in trial.attempts] == [0, 1]
    assert [attempt.note for attempt in trial.attempts] == [None, "epochs 2 to 3 are trained again (2.0 s)"]


@pytest.mark.usefixtures("slow_epochs", "prompt_reports")
def test_a_worker_that_leaves_saves_whatever_that_costs(
    store: Store, monkeypatch: pytest.MonkeyPatch, saves: list[tuple[int, int]]
) -> None:
    costs(monkeypatch, 1e9)
    study = engine_study(store, 1e-3, epochs=6)
    work(store, study, should_stop=lambda: len(store.trials.get_all(study)[0].epochs) >= 3)
    assert saves == [(0, 1), (0, 3)]
    (trial,) = work(store, study)
    assert [attempt.resumed_from for attempt in trial.attempts] == [0, 3]
    assert [attempt.note for attempt in trial.attempts] == [None, None]


@pytest.mark.usefixtures("slow_epochs", "prompt_reports")
def test_a_worker_saves_at_each_rung(
    store: Store, monkeypatch: pytest.MonkeyPatch, saves: list[tuple[int, int]]
) -> None:
    costs(monkeypatch, 1e9)
    asha = {"name": "asha", "min_epochs": 2, "reduction_factor": 2}
    work(store, engine_study(store, 1e-3, epochs=6, pruner=asha))
    assert saves == [(0, 1), (0, 2), (0, 4), (0, 6)]


def test_what_a_gpus_copy_raises_fails_the_trial_and_not_the_worker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised in the thread that writes; see `hpo.train.snapshot`."""
    from hpo.train.snapshot import Snapshot

    writers = set()

    def broken(self: Snapshot) -> None:
        writers.add(threading.current_thread().name)
        raise RuntimeError("the copy failed")

    monkeypatch.setattr(Snapshot, "checkpoint", broken)
    (trial,) = work(store, engine_study(store, 1e-3))
    assert (trial.state, trial.reason, len(trial.attempts)) == ("failed", "RuntimeError: the copy failed", 2)
    assert {name.rpartition("_")[0] for name in writers} == {"checkpoints"}
