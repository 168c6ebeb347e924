"""Measure images per second of the plain engine, of a hand-written training loop, and FLOP/s of a large matrix product.

The loop is what a good engineer writes by hand for the same work: uint8 images on the device, shuffled each epoch,
normalised, channels_last, fused or for-each Adam. Both train the article's network on the same CIFAR-shaped images,
including data loading but not validation. They take turns within one run, so that other load on the machine hits both.
Needs torch alone. Usage: python -m scripts.bench.engine [--device cuda] [--pictures N] [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data import datasets
from hpo.train.data.images import ArrayImages
from hpo.train.engines.plain import PlainEngine
from hpo.train.models import article_cnn

BATCH_SIZE = 128
NUM_CLASSES = 100
LR = 1e-4


def noise_images(num_images: int) -> tuple[Tensor, Tensor]:
    """Return CIFAR-100-shaped noise, uint8 (N, C, H, W), and labels that go round the classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.arange(num_images) % NUM_CLASSES


def engine_epoch(num_images: int, device: str) -> Callable[[], float]:
    """Return a function that trains one epoch with the plain engine and returns its seconds."""
    images, labels = noise_images(num_images + NUM_CLASSES)  # one image of each class is for the validation

    def noise(config: DataConfig) -> datasets.OpenedDataset:
        train = ArrayImages(images.permute(0, 2, 3, 1).contiguous(), labels)
        return datasets.OpenedDataset(train=train, open_test=None, num_classes=NUM_CLASSES)

    datasets.DATASETS["noise"] = noise
    engine = PlainEngine(device=device)
    engine.admit(
        TrialConfig(
            model=ModelConfig(name="article_cnn"),
            data=DataConfig(name="noise", validation_fraction=NUM_CLASSES / len(images), placement="device"),
            training=TrainingConfig(lr=LR, batch_size=BATCH_SIZE, optimizer="adam"),
            seed=0,
        )
    )
    lane = engine._lane  # its own training pass is timed: run_epoch validates too, and the loop does not
    assert lane is not None

    def epoch() -> float:
        synchronise(device)
        start_s = time.perf_counter()
        engine._train(lane)
        synchronise(device)
        return time.perf_counter() - start_s

    return epoch


def loop_epoch(num_images: int, device: str) -> Callable[[], float]:
    """Return a function that trains one epoch with the hand-written loop and returns its seconds."""
    images, labels = (tensor.to(device) for tensor in noise_images(num_images))
    scaled = images.float() / 255
    mean, std = (stat.view(3, 1, 1) for stat in (scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))))
    images = images.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    model = article_cnn(channels=3, num_classes=NUM_CLASSES).to(device).to(memory_format=torch.channels_last)
    on_cuda = torch.device(device).type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=on_cuda)
    criterion = nn.CrossEntropyLoss()

    def epoch() -> float:
        synchronise(device)
        start_s = time.perf_counter()
        model.train()
        order = torch.randperm(num_images, device=device)
        total_loss = torch.zeros((), device=device)
        correct = torch.zeros((), device=device)
        for start in range(0, num_images, BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            inputs = ((images[batch].float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
            targets = labels[batch]
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=on_cuda):
                logits = model(inputs)
                loss = criterion(logits, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total_loss += loss.detach() * len(targets)
            correct += (logits.argmax(1) == targets).sum()
        total_loss.item(), correct.item()
        synchronise(device)
        return time.perf_counter() - start_s

    return epoch


def matmul_flops(device: str) -> float:
    """Return the FLOP/s of a square matrix product: 2048 in float32 on a CPU, 8192 in bf16 on a GPU."""
    on_cuda = torch.device(device).type == "cuda"
    size, dtype, repeats = (8192, torch.bfloat16, 20) if on_cuda else (2048, torch.float32, 5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return rate(lambda: left @ right, flops=2 * size**3, repeats=repeats, device=device)


def onednn_flops() -> float:
    """Return the FLOP/s of the CPU's 2048 product written as a 1x1 convolution, which oneDNN computes and not MKL.

    MKL's matmul leaves AVX-512 unused on AMD processors, and oneDNN's convolutions do not. There the network runs
    faster than "a large matrix product" of torch.matmul's, and only this product is a yardstick.
    """
    images = torch.randn(8, 2048, 16, 16).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(2048, 2048, 1, 1)
    return rate(lambda: torch.conv2d(images, weights), flops=2 * 2048**3, repeats=5, device="cpu")


def rate(product: Callable[[], Tensor], *, flops: int, repeats: int, device: str) -> float:
    """Return the FLOP/s of a product, over several repeats after one that warms up."""
    product()
    synchronise(device)
    start_s = time.perf_counter()
    for _ in range(repeats):
        product()
    synchronise(device)
    return flops * repeats / (time.perf_counter() - start_s)


def flops_per_image() -> int:
    """Count the floating-point operations of one image forward and backward, without the optimizer."""
    model = article_cnn(channels=3, num_classes=NUM_CLASSES)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(8, 3, 32, 32)).sum().backward()
    return int(counter.get_total_flops()) // 8


def synchronise(device: str) -> None:
    """Wait for a GPU's kernels."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, lowest, highest and number of measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def main() -> None:
    """Measure in turns, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=int, help="an epoch (default: 1280, on a GPU 50000)")
    parser.add_argument("--repeats", type=int, default=7, help="timed epochs of each")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    device = arguments.device
    on_cuda = torch.device(device).type == "cuda"
    num_images = arguments.pictures or (50_000 if on_cuda else 1_280)

    engine, loop = engine_epoch(num_images, device), loop_epoch(num_images, device)
    engine(), loop()  # warm up
    engine_rates, loop_rates, ratios = [], [], []
    products: dict[str, list[float]] = {name: [] for name in (["matmul"] if on_cuda else ["matmul", "onednn"])}
    for repeat in range(arguments.repeats):
        first, second = (engine, loop) if repeat % 2 == 0 else (loop, engine)
        seconds = {first: first(), second: second()}
        engine_rates.append(num_images / seconds[engine])
        loop_rates.append(num_images / seconds[loop])
        ratios.append(seconds[loop] / seconds[engine])
        products["matmul"].append(matmul_flops(device))
        if not on_cuda:
            products["onednn"].append(onednn_flops())

    flops = flops_per_image()
    figures: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name(device) if on_cuda else f"{platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "precision": "bf16" if on_cuda else "fp32",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "batch_size": BATCH_SIZE,
        "pictures": num_images,
        "flops_per_image": flops,
        "engine_images_per_s": spread(engine_rates),
        "loop_images_per_s": spread(loop_rates),
        "engine_over_loop": spread(ratios),
    }
    for name, peaks in products.items():
        figures[f"{name}_flops_per_s"] = spread(peaks)
        for who, rates in (("engine", engine_rates), ("loop", loop_rates)):
            shares = [images * flops / peak for images, peak in zip(rates, peaks, strict=True)]
            figures[f"{who}_share_of_{name}"] = spread(shares)

    def line(label: str, key: str, form: str) -> None:
        low, middle, high = (format(figures[key][name], form) for name in ("min", "median", "max"))
        print(f"{label:<28}{middle} ({low} to {high}, n={figures[key]['n']})")

    print(f"{figures['hardware']}, {figures['threads']} threads, {figures['precision']}, torch {torch.__version__}")
    print(f"article_cnn, batch {BATCH_SIZE}, {num_images} images an epoch, {flops / 1e9:.3f} GFLOP an image")
    line("plain engine, images/s", "engine_images_per_s", ".1f")
    line("hand-written loop, images/s", "loop_images_per_s", ".1f")
    line("engine / loop", "engine_over_loop", ".3f")
    for name in products:
        line(f"{name} product, FLOP/s", f"{name}_flops_per_s", ".3g")
        line(f"engine, share of {name}", f"engine_share_of_{name}", ".0%")
        line(f"loop, share of {name}", f"loop_share_of_{name}", ".0%")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
