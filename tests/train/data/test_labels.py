"""Images with a 0 or 1 for each class are read, split and counted; labels of other numbers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.errors import UserError
from hpo.train.data.labels import num_correct, num_correct_at_best, strata
from tests.train.data.datasets_under_test import load

SEVERAL = """
import numpy, torch

def some(num, classes=4):
    random = numpy.random.default_rng(0)
    labels = (random.random((num, classes)) < [0.5, 0.3, 0.1, 0.02][:classes]).astype("float32")
    return random.integers(0, 256, (num, 1, 8, 8), dtype="uint8"), labels

def arrays(change="none", test="same", classes=4):
    images, labels = some(400)
    if change == "half":
        labels[3, 1] = 0.5
    if change == "none of one":
        labels[:, 2] = 0
    if change == "short":
        labels = labels[:-1]
    return (images, labels), {"same": (images, labels), "fewer": some(20, 3), "one": (images, labels.argmax(1))}[test]

class Items(torch.utils.data.Dataset):
    def __init__(self, change):
        self.images, self.labels = some(400)
        self.change = change

    def __len__(self):
        return 400

    def __getitem__(self, index):
        label = self.labels[index]
        label = {"none": label, "list": label.astype(int).tolist(), "half": label / 2}[self.change]
        return torch.from_numpy(self.images[index]), label

def items(change="none"):
    return Items(change), None
"""


@pytest.fixture
def own(own_code: Path) -> Any:
    (own_code / "own_several.py").write_text(SEVERAL)

    def data(factory: str, validation_fraction: float = 0.25, **options: str) -> Any:
        return load(f"own_several:{factory}", options=options, validation_fraction=validation_fraction)

    return data


def test_each_class_is_on_both_sides_in_its_share_and_a_dataset_gives_what_arrays_do(own: Any) -> None:
    data = own("arrays")
    assert (data.num_classes, data.has_several_labels) == (4, True)
    assert data.train.labels_N.shape == (300, 4)
    sizes, of_val = (loader.labels_N.sum(0) for loader in (data.train, data.val))
    assert (of_val - sizes / 3).abs().max() < 12
    assert of_val[3] == round(float((sizes + of_val)[3]) / 4)  # the rarest class is split evenly
    for factory in ("none", "list"):
        same = own("items", change=factory)
        assert torch.equal(same.train.labels_N, data.train.labels_N)
        images, labels = next(same.train.batches(8, seed=1))
        expected_images, expected_labels = next(data.train.batches(8, seed=1))
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("arrays", {"change": "half"}, "must have a 0 or 1 for each class where images have several labels, got 0.5"),
        ("arrays", {"change": "none of one"}, "must have images of every class; none has label 2"),
        ("arrays", {"change": "short"}, r"and labels \(N,\), or 0 and 1 \(N, classes\), got .* shape \(399, 4\)"),
        ("arrays", {"test": "fewer"}, r"as many labels for each of the test images .* \(20, 3\) and \(400, 4\)"),
        ("arrays", {"test": "one"}, r"as many labels for each of the test images .* \(400,\) and \(400, 4\)"),
        ("items", {"change": "half"}, "must give integer labels, got array"),
    ],
)
def test_what_is_no_label_for_each_class_is_one_sentence(
    factory: str, options: dict[str, str], message: str, own: Any
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _ = own(factory, **options).test
    assert "\n" not in str(caught.value)


def test_an_image_counts_with_the_share_of_its_labels_that_is_right() -> None:
    labels_NL = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]])
    logits_NL = torch.tensor([[1.0, -1, -1, -1], [1, -1, -1, -1], [-1, -1, 1, 1], [3, -2, -1, 2]])
    assert float(num_correct(logits_NL, labels_NL)) == 1 + 0.75 + 0 + 1
    assert num_correct_at_best(labels_NL) == (3 + 3 + 4 + 3) / 4
    assert strata(labels_NL).tolist() == [0, 3, 1, 2]  # of the last image's classes the fourth is rarer
