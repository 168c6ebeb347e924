"""Losses are torch's own where torch has them, and one of a user's own is refused in a sentence where it is none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from hpo.errors import UserError
from hpo.train.config import DataConfig, TrainingConfig
from hpo.train.data.loading import SplitDataset, load_data
from hpo.train.losses import LOSSES, build_loss, check_own_loss

LOGITS_BL = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)) * 3
LABELS_B = torch.tensor([0, 1, 2, 3, 9, 9])
ONE_HOT_BL = functional.one_hot(LABELS_B, 10).float()


@pytest.fixture(scope="module")
def data() -> SplitDataset:
    return load_data(DataConfig(train_samples=100), device="cpu")


def test_the_cross_entropy_is_torchs_to_the_digit(data: SplitDataset) -> None:
    loss = build_loss(TrainingConfig(label_smoothing=0.1), data=data)
    assert torch.equal(
        loss.mean(LOGITS_BL, LABELS_B), functional.cross_entropy(LOGITS_BL, LABELS_B, label_smoothing=0.1)
    )
    assert torch.equal(loss.sum(LOGITS_BL, LABELS_B), functional.cross_entropy(LOGITS_BL, LABELS_B, reduction="sum"))


def test_bce_asks_of_each_class_alone(data: SplitDataset) -> None:
    loss = build_loss(TrainingConfig(loss="bce", label_smoothing=0.1), data=data)
    smooth_BL = ONE_HOT_BL * 0.9 + 0.01
    expected = functional.binary_cross_entropy_with_logits(LOGITS_BL, smooth_BL)
    assert float(loss.mean(LOGITS_BL, LABELS_B)) == pytest.approx(float(expected))
    whole = functional.binary_cross_entropy_with_logits(LOGITS_BL, ONE_HOT_BL)
    assert float(loss.sum(LOGITS_BL, LABELS_B)) == pytest.approx(6 * float(whole))


def test_bce_asks_of_each_label_alone_and_other_losses_take_no_several(data: SplitDataset) -> None:
    several_BL = (LOGITS_BL.roll(1, 0) > 0).float()
    labels_NL = functional.one_hot(data.train.labels_N, 10).float()
    several = replace(data, train=replace(data.train, labels_N=labels_NL), val=replace(data.val, labels_N=labels_NL))
    loss = build_loss(TrainingConfig(loss="bce", label_smoothing=0.1), data=several)
    expected = functional.binary_cross_entropy_with_logits(LOGITS_BL, several_BL * 0.9 + 0.05)
    assert float(loss.mean(LOGITS_BL, several_BL)) == pytest.approx(float(expected))
    assert loss.guess(several) == pytest.approx(math.log(2))
    assert loss.best_constant(several) == pytest.approx(0.325, abs=0.001)  # the entropy of a tenth
    for name in LOSSES.keys() - {"bce"}:
        with pytest.raises(UserError, match=f"training.loss must be 'bce', or a function of your .* got '{name}'"):
            build_loss(TrainingConfig(loss=name), data=several)


@pytest.mark.parametrize("weights", ["balanced", [3.0, *[1.0] * 8, 0.0]])
def test_class_weights_of_several_labels_are_those_of_the_labels_1(weights: Any, data: SplitDataset) -> None:
    labels_NL = functional.one_hot(data.train.labels_N, 10).float()
    several = replace(data, train=replace(data.train, labels_N=labels_NL), val=replace(data.val, labels_N=labels_NL))
    loss = build_loss(TrainingConfig(loss="bce", class_weights=weights), data=several)
    assert loss.label_weights_2L is not None
    zero_L, one_L = loss.label_weights_2L
    assert float(torch.where(labels_NL > 0, one_L, zero_L).mean()) == pytest.approx(1)
    if weights == "balanced":
        ones_L = labels_NL.sum(0)
        assert (one_L * ones_L).tolist() == pytest.approx((zero_L * (len(labels_NL) - ones_L)).tolist())
        assert loss.best_constant(several) == pytest.approx(math.log(2))
    else:
        assert (one_L / zero_L).tolist() == pytest.approx(weights)
        answers = [loss.best_constant(several), loss.guess(several)]
        assert answers == sorted(answers)

    several_BL = (LOGITS_BL.roll(1, 0) > 0).float()
    weights_BL = torch.where(several_BL > 0, one_L, zero_L)
    expected = functional.binary_cross_entropy_with_logits(LOGITS_BL, several_BL, weights_BL)
    assert float(loss.mean(LOGITS_BL, several_BL)) == pytest.approx(float(expected))
    assert float(loss.sum(LOGITS_BL, several_BL)) == pytest.approx(6 * float(expected))
    with pytest.raises(UserError, match="must have one number for each of the 10 classes, got 2"):
        build_loss(TrainingConfig(loss="bce", class_weights=[1.0, 2.0]), data=several)


def test_the_focal_loss_counts_sure_images_less(data: SplitDataset) -> None:
    shares_B = LOGITS_BL.softmax(1)[range(6), LABELS_B]
    expected = float(((1 - shares_B) ** 3 * -shares_B.log()).mean())
    loss = build_loss(TrainingConfig(loss="focal", focal_gamma=3.0), data=data)
    assert float(loss.mean(LOGITS_BL, LABELS_B)) == pytest.approx(expected)
    sure_BL = (ONE_HOT_BL * 200).requires_grad_()
    for gamma in (0.0, 0.5, 2.0):
        mean = build_loss(TrainingConfig(loss="focal", focal_gamma=gamma), data=data).mean(sure_BL, LABELS_B)
        torch.autograd.backward(mean)
        assert sure_BL.grad is not None
        assert sure_BL.grad.isfinite().all(), gamma


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", ["balanced", [3.0, *[1.0] * 8, 0.0]])
def test_class_weights_have_a_mean_of_one_over_the_training_images(name: str, weights: Any, data: SplitDataset) -> None:
    plain = build_loss(TrainingConfig(loss=name), data=data)
    loss = build_loss(TrainingConfig(loss=name, class_weights=weights), data=data)
    assert loss.weights_L is not None
    assert float(loss.weights_L[data.train.labels_N].mean()) == pytest.approx(1)
    if weights == "balanced":
        totals = [float(loss.weights_L[label]) * int((data.train.labels_N == label).sum()) for label in range(10)]
        assert totals == pytest.approx([10.0] * 10)
    alone = [float(plain.sum(LOGITS_BL[i : i + 1], LABELS_B[i : i + 1])) for i in range(6)]
    expected = sum(weight * one for weight, one in zip(loss.weights_L[LABELS_B].tolist(), alone, strict=True))
    assert float(loss.sum(LOGITS_BL, LABELS_B)) == pytest.approx(expected)
    assert float(loss.mean(LOGITS_BL, LABELS_B)) == pytest.approx(expected / 6)


@pytest.mark.parametrize(
    ("name", "guess"), [("cross_entropy", math.log(10)), ("bce", math.log(2)), ("focal", 0.81 * math.log(10))]
)
def test_a_guess_is_worth_what_each_loss_makes_of_it(name: str, guess: float, data: SplitDataset) -> None:
    assert build_loss(TrainingConfig(loss=name), data=data).guess(data) == pytest.approx(guess)


OWN_LOSSES = """
import torch
from torch.nn import functional as F

def poly(outputs, labels):
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return losses + 1 - torch.exp(-losses)

def mean(outputs, labels):
    return F.cross_entropy(outputs, labels)

def text(outputs, labels):
    return "small"

def fixed(outputs, labels):
    return torch.ones(len(labels))

def among_others(outputs, labels):
    return F.cross_entropy(outputs - outputs.mean(0), labels, reduction="none")

def infinite(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none") / 0

def raises(outputs, labels):
    raise KeyError(labels.shape)
"""
REFUSED = {
    "mean": "must return a tensor with the loss of each image, of shape (8,); got ()",
    "text": "must return a tensor with the loss of each image, of shape (8,); got str",
    "fixed": "must be computed from the outputs by torch, so that they have a gradient",
    "among_others": "must give an image the same loss in every batch; alone it is",
    "infinite": "must be finite, with a finite gradient",
    "raises": "failed: KeyError",
    "missing": "'missing'",
}


def test_a_loss_of_ones_own(data: SplitDataset, own_code: Path) -> None:
    (own_code / "own_losses.py").write_text(OWN_LOSSES)
    training = TrainingConfig(loss="own_losses:poly")
    check_own_loss(training, data=data)
    losses_B = functional.cross_entropy(LOGITS_BL, LABELS_B, reduction="none")
    expected = float((losses_B + 1 - torch.exp(-losses_B)).mean())
    assert float(build_loss(training, data=data).mean(LOGITS_BL, LABELS_B)) == pytest.approx(expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_loss_is_refused(name: str, data: SplitDataset, own_code: Path) -> None:
    (own_code / "own_losses.py").write_text(OWN_LOSSES)
    with pytest.raises(UserError) as caught:
        check_own_loss(TrainingConfig(loss=f"own_losses:{name}"), data=data)
    assert REFUSED[name] in str(caught.value)
    assert "training.loss" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"class_weights": [1.0, 2.0]},
            "training.class_weights must have one number for each of the 10 cl",
        ),
        ({"class_weights": [0.0] * 10}, "training.class_weights must be greater than 0 for a class that is trained on"),
        ({"loss": "focl"}, "training.loss must be one of .*got 'focl' .did you mean 'focal'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str, data: SplitDataset) -> None:
    with pytest.raises(UserError, match=message):
        build_loss(TrainingConfig(**settings), data=data)
