"""Mixing of the images of a batch: MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899).

What is drawn follows from the seed, the epoch and the step. Each image is mixed with the one at the mirrored position
of its batch, which the epoch's order has made a random one. As in the papers' code, a batch has one share. The loss is
that of both labels, weighted by their shares, so that any loss of images and labels can be used.
Shapes: B batch, C H W image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from hpo.train.config import TrainingConfig, derive_seed


@dataclass(frozen=True)
class Mix:
    """What was mixed into the images of a batch."""

    labels_B: Tensor  # of the images that were mixed in
    share: float  # of the images themselves, 0 to 1


def mix_batch(
    images_BCHW: Tensor, labels_B: Tensor, training: TrainingConfig, *, seed: int, epoch: int, step: int
) -> tuple[Tensor, Mix | None]:
    """Return the images of a step's batch, mixed, and what was mixed in; None where nothing is mixed.

    With both `mixup` and `cutmix` one of the two is drawn for each batch.
    """
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(training, kind) > 0]
    if not kinds:
        return images_BCHW, None
    random = numpy.random.RandomState(derive_seed(seed, "mix", epoch, step))  # whose numbers never change
    kind = kinds[random.randint(len(kinds))]
    alpha = getattr(training, kind)
    share = float(random.beta(alpha, alpha))
    others_BCHW, other_labels_B = images_BCHW.flip(0), labels_B.flip(0)
    if kind == "mixup":
        return torch.lerp(others_BCHW, images_BCHW, share), Mix(other_labels_B, share)
    height, width = images_BCHW.shape[2:]
    side = math.sqrt(1 - share)
    (top, bottom), (left, right) = (
        _stretch(random.randint(size), round(size * side), size=size) for size in (height, width)
    )
    images_BCHW = images_BCHW.clone()
    images_BCHW[:, :, top:bottom, left:right] = others_BCHW[:, :, top:bottom, left:right]
    return images_BCHW, Mix(other_labels_B, 1 - (bottom - top) * (right - left) / (height * width))


def _stretch(centre: int, length: int, *, size: int) -> tuple[int, int]:
    """Return where a stretch of this length around a pixel begins and ends within an image."""
    start = centre - length // 2
    return max(0, start), min(size, start + length)
