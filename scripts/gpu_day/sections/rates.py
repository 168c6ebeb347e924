"""Images a second of the article's network, batch 128, in every way to train it, on the same images.

`captured.K` and `plain` are whole epochs as a user gets them, with one validation image a class; `captured_steps.K` and
`plain_steps` are steps alone. Those that decide the goals come first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from hpo.train.config import TrialConfig
from hpo.train.data.loading import DatasetCache, SplitDataset
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.protocol import Engine
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from scripts.gpu_day.common import (
    Section,
    article_trial,
    device,
    free_memory,
    on_gpu,
    plain_engine,
    plain_steps,
    rate,
    stack_steps,
    timed_chunks,
    wait,
    with_training,
)

NUM_IMAGES = 25_600


def run(section: Section) -> None:
    config = article_trial(section, NUM_IMAGES)
    cache = DatasetCache(device=device())
    data = cache.get(config.data)

    def measure(key: str, rate_of: Callable[[], dict[str, float]]) -> None:
        with section.trying(key):
            section.say(key, rate_of())
        free_memory()  # what was measured is gone

    def plain(key: str) -> None:
        measure(key, lambda: epoch_rate(plain_engine(dataset_cache=cache), config, 1, data=data, section=section))

    def captured(key: str, count: int) -> None:
        def rate_of() -> dict[str, float]:
            engine = CapturedLanes(device=device(), dataset_cache=cache)
            return epoch_rate(engine, config, count, data=data, section=section)

        measure(f"{key}.{count}", rate_of)

    def stacks(count: int) -> None:
        for name in CONVOLUTIONS:
            measure(f"stack.{name}.{count}", partial(stack_rate, config, data, count, name, section=section))

    many = section.pick(16, 2)
    plain("plain")
    captured("captured", many)
    size = config.training.batch_size
    measure("plain_steps", lambda: rate(plain_steps(config, data), num_images=size, section=section))
    measure(f"captured_steps.{many}", lambda: captured_steps_rate(config, many, cache=cache, section=section))
    stacks(many)
    for count in section.pick((1, 8, 4, 32, 2), (1,)):
        captured("captured", count)
    stacks(section.pick(4, 3))
    if section.needs_gpu("benchmark"):
        torch.backends.cudnn.benchmark = True
        plain("plain_benchmark")
        captured("captured_benchmark", 16)
        captured("captured_benchmark", 1)


def epoch_rate(
    engine: Engine, config: TrialConfig, count: int, *, data: SplitDataset, section: Section
) -> dict[str, float]:
    """Return the images a second of whole epochs of so many lanes, and what setting them up took."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    start_s = time.perf_counter()
    for seed in range(count):
        engine.admit(with_training(config, seed=seed))
    wait()
    setting_up_s = time.perf_counter() - start_s
    engine.run_epoch()  # warms up
    measured = timed_chunks(engine.run_epoch, num_images=count * len(data.train), section=section)
    memory_gb = torch.cuda.max_memory_allocated() / 1e9 if on_gpu() else 0.0
    return measured | {"setting_up_s": setting_up_s, "memory_gb": memory_gb}


def captured_steps_rate(config: TrialConfig, count: int, *, cache: DatasetCache, section: Section) -> dict[str, float]:
    """Return the images a second of the steps of so many captured lanes, and the seconds that capturing them took."""
    engine = CapturedLanes(device=device(), dataset_cache=cache)
    start_s = time.perf_counter()
    engine.fill(config, count)
    wait()
    capture_s = time.perf_counter() - start_s
    num_images = count * config.training.batch_size
    return rate(engine.issue_step, num_images=num_images, section=section) | {"capture_s": capture_s}


def stack_rate(
    config: TrialConfig, data: SplitDataset, count: int, convolution: str, *, section: Section
) -> dict[str, float]:
    """Return the images a second of the steps of a stack."""
    step = stack_steps(config, data, count, convolution=convolution)
    return rate(step, num_images=count * config.training.batch_size, section=section)
