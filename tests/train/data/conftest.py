"""A module of a user's datasets, and a folder of images of several sizes."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

OWN_DATA = """
import numpy, torch
from PIL import Image

def arrays(size=8, num=60, test=True, dtype="uint8"):
    images = numpy.random.RandomState(0).randint(0, 256, (num, 3, size, size)).astype(dtype)
    labels = numpy.arange(num) % 3
    return (images, labels), ((images[:6], labels[:6]) if test else None)

class Listed(torch.utils.data.Dataset):
    def __init__(self, kind, num=60):
        self.pictures = torch.from_numpy(arrays(num=num)[0][0])
        self.kind = kind

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures[index]
        if self.kind == "pil":
            return Image.fromarray(picture.permute(1, 2, 0).numpy()), index % 3
        if self.kind == "float":
            return picture / 255, index % 3
        if self.kind == "sizes":
            return picture[:, index % 2 :], index % 3
        if self.kind == "flipped" and torch.rand(()) < 0.5:
            return picture.flip(2), index % 3
        if self.kind == "broken" and index == 50:
            raise RuntimeError("disk on fire")
        return picture, index % 3

def dataset(kind="tensor"):
    return Listed(kind), Listed(kind, num=6)

class Unreadable:
    def __len__(self):
        raise AssertionError("the test part was read")
    def __getitem__(self, index):
        raise AssertionError("the test part was read")

def test_is_unreadable():
    return arrays()[0], Unreadable()

def bad_test_labels():
    (images, labels), (test_images, test_labels) = arrays()
    return (images, labels), (test_images, test_labels + 3)

def three_parts(val=True, test=True, val_size=8):
    train, (images, labels) = arrays()[0], arrays(size=val_size)[0]
    return train, (images[:6], labels[:6]) if val else None, (train[0][:9], train[1][:9]) if test else None

def not_a_pair():
    return 3

def mirrored(flip=True, root=None):
    return arrays()

def oblong():
    return (numpy.zeros((60, 1, 8, 9), dtype="uint8"), numpy.arange(60) % 3), None
"""


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> None:
    """Use two threads, and so two processes that read images from files."""
    torch.set_num_threads(2)


@pytest.fixture
def own_data(own_code: Path) -> str:
    (own_code / "own_data_under_test.py").write_text(OWN_DATA)
    return "own_data_under_test"


@pytest.fixture
def image_folder_root(tmp_path: Path) -> Path:
    """Write two classes of 20 training and 3 test images of different sizes, among files that are no images."""
    random = numpy.random.RandomState(0)
    for part, count in (("train", 20), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("not an image")
            for index in range(count):
                pixels = random.randint(0, 256, (20 + index, 30, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"
