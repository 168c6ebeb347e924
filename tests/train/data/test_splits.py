"""Splits are exact, stratified, and depend on their seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.data.splits import stratified_order
from tests.train.data.datasets_under_test import load


@pytest.mark.parametrize("sizes", [[50, 50, 50], [90, 9, 1], [1, 2, 97], [7]])
def test_every_prefix_of_the_order_is_stratified(sizes: list[int]) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    order = stratified_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for length in range(len(labels) + 1):
        counts = torch.bincount(labels[order[:length]], minlength=len(sizes))
        shares = torch.tensor(sizes) * length / len(labels)
        assert (counts - shares).abs().max() <= 1.01


def test_the_split_is_exact_and_depends_on_its_seed_alone() -> None:
    data = load(validation_fraction=0.25, train_samples=500)
    assert (len(data.train), len(data.val)) == (500, round(0.25 * 1438))
    assert len(load(train_fraction=0.5).train) == round(0.5 * (1438 - 144))

    def val(**keys: Any) -> Tensor:
        return torch.cat([images for images, _ in load(**keys).val.batches(100)])

    # The same images; the numbers differ by the normalisation, which is the training part's own.
    assert torch.equal(val().argsort(0), val(flip=True, placement="stream").argsort(0))
    assert not torch.equal(val(), val(split_seed=1))


def test_a_smaller_training_part_is_a_prefix_of_a_larger() -> None:
    """Labels of the first of 100 images and of 200 images in the stored order agree."""
    small, large = load(train_samples=100), load(train_samples=200)
    assert torch.equal(small.train.labels_N, large.train.labels_N[:100])
    assert torch.equal(small.val.labels_N, large.val.labels_N)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"validation_fraction": 0.0}, "data.validation_fraction must be between 0 and 1, got 0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction must be between 0 and 1, got 1"),
        ({"validation_fraction": 0.001}, "data.validation_fraction must leave .*validation part, got 0.001.*none of"),
        ({"validation_fraction": 0.999}, "data.validation_fraction must leave .*training part, got 0.999.*none of"),
        ({"train_samples": 5}, "data.train_samples must leave .*10 classes.*training part, got 5"),
        ({"train_samples": 5000}, "data.train_samples must be between 1 and the 1294 .*got 5000"),
        ({"train_fraction": 0.001}, "data.train_fraction must leave .*got 0.001"),
        ({"train_fraction": 1.5}, "data.train_fraction must be above 0 and at most 1, got 1.5"),
    ],
)
def test_a_split_that_leaves_a_class_out_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**keys)
