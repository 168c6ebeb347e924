"""Networks of other kinds than the article's, without torchvision: batch norm, dropout, and a residual one.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def two_convolutions(*, channels: int, num_classes: int) -> nn.Module:
    """Return two convolutions and a linear layer, for images of 32x32."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, num_classes)),
    )


def batch_norm(*, channels: int, num_classes: int) -> nn.Module:
    """Return two convolutions with batch norm, for images of 32x32."""
    return nn.Sequential(
        *_normed(channels, 32, stride=2),
        *_normed(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, num_classes),
    )


def dropout(*, channels: int, num_classes: int) -> nn.Module:
    """Return two convolutions with dropout of both kinds, for images of 32x32."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Dropout2d(0.2)),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, num_classes)),
    )


def residual(*, channels: int, num_classes: int, width: float = 1.0) -> nn.Module:
    """Return a network of eight residual blocks as ResNet-18 has them, with the stem that images of 32x32 need."""
    sizes = [max(8, int(width * size)) for size in (64, 128, 256, 512)]
    blocks, inputs = [], sizes[0]
    for index, outputs in enumerate(sizes):
        blocks += [Block(inputs, outputs, stride=1 if index == 0 else 2), Block(outputs, outputs, stride=1)]
        inputs = outputs
    return nn.Sequential(
        *_normed(channels, sizes[0], stride=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, num_classes),
    )


class Block(nn.Module):
    """A residual block of two convolutions (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_normed(inputs, outputs, stride=stride), *_normed(outputs, outputs, stride=1)[:2])
        is_same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return functional.relu(self.body(images_BCHW) + self.shortcut(images_BCHW))


def _normed(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    """Return a convolution, its batch norm and its activation."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
