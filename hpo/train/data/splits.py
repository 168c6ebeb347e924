"""Splits of labeled images into training and validation images, stratified by class and seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.config import DataConfig, derive_seed


def stratified_order(labels_N: Tensor, *, seed: int) -> Tensor:
    """A random order of which every prefix holds each class in its share, up to one picture."""
    shuffled = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    labels = labels_N[shuffled]
    class_sizes = torch.bincount(labels)
    by_class = torch.argsort(labels, stable=True)
    first_of_class = class_sizes.cumsum(0) - class_sizes
    rank_in_class = torch.empty_like(labels)
    rank_in_class[by_class] = torch.arange(len(labels)) - first_of_class[labels[by_class]]
    position = (rank_in_class.double() + 0.5) / class_sizes[labels]
    return shuffled[torch.argsort(position, stable=True)]


def split_indices(labels_N: Tensor, config: DataConfig, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """The indices of the training and the validation pictures; they depend on the labels and `split_seed` alone.

    Raises UserError where the settings leave a class out of either.
    """
    if not 0 < config.validation_fraction < 1:
        raise UserError(f"data.validation_fraction must be between 0 and 1, got {config.validation_fraction}")
    order = stratified_order(labels_N, seed=derive_seed(config.split_seed, "split"))
    num_val = round(config.validation_fraction * len(order))
    val, rest = order[:num_val], order[num_val:]
    num_train, setting = len(rest), "data.validation_fraction"
    if config.train_samples is not None:
        num_train, setting = config.train_samples, "data.train_samples"
        if not 0 < num_train <= len(rest):
            raise UserError(
                f"data.train_samples must be between 1 and the {len(rest)} pictures that the validation split leaves, "
                f"got {num_train}"
            )
    elif config.train_fraction is not None:
        num_train, setting = round(config.train_fraction * len(rest)), "data.train_fraction"
        if not 0 < config.train_fraction <= 1:
            raise UserError(f"data.train_fraction must be above 0 and at most 1, got {config.train_fraction}")
    train = rest[:num_train]
    for part, name, key in ((val, "validation", "data.validation_fraction"), (train, "training", setting)):
        missing = torch.bincount(labels_N[part], minlength=num_classes).eq(0).nonzero().flatten().tolist()
        if missing:
            raise UserError(
                f"{key} must leave a picture of each of the {num_classes} classes in the {name} part, got "
                f"{getattr(config, key.removeprefix('data.'))}, which leaves {len(part)} pictures and none of "
                f"class {missing[0]}"
            )
    return train, val
