"""What this machine is: versions, the GPU, its matrix rate, what copies and launches cost."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from hpo.train.models import article_cnn
from scripts.gpu_day.common import TINY_WIDTH, Section, device, new_stream, on_gpu, wait
from scripts.gpu_day.stand_in import is_here

COMMANDS = {
    "driver": "nvidia-smi --query-gpu=driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader",
    "commit": "git rev-parse HEAD",
    "cpu_model": "grep -m1 model.name /proc/cpuinfo",
}
PACKAGES = (
    "annotated_types",
    "optuna",
    "sqlalchemy",
    "pydantic",
    "scipy",
    "sklearn",
    "pynvml",
    "psutil",
    "torchvision",
)


def run(section: Section) -> None:
    section.say("python", platform.python_version())
    section.say("torch", torch.__version__)
    section.say("cores", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    section.say("gpu", torch.cuda.get_device_name() if on_gpu() else None)
    for name, command in COMMANDS.items():
        with suppress(OSError, subprocess.SubprocessError):
            section.say(name, _first_line(command))
    with section.trying("packages"):
        section.say("packages", [*filter(is_here, PACKAGES)])
    with section.trying("flops_per_image"):
        section.say("flops_per_image", flops_per_image(section.pick(1.0, TINY_WIDTH)))
    with section.trying("matmul"):
        section.say("matmul_flops", matmul_flops(section))
    if not section.needs_gpu("cuda"):
        return
    with section.trying("cuda"):
        section.say(
            "cuda",
            {
                "runtime": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
                "capability": torch.cuda.get_device_capability(),
                "has_bf16": torch.cuda.is_bf16_supported(including_emulation=False),
                "tf32_convolutions": torch.backends.cudnn.allow_tf32,
                "tf32_products": torch.backends.cuda.matmul.allow_tf32,
                "free_and_total_gb": [size / 1e9 for size in torch.cuda.mem_get_info()],
            },
        )
    with section.trying("copies"):
        section.say("copy_bytes_per_s", copy_rates(section))
    with section.trying("launches"):
        section.say("launch_us", launch_us(section))
    with section.trying("graphs"):
        section.say("graph_kernel_us", graph_kernel_us(section))


def _first_line(command: str) -> str:
    output = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=10, check=False, cwd=Path(__file__).parent
    )
    return output.stdout.partition("\n")[0]


def flops_per_image(width: float) -> int:
    """Count the floating-point operations of an image of the article's network, forward and backward."""
    model = article_cnn(channels=3, num_classes=100, width=width)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(8, 3, 32, 32)).sum().backward()
    return int(counter.get_total_flops()) // 8


def matmul_flops(section: Section) -> float:
    """Return the FLOP/s of a square matrix product, the median of five: 8192 in bf16 on a GPU, 2048 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if on_gpu() else (2048, torch.float32)
    repeats = 20 if on_gpu() else 1
    if section.is_tiny:
        size, repeats = 256, 1
    left, right = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    return statistics.median(2 * size**3 / _seconds(lambda: left @ right, repeats=repeats) for _ in range(5))


def copy_rates(section: Section) -> dict[str, float]:
    """Return the bytes a second within the GPU's memory (read and written), and from it to the host's."""
    size = section.pick(2**30, 2**20)
    there, other = (torch.empty(size, dtype=torch.uint8, device=device()) for _ in range(2))
    pinned = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
    part = there[: size // 4]
    return {
        "within": 2 * size / _seconds(lambda: other.copy_(there), repeats=5),
        "to_pinned": size / 4 / _seconds(lambda: pinned.copy_(part, non_blocking=True), repeats=4),
        "to_pageable": size / 4 / _seconds(part.cpu, repeats=4),
    }


def launch_us(section: Section) -> dict[str, float]:
    """Return the microseconds of a smallest kernel: of the host's side alone, and until the last one is done."""
    numbers = torch.zeros(64, device=device())
    repeats = section.pick(5000, 10)
    for _ in range(100):
        numbers.add_(1)
    wait()
    start_s = time.perf_counter()
    for _ in range(repeats):
        numbers.add_(1)
    host_s = time.perf_counter() - start_s
    wait()
    return {"host": 1e6 * host_s / repeats, "whole": 1e6 * (time.perf_counter() - start_s) / repeats}


def graph_kernel_us(section: Section) -> dict[str, dict[str, float]]:
    """Return the microseconds of a smallest kernel in captured graphs of 100, on 1, 4 and 16 streams at a time."""
    kernels, repeats = 100, section.pick(20, 1)
    captured = []
    for _ in range(16):
        numbers, stream, graph = torch.zeros(64, device=device()), new_stream(), torch.cuda.CUDAGraph()
        wait()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(kernels):
                numbers.add_(1)
        captured.append((graph, stream, numbers))
    found = {}
    for count in (1, 4, 16):

        def replay(count: int = count) -> None:
            for graph, stream, _ in captured[:count]:
                with torch.cuda.stream(stream):
                    graph.replay()

        replay()
        wait()
        start_s = time.perf_counter()
        for _ in range(repeats):
            replay()
        host_s = time.perf_counter() - start_s
        wait()
        whole_s = time.perf_counter() - start_s
        found[f"{count} streams"] = {
            "kernel": 1e6 * whole_s / repeats / kernels / count,
            "host_per_replay": 1e6 * host_s / repeats / count,
        }
    return found


def _seconds(function: Callable[[], object], *, repeats: int) -> float:
    """Return the seconds of a call, over several calls after one that warms up."""
    function()
    wait()
    start_s = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - start_s) / repeats
