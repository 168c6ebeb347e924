"""The weights that are written are the confirmed ones, and the network that is built from them says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hpo
from hpo.api import reading, running, trained_weights
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.train.data.loading import load_data
from hpo.workers.executors import InProcess

NETWORK = """
from torch import nn

def small(channels, num_classes, hidden=4):
    body = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels * 64, hidden)]
    return nn.Sequential(*body, nn.Linear(hidden, num_classes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store, in which a study of a user's own network was confirmed."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "own_small.py").write_text(NETWORK)
    settings: dict[str, Any] = {
        "name": "s",
        "search": {"sampler": "grid", "space": {"lr": [1e-3, 1e-2, 3e-2]}},
        "model": {"name": "own_small:small", "hidden": 16},
        "data": {"train_samples": 300},
        "training": {"epochs": 1, "batch_size": 32},
        "confirm": {"top": 2, "seeds": 2},
    }
    running.run(StudySpec.from_dict(settings), storage=url(folder), executor=InProcess("cpu"), code_folder=folder)
    return folder


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/hpo.db"


def test_the_network_is_that_of_the_best_trial_of_the_confirmed_rate(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    written = trained_weights.write_weights("s", file, storage=url(folder))
    assert written == json.loads(file.with_suffix(".json").read_text())
    trials = reading.trials("s", storage=url(folder))
    recommended = reading.best("s", storage=url(folder)).recommended
    of_winner = [t for t in trials if t["kind"] == "confirm" and t["params"] == recommended]
    best = max(of_winner, key=lambda trial: trial["value"])
    assert (written["trial"], written["val_accuracy"], written["params"]) == (
        best["number"],
        best["value"],
        recommended,
    )

    model = hpo.load_model(file, allow=[str(folder)])
    assert not model.training
    split = load_data(Store(url(folder)).studies.get("s").spec.data, device="cpu")
    assert written["data"] == {"name": "digits", **split.description()}
    with torch.no_grad():
        hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in split.val.batches(64))
    assert hits / len(split.val) == pytest.approx(best["value"])


def test_of_a_confirmation_only_the_best_trial_of_each_rate_keeps_its_weights(folder: Path) -> None:
    store = Store(url(folder))
    study = store.studies.get("s")
    kept = {int(path.name) for path in Path(store.checkpoints_url(study)).iterdir()}
    trials = store.trials.get_all(study)
    best_of: dict[Any, Any] = {}
    for trial in trials:
        key = trial.params["lr"] if trial.kind == "confirm" else trial.kind
        if trial.kind != "test" and (key not in best_of or (trial.value or 0) > (best_of[key].value or 0)):
            best_of[key] = trial
    assert kept == {trial.number for trial in best_of.values()}
    assert len(kept) == 3
    lost = next(trial.number for trial in trials if trial.number not in kept)
    with pytest.raises(UserError, match=rf"weights of trial {lost} of study 's' were not kept .*hpo export s --trial"):
        trained_weights.write_weights("s", "lost.safetensors", trial=lost, storage=url(folder))


def test_a_wrong_file_or_code_that_is_not_allowed_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    with pytest.raises(UserError, match=r"--weights must end in .safetensors, got 'best.pt'"):
        trained_weights.write_weights("s", "best.pt", storage=url(folder))
    file.write_text("precious")
    with pytest.raises(UserError, match=r"best.safetensors exists and was not written by hpo export"):
        trained_weights.write_weights("s", file, storage=url(folder))
    with pytest.raises(UserError, match=r"best.safetensors must be a file that hpo export --weights wrote"):
        hpo.load_model(file)
    file.unlink()
    trained_weights.write_weights("s", file, storage=url(folder))
    trained_weights.write_weights("s", file, storage=url(folder))  # over its own
    with pytest.raises(UserError, match=r"needs code from the module 'own_small'; if .*allow=\['own_small'\]"):
        hpo.load_model(file)
    (tmp_path / "own_small.py").write_text(NETWORK.replace("* 64", "* 16"))
    with pytest.raises(UserError, match=r"other tensors than the network that own_small:small builds: .*size mismatch"):
        hpo.load_model(file, allow=[str(tmp_path)])
