"""Batches of one split: shuffled, augmented and normalised on the device.

Both placements of images give the same batches bit for bit. Everything random in an epoch (order, flips, crops) is
drawn on the CPU before it starts, from the trial's seed and the epoch, but for what `augment.py` draws for each image.
The pixels go through the same operations on the device.
Shapes: K lanes, N images of a split, B batch, C H W image. Pixels are uint8 (N, H, W, C); batches are float32
(B, C, H, W) in channels_last memory format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo.train.config import derive_seed
from hpo.train.data.augment import Augmentation
from hpo.train.data.sources import ImageSource, batch_bounds


@dataclass(frozen=True, kw_only=True)
class BatchLoader:
    """A loader of the training, validation or test images of a dataset, as normalised batches on the device."""

    source: ImageSource
    labels_N: Tensor  # as in labels.py, on the device
    mean_C11: Tensor  # of the training images, in units of a pixel's 0 to 255, on the device
    std_C11: Tensor
    flip: bool = False
    crop: int = 0  # pixels of zero padding
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels_N)

    def num_batches(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        return len(batch_bounds(len(self), batch_size))

    def batches(self, batch_size: int, *, seed: int | None = None, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images float32 (B, C, H, W) and labels (B,) or (B, L), each image once, without synchronising the host.

        With a seed the images are shuffled and augmented, the same way for the same (seed, epoch). Without one they
        come as they are, in their fixed order.
        """
        batches = (
            self._read(batch_size, torch.arange(len(self))[None])
            if seed is None
            else self.stacked_batches(batch_size, [(seed, epoch)])
        )
        for images_1BCHW, labels_1B in batches:
            yield images_1BCHW[0], labels_1B[0]

    def stacked_batches(self, batch_size: int, epochs: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of K epochs, each a (seed, epoch), at once: images (K, B, C, H, W) and labels (K, B).

        Each lane gets the batches that `batches` gives for its seed and epoch.
        """
        order_KN, flips_and_offsets = self.shuffled(epochs)
        return self._read(batch_size, order_KN, flips_and_offsets, epochs=epochs)

    def shuffled(self, epochs: Sequence[tuple[int, int]]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the order of each epoch (K, N), and its flips (K, N) and offsets (K, N, 2) where it is augmented.

        An epoch is a (seed, epoch). All are on the CPU.
        """
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
        self,
        batch_size: int,
        order_KN: Tensor,
        flips_and_offsets: tuple[Tensor, Tensor] | None = None,
        *,
        epochs: Sequence[tuple[int, int]] = (),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of images in this order, augmented where the epochs that they are of are given."""
        device, num_lanes = self.labels_N.device, len(order_KN)
        bounds = batch_bounds(len(self), batch_size)
        labels_KN = self.labels_N[order_KN.to(device)]
        if flips_and_offsets is not None:
            flips_KN, offsets_KN2 = (drawn.to(device) for drawn in flips_and_offsets)
        # Each read has the batches of all lanes, one lane after the other.
        stored = self.source.read([order_KN[:, start:end].flatten() for start, end in bounds])
        for (start, end), images_BHWC in zip(bounds, stored, strict=True):
            images = images_BHWC
            if flips_and_offsets is not None:
                flips_B, offsets_B2 = flips_KN[:, start:end].flatten(), offsets_KN2[:, start:end].flatten(0, 1)
                images = flip_and_crop(images, flips_B=flips_B, offsets_B2=offsets_B2, padding=self.crop)
            if self.augmentation is not None and epochs:
                numbers_KB = order_KN[:, start:end].tolist()
                draws = [(*of, number) for of, row in zip(epochs, numbers_KB, strict=True) for number in row]
                images = self.augmentation(images, draws)
            images_BCHW = self.normalise(images)
            yield images_BCHW.view(num_lanes, end - start, *images_BCHW.shape[1:]), labels_KN[:, start:end]

    def normalise(self, images_BHWC: Tensor) -> Tensor:
        """Return stored images as batches have them, (B, C, H, W)."""
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        return images_BCHW.sub_(self.mean_C11).div_(self.std_C11)


def flip_and_crop(images_BHWC: Tensor, *, flips_B: Tensor, offsets_B2: Tensor, padding: int) -> Tensor:
    """Return the images mirrored where `flips_B`, then padded with zeros and cut out at their offsets, in one gather.

    Args:
        images_BHWC: The images.
        flips_B: Whether each image is mirrored left-right (bool).
        offsets_B2: The row and the column in the padded image where each result begins, 0 to 2 * padding.
        padding: Pixels of zeros on each side.
    """
    batch, height, width, _ = images_BHWC.shape
    device = images_BHWC.device
    padded = torch.nn.functional.pad(images_BHWC, (0, 0, padding, padding, padding, padding))
    columns_W = torch.arange(width, device=device)
    columns_BW = torch.where(flips_B[:, None], columns_W.flip(0), columns_W) + offsets_B2[:, 1:]
    rows_BH = torch.arange(height, device=device) + offsets_B2[:, :1]
    indices_B = torch.arange(batch, device=device)
    return padded[indices_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]
