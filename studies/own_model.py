"""A network of your own: called with the data set's channels and classes, and the options of [model]."""

from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        return images + self.body(images)


def small_resnet(*, channels: int, num_classes: int, hidden: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, stride=4, padding=1),
        Residual(hidden),
        nn.MaxPool2d(2),
        Residual(hidden),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(hidden, num_classes),
    )
