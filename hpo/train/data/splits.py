"""Splits of labeled images into training and validation images: stratified by class, drawn from a seed.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.config import DEFAULT_VALIDATION_FRACTION, DataConfig, derive_seed
from hpo.train.data.labels import class_sizes, strata


def stratified_order(labels_N: Tensor, *, seed: int) -> Tensor:
    """Return a random order of which every prefix holds each class in its share, up to one image.

    Of several labels of an image, the rarest counts.
    """
    shuffled = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    labels = strata(labels_N)[shuffled]
    sizes = torch.bincount(labels)
    by_class = torch.argsort(labels, stable=True)
    first_of_class = sizes.cumsum(0) - sizes
    rank_in_class = torch.empty_like(labels)
    rank_in_class[by_class] = torch.arange(len(labels)) - first_of_class[labels[by_class]]
    position = (rank_in_class.double() + 0.5) / sizes[labels]
    return shuffled[torch.argsort(position, stable=True)]


def split_indices(
    labels_N: Tensor, config: DataConfig, *, class_names: Sequence[str], groups_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the validation images.

    They depend on the labels, the groups, the sizes that `config` asks for and its `split_seed` alone. Of each group
    all images are on one side. Raises UserError where a size is out of its range, or leaves a class out of a split.
    """
    fraction = DEFAULT_VALIDATION_FRACTION if config.validation_fraction is None else config.validation_fraction
    if not 0 < fraction < 1:
        raise UserError(f"data.validation_fraction must be between 0 and 1, got {fraction}")
    order = stratified_order(labels_N, seed=derive_seed(config.split_seed, "split"))
    is_val_N = torch.zeros(len(order), dtype=torch.bool)
    if groups_N is None:
        is_val_N[order[: round(fraction * len(order))]] = True
    else:
        is_val_N = _whole_groups(labels_N, groups_N, fraction=fraction, seed=derive_seed(config.split_seed, "groups"))
    val, rest = order[is_val_N[order]], order[~is_val_N[order]]
    setting = "data.validation_fraction" if groups_N is None else "data.groups"
    _check_has_every_class(labels_N[val], "validation", setting, config, class_names)
    return _training_part(rest, labels_N, config, class_names=class_names, setting=setting), val


def training_indices(labels_N: Tensor, config: DataConfig, *, class_names: Sequence[str]) -> Tensor:
    """Return the indices of the training images where none of these are for validation; raises as `split_indices`."""
    order = stratified_order(labels_N, seed=derive_seed(config.split_seed, "split"))
    return _training_part(order, labels_N, config, class_names=class_names, setting="data.name")


def _training_part(
    rest: Tensor, labels_N: Tensor, config: DataConfig, *, class_names: Sequence[str], setting: str
) -> Tensor:
    """Return those of the images in this order that are trained on; `setting` has left so many."""
    num_train, size_setting = _num_train(config, num_available=len(rest))
    train = rest[:num_train]
    _check_has_every_class(labels_N[train], "training", size_setting or setting, config, class_names)
    return train


def _whole_groups(labels_N: Tensor, groups_N: Tensor, *, fraction: float, seed: int) -> Tensor:
    """Return which images are for validation (N,): whole groups, with about this fraction of each class.

    Groups are looked at in a random order. One is taken where the classes' shares come nearer to the fraction by it.
    """
    labels_N = strata(labels_N)
    sizes = torch.bincount(labels_N).double()
    missing = fraction * sizes  # images of each class
    by_group = torch.split(torch.argsort(groups_N, stable=True), torch.bincount(groups_N).tolist())
    is_val_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for group in torch.randperm(len(by_group), generator=torch.Generator().manual_seed(seed)).tolist():
        left = missing - torch.bincount(labels_N[by_group[group]], minlength=len(missing))
        if ((left.square() - missing.square()) / sizes).sum() < 0:
            missing = left
            is_val_N[by_group[group]] = True
    return is_val_N


def _num_train(config: DataConfig, *, num_available: int) -> tuple[int, str | None]:
    """Return the number of training images, and the setting that gives it, or None where all are trained on.

    Raises UserError for a setting out of its range.
    """
    if config.train_samples is not None:
        if not 0 < config.train_samples <= num_available:
            raise UserError(
                f"data.train_samples must be between 1 and the {num_available} images that the validation split "
                f"leaves, got {config.train_samples}"
            )
        return config.train_samples, "data.train_samples"
    if config.train_fraction is not None:
        if not 0 < config.train_fraction <= 1:
            raise UserError(f"data.train_fraction must be above 0 and at most 1, got {config.train_fraction}")
        return round(config.train_fraction * num_available), "data.train_fraction"
    return num_available, None


def _check_has_every_class(
    labels_N: Tensor, split: str, setting: str, config: DataConfig, class_names: Sequence[str]
) -> None:
    """Raise UserError, naming `setting`, where a split leaves a class out."""
    missing = class_sizes(labels_N, len(class_names)).eq(0).nonzero().flatten().tolist()
    if missing:
        value = getattr(config, setting.removeprefix("data."))
        value = DEFAULT_VALIDATION_FRACTION if value is None else value
        raise UserError(
            f"{setting} must leave an image of each of the {len(class_names)} classes in the {split} part, got "
            f"{value!r}, which leaves {len(labels_N)} images and none of "
            f"class {class_names[missing[0]]}"
        )
