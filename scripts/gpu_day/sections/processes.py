"""The plain engine in 1, 2, 4 and 8 processes on one device at a time: what lanes are measured against."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import torch

from hpo.train.data.loading import DatasetCache
from scripts.gpu_day.common import Section, article_trial, device, plain_engine, wait
from scripts.gpu_day.sections.rates import NUM_IMAGES

STARTING_S = 40.0  # that a process may take until it has trained its first epoch
TINY_STARTING_S = 600.0  # the same in a tiny day, which tests run on machines that do much else


def run(section: Section) -> None:
    for count in section.pick((1, 2, 4, 8), (2,)):
        with section.trying(str(count)):
            section.say(str(count), {"images_per_s": rate_of_processes(count, section), "n": 1})


def rate_of_processes(count: int, section: Section) -> float:
    """Return the images a second of so many processes together."""
    starting_s = section.pick(STARTING_S, TINY_STARTING_S)
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(count), context.Queue()
    threads = max(1, torch.get_num_threads() // count)
    processes = [
        context.Process(target=one_of_many, args=(section, threads, starting_s, barrier, rates), daemon=True)
        for _ in range(count)
    ]
    try:
        for process in processes:
            process.start()
        return sum(float(rates.get(timeout=starting_s)) for _ in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def one_of_many(section: Section, threads: int, starting_s: float, barrier: Any, rates: Any) -> None:
    """Train in a process of its own, at the same time as the others behind the barrier, and report its rate."""
    torch.set_num_threads(threads)
    config = article_trial(section, NUM_IMAGES)
    cache = DatasetCache(device=device())
    num_images = len(cache.get(config.data).train)
    engine = plain_engine(dataset_cache=cache)
    engine.admit(config)
    engine.run_epoch()
    wait()
    barrier.wait(starting_s)
    start_s = time.perf_counter()
    engine.run_epoch()
    engine.run_epoch()
    wait()
    rates.put(2 * num_images / (time.perf_counter() - start_s))
    barrier.wait(starting_s)  # none ends and makes room while another one measures
