"""What checkpoints cost: how long training stands still for snapshots, and a thread is busy with them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hpo.train.checkpoint import CheckpointFolder
from hpo.train.config import TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.protocol import Engine
from scripts.gpu_day.common import Section, article_trial, device, plain_engine, wait, with_training
from scripts.gpu_day.sections.rates import NUM_IMAGES


def run(section: Section) -> None:
    config = article_trial(section, NUM_IMAGES)
    cache = DatasetCache(device=device())
    engines: dict[str, tuple[Engine, int]] = {
        "plain.1": (plain_engine(dataset_cache=cache), 1),
        "captured.16": (CapturedLanes(device=device(), dataset_cache=cache), section.pick(16, 2)),
    }
    for key, (engine, count) in engines.items():
        with section.trying(key):
            section.say(key, cost(engine, [with_training(config, seed=seed) for seed in range(count)]))


def cost(engine: Engine, trials: Sequence[TrialConfig]) -> dict[str, float]:
    """Return the seconds of an epoch of all trials, of taking their snapshots, and of what a thread does with them."""
    lanes = [engine.admit(trial) for trial in trials]
    engine.run_epoch()
    start_s = time.perf_counter()
    engine.run_epoch()
    wait()
    epoch_s = time.perf_counter() - start_s
    taking_s, waiting_s = [], []
    for _ in range(3):
        start_s = time.perf_counter()
        snapshots = [engine.snapshot(lane) for lane in lanes]
        taking_s.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        checkpoints = [snapshot.checkpoint() for snapshot in snapshots]
        waiting_s.append(time.perf_counter() - start_s)
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        CheckpointFolder(folder, identity={"study": "gpu_day"}).save(checkpoints[0])
        writing_s = time.perf_counter() - start_s
        num_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "epoch_s": epoch_s,
        "taking_s": statistics.median(taking_s),
        "waiting_s": statistics.median(waiting_s),
        "writing_one_s": writing_s,
        "bytes_of_one": num_bytes,
    }
