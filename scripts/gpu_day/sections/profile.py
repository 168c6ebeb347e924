"""Kernels a step and their time on the device, by torch's profiler: of the plain engine, a captured lane and stacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from scripts.gpu_day.common import (
    Section,
    article_trial,
    device,
    free_memory,
    load,
    on_gpu,
    plain_steps,
    stack_steps,
    wait,
)

NUM_STEPS = 3


def run(section: Section) -> None:
    config = article_trial(section, 2000)
    data = load(config)
    with section.trying("plain"):
        profile(section, "plain", plain_steps(config, data))
    with section.trying("captured"):
        engine = CapturedLanes(device=device())
        engine.fill(config, 1)
        profile(section, "captured", engine.issue_step)
    for convolution in CONVOLUTIONS:
        key = f"stack.{convolution}"
        with section.trying(key):
            count = section.pick(16, 2)
            profile(section, key, stack_steps(config, data, count, convolution=convolution))
        free_memory()


def profile(section: Section, key: str, step: Callable[[], object]) -> None:
    """Say how many kernels a step launches and how long they take; put the table of operations beside the figures."""
    for _ in range(2):
        step()
    wait()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(NUM_STEPS):
            step()
        wait()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    section.say(
        key,
        {
            "kernels_per_step": len(kernels) / NUM_STEPS,
            "device_us_per_step": sum(event.device_time for event in kernels) / NUM_STEPS,
            "operations_per_step": (len(profiler.events()) - len(kernels)) / NUM_STEPS,
        },
    )
    order = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=40)
    (section.folder / f"profile.{key}.txt").write_text(table)
