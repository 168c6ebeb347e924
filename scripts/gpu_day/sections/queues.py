"""Whether more hardware queues help: sixteen captured lanes with 8 connections to the GPU, the driver's own, and 32."""

from __future__ import annotations

from hpo.train.data.loading import DatasetCache
from hpo.train.engines.captured_lanes import CapturedLanes
from scripts.gpu_day.common import Section, article_trial, device, in_child
from scripts.gpu_day.sections.rates import NUM_IMAGES, epoch_rate

TIMEOUT_S = 30.0


def run(section: Section) -> None:
    if not section.needs_gpu("16_lanes"):
        return
    for connections in (8, 32):
        with section.trying(f"{connections}"):
            environment = {"CUDA_DEVICE_MAX_CONNECTIONS": str(connections)}
            section.say(f"{connections}", in_child(lanes_rate, section, timeout_s=TIMEOUT_S, environment=environment))


def lanes_rate(section: Section) -> dict[str, float]:
    """Return the images a second of sixteen captured lanes in this process."""
    config = article_trial(section, NUM_IMAGES)
    cache = DatasetCache(device=device())
    engine = CapturedLanes(device=device(), dataset_cache=cache)
    return epoch_rate(engine, config, section.pick(16, 2), data=cache.get(config.data), section=section)
