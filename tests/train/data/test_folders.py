"""Folders of images as people have them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hpo.errors import UserError
from hpo.train.data.folders import describe_images, other_folders, scan_folder, validation_folder
from hpo.train.data.images import FileImages


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, format="png")


def test_images_are_found_in_sub_folders_and_by_any_usual_ending(tmp_path: Path) -> None:
    names = ["0.png", "1.JPG", "2.jfif", "3.jpe", "camera/day 2/4.jpeg"]
    write(*(tmp_path / "cat" / name for name in names), tmp_path / "dog" / "0.png")
    found = scan_folder(tmp_path)
    assert {name: len(paths) for name, paths in found.images.items()} == {"cat": len(names), "dog": 1}
    assert found.left_out == []


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "0.png", tmp_path / "loose.png", tmp_path / "cat" / ".hidden" / "1.png")
    for name in ("notes.txt", "labels.csv", "more/notes.txt", "README", ".DS_Store"):
        (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_text("no image")
    (tmp_path / "owl").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / ".git").mkdir()
    assert scan_folder(tmp_path).left_out == [
        "4 files that are not images (.txt 2, .csv 1, no ending 1)",
        "1 images outside the folders of the classes",
        "folders without an image (__pycache__, owl)",
    ]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "0.png", tmp_path / "elsewhere" / "1.png")
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert [path.name for path in scan_folder(tmp_path).images["cat"]] == ["0.png", "1.png"]


def test_a_pipe_is_no_image_and_a_broken_link_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "0.png")
    os.mkfifo(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "2.png").symlink_to(tmp_path / "gone.png")
    assert [path.name for path in scan_folder(tmp_path).images["cat"]] == ["0.png", "2.png"]


@pytest.mark.parametrize("name", ["cat", "cat/more"])
def test_a_folder_that_cannot_be_read_is_named_and_not_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cat" / "0.png", tmp_path / "cat" / "more" / "1.png")
    scan = os.scandir

    def scan_as_another_user(path: str) -> Any:
        if str(path) == str(tmp_path / name):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", scan_as_another_user)
    with pytest.raises(UserError, match=f"holds a folder that cannot be read: .*/{name} .Permission denied."):
        scan_folder(tmp_path)


def test_folders_that_are_not_used_are_said(tmp_path: Path) -> None:
    for name in ("train", "test", ".git"):
        (tmp_path / name).mkdir()
    assert other_folders(tmp_path) == []
    (tmp_path / "val").mkdir()
    assert other_folders(tmp_path) == ["folders next to train and test (val)"]
    assert other_folders(tmp_path, ["train", "val", "test"]) == []
    assert validation_folder(tmp_path) == "val"
    (tmp_path / "valid").mkdir()
    with pytest.raises(UserError, match=r"data.root must hold one folder of validation images, got val and valid in "):
        validation_folder(tmp_path)


def test_sizes_and_modes_are_described(tmp_path: Path) -> None:
    write(tmp_path / "a.png", tmp_path / "b.png")
    Image.new("L", (640, 480)).save(tmp_path / "c.png")
    paths, labels = sorted(tmp_path.iterdir()), torch.zeros(3)
    assert describe_images(FileImages(paths, labels, image_size=8)) == "3 of 8x8 to 640x480 pixels, RGB 2, L 1"
    images = FileImages(paths, labels, image_size=8, left_out=["1 files", "folders"])
    assert describe_images(images).endswith("L 1; left out: 1 files; folders")


@pytest.mark.parametrize(
    ("brightest", "bits", "said"),
    [(4095, 16, "is 4,095: set data.bits = 12 if that is white"), (4095, 12, None), (40000, 16, None)],
)
def test_dark_images_of_16_bits_are_said(brightest: int, bits: int, said: str | None, tmp_path: Path) -> None:
    Image.new("I;16", (8, 8), brightest).save(tmp_path / "a.png")
    text = describe_images(FileImages([tmp_path / "a.png"], torch.zeros(1), image_size=8, bits=bits))
    assert text.startswith("1 of 8x8 pixels, I;16 1")
    assert said in text if said else "white" not in text
