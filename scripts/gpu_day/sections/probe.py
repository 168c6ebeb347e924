"""Which networks, precisions and ways to convolve the stack takes on this device, and what it says of the others."""

from __future__ import annotations

from hpo.train.data.loading import DatasetCache
from hpo.train.engines.stack import TrialStack
from hpo.train.engines.stacked_network import NotStackable
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from scripts.gpu_day.common import TINY_WIDTH, Section, device, free_memory, noise_trial

WITH_WIDTH = ("article_cnn", "residual")
NETWORKS = ("article_cnn", "batch_norm", "dropout", "residual")


def run(section: Section) -> None:
    cache = DatasetCache(device=device())
    for model in section.pick(NETWORKS, NETWORKS[:2]):
        for precision in section.pick(("fp32", "auto"), ("fp32",)):
            for convolution in CONVOLUTIONS:
                key = f"{model}.{precision}.{convolution}"
                config = noise_trial(
                    section.pick(500, 16),
                    batch_size=section.pick(64, 8),
                    num_classes=section.pick(10, 2),
                    model=model,
                    width=section.pick(1.0, TINY_WIDTH) if model in WITH_WIDTH else None,
                    precision=precision,
                )
                with section.trying(key):
                    try:
                        TrialStack(config, data=cache.get(config.data), device=device(), convolution=convolution)
                        section.say(key, "taken")
                    except NotStackable as error:
                        section.say(key, f"refused: {error}")
                free_memory()
