"""Loading: open a dataset, split it, place its images, and make the loaders of its batches.

Shapes: N images of a split, C channels, H W image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.config import DataConfig, TrialConfig
from hpo.train.data.augment import Augmentation
from hpo.train.data.batches import BatchLoader
from hpo.train.data.datasets import OpenedDataset, open_dataset
from hpo.train.data.groups import group_numbers
from hpo.train.data.images import DatasetImages, LabeledImages
from hpo.train.data.labels import class_sizes, has_several
from hpo.train.data.sources import (
    ImageSource,
    channel_statistics,
    fits_on_device,
    place_images,
    read_all,
)
from hpo.train.data.splits import split_indices, training_indices
from hpo.train.seeding import seed_generators
from hpo.train.weight_files import ImagesOfWeights, images_of_weights


@dataclass(frozen=True, kw_only=True)
class SplitDataset:
    """A dataset that is split and ready to train on."""

    train: BatchLoader
    val: BatchLoader
    num_classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]  # per channel, of the training images, pixels from 0 to 1
    std: tuple[float, ...]
    open_test: Callable[[], BatchLoader] | None  # None: the dataset has no test images
    class_names: Sequence[str] = ()  # where they have any

    def description(self) -> dict[str, Any]:
        """Return what a network needs to know of the images to be used on others: plain data."""
        return {
            "num_classes": self.num_classes,
            "channels": self.channels,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "class_names": list(self.class_names),
        }

    def normalised(self, mean: tuple[float, ...], std: tuple[float, ...]) -> SplitDataset:
        """Return the same images, normalised by this mean and deviation in place of those of the training images."""

        def loader(given: BatchLoader) -> BatchLoader:
            device = given.labels_N.device
            mean_C11, std_C11 = (255 * torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
            return replace(given, mean_C11=mean_C11, std_C11=std_C11)

        open_test = self.open_test
        return replace(
            self,
            train=loader(self.train),
            val=loader(self.val),
            mean=mean,
            std=std,
            open_test=None if open_test is None else lambda: loader(open_test()),
        )

    def blank_images(self, *, device: torch.device) -> Tensor:
        """Return two images without content, in the shape and the memory format of all."""
        shape = (2, self.image_size, self.image_size, self.channels)
        return self.train.normalise(torch.zeros(shape, dtype=torch.uint8, device=device))

    @property
    def has_several_labels(self) -> bool:
        """Return whether an image may be of several classes, or of none."""
        return has_several(self.train.labels_N)

    @cached_property
    def test(self) -> BatchLoader | None:
        """Return the loader of the test images, which are read when this is first asked for."""
        return None if self.open_test is None else self.open_test()


def load_data(config: DataConfig, *, device: torch.device | str, dataset: OpenedDataset | None = None) -> SplitDataset:
    """Split and place the dataset that `config` describes, opened before or now.

    Raises UserError for whatever is wrong with it.
    """
    device = torch.device(device)
    dataset = dataset or open_dataset(config)
    images, num_classes = dataset.train, dataset.num_classes
    _check_labels(images.labels_N, config, num_classes=num_classes)
    train_indices, val_images, val_indices = _split(dataset, config)
    height, width, channels = shape_HWC = images.shape_HWC()
    if height != width:
        raise UserError(f"data.name = {config.name!r} must give square images, got {height}x{width}")
    if 0 in shape_HWC:
        raise UserError(f"data.name = {config.name!r} must give images with pixels, got (H, W, C) of {shape_HWC}")
    num_bytes = (len(train_indices) + len(val_indices)) * height * width * channels
    on_device = fits_on_device(config, num_bytes=num_bytes, device=device)
    augmentation = Augmentation(config, shape_CHW=(channels, height, width)) if config.augment else None
    place = partial(place_images, shape_HWC=shape_HWC, on_device=on_device, device=device)
    train_source, val_source = place(images, train_indices), place(val_images, val_indices)
    mean_C, std_C = channel_statistics(train_source, num_images=len(train_indices), channels=channels)
    if not on_device:  # finds an image that cannot be read now, and not after an epoch of training
        deque(read_all(val_source, len(val_indices)), maxlen=0)

    def loader(source: ImageSource, labels_N: Tensor, **random: Any) -> BatchLoader:
        mean_C11, std_C11 = (value.float().to(device).view(-1, 1, 1) for value in (mean_C, std_C))
        return BatchLoader(source=source, labels_N=labels_N.to(device), mean_C11=mean_C11, std_C11=std_C11, **random)

    def open_test() -> BatchLoader:
        assert dataset.open_test is not None
        test = dataset.open_test()
        _check_part(test, dataset, config, shape_HWC=shape_HWC, part="test")
        return loader(place(test, torch.arange(len(test.labels_N))), test.labels_N)

    return SplitDataset(
        train=loader(
            train_source,
            images.labels_N[train_indices],
            flip=config.flip,
            crop=config.crop,
            augmentation=augmentation,
        ),
        val=loader(val_source, val_images.labels_N[val_indices]),
        num_classes=num_classes,
        channels=channels,
        image_size=height,
        mean=tuple((mean_C / 255).tolist()),
        std=tuple((std_C / 255).tolist()),
        open_test=None if dataset.open_test is None else open_test,
        class_names=dataset.class_names,
    )


def _split(dataset: OpenedDataset, config: DataConfig) -> tuple[Tensor, LabeledImages, Tensor]:
    """Return the indices of the training images, the images that hold the validation images, and their indices there.

    Raises UserError where the split leaves a class out, or what there is to validate on does not fit the training.
    """
    images, val, labels_N = dataset.train, dataset.val, dataset.train.labels_N
    if dataset.num_classes > len(labels_N) and not has_several(labels_N):
        raise UserError(
            f"data.name = {config.name!r} must have labels that count the classes from 0, got up to {labels_N.max()}"
        )
    class_names = dataset.class_names or [str(label) for label in range(dataset.num_classes)]
    _check_every_class(labels_N, config, class_names, is_split=val is None)
    if val is None:
        groups_N = None if config.groups is None else group_numbers(images, config.groups)
        train, held_out = split_indices(labels_N, config, class_names=class_names, groups_N=groups_N)
        return train, images, held_out
    if config.groups is not None:
        raise UserError(
            f"data.groups has no effect where data.name = {config.name!r} has validation images of its own, "
            f"got {config.groups!r}"
        )
    _check_part(val, dataset, config, shape_HWC=images.shape_HWC(), part="validation")
    return training_indices(labels_N, config, class_names=class_names), val, torch.arange(len(val.labels_N))


def is_random(dataset: OpenedDataset) -> bool:
    """Return whether a user's dataset gives other training or validation images when they are read again."""
    parts = [part for part in (dataset.train, dataset.val) if isinstance(part, DatasetImages)]
    return any(part.is_random(torch.arange(len(part.labels_N))) for part in parts)


class DatasetCache:
    """A cache of one dataset on a device: trials that share it load it once; another one takes its place."""

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._loaded: tuple[DataConfig, SplitDataset] | None = None
        self._normalised: dict[ImagesOfWeights, SplitDataset] = {}  # the same images, for weights that want it so

    def get(self, config: DataConfig) -> SplitDataset:
        """Return the dataset that `config` describes, loaded on the device; raises as `load_data` does."""
        if self._loaded is None or self._loaded[0] != config:
            self._loaded = None  # frees the device's memory before the next dataset needs it
            self._normalised.clear()
            seed_generators(config.split_seed, "data")  # a user's dataset may draw from them
            self._loaded = (config, load_data(config, device=self._device))
        return self._loaded[1]

    def for_trial(self, config: TrialConfig) -> SplitDataset:
        """Return the trial's dataset, normalised as its network's weights want it; raises as `load_data` does."""
        data, images = self.get(config.data), images_of_weights(config.model)
        if images is None:
            return data
        if images not in self._normalised:
            self._normalised[images] = fit_to_weights(data, images)
        return self._normalised[images]


def fit_to_weights(data: SplitDataset, images: ImagesOfWeights) -> SplitDataset:
    """Return a dataset, normalised as the images that weights were trained on."""
    images = images.for_channels(data.channels)
    return data.normalised(images.mean, images.std)


def _check_part(
    images: LabeledImages, dataset: OpenedDataset, config: DataConfig, *, shape_HWC: tuple[int, int, int], part: str
) -> None:
    """Raise UserError where the labels or the shape of validation or test images are not as in training."""
    if images.labels_N.shape[1:] != dataset.train.labels_N.shape[1:]:
        raise UserError(
            f"data.name = {config.name!r} must have as many labels for each of the {part} images as in training; of "
            f"shape {tuple(images.labels_N.shape)} and {tuple(dataset.train.labels_N.shape)}"
        )
    _check_labels(images.labels_N, config, num_classes=dataset.num_classes, images=f"{part} images")
    if images.shape_HWC() != shape_HWC:
        raise UserError(
            f"data.name = {config.name!r} must have {part} images of the training images' shape "
            f"{shape_HWC} (H, W, C), got {images.shape_HWC()}"
        )


def _check_every_class(labels_N: Tensor, config: DataConfig, class_names: Sequence[str], *, is_split: bool) -> None:
    """Raise UserError where a class has too few images to train on, and, where these are split, to validate on."""
    sizes = class_sizes(labels_N, len(class_names)).tolist()
    fewest = min(range(len(sizes)), key=sizes.__getitem__)
    if sizes[fewest] == 0 and has_several(labels_N):
        raise UserError(f"data.name = {config.name!r} must have images of every class; none has label {fewest}")
    if sizes[fewest] == 0:
        raise UserError(
            f"data.name = {config.name!r} must have labels that count the classes from 0 without a gap; the labels are "
            f"{int(labels_N.min())} to {int(labels_N.max())}, and no image has label {fewest}"
        )
    if sizes[fewest] == 1 and is_split:
        raise UserError(
            f"data.name = {config.name!r} must have at least 2 images of each class, one to train on and one to "
            f"validate on; of class {class_names[fewest]} it has 1"
        )


def _check_labels(labels_N: Tensor, config: DataConfig, *, num_classes: int, images: str = "images") -> None:
    """Raise UserError where there are no images, or their labels do not count the classes from 0."""
    if len(labels_N) == 0:
        raise UserError(f"data.name = {config.name!r} must have {images}, got none")
    if num_classes < 2:
        raise UserError(f"data.name = {config.name!r} must have at least 2 classes, got {num_classes}")
    if has_several(labels_N):
        if len(others := labels_N[(labels_N != 0) & (labels_N != 1)]):
            raise UserError(
                f"data.name = {config.name!r} must have a 0 or 1 for each class where {images} have several labels, "
                f"got {others[0]:g}"
            )
        return
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"data.name = {config.name!r} must have labels from 0 to {num_classes - 1}, got {low} to {high}"
        )
