"""Datasets of the tests: load one, and read an epoch of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpo.train.config import DataConfig
from hpo.train.data.augment import AUGMENTATIONS
from hpo.train.data.loading import SplitDataset, load_data

NEEDED: dict[str, dict[str, Any]] = {  # options without which a transform is not built, or does nothing
    "ColorJitter": {"brightness": 0.5},
    "ElasticTransform": {"sigma": 2.0},
    "GaussianBlur": {"kernel_size": 3},
    "RandomAdjustSharpness": {"sharpness_factor": 2.0},
    "RandomAffine": {"degrees": 30},
    "RandomCrop": {"padding": 4},
    "RandomPosterize": {"bits": 2},
    "RandomRotation": {"degrees": 30},
    "RandomSolarize": {"threshold": 100},
}
EVERY_AUGMENTATION = [{"name": name, **NEEDED[name]} if name in NEEDED else name for name in AUGMENTATIONS]


def load(name: str = "digits", **keys: Any) -> SplitDataset:
    """Load a dataset on the CPU."""
    return load_data(DataConfig(name=name, **keys), device="cpu")


def epoch(data: SplitDataset, *, seed: int = 1, number: int = 0, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a shuffled epoch."""
    images, labels = zip(*data.train.batches(batch_size, seed=seed, epoch=number), strict=True)
    return torch.cat(images), torch.cat(labels)
