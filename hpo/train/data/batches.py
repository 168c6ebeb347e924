"""Pictures as batches: a stratified seeded split, kept on the device or streamed, augmented and normalised there.

Both placements give the same batches bit for bit: everything random in an epoch (order, flips, crops) is drawn on the
CPU before it starts, from the trial's seed and the epoch, and the pixels go through the same operations on the device.
Shapes: N pictures of a part, B batch, C H W picture; uint8 pictures are (N, H, W, C), batches float32 (B, C, H, W) in
channels_last memory format.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpo.errors import UserError
from hpo.train.config import DataConfig, derive_seed
from hpo.train.data.datasets import Pictures, open_data_set, stratified_order

LARGEST_SHARE_OF_MEMORY = 0.25  # of the device's free memory that pictures may take with placement "auto"
READING_BATCH = 512  # pictures at a time where all are read once


def split(labels_N: Tensor, config: DataConfig, *, num_classes: int) -> tuple[Tensor, Tensor]:
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


def batch_bounds(num_pictures: int, batch_size: int) -> list[tuple[int, int]]:
    """Where batches start and end. The last one may be smaller, but a single picture joins the batch before it.

    BatchNorm cannot train on one picture, and dropping it would train on less data than was asked for.
    """
    starts = list(range(0, num_pictures, batch_size))
    if batch_size > 1 and len(starts) > 1 and num_pictures - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_pictures], strict=True))


class Source(Protocol):
    """Where the pictures of one part are."""

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each batch of positions in the part (int64, CPU), its uint8 pictures (B, H, W, C) on the device."""


class DeviceSource:
    """All pictures of a part on the device."""

    def __init__(self, images_NHWC: Tensor) -> None:
        self.images_NHWC = images_NHWC

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        positions = torch.cat(list(batches)).to(self.images_NHWC.device)  # one transfer, not one a batch
        start = 0
        for batch in batches:
            yield self.images_NHWC.index_select(0, positions[start : start + len(batch)])
            start += len(batch)


class StreamSource:
    """Pictures that are read again in each epoch, by worker processes where they come from files."""

    def __init__(self, pictures: Pictures, indices_N: Tensor, *, device: torch.device) -> None:
        self.pictures, self.indices_N, self.device = pictures, indices_N, device

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        loader = DataLoader(
            _Reader(self.pictures, self.indices_N),
            batch_size=None,
            sampler=batches,
            num_workers=self._num_workers(len(batches)),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, or it would draw from the one that gives the trial its dropout
        )
        for images_BHWC in loader:
            if isinstance(images_BHWC, UserError):
                raise images_BHWC
            yield images_BHWC.to(self.device, non_blocking=True)

    def _num_workers(self, num_batches: int) -> int:
        if not self.pictures.reads_files or multiprocessing.current_process().daemon:  # daemons may not have children
            return 0
        return min(torch.get_num_threads(), num_batches)  # of the cores that this worker has for itself


class _Reader(Dataset[Any]):
    """Reads one batch per item; a user's mistake is returned, since a DataLoader rewrites what its workers raise."""

    def __init__(self, pictures: Pictures, indices_N: Tensor) -> None:
        self.pictures, self.indices_N = pictures, indices_N

    def __getitem__(self, positions_B: Tensor) -> Tensor | UserError:
        try:
            return self.pictures.read(self.indices_N[positions_B])
        except UserError as error:
            return error


@dataclass(frozen=True, kw_only=True)
class Part:
    """The training, validation or test pictures of a data set, as normalised batches on the device."""

    source: Source
    labels_N: Tensor  # int64, on the device
    mean_C11: Tensor  # of the training pictures, in units of a pixel's 0 to 255, on the device
    std_C11: Tensor
    flip: bool = False
    crop: int = 0  # pixels of zero padding

    def __len__(self) -> int:
        return len(self.labels_N)

    def num_batches(self, batch_size: int) -> int:
        return len(batch_bounds(len(self), batch_size))

    def batches(self, batch_size: int, *, seed: int | None = None, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of images float32 (B, C, H, W) and labels int64 (B,); every picture once, without host synchronisation.

        With a seed the pictures are shuffled and augmented, the same way for the same (seed, epoch); without, they come
        as they are in their fixed order.
        """
        order_1N, augment = torch.arange(len(self))[None], None
        if seed is not None:
            order_1N, augment = self._shuffled([(seed, epoch)])
        for images_1BCHW, labels_1B in self._read(batch_size, order_1N, augment):
            yield images_1BCHW[0], labels_1B[0]

    def stacked_batches(self, batch_size: int, epochs: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of K epochs at once, each a (seed, epoch) with the batches that it has alone.

        Pairs of images float32 (K, B, C, H, W) and labels int64 (K, B).
        """
        return self._read(batch_size, *self._shuffled(epochs))

    def _shuffled(self, epochs: Sequence[tuple[int, int]]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """For each epoch its order (K, N), and its flips (K, N) and offsets (K, N, 2) where pictures are augmented."""
        orders, flips, offsets = [], [], []
        for seed, epoch in epochs:
            generator = torch.Generator().manual_seed(derive_seed(seed, "data", epoch))
            orders.append(torch.randperm(len(self), generator=generator))
            if self.flip or self.crop:
                flips.append(torch.rand(len(self), generator=generator).lt(0.5 if self.flip else 0.0))
                offsets.append(torch.randint(2 * self.crop + 1, (len(self), 2), generator=generator))
        augment = (torch.stack(flips), torch.stack(offsets)) if flips else None
        return torch.stack(orders), augment

    def _read(
        self, batch_size: int, order_KN: Tensor, augment: tuple[Tensor, Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device, num_lanes = self.labels_N.device, len(order_KN)
        bounds = batch_bounds(len(self), batch_size)
        labels_KN = self.labels_N[order_KN.to(device)]
        if augment is not None:
            flips_KN, offsets_KN2 = (drawn.to(device) for drawn in augment)
        stored = self.source.read([order_KN[:, start:end].flatten() for start, end in bounds])
        for (start, end), images_BHWC in zip(bounds, stored, strict=True):  # the batch of each lane after the other's
            images = images_BHWC
            if augment is not None:
                flips_B, offsets_B2 = flips_KN[:, start:end].flatten(), offsets_KN2[:, start:end].flatten(0, 1)
                images = flip_and_crop(images, flips_B=flips_B, offsets_B2=offsets_B2, padding=self.crop)
            images_BCHW = self._normalise(images)
            yield images_BCHW.view(num_lanes, end - start, *images_BCHW.shape[1:]), labels_KN[:, start:end]

    def _normalise(self, images_BHWC: Tensor) -> Tensor:
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        return images_BCHW.sub_(self.mean_C11).div_(self.std_C11)


def flip_and_crop(images_BHWC: Tensor, *, flips_B: Tensor, offsets_B2: Tensor, padding: int) -> Tensor:
    """Mirror the pictures where `flips_B` and cut each out of its zero-bordered self at its offset, in one gather."""
    batch, height, width, _ = images_BHWC.shape
    device = images_BHWC.device
    padded = torch.nn.functional.pad(images_BHWC, (0, 0, padding, padding, padding, padding))
    columns_W = torch.arange(width, device=device)
    columns_BW = torch.where(flips_B[:, None], columns_W.flip(0), columns_W) + offsets_B2[:, 1:]
    rows_BH = torch.arange(height, device=device) + offsets_B2[:, :1]
    pictures_B = torch.arange(batch, device=device)
    return padded[pictures_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set, split and ready to train on. `test` is read when it is first asked for."""

    train: Part
    val: Part
    num_classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]  # per channel, of the training pictures, pixels from 0 to 1
    std: tuple[float, ...]
    open_test: Callable[[], Part] | None

    @cached_property
    def test(self) -> Part | None:
        return None if self.open_test is None else self.open_test()


def load_data(config: DataConfig, *, device: torch.device | str) -> Data:
    """Open, split and place the data set that `config` describes. Raises UserError for whatever is wrong with it."""
    device = torch.device(device)
    data_set = open_data_set(config)
    pictures, num_classes = data_set.train, data_set.num_classes
    _check_labels(pictures.labels_N, config, num_classes=num_classes)
    train_indices, val_indices = split(pictures.labels_N, config, num_classes=num_classes)
    height, width, channels = shape_HWC = pictures.shape_HWC()
    if height != width:
        raise UserError(f"data.name = {config.name!r} must give square pictures, got {height}x{width}")
    num_bytes = (len(train_indices) + len(val_indices)) * height * width * channels
    on_device = _is_on_device(config, num_bytes=num_bytes, device=device)

    def place(pictures: Pictures, indices_N: Tensor) -> Source:
        stream = StreamSource(pictures, indices_N, device=device)
        if not on_device:
            return stream
        images_NHWC = torch.empty((len(indices_N), *shape_HWC), dtype=torch.uint8, device=device)
        bounds = batch_bounds(len(indices_N), READING_BATCH)
        for (start, end), images_BHWC in zip(bounds, stream.read(_reading_batches(len(indices_N))), strict=True):
            images_NHWC[start:end] = images_BHWC
        return DeviceSource(images_NHWC)

    train_source, val_source = place(pictures, train_indices), place(pictures, val_indices)
    mean_C, std_C = channel_statistics(train_source, num_pictures=len(train_indices), channels=channels)
    if not on_device:  # a picture that cannot be read is found now, not when an epoch has been trained
        for _ in val_source.read(_reading_batches(len(val_indices))):
            pass

    def part(source: Source, labels_N: Tensor, *, flip: bool = False, crop: int = 0) -> Part:
        mean_C11, std_C11 = (value.float().to(device).view(-1, 1, 1) for value in (mean_C, std_C))
        return Part(
            source=source, labels_N=labels_N.to(device), mean_C11=mean_C11, std_C11=std_C11, flip=flip, crop=crop
        )

    def open_test() -> Part:
        assert data_set.open_test is not None
        test = data_set.open_test()
        _check_labels(test.labels_N, config, num_classes=num_classes)
        if test.shape_HWC() != shape_HWC:
            raise UserError(
                f"data.name = {config.name!r} must have test pictures of the training pictures' shape "
                f"{shape_HWC} (H, W, C), got {test.shape_HWC()}"
            )
        return part(place(test, torch.arange(len(test.labels_N))), test.labels_N)

    return Data(
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


def channel_statistics(source: Source, *, num_pictures: int, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel (float64, CPU), in units of a pixel's 0 to 255.

    Taken from counts of the 256 values, and so the same on every device and for every placement. A channel that is the
    same everywhere gets a deviation of 1, not 0.
    """
    counts_C256 = torch.zeros((channels, 256), dtype=torch.int64)
    for images_BHWC in source.read(_reading_batches(num_pictures)):
        counts = [torch.bincount(pixels.flatten(), minlength=256) for pixels in images_BHWC.unbind(-1)]
        counts_C256 += torch.stack(counts).cpu()
    shares_C256 = counts_C256.double() / counts_C256.sum(1, keepdim=True)
    values_256 = torch.arange(256, dtype=torch.float64)
    mean_C = (shares_C256 * values_256).sum(1)
    variance_C = (shares_C256 * (values_256 - mean_C[:, None]).square()).sum(1)
    return mean_C, torch.where(variance_C > 0, variance_C, 1.0).sqrt()


def _reading_batches(num_pictures: int) -> list[Tensor]:
    return [torch.arange(start, end) for start, end in batch_bounds(num_pictures, READING_BATCH)]


def _is_on_device(config: DataConfig, *, num_bytes: int, device: torch.device) -> bool:
    if config.placement != "auto":
        return config.placement == "device"
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free_bytes = psutil.virtual_memory().available
    return num_bytes < LARGEST_SHARE_OF_MEMORY * free_bytes
