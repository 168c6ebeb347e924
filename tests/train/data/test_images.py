"""Images of users' datasets: what is taken for an image and for a label, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from hpo.errors import UserError
from hpo.train.data.images import DatasetImages

GREY = Image.new("L", (4, 4), 100)


class Items(list[Any]):
    """A map-style dataset of these items, with the attributes given."""

    def __init__(self, items: Sequence[Any], **attributes: Any) -> None:
        super().__init__(items)
        self.__dict__.update(attributes)


def red_palette() -> Image.Image:
    image = Image.new("P", (4, 4), 7)
    image.putpalette([200, 0, 0] * 256)
    return image


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("1", (4, 4), 1), [255]),
        (Image.new("I;16", (4, 4), 0x4000), [64]),
        (Image.new("F", (4, 4), 0.5), [128]),
        (red_palette(), [200, 0, 0]),
        (GREY, [100]),
        (Image.new("RGBA", (4, 4), (1, 2, 3, 4)), [1, 2, 3, 4]),
        (torch.full((3, 4, 4), 9, dtype=torch.uint8), [9, 9, 9]),
        (numpy.full((4, 4), 9, dtype="uint8"), [9]),
    ],
)
def test_every_image_has_8_bits_in_the_end(image: Any, pixel: list[int]) -> None:
    (read,) = DatasetImages(Items([(image, 0)]), name="own:data").read(torch.tensor([0]))
    assert read.dtype == torch.uint8
    assert read[0, 0].tolist() == pixel


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Items([(None, 0)]), "uint8 images .C, H, W. or PIL images, got NoneType"),
        (Items([(numpy.zeros((4, 4, 3)), 0)]), r"PIL images, got float64 of shape \(4, 4, 3\)"),
        (Items([(Image.new("F", (4, 4), 200), 0)]), "cannot give image 0: .*values go from 200 to 200"),
        (Items([(GREY, 0.7)]), "integer labels, got 0.7 for image 0"),
        (Items([(GREY, "cat")]), "cannot give image 0: ValueError"),
        (Items([(GREY, 0)], targets=["cat"]), "cannot give its labels: ValueError"),
        (Items([(GREY, 0)], targets=[0.7]), "integer labels, got torch.float32"),
        (Items([(GREY, 0)], targets=[0, 1]), "one label for each of its 1 images"),
        (Items([(GREY, 0)], targets=[2]), "image 0 comes with 0, and had 2 before, or in `targets`"),
        (SimpleNamespace(__getitem__=None), "cannot give its labels: TypeError"),
    ],
)
def test_what_is_no_image_or_no_label_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"data.name = 'own:data' .*{message}"):
        DatasetImages(dataset, name="own:data").read(torch.tensor([0]))


def test_labels_that_a_dataset_transforms_are_read_from_its_items() -> None:
    items = [(GREY, 0), (GREY, 1)]
    images = DatasetImages(Items(items, targets=[7, 8], target_transform=lambda label: label - 7), name="own:data")
    assert images.labels_N.tolist() == [0, 1]
