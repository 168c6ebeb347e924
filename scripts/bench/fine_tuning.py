"""Measure the best rates of fine-tuning on dense grids, and how often the range test holds them.

    python -m scripts.bench.fine_tuning --cifar10 FOLDER --cifar100 FOLDER             # the range tests, a minute
    python -m scripts.bench.fine_tuning --cifar10 FOLDER --cifar100 FOLDER --record    # trains all again, half an hour

Both folders hold their images as train/CLASS/*. A small residual network is trained on 20,000 images of CIFAR-10, and
fine-tuned on 2,000 images of 20 classes of CIFAR-100: the head alone, the whole network, and the whole network with the
head at ten times the learning rate. The results of the grids are in fine_tuning_grids.json in this folder. The range
test's constants for frozen bodies were chosen with the seeds 200 to 204; those from --first-seed on are different.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.plain import PlainEngine
from hpo.train.imports import ImportAllowlist
from hpo.train.lr_ramp import run_range_test

GRIDS = Path(__file__).resolve().parent / "fine_tuning_grids.json"
NETWORK = "scripts.bench.fine_tuning:small_resnet"
NUM_CLASSES, NUM_TRAIN = 20, 2000
EPOCHS = 8
AS_GOOD = 0.01  # behind the best accuracy; the standard error of 2,000 validation images is as large
WAYS: dict[str, dict[str, Any]] = {
    "head only": {"freeze": ["body"]},
    "whole network": {},
    "head at ten times": {"groups": {"head": {"lr": 10.0}}},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"sgd": {"optimizer": "sgd", "momentum": 0.9}, "adam": {"optimizer": "adam"}}
# Of each grid: its decades as powers of ten, the rates a decade, and the seeds.
TASKS = {
    ("head only", "sgd"): (-3, 1, 3, 2),
    ("head only", "adam"): (-3, 0, 3, 2),
    ("whole network", "sgd"): (-3, 0, 3, 2),
    ("whole network", "adam"): (-4, -1, 2, 1),
    ("head at ten times", "sgd"): (-3, 0, 2, 1),
    ("head at ten times", "adam"): (-5, -2, 2, 1),
}


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(maps)))))
        return torch.relu(inner + self.shortcut(maps))


def small_resnet(*, channels: int, num_classes: int) -> nn.Module:
    """Return a residual network of 0.1 M parameters for 32x32 images."""
    stem = nn.Sequential(nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def train(config: TrialConfig, *, cache: DatasetCache) -> PlainEngine:
    """Train a trial to its end, or until it diverges."""
    engine = PlainEngine(device="cpu", dataset_cache=cache)
    engine.admit(config)
    for _ in range(config.training.epochs):
        if engine.run_epoch()[0].diverged:
            break
    return engine


def pretrain(cifar10: Path, file: Path) -> float:
    """Train the network on CIFAR-10, write its weights to a file, and return its validation accuracy."""
    config = TrialConfig(
        model=ModelConfig(name=NETWORK),
        data=DataConfig(name="image_folder", root=str(cifar10), train_samples=20_000, flip=True, crop=4),
        training=TrainingConfig(epochs=10, lr=0.05, optimizer="sgd", momentum=0.9, schedule="cosine", batch_size=64),
        seed=1,
    )
    engine = train(config, cache=DatasetCache(device=torch.device("cpu")))
    checkpoint = engine.checkpoint(0)
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.state["model"].items()}, file)
    return checkpoint.results[-1].val_accuracy


def fine_tuned(way: str, optimizer: str, *, root: Path, weights: Path, lr: float, seed: int) -> TrialConfig:
    """Return a trial that fine-tunes the network."""
    return TrialConfig(
        model=ModelConfig(name=NETWORK, weights=str(weights)),
        data=DataConfig(name="image_folder", root=str(root), validation_fraction=0.2, train_samples=NUM_TRAIN),
        training=TrainingConfig(
            epochs=EPOCHS, lr=lr, batch_size=32, schedule="cosine", **OPTIMIZERS[optimizer], **WAYS[way]
        ),
        seed=seed,
    )


def grid_of(way: str, optimizer: str, *, root: Path, weights: Path, cache: DatasetCache) -> dict[str, Any]:
    """Train a grid; return its learning rates, and the last accuracies of each."""
    low, high, per_decade, num_seeds = TASKS[way, optimizer]
    lrs = [float(f"{10 ** (low + step / per_decade):.2g}") for step in range((high - low) * per_decade + 1)]
    accuracies = []
    for lr in lrs:
        configs = (
            fine_tuned(way, optimizer, root=root, weights=weights, lr=lr, seed=seed) for seed in range(num_seeds)
        )
        lasts = [train(config, cache=cache).checkpoint(0).results[-1] for config in configs]
        accuracies.append([1 / NUM_CLASSES if last.diverged else round(last.val_accuracy, 4) for last in lasts])
    return {"lrs": lrs, "val_accuracy": accuracies}


def record_grids(root: Path, *, weights: Path, pretrained: float) -> None:
    """Train the grids, and write the last accuracies."""
    cache = DatasetCache(device=torch.device("cpu"))
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    content: dict[str, Any] = {"machine": machine, "pretrained": pretrained, "epochs": EPOCHS, "grids": {}}
    for way, optimizer in TASKS:
        grid = grid_of(way, optimizer, root=root, weights=weights, cache=cache)
        content["grids"][f"{way}, {optimizer}"] = grid
        GRIDS.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{way}, {optimizer}: {grid}", flush=True)


def row(way: str, optimizer: str, grid: dict[str, Any], *, root: Path, weights: Path, seeds: range) -> str:
    """Run the range tests of a grid, and return its line of the table in docs/results/index.md."""
    means = [statistics.fmean(values) for values in grid["val_accuracy"]]
    top = max(means)
    best = grid["lrs"][means.index(top)]
    good = [lr for lr, mean in zip(grid["lrs"], means, strict=True) if mean >= top - AS_GOOD]
    cache = DatasetCache(device=torch.device("cpu"))
    ranges = []
    for seed in seeds:
        config = fine_tuned(way, optimizer, root=root, weights=weights, lr=1.0, seed=seed)
        test = run_range_test(config, device="cpu", dataset_cache=cache)
        ranges.append((test.low or math.nan, test.high or math.nan))
    held = sum(low <= best <= high for low, high in ranges)
    all_held = sum(low <= good[0] and good[-1] <= high for low, high in ranges)
    low, high = (statistics.median(ends) for ends in zip(*ranges, strict=True))
    width = statistics.median(math.log10(high / low) for low, high in ranges)
    return (
        f"| {way}, {optimizer} | {best:.2g} ({good[0]:.2g} to {good[-1]:.2g}) | {100 * top:.1f} % "
        f"| {low:.2g} to {high:.2g} "
        f"| {held} of {len(ranges)} | {all_held} of {len(ranges)} | {width:.2f} |"
    )


def link_classes(cifar100: Path, root: Path) -> None:
    """Make a folder of images of the first classes."""
    (root / "train").mkdir()
    for folder in sorted((cifar100 / "train").iterdir())[:NUM_CLASSES]:
        (root / "train" / folder.name).symlink_to(folder)


def main() -> None:
    """Print a row of the table for each way and optimizer."""
    parser = argparse.ArgumentParser(description="Does the range test hold the best rate of fine-tuning?")
    parser.add_argument("--cifar10", type=Path, required=True, help="folder with CIFAR-10's images as train/CLASS/*")
    parser.add_argument("--cifar100", type=Path, required=True, help="folder with CIFAR-100's images as train/CLASS/*")
    parser.add_argument("--weights", type=Path, help="where the weights are kept; by default they are trained anew")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=3000)
    parser.add_argument("--record", action="store_true", help="train the grids again first")
    arguments = parser.parse_args()
    allowed = ImportAllowlist(names=(NETWORK,), path=(os.getcwd(),))
    with tempfile.TemporaryDirectory() as temporary, allowed.importable():
        root = Path(temporary)
        link_classes(arguments.cifar100, root)
        weights = arguments.weights or root / "cifar10.safetensors"
        pretrained = math.nan if weights.exists() else pretrain(arguments.cifar10, weights)
        print(f"validation accuracy on CIFAR-10: {pretrained:.3f}", flush=True)
        if arguments.record:
            record_grids(root, weights=weights, pretrained=pretrained)
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        print("| task | grid's best (as good) | accuracy | range found | held the best | held all as good | decades |")
        print("|---|---|---|---|---|---|---|")
        grids = json.loads(GRIDS.read_text())["grids"]
        for way, optimizer in TASKS:
            if (grid := grids.get(f"{way}, {optimizer}")) is not None:
                print(row(way, optimizer, grid, root=root, weights=weights, seeds=seeds), flush=True)
    print(f"\ntorch {torch.__version__}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
