"""Learnable noise: each class has an image of its own, seen through noise, so that losses fall as on real images.

A class's image is 4x4 patches of a colour each: networks that pool average single pixels away.

Shapes: N images of 32x32 with 3 channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noise_images(num_images: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, H, W, C) and labels (N,), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(num_images) % num_classes
    patches = torch.randint(128, (num_classes, 4, 4, 3), dtype=torch.uint8, generator=generator)
    faces = patches.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    images_NHWC = torch.randint(128, (num_images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    for start in range(0, num_images, 8192):  # in parts, because a copy of all takes a second and memory
        images_NHWC[start : start + 8192] += faces[labels_N[start : start + 8192]]
    return images_NHWC, labels_N


def study_data(num_images: int = 50_000, num_classes: int = 100) -> tuple[tuple[Tensor, Tensor], None]:
    """Return the same as a study's `data.name` gives them: images (N, C, H, W) and labels, and no test images."""
    images_NHWC, labels_N = noise_images(num_images, num_classes)
    return (images_NHWC.permute(0, 3, 1, 2), labels_N), None
