"""Record learning curves over a dense grid of learning rates and many seeds, for `search.py` to replay.

    python -m scripts.bench.record_curves --cifar10 FOLDER       # HPO_DATA names the folder that holds MNIST

Each task is a grid study of its own in --storage, which resumes after an interruption. All tasks took about half an
hour on two cores. The curves are small, and kept in this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

import hpo
from hpo.config.study_spec import StudySpec

CURVES = Path(__file__).resolve().parent / "curves.json"
EPOCHS = 9
SEEDS = 10
PER_DECADE = 5


def tasks(cifar10: str | None) -> dict[str, dict[str, Any]]:
    """Return the tasks by name: what is trained, and the range of learning rates that is searched."""
    network = {"name": "article_cnn", "width": 0.25}
    few = {"train_samples": 2000, "validation_fraction": 0.02}
    images = {"name": "image_folder", "root": cifar10, **few}
    return {
        "mnist-adam": {
            "range": (1e-5, 1e-1),
            "model": network,
            "data": {"name": "mnist", **few},
            "training": {"optimizer": "adam", "batch_size": 32},
        },
        "cifar10-adam": {
            "range": (1e-5, 1e-1),
            "model": network,
            "data": images,
            "training": {"optimizer": "adam", "batch_size": 32},
        },
        "cifar10-sgd": {
            "range": (1e-4, 1.0),
            "model": network,
            "data": images,
            "training": {"optimizer": "sgd", "momentum": 0.9, "batch_size": 32},
        },
    }


def grid(low: float, high: float) -> list[float]:
    """Return learning rates from `low` to `high`, PER_DECADE of them a decade."""
    decades = torch.tensor([low, high], dtype=torch.float64).log10()
    count = round(float(decades[1] - decades[0]) * PER_DECADE) + 1
    return [float(f"{lr:.4g}") for lr in torch.logspace(decades[0], decades[1], count, dtype=torch.float64).tolist()]


def record(name: str, task: dict[str, Any], *, storage: str, seeds: int, epochs: int) -> dict[str, Any]:
    """Train the task at every learning rate with every seed; return accuracies by learning rate, seed and epoch.

    The list of a trial that diverged ends with the epoch that it diverged in.
    """
    lrs = grid(*task["range"])
    spec = StudySpec.from_dict(
        {
            "name": f"curves-{name}",
            "search": {"sampler": "grid", "space": {"lr": lrs, "seed": list(range(seeds))}},
            "pruner": {"name": "none"},
            "model": task["model"],
            "data": task["data"],
            "training": {**task["training"], "epochs": epochs},
            "engine": {"lanes": 1},
        }
    )
    trials = hpo.run(spec, storage=storage, executor=hpo.Local(workers=os.cpu_count())).trials
    curves: list[list[list[float]]] = [[[] for _ in range(seeds)] for _ in lrs]
    for trial in trials:
        assert trial.state in ("complete", "diverged"), f"trial {trial.number} {trial.state}: {trial.reason}"
        curve = [round(value, 4) for value in trial.curves["val_accuracy"] if value is not None]
        curves[lrs.index(trial.params["lr"])][int(trial.params["seed"])] = curve
    seconds = [second for trial in trials for second in trial.curves["seconds"] if second is not None]
    return {
        "range": task["range"],
        "model": task["model"],
        "data": {key: value for key, value in task["data"].items() if key != "root"},
        "training": spec.frozen()["training"],
        "lrs": lrs,
        "epochs": epochs,
        "seconds_per_epoch": round(statistics.median(seconds), 3),
        "val_accuracy": curves,
    }


def main() -> None:
    """Record the tasks and write their curves."""
    parser = argparse.ArgumentParser(description="Record learning curves.")
    parser.add_argument("--cifar10", help="folder with CIFAR-10's images as train/CLASS/*.jpg")
    parser.add_argument("--storage", default="sqlite:///curves.db")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--only", help="the name of one task")
    parser.add_argument("--output", type=Path, default=CURVES)
    arguments = parser.parse_args()

    recorded = {}
    for name, task in tasks(arguments.cifar10).items():
        if arguments.only in (None, name):
            recorded[name] = record(
                name, task, storage=arguments.storage, seeds=arguments.seeds, epochs=arguments.epochs
            )
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    arguments.output.write_text(json.dumps({"machine": machine, "tasks": recorded}, separators=(",", ":")) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
