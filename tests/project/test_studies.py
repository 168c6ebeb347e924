"""Every study in studies/ runs at a tiny size, and so does the script that launches one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tomllib
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hpo
from hpo.config.study_spec import StudySpec
from scripts import launch_study
from tests.rows import slow_except

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
TINY: dict[str, dict[str, Any]] = {
    "data": {"name": "digits", "validation_fraction": 0.2, "train_samples": 60},
    "training": {"epochs": 2, "batch_size": 30},
}


def tiny(path: Path) -> StudySpec:
    """Return the study on a few digits, with two epochs and two trials; a grid has two learning rates."""
    settings = tomllib.loads(path.read_text())
    settings.pop("compare", None)
    settings.pop("confirm", None)  # tests/analysis/test_confirmation.py
    if "objective" in settings:
        return StudySpec.from_dict(settings | {"search": {**settings["search"], "trials": 2}})
    for section, values in TINY.items():
        given = settings.get(section, {})
        own_name = {"name": given["name"]} if section == "data" and ":" in given.get("name", "") else {}
        settings[section] = {**given, **values, **own_name}
    if settings.get("model", {}).get("name") == "article_cnn":
        settings["model"]["width"] = 0.05
    if settings["search"]["sampler"] == "grid":
        settings["search"]["space"]["lr"] = [1e-3, 1e-2]
    else:
        settings["search"]["trials"] = 2
        settings["search"].pop("try_first", None)
    return StudySpec.from_dict(settings)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_as_it_is_written_is_valid(path: Path) -> None:
    spec, *others = StudySpec.all_from_toml(path)
    assert all(other.differences(spec) for other in others)
    assert path.read_text().startswith("#"), "each is commented in a line or two"
    assert spec.name.replace("-", "_") == path.stem


QUICK = [path for path in STUDIES if path.stem in ("quickstart", "optimizers", "own_model")]


@pytest.mark.parametrize("path", slow_except(STUDIES, *QUICK), ids=lambda path: path.stem)
def test_a_study_runs_at_a_tiny_size(path: Path, tmp_path: Path) -> None:
    spec = tiny(path)
    result = hpo.run(
        spec, storage=f"sqlite:///{tmp_path}/hpo.db", executor=hpo.InProcess("cpu"), code_folder=path.parent
    )
    assert len(result.trials) == spec.num_trials
    assert {trial.state for trial in result.trials} <= {"complete", "pruned", "diverged"}
    assert result.best.value > 0


def test_the_articles_study_reads_both_readings_of_its_fourth_learning_rate() -> None:
    spec = StudySpec.from_toml(ROOT / "studies" / "article_cifar100.toml")
    assert spec.search.space["lr"] == [1e-1, 1e-3, 3e-4, 6.25e-3, 6.25e-5]
    assert spec.training.report_test_accuracy


def test_the_articles_study_runs_on_an_archive_in_cifar100s_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test writes the archive itself, and replaces torchvision's checksums by those of what it wrote."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return md5(data).hexdigest()

    def part(name: str, count: int) -> tuple[str, str]:
        labels = [index % 100 for index in range(count)]
        images = random.integers(0, 256, size=(count, 3072), dtype=np.uint8)
        return name, write(name, {"data": images, "fine_labels": labels, "coarse_labels": labels})

    monkeypatch.setattr(CIFAR100, "train_list", [part("train", 400)])
    monkeypatch.setattr(CIFAR100, "test_list", [part("test", 100)])
    names = write("meta", {"fine_label_names": [str(index) for index in range(100)]})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": names})

    overrides = [f"data.root={tmp_path}", "training.epochs=1", "data.validation_fraction=0.25", "model.width=0.05"]
    spec = StudySpec.from_toml(ROOT / "studies" / "article_cifar100.toml", overrides=overrides)
    result = hpo.run(spec, storage=f"sqlite:///{tmp_path}/hpo.db", executor=hpo.InProcess("cpu"))
    assert len(result.trials) == 5
    for trial in result.trials:
        assert len(trial.curves["test_accuracy"]) == 1


def test_the_script_recommends_the_answer_and_not_the_best_single_trial(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = SimpleNamespace(trial=3, params={"lr": 0.5}, value=0.9, lr=0.0123)
    monkeypatch.setattr(hpo, "run", lambda *_, **__: SimpleNamespace(best=best, trials=[]), raising=False)
    monkeypatch.setattr(sys, "argv", ["launch_study.py"])
    launch_study.main()
    recommendation, single = capsys.readouterr().out.splitlines()
    assert recommendation.startswith("train with lr = 1.23e-02")
    assert "optimistic" in single


@pytest.mark.slow
def test_the_script_launches_a_study(tmp_path: Path) -> None:
    arguments = ["--trials", "2", "--epochs", "1"]
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "launch_study.py", *arguments],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "train with lr = " in result.stdout
    assert result.stdout.count("  trial ") == 2
