"""Loading: open, split and place a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.config import DataConfig
from hpo.train.data.batches import BatchLoader
from hpo.train.data.datasets import open_dataset
from hpo.train.data.images import LabeledImages
from hpo.train.data.sources import (
    READING_BATCH,
    DeviceSource,
    ImageSource,
    StreamSource,
    batch_bounds,
    channel_statistics,
    fits_on_device,
    reading_batches,
)
from hpo.train.data.splits import split_indices
from hpo.train.seeding import seed_generators


@dataclass(frozen=True, kw_only=True)
class SplitDataset:
    """A data set, split and ready to train on. `test` is read when it is first asked for."""

    train: BatchLoader
    val: BatchLoader
    num_classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]  # per channel, of the training pictures, pixels from 0 to 1
    std: tuple[float, ...]
    open_test: Callable[[], BatchLoader] | None

    @cached_property
    def test(self) -> BatchLoader | None:
        return None if self.open_test is None else self.open_test()


def load_data(config: DataConfig, *, device: torch.device | str) -> SplitDataset:
    """Open, split and place the data set that `config` describes. Raises UserError for whatever is wrong with it."""
    device = torch.device(device)
    data_set = open_dataset(config)
    pictures, num_classes = data_set.train, data_set.num_classes
    _check_labels(pictures.labels_N, config, num_classes=num_classes)
    train_indices, val_indices = split_indices(pictures.labels_N, config, num_classes=num_classes)
    height, width, channels = shape_HWC = pictures.shape_HWC()
    if height != width:
        raise UserError(f"data.name = {config.name!r} must give square pictures, got {height}x{width}")
    num_bytes = (len(train_indices) + len(val_indices)) * height * width * channels
    on_device = fits_on_device(config, num_bytes=num_bytes, device=device)

    def place(pictures: LabeledImages, indices_N: Tensor) -> ImageSource:
        stream = StreamSource(pictures, indices_N, device=device)
        if not on_device:
            return stream
        images_NHWC = torch.empty((len(indices_N), *shape_HWC), dtype=torch.uint8, device=device)
        bounds = batch_bounds(len(indices_N), READING_BATCH)
        for (start, end), images_BHWC in zip(bounds, stream.read(reading_batches(len(indices_N))), strict=True):
            images_NHWC[start:end] = images_BHWC
        return DeviceSource(images_NHWC)

    train_source, val_source = place(pictures, train_indices), place(pictures, val_indices)
    mean_C, std_C = channel_statistics(train_source, num_pictures=len(train_indices), channels=channels)
    if not on_device:  # a picture that cannot be read is found now, not when an epoch has been trained
        for _ in val_source.read(reading_batches(len(val_indices))):
            pass

    def part(source: ImageSource, labels_N: Tensor, *, flip: bool = False, crop: int = 0) -> BatchLoader:
        mean_C11, std_C11 = (value.float().to(device).view(-1, 1, 1) for value in (mean_C, std_C))
        return BatchLoader(
            source=source, labels_N=labels_N.to(device), mean_C11=mean_C11, std_C11=std_C11, flip=flip, crop=crop
        )

    def open_test() -> BatchLoader:
        assert data_set.open_test is not None
        test = data_set.open_test()
        _check_labels(test.labels_N, config, num_classes=num_classes)
        if test.shape_HWC() != shape_HWC:
            raise UserError(
                f"data.name = {config.name!r} must have test pictures of the training pictures' shape "
                f"{shape_HWC} (H, W, C), got {test.shape_HWC()}"
            )
        return part(place(test, torch.arange(len(test.labels_N))), test.labels_N)

    return SplitDataset(
        train=part(train_source, pictures.labels_N[train_indices], flip=config.flip, crop=config.crop),
        val=part(val_source, pictures.labels_N[val_indices]),
        num_classes=num_classes,
        channels=channels,
        image_size=height,
        mean=tuple((mean_C / 255).tolist()),
        std=tuple((std_C / 255).tolist()),
        open_test=None if data_set.open_test is None else open_test,
    )


def _check_labels(labels_N: Tensor, config: DataConfig, *, num_classes: int) -> None:
    if len(labels_N) == 0:
        raise UserError(f"data.name = {config.name!r} must have pictures, got none")
    low, high = int(labels_N.min()), int(labels_N.max())
    if num_classes < 2:
        raise UserError(f"data.name = {config.name!r} must have at least 2 classes, got {num_classes}")
    if num_classes > len(labels_N):
        raise UserError(f"data.name = {config.name!r} must have labels that count the classes from 0, got up to {high}")
    if low < 0 or high >= num_classes:
        raise UserError(
            f"data.name = {config.name!r} must have labels from 0 to {num_classes - 1}, got {low} to {high}"
        )


class DatasetCache:
    """The data set on a device: loaded once for the trials that share it, dropped where another one is needed."""

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._loaded: tuple[DataConfig, SplitDataset] | None = None

    def get(self, config: DataConfig) -> SplitDataset:
        if self._loaded is None or self._loaded[0] != config:
            self._loaded = None  # frees the device's memory before the next data set needs it
            seed_generators(config.split_seed, "data")  # a user's data set may draw from them
            self._loaded = (config, load_data(config, device=self._device))
        return self._loaded[1]
