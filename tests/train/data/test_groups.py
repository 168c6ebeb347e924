"""Groups of images, by their paths or by a function, are never on both sides of a split."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hpo.errors import UserError
from hpo.train.config import DataConfig
from hpo.train.data.datasets import open_dataset
from hpo.train.data.groups import group_numbers, groups_digest
from hpo.train.data.images import FileImages
from hpo.train.data.splits import split_indices
from tests.train.data.datasets_under_test import load

FUNCTIONS = """
def of_path(path):
    return path.split("/")[1].split("_")[0]

def of_index(index):
    return index // 7

def nobody(key):
    return None

def fails(key):
    raise KeyError(key)
"""


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Write 30 patients with two images each in either of two classes."""
    for name in ("ill", "well"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for patient in range(30):
            for index in range(2):
                image = Image.new("L", (32, 32), patient)
                image.save(tmp_path / "train" / name / f"p{patient:02d}_{index}.png")
    return tmp_path


@pytest.fixture
def functions(own_code: Path) -> str:
    (own_code / "own_groups.py").write_text(FUNCTIONS)
    return "own_groups"


@pytest.mark.parametrize("groups", [r"p\d+", r"/(p\d+)_", "own_groups:of_path"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_group_is_on_both_sides_and_the_split_is_the_same_each_time(
    groups: str, seed: int, patients: Path, functions: str
) -> None:
    keys: dict[str, Any] = {"root": str(patients), "groups": groups, "validation_fraction": 0.2, "split_seed": seed}
    data, again = (load("image_folder", **keys) for _ in range(2))

    def patients_of(loader: Any) -> set[int]:
        return {round(float(p)) for images, _ in loader.batches(60) for p in (images * loader.std_C11)[:, 0, 0, 0]}

    train, val = patients_of(data.train), patients_of(data.val)
    assert len(train) + len(val) == 30
    assert not train & val
    assert data.val.labels_N.bincount().tolist() == [12, 12]
    assert patients_of(again.val) == val


def test_a_table_names_the_groups(patients: Path, own_code: Path) -> None:
    images = open_dataset(DataConfig(name="image_folder", root=str(patients))).train
    assert isinstance(images, FileImages)
    paths = [path.relative_to(images.folder).as_posix() for path in images.paths]
    text = "group,path\n" + "".join(f"{path[-7:-6]},{path}\n" for path in reversed(paths))
    (own_code / "patients.csv").write_text(text, encoding="utf-8-sig")  # as spreadsheets write it
    expected = group_numbers(images, r"(\d)_\d\.png$")
    assert torch.equal(group_numbers(images, "patients.csv"), expected)
    digest = groups_digest("patients.csv")
    (own_code / "patients.csv").write_text(text.replace("9,", "8,"))
    assert groups_digest("patients.csv") not in (None, digest)
    assert groups_digest(r"(p\d+)_") is None
    (own_code / "patients.csv").write_text("index,group\n" + "".join(f"{i},{i // 7}\n" for i in range(1438)))
    digits = open_dataset(DataConfig()).train
    assert torch.equal(group_numbers(digits, "patients.csv"), torch.arange(len(digits.labels_N)) // 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,group\nill/p00_0.png,ada\n", "must have a group for every image, and has none for ill/p00_1.png"),
        ("path,group\nill/p00_0.png,\n", "must have a group for every image, and has none for ill/p00_0.png"),
        ("file;patient\n", "must have the columns path and group, got file;patient"),
        ("", "must have the columns path and group, got "),
        (None, "cannot be read as "),
    ],
)
def test_a_table_that_is_none_is_one_sentence(text: str | None, message: str, patients: Path, own_code: Path) -> None:
    if text is not None:
        (own_code / "patients.csv").write_text(text)
    with pytest.raises(UserError, match=rf"data.groups = 'patients.csv' {message}") as raised:
        load("image_folder", root=str(patients), groups="patients.csv")
    assert "\n" not in str(raised.value)


def test_a_function_is_given_the_index_of_what_is_no_file(functions: str) -> None:
    images = open_dataset(DataConfig()).train
    assert torch.equal(group_numbers(images, f"{functions}:of_index"), torch.arange(len(images.labels_N)) // 7)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("^p", "data.groups must match the path of every image below train/, got '^p' for ill/p00_0.png"),
        (
            "own_groups:nobody",
            "data.groups = 'own_groups:nobody' must name a group for every image, got None",
        ),
        ("own_groups:fails", "data.groups = 'own_groups:fails' cannot name the group of 'ill/p00_0.png': KeyError"),
        ("png", "data.groups must leave an image of each of the 2 classes in the validation part, got 'png', which"),
    ],
)
def test_groups_that_are_none_are_one_sentence(groups: str, message: str, patients: Path, functions: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        load("image_folder", root=str(patients), groups=groups)
    assert "\n" not in str(raised.value)


def test_a_pattern_needs_files(functions: str) -> None:
    with pytest.raises(
        UserError, match=r"data.groups must be package.module:function or a CSV file for images that are not files"
    ):
        load("digits", groups="a+")


def test_classes_keep_their_shares_where_groups_are_of_all_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 12, (400,), generator=generator)
    groups = torch.repeat_interleave(torch.arange(400), sizes)
    labels = torch.repeat_interleave(torch.randint(0, 5, (400,), generator=generator), sizes)
    config = DataConfig(validation_fraction=0.2)
    train, val = split_indices(labels, config, class_names="abcde", groups_N=groups)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(labels)))
    assert not set(groups[train].tolist()) & set(groups[val].tolist())
    shares = labels[val].bincount() / labels.bincount()
    assert float((shares - 0.2).abs().max()) < 0.02


def test_paths_are_below_the_folder_of_the_split() -> None:
    images = FileImages([Path("/a/train/cat/1.png")], torch.zeros(1).long(), image_size=8, folder=Path("/a/train"))
    assert group_numbers(images, "^cat/1.png$").tolist() == [0]
