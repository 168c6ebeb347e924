"""Measure how often the range test brackets the best learning rate of a dense grid, over nine tasks, and its cost.

    python -m scripts.bench.range_test --cifar10 FOLDER              # HPO_DATA names the folder that holds MNIST
    python -m scripts.bench.range_test --cifar10 FOLDER --record     # trains the grids again first, half an hour

The results of the grids are in range_grids.json in this folder: means over seeds of the accuracy after nine epochs.
Three come from curves.json; --record trains the others. The range test's constants were chosen with the seeds 200 to
204, 1000 to 1009 and 2000 to 2009; those from --first-seed on are different.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from hpo.config.study_spec import StudySpec
from hpo.train.data.loading import DatasetCache
from hpo.train.lr_ramp import RangeTest, run_range_test
from scripts.bench.record_curves import CURVES, EPOCHS, record, tasks

GRIDS = Path(__file__).resolve().parent / "range_grids.json"
GUESSING = 0.1  # the accuracy that a diverged trial counts with
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
    "adam": {"optimizer": "adam"},
    "rmsprop": {"optimizer": "rmsprop"},
}
RANGES = {"sgd": (1e-3, 1.0), "adam": (1e-5, 1e-1), "rmsprop": (1e-5, 1e-1)}
USUAL_DECADES = 4.0  # 1e-5 to 1e-1
SEEDS_OF_A_GRID = 3


def combinations(cifar10: str | None) -> dict[str, dict[str, Any]]:
    """Return the tasks by name, each a network, a dataset and an optimizer; CIFAR-10 only where its folder is given."""
    known = tasks(cifar10)
    data = {
        "digits": {"name": "digits", "validation_fraction": 0.2},
        "mnist": known["mnist-adam"]["data"],
        "cifar10": known["cifar10-adam"]["data"],
    }
    return {
        f"{name}-{optimizer}": {
            "range": RANGES[optimizer],
            "model": known["mnist-adam"]["model"],
            "data": section,
            "training": {**settings, "batch_size": 32},
        }
        for name, section in data.items()
        for optimizer, settings in OPTIMIZERS.items()
        if name != "cifar10" or cifar10 is not None
    }


def summary(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return mean and deviation of the last accuracy at each learning rate of a grid."""
    last = [
        [curve[-1] if len(curve) == recorded["epochs"] else GUESSING for curve in curves]
        for curves in recorded["val_accuracy"]
    ]
    return {
        "lrs": recorded["lrs"],
        "accuracy": [round(statistics.fmean(values), 4) for values in last],
        "deviation": [round(statistics.stdev(values), 4) for values in last],
        "seeds": len(last[0]),
        "epochs": recorded["epochs"],
    }


def record_grids(cifar10: str | None, *, storage: str) -> None:
    """Train the grids that curves.json does not have, and write the summaries of all."""
    curves = json.loads(CURVES.read_text())["tasks"]
    grids = {}
    for name, task in combinations(cifar10).items():
        known = curves.get(name) or record(name, task, storage=storage, seeds=SEEDS_OF_A_GRID, epochs=EPOCHS)
        grids[name] = summary(known)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    GRIDS.write_text(json.dumps({"machine": machine, "grids": grids}, indent=1) + "\n")
    print(f"wrote {GRIDS}")


def best_rates(grid: dict[str, Any]) -> tuple[float, list[float]]:
    """Return the grid's best learning rate, and all within one standard error of it."""
    best = max(range(len(grid["lrs"])), key=grid["accuracy"].__getitem__)
    least = grid["accuracy"][best] - grid["deviation"][best] / math.sqrt(grid["seeds"])
    return grid["lrs"][best], [lr for lr, value in zip(grid["lrs"], grid["accuracy"], strict=True) if value >= least]


def measure(task: dict[str, Any], seeds: range) -> list[RangeTest]:
    """Run the range test of a task with each seed."""
    sections = {key: task[key] for key in ("model", "data", "training")}
    spec = StudySpec.from_dict({"name": "bench", "search": {"space": {"lr": "auto"}}, **sections})
    dataset_cache = DatasetCache(device=torch.device("cpu"))
    return [
        run_range_test(spec.trial_config({}, seed=seed), device="cpu", dataset_cache=dataset_cache) for seed in seeds
    ]


def row(name: str, grid: dict[str, Any], tests: list[RangeTest]) -> str:
    """Return a line of the table in docs/results/index.md."""
    best, good = best_rates(grid)
    ranges = [(test.low, test.high) for test in tests if test.low is not None and test.high is not None]
    held = sum(low <= best <= high for low, high in ranges)
    all_held = sum(low <= good[0] and good[-1] <= high for low, high in ranges)
    widths = [math.log10(high / low) for low, high in ranges]
    below, above = (
        min(math.log10(best / low) for low, _ in ranges),
        min(math.log10(high / best) for _, high in ranges),
    )
    fell = [test.falls for test in tests if test.falls is not None]
    middle_low, middle_high = (statistics.median(ends) for ends in zip(*ranges, strict=True))
    epochs, seconds = (statistics.median(getattr(test, what) for test in tests) for what in ("epochs", "seconds"))
    among = f"{best:.2g}"
    if len(good) > 1:
        among += f" ({good[0]:.2g} to {good[-1]:.2g})"
    falls = f"{statistics.median(fell):.2g} ({len(fell)})" if fell else "(0)"
    return (
        f"| {name} | {among} | {middle_low:.2g} to {middle_high:.2g} | {held} of {len(tests)} "
        f"| {all_held} of {len(tests)} | {below:.1f}, {above:.1f} | {statistics.median(widths):.2f} | {falls} "
        f"| {epochs:.2f} | {seconds:.1f} |"
    )


def main() -> None:
    """Print a row of the table for each task."""
    parser = argparse.ArgumentParser(description="Does the range test bracket the best learning rate?")
    parser.add_argument("--cifar10", help="folder with CIFAR-10's images as train/CLASS/*.jpg")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=3000)
    parser.add_argument("--only", help="the name of one task")
    parser.add_argument("--record", action="store_true", help="train the grids again first")
    parser.add_argument("--storage", default="sqlite:///range_grids.db", help="of the grids' studies, with --record")
    arguments = parser.parse_args()
    if arguments.record:
        record_grids(arguments.cifar10, storage=arguments.storage)
    grids = json.loads(GRIDS.read_text())["grids"]
    print(
        "| task | grid's best (as good) | range found | held the best | held all as good | least margins, decades "
        "| width, decades | loss falls from (seen) | epochs | seconds |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for name, task in combinations(arguments.cifar10).items():
        if arguments.only in (None, name):
            seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
            print(row(name, grids[name], measure(task, seeds)), flush=True)
    print(f"\nranges of {USUAL_DECADES:g} decades are usual; torch {torch.__version__}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
