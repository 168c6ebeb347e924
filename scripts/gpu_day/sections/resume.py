"""Resuming across devices, for every optimizer: GPU, CPU, GPU; and captured lane, plain engine, captured lane."""

from __future__ import annotations

from collections.abc import Sequence

from hpo.train.config import EpochResult, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.captured_optimizers import NotCapturable
from hpo.train.engines.protocol import Engine
from hpo.train.optim import OPTIMIZERS
from scripts.gpu_day.common import (
    CPU,
    Section,
    Trained,
    device,
    difference,
    flat_weights,
    plain_engine,
    small_trial,
    train,
)


def run(section: Section) -> None:
    gpu, cpu = DatasetCache(device=device()), DatasetCache(device=CPU)

    def plain() -> Engine:
        return plain_engine(dataset_cache=gpu)

    def plain_on_cpu() -> Engine:
        return plain_engine(CPU, dataset_cache=cpu)

    def captured() -> Engine:
        return CapturedLanes(device=device(), dataset_cache=gpu)

    for optimizer in OPTIMIZERS:
        config = small_trial(section, optimizer=optimizer)
        with section.trying(optimizer):
            whole = train(plain(), config, epochs=3)
            moved = train_in_turns([plain(), plain_on_cpu(), plain()], config)
            section.say(f"plain.{optimizer}", difference(config, whole, moved))
            try:
                moved = train_in_turns([captured(), plain(), captured()], config)
            except NotCapturable as error:
                section.say(f"captured.{optimizer}", {"not_captured": str(error)})
                continue
            section.say(f"captured.{optimizer}", difference(config, whole, moved))


def train_in_turns(engines: Sequence[Engine], config: TrialConfig) -> Trained:
    """Train each epoch in another engine, from the checkpoint of the one before."""
    checkpoint, results = None, list[EpochResult]()
    for engine in engines:
        lane = engine.admit(config, checkpoint)
        results += engine.run_epoch()
        checkpoint = engine.checkpoint(lane)
        engine.evict(lane)
    assert checkpoint is not None
    return Trained(results, flat_weights(checkpoint.state["model"]))
