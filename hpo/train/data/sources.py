"""Sources of images"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpo.errors import UserError
from hpo.train.config import DataConfig
from hpo.train.data.images import LabeledImages

MAX_FREE_MEMORY_FRACTION = 0.25  # of the device's free memory that pictures may take with placement "auto"
READING_BATCH = 512  # pictures at a time where all are read once


def batch_bounds(num_pictures: int, batch_size: int) -> list[tuple[int, int]]:
    """Where batches start and end. The last one may be smaller, but a single picture joins the batch before it.

    BatchNorm cannot train on one picture, and dropping it would train on less data than was asked for.
    """
    starts = list(range(0, num_pictures, batch_size))
    if batch_size > 1 and len(starts) > 1 and num_pictures - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_pictures], strict=True))


class ImageSource(Protocol):
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

    def __init__(self, pictures: LabeledImages, indices_N: Tensor, *, device: torch.device) -> None:
        self.pictures, self.indices_N, self.device = pictures, indices_N, device

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        loader = DataLoader(
            _BatchReader(self.pictures, self.indices_N),
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


class _BatchReader(Dataset[Any]):
    """Reads one batch per item; a user's mistake is returned, since a DataLoader rewrites what its workers raise."""

    def __init__(self, pictures: LabeledImages, indices_N: Tensor) -> None:
        self.pictures, self.indices_N = pictures, indices_N

    def __getitem__(self, positions_B: Tensor) -> Tensor | UserError:
        try:
            return self.pictures.read(self.indices_N[positions_B])
        except UserError as error:
            return error


def channel_statistics(source: ImageSource, *, num_pictures: int, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel (float64, CPU), in units of a pixel's 0 to 255.

    Taken from counts of the 256 values, and so the same on every device and for every placement. A channel that is the
    same everywhere gets a deviation of 1, not 0.
    """
    counts_C256 = torch.zeros((channels, 256), dtype=torch.int64)
    for images_BHWC in source.read(reading_batches(num_pictures)):
        counts = [torch.bincount(pixels.flatten(), minlength=256) for pixels in images_BHWC.unbind(-1)]
        counts_C256 += torch.stack(counts).cpu()
    shares_C256 = counts_C256.double() / counts_C256.sum(1, keepdim=True)
    values_256 = torch.arange(256, dtype=torch.float64)
    mean_C = (shares_C256 * values_256).sum(1)
    variance_C = (shares_C256 * (values_256 - mean_C[:, None]).square()).sum(1)
    return mean_C, torch.where(variance_C > 0, variance_C, 1.0).sqrt()


def reading_batches(num_pictures: int) -> list[Tensor]:
    return [torch.arange(start, end) for start, end in batch_bounds(num_pictures, READING_BATCH)]


def fits_on_device(config: DataConfig, *, num_bytes: int, device: torch.device) -> bool:
    if config.placement != "auto":
        return config.placement == "device"
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free_bytes = psutil.virtual_memory().available
    return num_bytes < MAX_FREE_MEMORY_FRACTION * free_bytes
