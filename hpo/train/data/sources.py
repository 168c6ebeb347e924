"""Sources of image batches: on the device from the start, or streamed to it in each epoch.

Shapes: N images of a split, B batch, H W C image; pixels are uint8.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from hpo.errors import UserError
from hpo.train.config import DataConfig
from hpo.train.data.images import LabeledImages
from hpo.train.data.progress import ReadingProgress
from hpo.train.seeding import GeneratorStates

# So many bytes of images are kept in memory on a CPU however little is free. Trials that train as a stack need them
# there, and whether they do must not change from run to run.
SMALL_BYTES = 2**28
MAX_FREE_MEMORY_FRACTION = 0.25  # of the device's free memory, that images may take with placement "auto"
READING_BATCH_SIZE = 512  # images at a time where all are read once
SHARED_MEMORY = "/dev/shm"  # where Linux keeps it
BATCHES_PER_PROCESS = 3  # that a DataLoader has in shared memory: two prefetched ones, and one in use
SHARED_MEMORY_SPARE = 4  # for the other split's processes, other workers and other programs


def batch_bounds(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """Return where each batch starts and ends.

    The last batch may be smaller, but a single image joins the batch before it: BatchNorm cannot train on one image,
    and dropping it would train on less data than was asked for.
    """
    starts = list(range(0, num_images, batch_size))
    if batch_size > 1 and len(starts) > 1 and num_images - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def reading_batches(num_images: int) -> list[Tensor]:
    """Return the positions of all images, in batches to read once."""
    return [torch.arange(start, end) for start, end in batch_bounds(num_images, READING_BATCH_SIZE)]


class ImageSource(Protocol):
    """A source of the images of one split."""

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the uint8 images (B, H, W, C) of each batch of positions in the split, on the device.

        Positions are int64 on the CPU. Raises UserError where an image cannot be read.
        """


class DeviceSource:
    """A source whose images are all on the device."""

    def __init__(self, images_NHWC: Tensor) -> None:
        self.images_NHWC = images_NHWC

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch; see `ImageSource`."""
        positions = torch.cat(list(batches)).to(self.images_NHWC.device)  # one transfer, not one a batch
        start = 0
        for batch in batches:
            yield self.images_NHWC.index_select(0, positions[start : start + len(batch)])
            start += len(batch)


class StreamSource:
    """A source that reads its images again in each epoch, in worker processes where they come from files.

    The processes stay from one epoch to the next, and end with this process or when the source is dropped.
    """

    def __init__(
        self, images: LabeledImages, indices_N: Tensor, *, device: torch.device, bytes_per_image: int = 0
    ) -> None:
        self.images, self.indices_N, self.device = images, indices_N, device
        self._bytes_per_image = bytes_per_image
        self._idle: list[DataLoader[Any]] = []  # the loader of the last epoch, with its processes; at most one
        # Torch can end the processes only while their queues are whole, which within a cycle of garbage they are not.
        weakref.finalize(self, self._idle.clear).atexit = False
        self._pid = os.getpid()

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch; see `ImageSource`."""
        num_workers = self._num_workers(len(batches))
        num_bytes = max(map(len, batches), default=0) * self._bytes_per_image * num_workers * BATCHES_PER_PROCESS
        loader = self._take_loader(num_workers, by_value=not has_shared_memory(num_bytes))
        assert isinstance(loader.sampler, _EpochBatches)
        loader.sampler.begin(batches)
        try:
            for images_BHWC in loader:  # of an epoch that was left in its middle, it drops the batches first
                if isinstance(images_BHWC, UserError):
                    raise images_BHWC
                yield torch.as_tensor(images_BHWC).to(self.device, non_blocking=True)
        except (UserError, GeneratorExit):  # after anything else the processes may be gone
            self._give_back(loader)
            raise
        self._give_back(loader)

    def _take_loader(self, num_workers: int, *, by_value: bool) -> DataLoader[Any]:
        """Return the idle loader where it has as many processes that send as is asked for, or else a new one.

        While an epoch is read its loader is not idle, so two readers never share one. Nor does a process that the
        user's code forked use its parent's.
        """
        if self._pid == os.getpid():
            idle = [
                loader
                for loader in self._idle
                if loader.num_workers == num_workers and getattr(loader.dataset, "by_value", None) == by_value
            ]
            self._idle.clear()
            if idle:
                return idle[0]
        return DataLoader(
            _BatchReader(self.images, self.indices_N, by_value=by_value),
            batch_size=None,
            sampler=_EpochBatches(),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=self.device.type == "cuda",
            # Its own generator, or it would draw from the one that gives the trial its dropout.
            generator=torch.Generator(),
            worker_init_fn=_ignore_ctrl_c,
            collate_fn=_as_it_is,  # else torch makes a tensor of an array
        )

    def _give_back(self, loader: DataLoader[Any]) -> None:
        if self._pid == os.getpid():
            self._idle[:] = [loader]

    def _num_workers(self, num_batches: int) -> int:
        # Daemons may not have children.
        if not self.images.reads_files or multiprocessing.current_process().daemon or not has_semaphores():
            return 0
        return min(torch.get_num_threads(), num_batches)  # the threads are this worker's share of the cores


class _EpochBatches(Sampler[tuple[int, Any]]):
    """The batches of positions of one epoch after the other, each with the number of its epoch.

    Positions are arrays, which go to another process by value; a tensor would take a file descriptor each.
    """

    def __init__(self) -> None:
        self._epoch = 0
        self._batches: Sequence[Tensor] = ()

    def begin(self, batches: Sequence[Tensor]) -> None:
        """Give the batches of the next epoch."""
        self._epoch, self._batches = self._epoch + 1, batches

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return ((self._epoch, batch.numpy()) for batch in self._batches)


class _BatchReader(Dataset[Any]):
    """A dataset whose items are whole batches.

    It returns a user's mistake, because a DataLoader rewrites what its workers raise. With `by_value` a batch is an
    array, which is sent to another process through a pipe, and not a tensor, which goes through shared memory.
    """

    def __init__(self, images: LabeledImages, indices_N: Tensor, *, by_value: bool) -> None:
        self.images, self.indices_N, self.by_value = images, indices_N, by_value
        self._epoch = 0
        self._generators: GeneratorStates | None = None  # as a worker process began

    def __getitem__(self, item: tuple[int, Any]) -> Any:
        epoch, positions_B = item
        if epoch != self._epoch and get_worker_info() is not None:
            # What a user's dataset draws must not depend on how many epochs this process has read.
            self._generators = self._generators or GeneratorStates()
            self._generators.restore()
        self._epoch = epoch
        try:
            images_BHWC = self.images.read(self.indices_N[torch.from_numpy(positions_B)])
            return images_BHWC.numpy() if self.by_value else images_BHWC
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_ctrl_c(number: int) -> None:
    """Have a process that reads images outlive Ctrl-C, after which the epoch in training is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def has_semaphores() -> bool:
    """Return whether the system lets processes have locks in common, which it keeps in its shared memory."""
    try:
        multiprocessing.Lock()
    except OSError:  # that is read-only, full, or another user's
        return False
    return True


def has_shared_memory(num_bytes: int) -> bool:
    """Return whether the machine's shared memory has room for so much with some to spare; containers often have 64 MB.

    Where it runs out a process of a DataLoader loses its batch, and the DataLoader waits for that for ever.
    """
    try:
        return shutil.disk_usage(SHARED_MEMORY).free > SHARED_MEMORY_SPARE * num_bytes
    except OSError:  # the system has none of this name
        return True


def fits_on_device(config: DataConfig, *, num_bytes: int, device: torch.device) -> bool:
    """Return whether images of `num_bytes` go to the device, by `data.placement` or the memory that is free."""
    if config.placement != "auto":
        return config.placement == "device"
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
    elif num_bytes <= SMALL_BYTES:
        return True
    else:
        import psutil

        free_bytes = psutil.virtual_memory().available
    return num_bytes < MAX_FREE_MEMORY_FRACTION * free_bytes


def place_images(
    images: LabeledImages,
    indices_N: Tensor,
    *,
    shape_HWC: tuple[int, int, int],
    on_device: bool,
    device: torch.device,
) -> ImageSource:
    """Return a source of the images at these indices; with `on_device` read them all to the device now."""
    stream = StreamSource(images, indices_N, device=device, bytes_per_image=math.prod(shape_HWC))
    if not on_device:
        return stream
    images_NHWC = torch.empty((len(indices_N), *shape_HWC), dtype=torch.uint8, device=device)
    start = 0
    for images_BHWC in read_all(stream, len(indices_N)):
        images_NHWC[start : start + len(images_BHWC)] = images_BHWC
        start += len(images_BHWC)
    return DeviceSource(images_NHWC)


def read_all(source: ImageSource, num_images: int) -> Iterator[Tensor]:
    """Yield all images of a source in batches, once, and log how far that is."""
    progress = ReadingProgress("all of", num_images)
    for images_BHWC in source.read(reading_batches(num_images)):
        yield images_BHWC
        progress.add(len(images_BHWC))


def channel_statistics(source: ImageSource, *, num_images: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each channel (float64, CPU), in units of a pixel's 0 to 255.

    They come from counts of the 256 values, and so are the same on every device and for every placement. A channel
    that is the same everywhere gets a deviation of 1, not 0.
    """
    counts_C256 = torch.zeros((channels, 256), dtype=torch.int64)
    for images_BHWC in read_all(source, num_images):
        counts = [torch.bincount(pixels.flatten(), minlength=256) for pixels in images_BHWC.unbind(-1)]
        counts_C256 += torch.stack(counts).cpu()
    shares_C256 = counts_C256.double() / counts_C256.sum(1, keepdim=True)
    values_256 = torch.arange(256, dtype=torch.float64)
    mean_C = (shares_C256 * values_256).sum(1)
    variance_C = (shares_C256 * (values_256 - mean_C[:, None]).square()).sum(1)
    return mean_C, torch.where(variance_C > 0, variance_C, 1.0).sqrt()
