"""Checkpoints of a study: where trials resume, which are kept, and what goes wrong with them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.api import stores
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store import schema
from hpo.store.store import Store
from hpo.store.trials import Trials
from hpo.study.records import StudyRecord, TrialRecord
from hpo.train.checkpoint import Checkpoint, CheckpointFolder
from hpo.workers.checkpoints import StudyCheckpoints
from tests.workers.training import curves, engine_study, work

MakeSpec = Callable[..., StudySpec]


def uninterrupted(tmp_path: Path, *lrs: float, **settings: Any) -> tuple[list[TrialRecord], dict[int, Checkpoint]]:
    store = Store(f"sqlite:///{tmp_path}/uninterrupted/hpo.db", create=True)
    study = engine_study(store, *lrs, **settings)
    return work(store, study), final_checkpoints(store, study)


def final_checkpoints(store: Store, study: StudyRecord) -> dict[int, Checkpoint]:
    found = {}
    for trial in store.trials.get_all(study):
        config = study.spec.trial_config(trial.params, seed=trial.attributes["seed"])
        url = f"{store.checkpoints_url(study)}/{trial.number:06d}"
        identity = {"study": study.metadata["uid"], "trial": trial.number}
        checkpoint, notes = CheckpointFolder(url, identity=identity).load(config)
        assert notes == []
        if checkpoint is not None:
            found[trial.number] = checkpoint
    return found


def parameters(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dict(checkpoint.state["model"])


@pytest.mark.usefixtures("prompt_reports")
@pytest.mark.parametrize("checkpoint_epochs", [1, 3])
def test_a_trial_that_is_let_go_is_saved_and_goes_on_with_its_next_epoch_bit_for_bit(
    store: Store, tmp_path: Path, checkpoint_epochs: int
) -> None:
    (tmp_path / "uninterrupted").mkdir()
    settings: dict[str, Any] = {"epochs": 5, "checkpoint_epochs": checkpoint_epochs, "schedule": "cosine"}
    (expected,), expected_final = uninterrupted(tmp_path, 1e-3, **settings)
    study = engine_study(store, 1e-3, **settings)
    for epochs in (1, 2, 4):

        def has_trained(num_epochs: int = epochs) -> bool:
            return len(store.trials.get_all(study)[0].epochs) >= num_epochs

        (interrupted,) = work(store, study, should_stop=has_trained)
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
    note = f"{socket.gethostname()} finds no checkpoint in {tmp_path}/another machine/checkpoints"
    assert re.fullmatch(rf"epoch 1 is trained again \([0-9.]+ s\): {re.escape(note)}", str(trial.attempts[-1].note))


@pytest.mark.usefixtures("prompt_reports")
def test_an_epoch_that_the_database_has_lost_is_reported_from_the_checkpoint(
    store: Store, change: Callable[..., None]
) -> None:
    """Lose the epoch as SQLite may in a power cut: the checkpoint is on disk, the report is not."""
    study = engine_study(store, 1e-3, epochs=3)
    work(store, study, should_stop=lambda: len(store.trials.get_all(study)[0].epochs) >= 2)
    before = store.trials.get_all(study)[0]
    change(store, schema.epochs_table.delete().where(schema.epochs_table.c.epoch == 2))
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
    shutil.copytree(root / "000000", root / "000001")  # as if of a trial that has not been trained yet
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
    study = store.studies.create(make_spec(0.1, 0.2, 0.3), metadata={})
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
        assert checkpoint.epoch > 1 or training_second.wait(timeout=500)
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
    (trial,) = work(store, engine_study(store, 1e-3, epochs=3, checkpoint_epochs=1))
    assert trial.state == "complete"
    assert events == ["reported 1", "saved 1", "reported 2", "saved 2", "reported 3", "saved 3"]


def test_a_network_that_cannot_be_saved_fails_its_trial_and_not_the_worker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.train.models import build_model

    monkeypatch.setattr(
        "hpo.train.engines.lane_state.build_model",
        lambda *args, **options: Unsavable(build_model(*args, **options)),
    )
    (trial,) = work(store, engine_study(store, 1e-3))
    assert (trial.state, len(trial.attempts)) == ("failed", 2)


@pytest.mark.usefixtures("prompt_reports")
def test_a_copied_study_goes_on_from_its_checkpoints(store: Store, tmp_path: Path) -> None:
    study = engine_study(store, 1e-3, epochs=3)
    work(store, study, should_stop=lambda: len(store.trials.get_all(study)[0].epochs) >= 2)
    url = store.url.render_as_string(hide_password=False)
    (tmp_path / "elsewhere").mkdir()
    (store.folder(study) / "trials").mkdir()
    os.mkfifo(store.folder(study) / "trials" / "pipe")  # is not copied, and not waited for
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
