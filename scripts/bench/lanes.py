"""Measure images a second of many trials on a CPU: in lanes, one after another, and in several processes.

    python -m scripts.bench.lanes                    # the article's network on CIFAR-100-shaped noise, batch 128
    python -m scripts.bench.lanes --network tiny     # 8x8 images, of which a CPU trains many at once

Next to our lanes (both ways to stack convolutions) and our plain engine, it measures a usual DataLoader script and
several processes of the plain engine at once. Figures are medians of --repeats, which take turns. Needs torch alone.
`make bench-gpu` measures a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data import datasets
from hpo.train.data.images import ArrayImages
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.lane_state import initial_model
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.plain import PlainEngine, build_lane
from hpo.train.engines.stack import TrialStack
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from hpo.train.models import MODELS
from scripts.bench.engine import flops_per_image, matmul_flops, spread

ARTICLE_LRS = (1e-1, 1e-3, 3e-4, 6.25e-5)
SPACE = (1e-5, 1e-1)  # of the study of many trials
NETWORKS = ("article", "tiny", "resnet18")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def tiny_cnn(*, channels: int, num_classes: int) -> nn.Module:
    """Return a small CNN for 8x8 images."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, num_classes)),
    )


def prepare(network: str, num_images: int, batch_size: int) -> TrialConfig:
    """Return a trial of the network on noise of its shape, which becomes a dataset of our own."""
    side, channels, num_classes = (8, 1, 10) if network == "tiny" else (32, 3, 100)
    generator = torch.Generator().manual_seed(0)
    shape = (num_images + num_classes, side, side, channels)  # one image of each class is for the validation
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def noise(config: DataConfig) -> datasets.OpenedDataset:
        train = ArrayImages(images, torch.arange(len(images)) % num_classes)
        return datasets.OpenedDataset(train=train, open_test=None, num_classes=num_classes)

    datasets.DATASETS["noise"] = noise
    MODELS["tiny"] = tiny_cnn
    names = {"article": "article_cnn", "tiny": "tiny", "resnet18": "torchvision:resnet18"}
    return TrialConfig(
        model=ModelConfig(name=names[network]),
        data=DataConfig(name="noise", validation_fraction=num_classes / len(images), placement="device"),
        training=TrainingConfig(lr=1e-4, batch_size=batch_size, optimizer="adam"),
        seed=0,
    )


def of_seed(config: TrialConfig, seed: int, **training: Any) -> TrialConfig:
    """Return the trial with another seed and other settings of its training."""
    return replace(config, seed=seed, training=replace(config.training, **training))


def lanes_epoch(config: TrialConfig, lanes: int, convolution: str) -> Callable[[], int]:
    """Return a function that trains an epoch in every lane, without validation, and returns its number of images."""
    group = TrialStack(config, data=DatasetCache(device=CPU).get(config.data), device=CPU, convolution=convolution)
    for seed in range(lanes):
        group.admit(of_seed(config, seed))
    num_steps = group.num_steps

    def epoch() -> int:
        num_images = 0
        factors = group.factors(num_steps)
        for step, (images, labels) in enumerate(group.batches()):
            group.step(images, labels, factors[step])
            num_images += labels.numel()
        return num_images

    return epoch


def plain_epoch(config: TrialConfig) -> Callable[[], int]:
    """Return the same for the plain engine and one trial."""
    data = DatasetCache(device=CPU).get(config.data)
    engine, lane = PlainEngine(device="cpu"), build_lane(config, data=data, device=CPU)

    def epoch() -> int:
        num_images = 0
        for images, labels in data.train.batches(config.training.batch_size, seed=0, epoch=0):
            engine.step(lane, images, labels)
            num_images += len(labels)
        return num_images

    return epoch


def loader_epoch(config: TrialConfig) -> Callable[[], int]:
    """Return the same for a usual script: a DataLoader with workers, a loss read in every step, float32."""
    data = DatasetCache(device=CPU).get(config.data)
    images, labels = next(data.train.batches(len(data.train)))
    loader = DataLoader(
        TensorDataset(images, labels),
        batch_size=config.training.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    model = initial_model(config, data=data, device=CPU).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    criterion = nn.CrossEntropyLoss()

    def epoch() -> int:
        num_images, total = 0, 0.0
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
            num_images += len(labels)
        return num_images

    return epoch


def rate(epoch: Callable[[], int]) -> float:
    """Return the images a second of one epoch."""
    start_s = time.perf_counter()
    num_images = epoch()
    return num_images / (time.perf_counter() - start_s)


def one_of_many(given: tuple[str, int, int], threads: int, barrier: Any, rates: Any) -> None:
    """Train in a process of its own, at the same time as the others behind the barrier, and report its rate."""
    torch.set_num_threads(threads)
    config = prepare(*given)
    epoch = plain_epoch(config)
    epoch()
    barrier.wait()
    rates.put(rate(epoch))


def processes_rate(given: tuple[str, int, int], count: int) -> float:
    """Return the images a second of so many processes of the plain engine together."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(count), context.Queue()
    threads = max(1, torch.get_num_threads() // count)
    arguments = (given, threads, barrier, rates)
    processes = [context.Process(target=one_of_many, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    total: float = sum(rates.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return total


def study(config: TrialConfig, lrs: list[float], epochs: int) -> int:
    """Train one trial for each learning rate, as many at once as the engine chooses; return how many that is."""
    engine = LaneEngine(device="cpu", max_lanes=max(2, len(lrs)))
    waiting = [of_seed(config, seed, lr=lr, epochs=epochs) for seed, lr in enumerate(lrs)]
    held: set[int] = set()
    while waiting or held:
        while waiting and engine.free_lanes:
            held.add(engine.admit(waiting.pop(0)))
        for result in engine.run_epoch():
            if result.epoch == epochs or result.diverged:
                engine.evict(result.lane)
                held.discard(result.lane)
    assert engine.plan is not None
    return engine.plan.lanes


def study_seconds(arguments: argparse.Namespace, trials: int, epochs: int) -> float:
    """Return the seconds of a whole process that trains a study, including its start, all measuring and compiling."""
    command = [
        sys.executable,
        "-m",
        "scripts.bench.lanes",
        "--network",
        arguments.network,
    ]
    command += ["--pictures", str(arguments.pictures), "--batch-size", str(arguments.batch_size)]
    command += ["--study", str(trials), str(epochs)]
    start_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - start_s


def parse_arguments() -> argparse.Namespace:
    """Read the command line, and fill in the defaults that depend on the network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="article", choices=NETWORKS)
    parser.add_argument("--lanes", type=int, nargs="+", help="default: 1 to 16")
    parser.add_argument("--processes", type=int, nargs="*", help="default: 2")
    parser.add_argument("--pictures", type=int, help="an epoch (default: 256, tiny 4096)")
    parser.add_argument("--batch-size", type=int, help="of a lane (default: 128, tiny 32)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-studies", action="store_true", help="leave out the seconds from start to answer")
    parser.add_argument(
        "--study", type=int, nargs=2, metavar=("TRIALS", "EPOCHS"), help="train this study, print nothing"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    small = 4096 if arguments.network == "tiny" else 256
    arguments.pictures = arguments.pictures or small
    arguments.batch_size = arguments.batch_size or (32 if arguments.network == "tiny" else 128)
    return arguments


def train_study(config: TrialConfig, *, trials: int, epochs: int) -> None:
    """Train a study over the article's learning rates, or over as many as there are trials, spread over SPACE."""
    low, high = map(math.log, SPACE)
    lrs = [math.exp(low + (high - low) * index / max(1, trials - 1)) for index in range(trials)]
    if trials == len(ARTICLE_LRS):
        lrs = list(ARTICLE_LRS)
    study(config, lrs, epochs)


def measure_rates(arguments: argparse.Namespace, config: TrialConfig) -> dict[str, list[float]]:
    """Return the images a second of every way to train, by name; in each repeat the ways take turns."""
    ways: dict[str, Callable[[], int]] = {"one after another": plain_epoch(config)}
    ways["DataLoader script"] = loader_epoch(config)
    for count in arguments.lanes or [1, 2, 4, 8, 16]:
        for convolution in CONVOLUTIONS:
            ways[f"{count} lanes, {convolution}"] = lanes_epoch(config, count, convolution)
    images = f"{arguments.pictures} images an epoch"
    print(f"{arguments.network}, batch {arguments.batch_size}, {images}, fp32", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for epoch in ways.values():
        epoch()  # warms up
    for _ in range(arguments.repeats):
        for name, epoch in ways.items():
            rates[name].append(rate(epoch))
    given = (arguments.network, arguments.pictures, arguments.batch_size)
    for count in arguments.processes if arguments.processes is not None else [2]:
        rates[f"{count} processes"] = [processes_rate(given, count) for _ in range(arguments.repeats)]
    return rates


def print_rates(rates: dict[str, list[float]], *, peaks: list[float], flops: int | None) -> None:
    """Print for each way its rate, its ratio to one trial after another, and its share of a matrix product's FLOP/s."""
    alone = rates["one after another"]
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, alone, strict=True)]
        share = ""
        if flops is not None:
            share = f"{statistics.median(values) * flops / statistics.median(peaks):8.1%}"
        print(
            f"{name:<24}{statistics.median(values):12.0f} images/s ({min(values):.0f} to {max(values):.0f})"
            f"{statistics.median(ratios):8.2f} times{share}",
            flush=True,
        )


def main() -> None:
    """Measure, print and write the figures; with --study train that study and print nothing."""
    arguments = parse_arguments()
    network = arguments.network
    config = prepare(network, arguments.pictures, arguments.batch_size)
    if arguments.study:
        trials, epochs = arguments.study
        train_study(config, trials=trials, epochs=epochs)
        return
    rates = measure_rates(arguments, config)
    peaks = [matmul_flops("cpu") for _ in range(arguments.repeats)]
    figures: dict[str, Any] = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "network": network,
        "batch_size": arguments.batch_size,
        "pictures": arguments.pictures,
        "matmul_flops_per_s": spread(peaks),
        "images_per_s": {name: spread(values) for name, values in rates.items()},
    }
    print(f"{figures['hardware']}, {figures['threads']} threads, torch {torch.__version__}; n = {arguments.repeats}")
    print_rates(rates, peaks=peaks, flops=flops_per_image() if network == "article" else None)
    if not arguments.no_studies:
        for trials, length in ((len(ARTICLE_LRS), 20), (32, 5)):
            seconds = study_seconds(arguments, trials, length)
            figures[f"seconds_{trials}_trials_{length}_epochs"] = seconds
            print(f"{trials} trials x {length} epochs, from the start of the process: {seconds:.1f} s", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
