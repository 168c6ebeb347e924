"""A LightningModule as a study: it is pruned, stopped, killed and resumed as our own trials are."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.api import running
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.workers.executors import Local
from hpo.workers.preflight import run_preflight
from tests.workers.training import curves_of, work

pytest.importorskip("lightning", reason="Lightning is not installed (pip install lightning)")

# Whatever a module may draw is drawn: its weights, a split, the order of batches, dropout. The schedule follows a
# metric, and makes its step after everything else of an epoch.
NET = """
import lightning.pytorch as pl
import os
import signal
import torch
from pathlib import Path
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

class Net(pl.LightningModule):
    def __init__(self, lr, hidden=8, crash=None):
        super().__init__()
        self.save_hyperparameters()
        layers = torch.nn.Linear(4, hidden), torch.nn.BatchNorm1d(hidden), torch.nn.Dropout(0.3)
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(hidden, 2))

    def training_step(self, batch, index):
        if self.current_epoch == 2 and index == 1 and (crash := Path(__file__).with_name("crash")).exists():
            crash.unlink()
            raise OSError("the power went")
        if self.current_epoch == 2 and index == 1 and (kill := Path(__file__).with_name("kill")).exists():
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * torch.inf if self.hparams.lr > 1e3 else loss

    def validation_step(self, batch, index):
        outputs = self.net(batch[0])
        self.log("val_loss", functional.cross_entropy(outputs, batch[1]))
        self.log("val_accuracy", (outputs.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, index):
        self.log("test_accuracy", 0.75)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

class Data(pl.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        points = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
        self.parts = random_split(TensorDataset(points, (points[:, 0] > 0).long()), [60, 20])

    def train_dataloader(self):
        return DataLoader(self.parts[0], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], batch_size=20)

    def test_dataloader(self):
        return DataLoader(self.parts[1], batch_size=20)

class Fixed(pl.LightningModule):
    def __init__(self, learning_rate=0.1): ...

class Silent(Net):
    def validation_step(self, batch, index):
        self.log("val_loss", 1.0)

def fixed(lr): return Fixed(lr)
def nothing(lr): return None
"""
MakeStudy = Callable[..., StudyRecord]


@pytest.fixture
def spec(make_spec: Callable[..., StudySpec], own_code: Path) -> Callable[..., StudySpec]:
    """Return what makes the spec of a study of the module."""
    (own_code / "net.py").write_text(NET)

    def make(*lrs: float, lightning: str = "net:Net", objective: Mapping[str, Any] = {}, **settings: Any) -> StudySpec:
        return make_spec(
            *lrs,
            objective={"lightning": lightning, "datamodule": "net:Data", **objective},
            **{"epochs": 4, "search": {"retries": 1}, **settings},
        )

    return make


def weights(store: Store, study: StudyRecord) -> Mapping[str, torch.Tensor]:
    path = store.folder(study) / "trials" / "0000" / "last.ckpt"
    state: Mapping[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_a_trial_that_was_stopped_or_has_crashed_ends_as_one_that_was_not(
    store: Store, spec: Callable[..., StudySpec], own_code: Path
) -> None:
    whole = store.studies.create(spec(0.05, name="whole"), metadata={})
    expected = work(store, whole)
    assert [(trial.state, trial.epochs) for trial in expected] == [("complete", [1, 2, 3, 4])]
    assert expected[0].curves.keys() == {"train_loss", "val_loss", "val_accuracy"}

    crashed = store.studies.create(spec(0.05, name="crashed"), metadata={})
    (own_code / "crash").touch()
    after = work(store, crashed)
    assert (after[0].attempt, curves_of(after)) == (2, curves_of(expected))

    stopped = store.studies.create(spec(0.05, name="stopped"), metadata={})
    (held,) = work(store, stopped, should_stop=lambda: len(store.trials.get_all(stopped)[0].epochs) == 2)
    assert (held.state, held.epochs) == ("waiting", [1, 2])
    assert curves_of(work(store, stopped)) == curves_of(expected)

    for study in (crashed, stopped):
        found = weights(store, study)
        assert all(torch.equal(tensor, found[name]) for name, tensor in weights(store, whole).items())


@pytest.mark.slow
def test_a_trial_whose_worker_was_killed_ends_as_one_that_was_not(
    store: Store, url: str, spec: Callable[..., StudySpec], own_code: Path
) -> None:
    whole = store.studies.create(spec(0.05, name="whole"), metadata={})
    expected = work(store, whole)
    (own_code / "kill").touch()
    running.run(spec(0.05, name="killed"), executor=Local("cpu", workers=1), storage=url, code_folder=own_code)
    killed = store.studies.get("killed")
    (trial,) = store.trials.get_all(killed)
    assert (trial.attempt, curves_of([trial])) == (2, curves_of(expected))
    found = weights(store, killed)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(store, whole).items())


def test_trials_are_pruned_diverge_and_get_their_values(store: Store, spec: Callable[..., StudySpec]) -> None:
    pruner = {"name": "threshold", "lower": 2.0, "warmup_epochs": 2}
    space = {"lr": [0.05, 1e4], "model.hidden": [3], "batch_size": [7]}
    settings = spec(
        search={"retries": 0, "sampler": "grid", "space": space},
        pruner=pruner,
        objective={"trainer": {"benchmark": False}},
    )
    study = store.studies.create(settings, metadata={})
    pruned, diverged = work(store, study)
    assert (pruned.state, pruned.error) == ("pruned", None)
    assert len(pruned.epochs) < 4
    assert weights(store, study)["net.0.weight"].shape == (3, 4)
    assert (diverged.state, diverged.epochs) == ("diverged", [1])
    assert (diverged.reason, diverged.curves["train_loss"]) == ("val_loss = nan in epoch 1", [None])


def test_the_test_set_is_measured_when_the_best_rate_is_confirmed(store: Store, spec: Callable[..., StudySpec]) -> None:
    study = store.studies.create(spec(0.05, epochs=2, confirm={"top": 1, "seeds": 2}), metadata={})
    searched, *confirmed = work(store, study)
    assert "test_accuracy" not in searched.curves
    assert [(trial.state, trial.curves["test_accuracy"]) for trial in confirmed] == [("complete", [None, 0.75])] * 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"lightning": "net:Fixed"},
        r"search\.space\.lr must be an argument of objective\.lightning = 'net:Fixed' or .*'net:Data', which takes "
        r"batch_size, learning_rate; .* name a function of lr that returns the module",
    ),
    ({"lightning": "net:nothing"}, "must make a lightning.pytorch.LightningModule, got NoneType"),
    ({"lightning": "net:fixed"}, "objective.lightning = 'net:fixed' cannot be trained: AttributeError: "),
    ({"lightning": "net:Silent"}, "objective.metric = 'val_accuracy' must be logged by .*; it logs val_loss"),
    ({"objective": {"datamodule": "net:Net"}}, "must make a lightning.pytorch.LightningDataModule, got Net"),
    (
        {"objective": {"trainer": {"gradient_clip_algorithm": "x"}}},
        "objective.trainer has settings that Lightning refuses: ",
    ),
    (
        {"objective": {"trainer": {"precision": "16-mixt"}}},
        "objective.trainer has settings that Lightning refuses: .*'16-mixt'",
    ),
    (
        {"objective": {"trainer": {"val_check_interval": 5}}},
        "objective.lightning = 'net:Net' cannot be trained: ValueError: .*val_check_interval",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_trained_is_one_sentence_before_the_study_exists(
    settings: dict[str, Any], message: str, spec: Callable[..., StudySpec]
) -> None:
    with pytest.raises(UserError, match=message):
        run_preflight(spec(0.1, **settings), ["cpu"])


def test_a_module_that_trains_passes_and_leaves_the_generators_alone(spec: Callable[..., StudySpec]) -> None:
    before = torch.get_rng_state()
    assert run_preflight(spec(0.1), ["cpu"]) == {}
    trainer = {"precision": "bf16-mixed", "val_check_interval": 4, "accumulate_grad_batches": 3}
    assert run_preflight(spec(0.1, objective={"trainer": trainer}), ["cpu"]) == {}
    assert torch.equal(torch.get_rng_state(), before)


def test_without_lightning_a_study_is_refused_before_it_exists(
    spec: Callable[..., StudySpec], own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "hpo.workers.lightning_loop", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    expected = re.escape("objective.lightning needs Lightning: pip install 'hpo-studies[lightning]'")
    with pytest.raises(UserError, match=expected):
        running.check(spec(0.1), executor=Local("cpu"), storage=f"sqlite:///{tmp_path}/x.db", code_folder=own_code)
    assert not (tmp_path / "x.db").exists()


def test_a_missing_lightning_is_told_before_torch_is_loaded() -> None:
    code = """
import sys
sys.modules["lightning"] = None
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.workers.preflight import run_preflight
study = {"name": "x", "objective": {"lightning": "net:Net"}, "search": {"space": {"lr": [0.1, 0.2]}}}
try:
    run_preflight(StudySpec.from_dict(study), ["cpu"])
except UserError as error:
    print(error, "torch" in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "objective.lightning needs Lightning: pip install 'hpo-studies[lightning]' False\n"


WRONG_OBJECTIVES: list[tuple[dict[str, Any], str]] = [
    ({"function": None, "lightning": None}, "objective must have either function, .* or lightning, "),
    ({"function": "a:b"}, "objective must have either function, .* or lightning, "),
    ({"datamodule": "Data"}, "objective.datamodule must be written package.module:name, got 'Data'"),
    ({"function": "a:b", "lightning": None}, "objective.datamodule cannot be used with objective.function, got 'net:"),
    ({"trainer": {"max_epoch": 3}}, "objective.trainer: each key must be one of accumulate_grad_batches, "),
]


@pytest.mark.parametrize(("objective", "message"), WRONG_OBJECTIVES)
def test_a_wrong_objective_is_refused(objective: dict[str, Any], message: str, spec: Callable[..., StudySpec]) -> None:
    with pytest.raises(UserError, match=message):
        spec(0.1, objective=objective)
