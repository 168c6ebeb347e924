"""Splits of labeled images into training and validation images: stratified by class, drawn from a seed.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.config import DataConfig, derive_seed


def stratified_order(labels_N: Tensor, *, seed: int) -> Tensor:
    """Return a random order of which every prefix holds each class in its share, up to one image."""
    shuffled = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    labels = labels_N[shuffled]
    class_sizes = torch.bincount(labels)
    by_class = torch.argsort(labels, stable=True)
    first_of_class = class_sizes.cumsum(0) - class_sizes
    rank_in_class = torch.empty_like(labels)
    rank_in_class[by_class] = torch.arange(len(labels)) - first_of_class[labels[by_class]]
    position = (rank_in_class.double() + 0.5) / class_sizes[labels]
    return shuffled[torch.argsort(position, stable=True)]


def split_indices(labels_N: Tensor, config: DataConfig, *, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the validation images.

    They depend on the labels, the sizes that `config` asks for and its `split_seed` alone. Raises UserError where a
    size is out of its range, or leaves a class out of either split.
    """
    if not 0 < config.validation_fraction < 1:
        raise UserError(f"data.validation_fraction must be between 0 and 1, got {config.validation_fraction}")
    order = stratified_order(labels_N, seed=derive_seed(config.split_seed, "split"))
    num_val = round(config.validation_fraction * len(order))
    val, rest = order[:num_val], order[num_val:]
    num_train, setting = _num_train(config, num_available=len(rest))
    train = rest[:num_train]
    _check_has_every_class(labels_N[val], "validation", "data.validation_fraction", config, class_names)
    _check_has_every_class(labels_N[train], "training", setting, config, class_names)
    return train, val


def _num_train(config: DataConfig, *, num_available: int) -> tuple[int, str]:
    """Return the number of training images and the setting that gives it; raise UserError for one out of range."""
    if config.train_samples is not None:
        if not 0 < config.train_samples <= num_available:
            raise UserError(
                f"data.train_samples must be between 1 and the {num_available} pictures that the validation split "
                f"leaves, got {config.train_samples}"
            )
        return config.train_samples, "data.train_samples"
    if config.train_fraction is not None:
        if not 0 < config.train_fraction <= 1:
            raise UserError(f"data.train_fraction must be above 0 and at most 1, got {config.train_fraction}")
        return round(config.train_fraction * num_available), "data.train_fraction"
    return num_available, "data.validation_fraction"


def _check_has_every_class(
    labels_N: Tensor, split: str, setting: str, config: DataConfig, class_names: Sequence[str]
) -> None:
    """Raise UserError, naming `setting`, where a split leaves a class out."""
    missing = torch.bincount(labels_N, minlength=len(class_names)).eq(0).nonzero().flatten().tolist()
    if missing:
        raise UserError(
            f"{setting} must leave a picture of each of the {len(class_names)} classes in the {split} part, got "
            f"{getattr(config, setting.removeprefix('data.'))}, which leaves {len(labels_N)} pictures and none of "
            f"class {class_names[missing[0]]}"
        )
