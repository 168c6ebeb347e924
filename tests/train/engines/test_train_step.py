"""A step in parts is the step of the larger batch, and fp16 with scaled gradients trains, resumes and is judged.

fp16 is tested with the CPU's own autocast and scaler, which a study does not use there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.errors import UserError
from hpo.train.config import ModelConfig, TrainingConfig
from hpo.train.engines import plain
from hpo.train.engines.lane_state import mixed_precision
from hpo.train.engines.plain import PlainEngine
from hpo.train.losses import LOSSES, Loss
from hpo.train.lr_ramp import run_range_test
from tests.train.engines.trials import BATCH_NORM, EPS, assert_close, assert_equal, train, trial

RECIPES = [
    {"optimizer": "adam", "eps": EPS, "gradient_clip": 0.5, "schedule": "one_cycle", "ema": 0.9},
    {"optimizer": "sgd", "momentum": 0.9, "class_weights": "balanced", "mixup": 0.4},
]

# Gradient accumulation


@pytest.mark.parametrize("recipe", RECIPES, ids=["adam", "mixup"])
def test_accumulated_gradients_are_those_of_the_larger_batch(recipe: dict[str, Any]) -> None:
    """Steps, schedule, average and mixed pairs are those of steps of 48 images, the last of which has six."""
    whole = train(PlainEngine(device="cpu"), trial(batch_size=48, **recipe))
    parts = train(PlainEngine(device="cpu"), trial(batch_size=16, gradient_accumulation=3, **recipe))
    assert_close(parts, whole)


def test_a_step_has_a_number_of_batches_and_a_single_image_joins_the_batch_before_it() -> None:
    engine, seen = PlainEngine(device="cpu"), list[int]()
    engine.admit(trial(batch_size=8, gradient_accumulation=3, data={"train_samples": 41}))
    assert engine._lane is not None
    engine._lane.model.register_forward_pre_hook(
        lambda model, images: seen.append(len(images[0])) if model.training else None
    )
    steps = list[object]()
    engine._lane.optimizer.register_step_post_hook(lambda *_: steps.append(len(seen)))
    engine.run_epoch()
    assert seen == [8, 8, 8, 8, 9]
    assert steps == [3, 5]


# Precision


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "expected"),
    [
        ("auto", "cpu", False, None),
        ("auto", "mps", False, None),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("fp16", "cuda", True, torch.float16),
        ("fp32", "cuda", False, None),
        ("bf16", "cuda", False, "'bf16' needs a GPU that computes in bf16, got the device cuda"),
        ("fp16", "cpu", False, "'fp16' needs a GPU that computes in fp16, got the device cpu"),
    ],
)
def test_the_precision_follows_from_the_setting_and_the_device(
    precision: Any, device: str, has_bf16: bool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has_bf16)
    training = TrainingConfig(precision=precision)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            mixed_precision(training, device=torch.device(device))
    else:
        assert mixed_precision(training, device=torch.device(device)) == expected


# fp16


def large(logits_BL: Tensor, labels_B: Tensor, training: TrainingConfig, reduction: str) -> Tensor:
    """Return a loss whose gradients, scaled as much as at first, are beyond float16."""
    return 1e3 * nn.functional.cross_entropy(logits_BL, labels_B, reduction=reduction)


def lost(logits_BL: Tensor, labels_B: Tensor, training: TrainingConfig, reduction: str) -> Tensor:
    """Return a finite loss whose gradient is never finite."""
    nothing = (logits_BL - logits_BL.detach()).sum().sqrt()
    return nothing + nn.functional.cross_entropy(logits_BL, labels_B, reduction=reduction)


@pytest.fixture
def in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the plain engine train in fp16 here."""
    monkeypatch.setattr(plain, "mixed_precision", lambda training, *, device: torch.float16)
    for compute in (large, lost):
        monkeypatch.setitem(LOSSES, compute.__name__, Loss(compute=compute, keys=frozenset()))


@pytest.mark.usefixtures("in_fp16")
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation": 3, "batch_size": 16}], ids=["batch", "parts"])
def test_a_trial_in_fp16_trains_as_in_fp32_and_is_resumed_with_its_scale(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trial(model=BATCH_NORM, gradient_clip=1.0, lr=1e-3, **more)
    engine = PlainEngine(device="cpu")
    lane = engine.admit(config)
    assert engine._lane is not None
    assert engine._lane.scaler is not None
    engine._lane.scaler.load_state_dict(engine._lane.scaler.state_dict() | {"scale": 2.0**30})  # skips some steps
    engine.run_epoch()
    before = engine.checkpoint(lane)
    assert 1 < before.state["scaler"]["scale"] < 2.0**30
    engine.run_epoch()
    whole = engine.checkpoint(lane)
    resumed = PlainEngine(device="cpu")
    resumed.admit(config, before)
    resumed.run_epoch()
    assert_equal(resumed.checkpoint(0), whole)
    assert resumed.checkpoint(0).state["scaler"] == whole.state["scaler"]
    usual = train(PlainEngine(device="cpu"), config)
    monkeypatch.undo()
    in_fp32 = train(PlainEngine(device="cpu"), config)
    assert "scaler" not in in_fp32.state
    for result, expected in zip(usual.results, in_fp32.results, strict=True):
        assert result.train_loss == pytest.approx(expected.train_loss, rel=5e-3)
        assert result.val_loss == pytest.approx(expected.val_loss, rel=5e-3)


ZERO_HEAD = """
from torch import nn

def network(*, channels, num_classes):
    head = nn.Linear(64, num_classes)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64 * channels, 64), nn.ReLU(), head)
"""


@pytest.mark.usefixtures("in_fp16")
def test_the_first_infinite_gradients_are_no_divergence(own_code: Path) -> None:
    """In the first epoch each step is skipped, and a head of zeros gives every image the same outputs."""
    (own_code / "own_zero_head.py").write_text(ZERO_HEAD)
    engine = PlainEngine(device="cpu")
    engine.admit(trial(model=ModelConfig(name="own_zero_head:network"), loss="large", lr=1e-3, epochs=4))
    assert engine._lane is not None
    assert engine._lane.scaler is not None
    head, has_moved = engine._lane.model[-1].weight, list[bool]()  # type: ignore[index]
    for _ in range(4):
        [result] = engine.run_epoch()
        assert result.diverged is None
        has_moved.append(bool(head.any()))
    assert (has_moved[0], has_moved[-1]) == (False, True)
    assert result.val_accuracy > 0.2


@pytest.mark.usefixtures("in_fp16")
def test_gradients_that_are_never_finite_are_a_divergence() -> None:
    engine = PlainEngine(device="cpu")
    engine.admit(trial(loss="lost", batch_size=4, epochs=9))
    [result] = engine.run_epoch()
    assert result.diverged == "non-finite gradients"


@pytest.mark.usefixtures("in_fp16")
def test_a_range_test_in_fp16_waits_for_a_step_that_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    config = trial(loss="large", optimizer="adam", data={"train_samples": 80})
    in_fp16 = run_range_test(config, device="cpu")
    monkeypatch.setattr(plain, "mixed_precision", mixed_precision)
    in_fp32 = run_range_test(config, device="cpu")
    assert in_fp16.lrs[0] == pytest.approx(in_fp32.lrs[0], rel=0.1)
    assert in_fp16.losses[0] == pytest.approx(in_fp32.losses[0], rel=1e-2)


def test_a_range_test_of_accumulated_steps_is_that_of_the_larger_batch() -> None:
    whole, parts = (
        run_range_test(trial(optimizer="sgd", batch_size=4 // number, gradient_accumulation=number), device="cpu")
        for number in (1, 2)
    )
    assert parts.batch_size == whole.batch_size == 4
    assert parts.lrs == pytest.approx(whole.lrs, rel=1e-3)
    assert parts.edge == pytest.approx(whole.edge, rel=0.05)
