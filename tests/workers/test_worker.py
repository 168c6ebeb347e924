"""The worker's loop over a user's function and over the engine: how trials end, whatever the training code does."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from hpo.api import exporting, reading, stores
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store import database, schema
from hpo.store import ledger as ledger_module
from hpo.store.store import Store
from hpo.store.trials import Trials
from hpo.study.records import StudyRecord, TrialRecord
from hpo.train.checkpoint import Checkpoint, CheckpointFolder
from hpo.workers import lane_runner
from hpo.workers import worker as worker_module
from hpo.workers.checkpoints import StudyCheckpoints
from hpo.workers.worker import Worker

MakeSpec = Callable[..., StudySpec]
WriteLoop = Callable[[str], None]


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteLoop]:
    """Writes the module `loop`, whose function `train` the studies of `make_spec` call."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body: str) -> None:
        lines = "\n".join("    " + line for line in body.strip().splitlines())
        (tmp_path / "loop.py").write_text(f"import math, pathlib, sys, time\ndef train(trial):\n{lines}\n")

    yield write
    sys.modules.pop("loop", None)


def work(store: Store, study: StudyRecord, *, should_stop: Callable[[], bool] = lambda: False) -> list[TrialRecord]:
    Worker(store, study, device="cpu", torch_device="cpu", should_stop=should_stop).run()
    return store.trials.get_all(study)


@pytest.fixture
def prompt_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """No epoch begins before the one before is in the store, so that `should_stop` can name an epoch."""
    monkeypatch.setattr(lane_runner, "MAX_REPORT_SHARE", 1e6)


@contextmanager
def working(store: Store, study: StudyRecord, **options: Any) -> Iterator[None]:
    """A worker in a thread, which has ended after the block."""
    thread = threading.Thread(target=lambda: work(store, study, **options), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=180)
        assert not thread.is_alive()


def lease(store: Store) -> float:
    with store.storage.engine.connect() as connection:  # type: ignore[attr-defined]
        return float(connection.execute(sa.select(schema.slots.c.lease_until)).scalars().first() or 0)


# How a function's trials end


def test_an_exception_fails_its_trial_with_the_traceback_and_the_study_goes_on(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
if trial.params["lr"] == 0.1:
    raise ValueError("no such\\nluck")
trial.report(1, val_accuracy=0.5)
""")
    study = store.studies.create(make_spec(0.1, 0.2), facts={})
    failed, fine = work(store, study)
    assert (failed.state, failed.reason, failed.value) == ("failed", "ValueError: no such", None)
    assert failed.error is not None
    assert 'loop.py", line 4, in train' in failed.error
    assert (fine.state, fine.value) == ("complete", 0.5)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("sys.exit('enough')", "SystemExit: enough"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise MemoryError", "out of memory"),
        ("return", "UserError: loop:train returned without a trial.report(...)"),
        ("trial.report(1)", "UserError: trial.report must be given val_accuracy=..."),
        ("trial.report(0, val_accuracy=1)", "UserError: trial.report: epoch must be an integer of at least 1, got 0"),
        ("trial.report(1, val_accuracy='high')", "ValueError: could not convert string to float: 'high'"),
    ],
)
def test_whatever_a_function_does_wrong_fails_its_trial_and_not_the_worker(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, statement: str, reason: str
) -> None:
    loop(statement)
    (failed,) = work(store, store.studies.create(make_spec(0.1), facts={}))
    assert failed.state == "failed"
    assert failed.reason is not None
    assert failed.reason.startswith(reason)


def test_a_value_that_is_not_finite_ends_the_trial_as_diverged(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
assert not trial.report(1, val_accuracy=0.5)
assert trial.report(2, val_accuracy=math.nan)
assert trial.report(3, val_accuracy=0.9)
""")
    (diverged,) = work(store, store.studies.create(make_spec(0.1), facts={}))
    assert (diverged.state, diverged.reason) == ("diverged", "val_accuracy = nan in epoch 2")
    assert (diverged.value, diverged.curves["val_accuracy"]) == (None, [0.5, None])


def test_a_loop_that_is_told_to_end_and_goes_on_records_nothing_more(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
for epoch in range(1, trial.epochs + 1):
    trial.report(epoch, val_accuracy=epoch / 100)
""")
    pruner = {"name": "threshold", "lower": 0.5, "warmup_epochs": 2}
    (pruned,) = work(store, store.studies.create(make_spec(0.1, epochs=9, pruner=pruner), facts={}))
    assert pruned.state == "pruned"
    assert pruned.reason == f"threshold pruner after epoch {pruned.epochs[-1]}"
    assert pruned.epochs[-1] < 5
    assert pruned.value == pruned.epochs[-1] / 100


@pytest.mark.parametrize(("last", "state", "value"), [(0.7, "complete", 0.7), (float("nan"), "diverged", None)])
def test_a_trial_that_was_killed_after_its_last_report_ends_with_it(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, last: float, state: str, value: float | None
) -> None:
    loop("return  # the checkpoint says that nothing is left to train")
    study = store.studies.create(make_spec(0.1, epochs=2), facts={})
    killed = store.trials.claim(study, store.workers.add(study.study_id, device="cpu"))
    assert killed is not None
    store.trials.suggest(killed, study.spec, attributes=lambda _: {})
    for epoch, number in ((1, 0.6), (2, last)):
        store.trials.report(killed, study.spec, epoch=epoch, metrics={"val_accuracy": number}, value=number)
    store.trials.release(killed)
    (ended,) = work(store, study)
    assert (ended.state, ended.value, ended.attempt) == (state, value, 2)


def test_a_trial_is_given_and_recorded_with_what_it_depends_on(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, tmp_path: Path
) -> None:
    loop("""
assert (trial.device, trial.epochs, trial.attempt) == ("cpu", 3, 1)
assert trial.checkpoint_dir.is_dir() and not list(trial.checkpoint_dir.iterdir())
(trial.checkpoint_dir / "seed").write_text(str(trial.seed))
trial.report(1, val_accuracy=trial.params["lr"])
""")
    study = store.studies.create(make_spec(0.1, 0.2), facts={})
    trials = work(store, study)
    for trial in trials:
        folder = store.folder(study) / "trials" / f"{trial.number:04d}"
        assert (folder / "seed").read_text() == str(trial.attributes["seed"])
        assert (trial.attributes["device"], trial.attributes["pid"]) == ("cpu", os.getpid())
        assert trial.attributes["host"] == socket.gethostname()
        assert {"python", "optuna", "torch"} <= trial.attributes["versions"].keys()
        assert "git_revision" in trial.attributes
    assert len({trial.attributes["seed"] for trial in trials}) == 2


# Stopping

HELD = """
for epoch in range(1, trial.epochs + 1):
    if trial.report(epoch, val_accuracy=epoch):
        return
    while epoch == 1 and not pathlib.Path(__file__).with_name("go").exists():
        time.sleep(0.01)
"""


def test_a_worker_that_is_to_stop_gives_its_trial_back_at_the_next_report(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    loop(HELD)
    study = store.studies.create(make_spec(0.1, 0.2), facts={})
    with working(store, study):
        wait_for(lambda: store.trials.get_all(study)[0].epochs)
        store.studies.request_stop(study)
        (tmp_path / "go").touch()
    assert [(trial.state, trial.epochs) for trial in store.trials.get_all(study)] == [
        ("waiting", [1, 2]),
        ("waiting", []),
    ]
    assert store.workers.get_all(study) == []
    store.studies.start(study)
    assert [(trial.state, trial.attempt) for trial in work(store, study)] == [("complete", 2), ("complete", 1)]


def test_a_trial_that_had_its_last_epoch_is_complete_even_where_the_worker_is_to_stop(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("trial.report(trial.epochs, val_accuracy=0.5)")
    study = store.studies.create(make_spec(0.1, 0.2), facts={})
    trials = work(store, study, should_stop=lambda: store.trials.get_all(study)[0].state != "waiting")
    assert [trial.state for trial in trials] == ["complete", "waiting"]


# Leases


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_lease_is_renewed_during_a_long_epoch_also_after_database_errors(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, tmp_path: Path,
    wait_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for module in (ledger_module, worker_module):
        monkeypatch.setattr(module, "LEASE_S", 0.4)
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    loop(HELD)
    study = store.studies.create(make_spec(0.1), facts={})
    impatient = Store(store.url.render_as_string(hide_password=False))
    with working(impatient, study):
        wait_for(lambda: store.trials.get_all(study)[0].epochs)
        first = lease(store)
        wait_for(lambda: lease(store) > first)
        writer = sqlite3.connect(store.url.database or "")
        writer.execute("BEGIN IMMEDIATE")
        wait_for(lambda: "the leases could not be renewed" in caplog.text)
        writer.close()
        blocked = lease(store)
        wait_for(lambda: lease(store) > blocked)
        (tmp_path / "go").touch()
    (trial,) = store.trials.get_all(study)
    assert (trial.state, trial.attempt) == ("complete", 1)


SWALLOWS_EXCEPTIONS = """
for epoch in range(1, trial.epochs + 1):
    try:
        trial.report(epoch, val_accuracy=epoch)
    except Exception:
        pass
    while epoch == 1 and not pathlib.Path(__file__).with_name("go").exists():
        time.sleep(0.01)
"""


@pytest.mark.parametrize("code", [HELD, SWALLOWS_EXCEPTIONS], ids=["plain", "swallows exceptions"])
def test_a_trial_that_was_given_to_another_worker_is_dropped_without_a_trace(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, tmp_path: Path,
    wait_for: Callable[..., Any], change: Callable[..., None], code: str,
) -> None:  # fmt: skip
    loop(code)
    study = store.studies.create(make_spec(0.1), facts={})
    other = store.workers.add(study.study_id, device="cpu")
    with working(store, study):
        wait_for(lambda: store.trials.get_all(study)[0].epochs)
        change(store, schema.slots.update().values(lease_until=0))
        store.workers.reap(study)
        taken = store.trials.claim(study, other)
        assert taken is not None
        (tmp_path / "go").touch()
        wait_for(lambda: len(store.workers.get_all(study)) == 2)
        store.trials.report(taken, study.spec, epoch=1, metrics={"val_accuracy": 0.9}, value=0.9)
        store.trials.finish(taken, "complete", reason="by the other")
    (trial,) = store.trials.get_all(study)
    assert (trial.state, trial.attempt, trial.value, trial.epochs) == ("complete", 2, 0.9, [1])


# The engine


def engine_study(
    store: Store,
    *lrs: float,
    name: str = "digits",
    keep_best: int = 1,
    lanes: int | str = 1,
    pruner: dict[str, Any] | None = None,
    **training: Any,
) -> StudyRecord:
    spec = StudySpec.from_dict(
        {
            "name": name,
            "pruner": pruner or {"name": "none"},
            "engine": {"lanes": lanes},
            "search": {"sampler": "grid", "space": {"lr": list(lrs)}},
            "model": {"name": "article_cnn", "width": 0.05},
            "data": {"name": "digits", "train_samples": 200, "validation_fraction": 0.2},
            "training": {"epochs": 2, "optimizer": "adam", "batch_size": 50, **training},
            "checkpoints": {"keep_best": keep_best},
        }
    )
    return store.studies.create(spec, facts={})


def test_the_engine_reports_every_epoch_of_every_trial(store: Store) -> None:
    trials = work(store, engine_study(store, 1e-3, 1e30))
    assert [trial.state for trial in trials] == ["complete", "diverged"]
    assert trials[0].epochs == [1, 2]
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds"} <= trials[0].curves.keys()
    assert trials[0].value == trials[0].curves["val_accuracy"][-1]
    assert trials[1].value is None


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_claim_that_is_lost_before_training_begins_does_not_end_the_worker(store: Store) -> None:
    study = engine_study(store, 1e-3, 1e-4)
    with store.storage.engine.begin() as connection:  # type: ignore[attr-defined]
        connection.exec_driver_sql(
            "CREATE TRIGGER another_is_faster AFTER UPDATE OF state ON hpo_slots "
            "WHEN new.number = 0 AND new.attempt = 1 "
            "BEGIN UPDATE hpo_slots SET attempt = 2, worker_id = 'another' WHERE number = 0; END"
        )
    trials = work(store, study, should_stop=lambda: store.trials.get_all(study)[1].state == "complete")
    assert [(trial.state, trial.worker_id == "another") for trial in trials] == [("running", True), ("complete", False)]


# What no exception handler expects


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("raise GeneratorExit", "GeneratorExit: "),
        ("raise __import__('sqlalchemy').exc.OperationalError('mine', {}, Exception('mine'))", "OperationalError: "),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "Mute: "),
    ],
)
def test_whatever_a_loop_raises_ends_its_trial_and_not_the_study(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, line: str, reason: str
) -> None:
    loop(f"if trial.number == 0: {line}\ntrial.report(1, val_accuracy=0.5)")
    first, second = work(store, store.studies.create(make_spec(0.1, 0.2), facts={}))
    assert (first.state, second.state) == ("failed", "complete")
    assert str(first.reason).startswith(reason)


def test_a_loop_is_never_given_another_studys_checkpoints(tmp_path: Path, make_spec: MakeSpec, loop: WriteLoop) -> None:
    """Not those of a study of the same name in another database beside it, nor of one that was deleted."""
    loop("""
assert not list(trial.checkpoint_dir.iterdir())
(trial.checkpoint_dir / "last.pt").touch()
trial.report(1, val_accuracy=0.5)
""")
    for name in ("a", "b", "a"):
        (tmp_path / f"{name}.db").unlink(missing_ok=True)
        store = Store(f"sqlite:///{tmp_path}/{name}.db", create=True)
        (trial,) = work(store, store.studies.create(make_spec(0.1), facts={}))
        assert trial.state == "complete", trial.error


# Retries, and what goes on from a checkpoint

NUMBER_OF_ITS_ATTEMPTS = """
if trial.attempt == 1:
    raise ValueError("this time")
trial.report(1, val_accuracy=trial.attempt)
"""


def test_a_trial_that_an_exception_ended_is_tried_again(store: Store, make_spec: MakeSpec, loop: WriteLoop) -> None:
    loop(NUMBER_OF_ITS_ATTEMPTS)
    (trial,) = work(store, store.studies.create(make_spec(0.1), facts={}))
    assert (trial.state, trial.value, trial.error) == ("complete", 2.0, None)
    assert [attempt.outcome for attempt in trial.attempts] == ["ValueError: this time", "complete"]
    assert "raise ValueError" in str(trial.attempts[0].error)


def test_what_ran_out_of_memory_is_tried_again_alone_and_last(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
if trial.attempt == 1 and trial.number == 0:
    raise MemoryError
trial.report(1, val_accuracy=time.time())
""")
    trials = work(store, store.studies.create(make_spec(0.1, 0.2, 0.3, search={"retries": 0}), facts={}))
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert [attempt.outcome for attempt in trials[0].attempts] == ["out of memory", "complete"]
    assert (trials[0].value or 0) > max(trial.value or 0 for trial in trials[1:])


def uninterrupted(tmp_path: Path, *lrs: float, **settings: Any) -> tuple[list[TrialRecord], dict[int, Checkpoint]]:
    store = Store(f"sqlite:///{tmp_path}/uninterrupted/hpo.db", create=True)
    study = engine_study(store, *lrs, **settings)
    return work(store, study), final_checkpoints(store, study)


def final_checkpoints(store: Store, study: StudyRecord) -> dict[int, Checkpoint]:
    found = {}
    for trial in store.trials.get_all(study):
        config = study.spec.trial_config(trial.params, seed=trial.attributes["seed"])
        url = f"{store.checkpoints_url(study)}/{trial.number:06d}"
        identity = {"study": study.facts["uid"], "trial": trial.number}
        checkpoint, notes = CheckpointFolder(url, identity=identity).load(config)
        assert notes == []
        if checkpoint is not None:
            found[trial.number] = checkpoint
    return found


def parameters(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dict(checkpoint.state["model"])


def curves(trial: TrialRecord) -> dict[str, Any]:
    return {name: values for name, values in trial.curves.items() if name != "seconds"}


@pytest.mark.usefixtures("prompt_reports")
@pytest.mark.parametrize("checkpoint_epochs", [1, 3])
def test_a_trial_that_is_let_go_is_saved_and_goes_on_with_its_next_epoch_bit_for_bit(
    store: Store, tmp_path: Path, checkpoint_epochs: int
) -> None:
    (tmp_path / "uninterrupted").mkdir()
    settings = {"epochs": 5, "checkpoint_epochs": checkpoint_epochs, "schedule": "cosine"}
    (expected,), expected_final = uninterrupted(tmp_path, 1e-3, **settings)
    study = engine_study(store, 1e-3, **settings)
    for epochs in (1, 2, 4):
        (interrupted,) = work(
            store, study, should_stop=lambda n=epochs: len(store.trials.get_all(study)[0].epochs) >= n
        )
        assert (interrupted.state, interrupted.epochs) == ("waiting", list(range(1, epochs + 1)))
    (trial,) = work(store, study)
    assert [attempt.resumed_from for attempt in trial.attempts] == [0, 1, 2, 4]
    assert [attempt.outcome for attempt in trial.attempts] == ["released"] * 3 + ["complete"]
    assert all(attempt.note is None for attempt in trial.attempts)
    assert (curves(trial), trial.value) == (curves(expected), expected.value)
    final = final_checkpoints(store, study)
    for name, tensor in parameters(expected_final[0]).items():
        assert torch.equal(parameters(final[0])[name], tensor)


def test_a_trial_that_was_lost_between_its_last_epoch_and_its_end_is_not_trained_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = engine_study(store, 1e-3)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            work(store, study)
    (trial,) = work(store, study)
    assert (trial.state, trial.epochs) == ("complete", [1, 2])
    assert trial.attempts[-1].resumed_from == 2


@pytest.mark.usefixtures("prompt_reports")
def test_a_trial_whose_checkpoints_are_elsewhere_starts_again_and_the_store_says_so(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = engine_study(store, 1e-3)
    work(store, study, should_stop=lambda: len(store.trials.get_all(study)[0].epochs) >= 1)
    monkeypatch.setattr(Store, "folder", lambda self, study: tmp_path / "another machine")
    (trial,) = work(store, study)
    assert (trial.state, trial.epochs) == ("complete", [1, 2])
    assert trial.attempts[-1].resumed_from == 0
    assert trial.attempts[-1].note == (
        f"started again after 1 epochs: {socket.gethostname()} finds no checkpoint in "
        f"{tmp_path}/another machine/checkpoints"
    )


@pytest.mark.usefixtures("prompt_reports")
def test_an_epoch_that_the_database_has_lost_is_reported_from_the_checkpoint(
    store: Store, change: Callable[..., None]
) -> None:
    """As SQLite may in a power cut: the checkpoint is on disk, the report is not."""
    study = engine_study(store, 1e-3, epochs=3)
    work(store, study, should_stop=lambda: len(store.trials.get_all(study)[0].epochs) >= 2)
    before = store.trials.get_all(study)[0]
    change(store, schema.epochs.delete().where(schema.epochs.c.epoch == 2))
    change(store, schema.intermediate_values.delete().where(schema.intermediate_values.c.step == 2))
    (trial,) = work(Store(store.url.render_as_string(hide_password=False)), study)
    assert trial.epochs == [1, 2, 3]
    assert trial.curves["val_loss"][:2] == before.curves["val_loss"]
    assert trial.attempts[-1].resumed_from == 2


def test_of_trials_that_have_ended_only_the_best_keep_a_checkpoint(store: Store) -> None:
    study = engine_study(store, 1e-5, 1e-3, 1e30, 1e-4, keep_best=2)
    trials = work(store, study)
    best = sorted((t for t in trials if t.state == "complete"), key=lambda t: -(t.value or 0))[:2]
    assert sorted(final_checkpoints(store, study)) == sorted(trial.number for trial in best)
    assert all(checkpoint.epoch == 2 for checkpoint in final_checkpoints(store, study).values())


def test_what_killed_workers_have_left_is_removed_by_the_next_one(store: Store) -> None:
    study = engine_study(store, 1e-3, 1e-30, keep_best=1)
    work(store, study, should_stop=lambda: store.trials.get_all(study)[0].state == "complete")
    root = Path(store.checkpoints_url(study))
    assert sorted(path.name for path in root.iterdir()) == ["000000"]
    shutil.copytree(root / "000000", root / "000001")  # as of a trial that is still to be trained
    work(store, study)
    shutil.copytree(root / "000000", root / "000001")
    assert sorted(path.name for path in root.iterdir()) == ["000000", "000001"]
    work(store, study)
    assert sorted(path.name for path in root.iterdir()) == ["000000"]


def test_a_checkpoint_that_cannot_be_written_is_noted_and_training_goes_on(store: Store) -> None:
    study = engine_study(store, 1e-3)
    root = Path(store.checkpoints_url(study))
    root.parent.mkdir(parents=True)
    root.write_text("a file where the folder should be")
    (trial,) = work(store, study)
    assert trial.state == "complete"
    assert "\na checkpoint could not be written: " in str(trial.attempts[0].note)


def test_of_equal_trials_the_one_that_is_called_best_keeps_its_last_checkpoint(
    store: Store, make_spec: MakeSpec
) -> None:
    study = store.studies.create(make_spec(0.1, 0.2, 0.3), facts={})
    worker = store.workers.add(study.study_id, device="cpu")
    claims = [store.trials.claim(study, worker) for _ in range(3)]
    for claim in claims[1:]:
        assert claim is not None
        store.trials.report(claim, study.spec, epoch=1, metrics={}, value=0.5)
    assert claims[1] is not None
    store.trials.finish(claims[1], "complete", reason="")
    checkpoints = StudyCheckpoints(store, study)
    assert checkpoints.may_be_kept(0, 0.5)
    assert not checkpoints.may_be_kept(2, 0.5)
    assert checkpoints.may_be_kept(2, 0.6)
    assert not checkpoints.may_be_kept(0, 0.4)


class Unsavable(torch.nn.Sequential):
    def get_extra_state(self) -> object:
        return object()

    def set_extra_state(self, state: object) -> None:
        pass


def test_a_checkpoint_is_written_while_the_next_epoch_trains_and_before_that_is_reported(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.train.engines.plain import PlainEngine

    events: list[str] = []
    training_second = threading.Event()
    save, run_epoch, report_all = CheckpointFolder.save, PlainEngine.run_epoch, Trials.report_all

    def slow_save(self: CheckpointFolder, checkpoint: Any) -> None:
        assert checkpoint.epoch > 1 or training_second.wait(timeout=180)
        save(self, checkpoint)
        events.append(f"saved {checkpoint.epoch}")

    def noting_training(self: Any) -> Any:
        if self._lane.epoch == 1:
            training_second.set()
        return run_epoch(self)

    def noting_reports(self: Trials, reports: Any, spec: StudySpec) -> Any:
        events.append(f"reported {reports[0].epoch}")
        return report_all(self, reports, spec)

    monkeypatch.setattr(CheckpointFolder, "save", slow_save)
    monkeypatch.setattr(PlainEngine, "run_epoch", noting_training)
    monkeypatch.setattr(Trials, "report_all", noting_reports)
    (trial,) = work(store, engine_study(store, 1e-3, epochs=3))
    assert trial.state == "complete"
    assert events == ["reported 1", "saved 1", "reported 2", "saved 2", "reported 3", "saved 3"]


def test_a_network_that_cannot_be_saved_fails_its_trial_and_not_the_worker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hpo.train.engines.lane_state

    build = hpo.train.engines.lane_state.build_model
    monkeypatch.setattr(
        hpo.train.engines.lane_state, "build_model", lambda *args, **options: Unsavable(build(*args, **options))
    )
    (trial,) = work(store, engine_study(store, 1e-3))
    assert (trial.state, len(trial.attempts)) == ("failed", 2)


@pytest.mark.usefixtures("prompt_reports")
def test_a_copied_study_goes_on_from_its_checkpoints(store: Store, tmp_path: Path) -> None:
    study = engine_study(store, 1e-3, epochs=3)
    work(store, study, should_stop=lambda: len(store.trials.get_all(study)[0].epochs) >= 2)
    url = store.url.render_as_string(hide_password=False)
    (tmp_path / "elsewhere").mkdir()
    other = f"sqlite:///{tmp_path}/elsewhere/other.db"
    assert stores.copy("digits", to=other, storage=url) == other
    with pytest.raises(UserError, match=r"^--to must be an SQLite or Postgres URL"):
        stores.copy("digits", to="mysql://host/database", storage=url)
    with pytest.raises(UserError, match="holds a study 'digits' already"):
        stores.copy("digits", to=other, storage=url)
    target = Store(other)
    (trial,) = work(target, target.studies.get("digits"))
    assert (trial.state, trial.epochs) == ("complete", [1, 2, 3])
    assert (trial.attempts[-1].resumed_from, trial.attempts[-1].note) == (2, None)
    (untouched,) = store.trials.get_all(study)
    assert (untouched.state, untouched.epochs) == ("waiting", [1, 2])
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "hpo_files").iterdir()) == [
        target.studies.get("digits").key
    ]


# Many trials at once

SEVERAL = (1e-4, 3e-4, 1e-3, 3e-3, 1e30)


def curves_of(trials: list[TrialRecord]) -> list[Any]:
    """All that a trial came to but the time it took."""
    return [
        (trial.state, trial.epochs, {key: values for key, values in trial.curves.items() if key != "seconds"})
        for trial in trials
    ]


def test_trials_in_lanes_end_as_they_do_one_at_a_time(store: Store) -> None:
    studies = {lanes: engine_study(store, *SEVERAL, epochs=3, lanes=lanes, name=f"in-{lanes}") for lanes in (1, 3)}
    found = {lanes: work(store, study) for lanes, study in studies.items()}
    for alone, beside in zip(found[1], found[3], strict=True):
        assert (beside.state, beside.epochs, beside.attempt) == (alone.state, alone.epochs, 1)
        for name in ("train_loss", "val_loss", "val_accuracy", "lr"):
            pairs = zip(beside.curves[name], alone.curves[name], strict=True)
            assert all(one == pytest.approx(other, rel=1e-3) for one, other in pairs if None not in (one, other))
    (agreed,) = store.studies.shared_values(studies[3]).values()
    assert agreed["reason"] == "3 trials at once on the CPU: engine.lanes = 3"


def test_a_lane_is_filled_again_while_others_train(store: Store) -> None:
    """The second trial is dropped after its first epoch, and the third is in training before the first has ended."""
    pruner = {"name": "threshold", "upper": 1.0, "lower": 0.0, "warmup_epochs": 0}
    study = engine_study(store, 1e-3, 1e30, 1e-4, epochs=4, lanes=2, pruner=pruner)
    trials = work(store, study)
    assert [trial.state for trial in trials] == ["complete", "diverged", "complete"]
    assert trials[2].started is not None
    assert trials[0].ended is not None
    assert trials[2].started < trials[0].ended


@pytest.mark.usefixtures("prompt_reports")
def test_trials_in_lanes_go_on_bit_for_bit(store: Store) -> None:
    """Whatever is in the other lanes then: the interrupted study is gone on with by a worker of more lanes."""
    expected = work(store, engine_study(store, *SEVERAL, epochs=4, lanes=2, name="whole"))
    study = engine_study(store, *SEVERAL, epochs=4, lanes=2, name="cut")
    work(store, study, should_stop=lambda: sum(len(trial.epochs) for trial in store.trials.get_all(study)) >= 3)
    assert {trial.state for trial in store.trials.get_all(study)} >= {"waiting"}
    study = store.studies.create(StudySpec.from_dict(study.spec.frozen() | {"engine": {"lanes": 4}}), facts={})
    found = work(store, study)
    assert curves_of(found) == curves_of(expected)
    assert max(trial.attempt for trial in found) == 2
    assert {attempt.resumed_from for trial in found for attempt in trial.attempts[1:]} <= {1, 2}


def test_memory_that_runs_out_beside_others_is_nobodys_failure(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hpo.train.engines.stack import TrialStack

    step, most = TrialStack.step, []

    def step_in_little_memory(self: Any, *batch: Any) -> Any:
        if len(self) > 2:
            raise torch.OutOfMemoryError("out of memory")
        most.append(len(self))
        return step(self, *batch)

    monkeypatch.setattr("hpo.train.engines.lanes._stacked_rate", lambda *_: 1.0)
    monkeypatch.setattr(TrialStack, "step", step_in_little_memory)
    trials = work(store, engine_study(store, 1e-4, 3e-4, 1e-3, 3e-3, lanes=4))
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert {attempt.outcome for trial in trials for attempt in trial.attempts} == {"complete", "released"}
    assert max(most) == 2


def test_an_exception_is_charged_to_the_trial_that_raises_it_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.train.engines.plain import PlainEngine
    from hpo.train.engines.stack import TrialStack

    def is_bad(config: Any) -> bool:
        return bool(config.training.lr == 3e-4)

    group_step, plain_step = TrialStack.step, PlainEngine.step

    def in_a_group(self: Any, *batch: Any) -> Any:
        if any(is_bad(trial.config) for trial in self._trials()):
            raise RuntimeError("a bad trial")
        return group_step(self, *batch)

    def in_a_plain_engine(self: Any, lane: Any, *batch: Any) -> Any:
        if is_bad(lane.config):
            raise RuntimeError("a bad trial")
        return plain_step(self, lane, *batch)

    monkeypatch.setattr(TrialStack, "step", in_a_group)
    monkeypatch.setattr(PlainEngine, "step", in_a_plain_engine)
    study = engine_study(store, 1e-4, 3e-4, 1e-3, 3e-3, lanes=4)
    trials = work(store, study)
    assert [trial.state for trial in trials] == ["complete", "failed", "complete", "complete"]
    assert store.studies.get("digits").stop is None
    outcomes = [[attempt.outcome for attempt in trial.attempts] for trial in trials]
    assert outcomes[0] == ["beside others: RuntimeError: a bad trial", "complete"]
    assert outcomes[1] == ["beside others: RuntimeError: a bad trial", "RuntimeError: a bad trial", "failed"]


def test_trials_that_cannot_be_stacked_with_each_other_are_not(store: Store) -> None:
    settings = {
        "name": "kinds",
        "search": {"sampler": "grid", "space": {"lr": [1e-3], "batch_size": [25, 50]}},
        "model": {"name": "article_cnn", "width": 0.05},
        "data": {"name": "digits", "train_samples": 200, "validation_fraction": 0.2},
        "training": {"epochs": 1},
    }
    study = store.studies.create(StudySpec.from_dict(settings), facts={})
    assert [trial.state for trial in work(store, study)] == ["complete", "complete"]
    assert store.studies.shared_values(study) == {}  # it holds for this space, and was not measured


def test_an_exported_trial_is_trained_as_it_was(store: Store) -> None:
    study = engine_study(store, 1e-3, 3e-3, lanes=2)
    url = store.url.render_as_string(hide_password=False)
    trials = work(store, study)
    settings = exporting.export("digits", storage=url)
    best = reading.best("digits", storage=url)
    again = work(store, store.studies.create(StudySpec.from_dict(settings), facts={}))
    assert curves_of(again) == curves_of([trials[best.trial]])


def test_a_suspect_trains_alone(store: Store) -> None:
    """A crash of a worker with several trials does not tell whose doing it was; the next one does. For an epoch."""
    study = engine_study(store, 1e-4, 3e-4, 1e-3, lanes=3)
    worker_id = store.workers.add(study.study_id, device="cpu")
    held = [store.trials.claim(study, worker_id, num_held=num_held) for num_held in range(2)]
    assert None not in held
    with store.database.transaction() as connection:  # as after a crash that was seen
        connection.execute(schema.slots.update().where(schema.slots.c.number < 2).values(losses=1))
    for claim in held:
        assert claim is not None
        store.trials.release(claim)
    store.workers.remove(worker_id)
    beside: dict[tuple[int, int], list[int]] = {}  # which trials ran at the report of a trial's epoch
    report_all = Trials.report_all

    def noting(self: Trials, reports: Any, spec: StudySpec) -> Any:
        running = [trial.number for trial in store.trials.get_all(study) if trial.state == "running"]
        beside.update({(report.claim.number, report.epoch): running for report in reports})
        return report_all(self, reports, spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "report_all", noting)
        trials = work(store, study)
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert (beside[0, 1], beside[1, 1]) == ([0], [1])
    assert beside[0, 2] == [0, 2]


def test_workers_share_what_is_left(store: Store) -> None:
    """Four trials and two workers: neither takes more than two, however many lanes it has."""
    study = engine_study(store, 1e-4, 3e-4, 1e-3, 3e-3, lanes=4)
    store.workers.add(study.study_id, device="cpu")  # the other one, which has not come to claim yet
    most = 0

    def watching() -> bool:
        nonlocal most
        most = max(most, store.trials.counts(study.study_id).get("running", 0))
        return False

    trials = work(store, study, should_stop=watching)
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert most == 2


def rounds(store: Store, study: StudyRecord) -> list[list[int]]:
    """The epochs that each trial, waiting ones left out, had reported when another one was reported."""
    seen: list[list[int]] = []
    report_all = Trials.report_all

    def noting(self: Trials, *args: Any) -> Any:
        verdict = report_all(self, *args)
        seen.append([max(trial.epochs, default=0) for trial in store.trials.get_all(study) if trial.state != "waiting"])
        return verdict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "report_all", noting)
        work(store, study)
    return seen


def one_at_a_time_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.train.engines.lanes._stacked_rate", lambda *_: 1.0)


def test_trials_take_turns_where_the_pruner_compares_them_early(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one_at_a_time_is_fastest(monkeypatch)
    asha = {"name": "asha", "min_epochs": 2, "reduction_factor": 4}
    study = engine_study(store, *SEVERAL[:3], epochs=3, lanes="auto", name="turns", pruner=asha)
    assert rounds(store, study)[:4] == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1]]
    (agreed,) = store.studies.shared_values(study).values()
    assert agreed["reason"].startswith("3 trials in turns on the CPU: times as fast as one after another: 2 at once")
    median = engine_study(store, *SEVERAL[:3], epochs=2, lanes="auto", name="one-by-one", pruner={"name": "median"})
    assert rounds(store, median)[:3] == [[1], [2], [2, 1]]


@pytest.mark.usefixtures("prompt_reports")
def test_trials_that_take_turns_are_all_saved_when_the_worker_leaves(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what has trained an epoch since it was last saved: nothing is trained twice."""
    one_at_a_time_is_fastest(monkeypatch)
    settings = {"lanes": "auto", "pruner": {"name": "asha", "min_epochs": 3}, "checkpoint_epochs": 3}
    expected = work(store, engine_study(store, *SEVERAL[:3], epochs=3, name="whole", **settings))
    study = engine_study(store, *SEVERAL[:3], epochs=3, name="cut", **settings)
    work(store, study, should_stop=lambda: sum(len(trial.epochs) for trial in store.trials.get_all(study)) >= 5)
    assert [trial.epochs for trial in store.trials.get_all(study)] == [[1, 2], [1, 2], [1]]
    found = work(store, study)
    assert [trial.attempts[-1].resumed_from for trial in found] == [2, 2, 1]
    assert curves_of(found) == curves_of(expected)


def test_workers_whose_trials_take_turns_share_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight are compared, whoever trains them: two workers have four each."""
    one_at_a_time_is_fastest(monkeypatch)
    lrs = [1e-4 * (number + 1) for number in range(12)]
    study = engine_study(store, *lrs, epochs=1, lanes="auto", pruner={"name": "asha"})
    store.workers.add(study.study_id, device="cpu")
    seen = rounds(store, study)
    assert len(seen[0]) == 4


def test_what_the_first_worker_chose_holds_for_all(store: Store) -> None:
    study = engine_study(store, 1e-4)
    store.storage.set_study_user_attr(study.study_id, "owner", "somebody")  # with Optuna's own tools
    assert store.studies.get_or_set_shared(study, "lanes auto on the CPU", {"lanes": 8}) == {"lanes": 8}
    assert store.studies.get_or_set_shared(study, "lanes auto on the CPU", {"lanes": 2}) == {"lanes": 8}
    assert store.studies.get_or_set_shared(study, "lanes auto on some GPU", {"lanes": 2}) == {"lanes": 2}
    assert store.studies.shared_values(study) == {
        "lanes auto on the CPU": {"lanes": 8},
        "lanes auto on some GPU": {"lanes": 2},
    }
