"""The article's four learning rates for 20 epochs on data of CIFAR-100's size, from the start of the process.

Validation is included, images are drawn and not read from a disk. Then one epoch as the product plans it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from hpo.train.config import EpochResult, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.protocol import Engine
from scripts.gpu_day.common import Section, article_trial, device, wait, with_training

LRS = (1e-1, 1e-3, 3e-4, 6.25e-5)
NUM_IMAGES, NUM_VAL, EPOCHS = 45_000, 5_000, 20


def run(section: Section) -> None:
    section.say("started_s", time.time() - section.started_at)  # Python, torch and this package
    base = article_trial(section, NUM_IMAGES, num_val=NUM_VAL, epochs=section.pick(EPOCHS, 2))
    trials = [with_training(base, seed=seed, lr=lr) for seed, lr in enumerate(LRS)]
    cache = DatasetCache(device=device())
    with section.trying("data"):
        cache.get(base.data)
        wait()
    with section.trying("captured"):
        start_s = time.perf_counter()
        engine = CapturedLanes(device=device(), dataset_cache=cache)
        lanes = [engine.admit(trial) for trial in trials]
        wait()
        section.say("setting_up_s", time.perf_counter() - start_s)
        last, epoch_s = train_all(engine, lanes, base)
        section.say(
            "captured",
            {
                "total_s": time.time() - section.started_at,
                "is_whole": not section.is_tiny,
                "epoch_s": statistics.median(epoch_s),
                "val_accuracy": [result.val_accuracy for result in last],  # in the order of LRS
                "diverged": [result.diverged for result in last],
            },
        )
        del engine
    with section.trying("planned"):
        section.say("planned", as_planned(trials))


def train_all(engine: Engine, lanes: Sequence[int], base: TrialConfig) -> tuple[list[EpochResult], list[float]]:
    """Train every lane to its end, or until it diverges; return its last result, and the seconds of each epoch."""
    last: dict[int, EpochResult] = {}
    held, epoch_s = set(lanes), []
    while held:
        start_s = time.perf_counter()
        for result in engine.run_epoch():
            last[result.lane] = result
            if result.diverged or result.epoch == base.training.epochs:
                engine.evict(result.lane)
                held.discard(result.lane)
        epoch_s.append(time.perf_counter() - start_s)
    return [last[lane] for lane in lanes], epoch_s


def as_planned(trials: Sequence[TrialConfig]) -> dict[str, object]:
    """Train one epoch as the product would, and return its plan and the seconds."""
    start_s = time.perf_counter()
    engine = LaneEngine(device=str(device()), max_lanes=len(trials))
    waiting = list(trials)
    engine.admit(waiting.pop(0))
    planning_s = time.perf_counter() - start_s
    while waiting and engine.free_lanes:
        engine.admit(waiting.pop(0))
    start_s = time.perf_counter()
    num_results = len(engine.run_epoch())
    assert engine.plan is not None
    return {
        "plan": engine.plan.reason,
        "planning_s": planning_s,
        "epoch_s": time.perf_counter() - start_s,
        "trials_at_once": num_results,
    }
