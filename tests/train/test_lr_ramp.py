"""The range test: what it reads from ramps made up and real, what it costs, and that it outlives losses not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.lr_range.resolve import Ramp
from hpo.lr_range.text import range_test_report
from hpo.train import lr_ramp as module
from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.lr_ramp import RangeTest, plan_ramp, read_ramp
from tests.rows import slow_except

LRS = [1e-5 * 10 ** (step / 50) for step in range(201)]  # to 1e-1
DIGITS = DataConfig(name="digits", validation_fraction=0.2, train_samples=300)
BEST = {"sgd": (0.025, 0.063), "adam": (6.3e-4, 1e-3), "rmsprop": (6.3e-4, 1e-3)}  # on all digits, by a dense grid
MNIST_BEST = 1e-3  # Adam, 2,000 images: the best of scripts/curves.json


def make_config(
    optimizer: str = "adam", *, seed: int = 0, data: DataConfig = DIGITS, width: float = 0.05
) -> TrialConfig:
    momentum = 0.9 if optimizer == "sgd" else 0.0
    training = TrainingConfig(optimizer=optimizer, momentum=momentum, batch_size=32)
    return TrialConfig(model=ModelConfig(options={"width": width}), data=data, training=training, seed=seed)


DATASET_CACHE = DatasetCache(device=torch.device("cpu"))


def range_test(config: TrialConfig, **settings: Any) -> RangeTest:
    return module.run_range_test(config, device="cpu", dataset_cache=DATASET_CACHE, **settings)


def made(*knots: tuple[float, float]) -> list[float]:
    """Losses at LRS, by straight lines over log lr between (lr, loss)."""
    losses = []
    for lr in LRS:
        below = max((knot for knot in knots if knot[0] <= lr), default=knots[0])
        above = min((knot for knot in knots if knot[0] > lr), default=knots[-1])
        share = math.log(lr / below[0]) / math.log(above[0] / below[0]) if above[0] > below[0] else 0.0
        losses.append(below[1] + share * (above[1] - below[1]))
    return losses


def steps(leaps_at: float = 1.0) -> list[float]:
    return [module.LEAP_CHANGE * lr / leaps_at for lr in LRS]


def near(lr: float) -> object:
    return pytest.approx(lr, rel=0.35)  # half of a window to either side


def test_a_ramp_that_falls_and_breaks_is_read_as_it_was_made() -> None:
    found = read_ramp(LRS, made((1e-5, 2.3), (1e-4, 2.3), (3e-3, 0.3), (1e-2, 0.3), (1.1e-2, 8.0)), steps())
    assert found.falls == near(1.22e-4)
    assert 1e-3 < (found.lowest or 0) < 1e-2
    assert found.breaks == near(1e-2)
    assert found.leaps is None
    assert found.breaks is not None
    assert found.falls is not None
    lowest = min(found.breaks / module.DIVERGENCE_OVER_LOW, found.falls / module.FALL_OVER_LOW)
    assert found.low == pytest.approx(lowest)
    assert found.high == pytest.approx(found.breaks * module.HIGH_OVER_DIVERGENCE)


def test_a_loss_that_never_falls_breaks_where_it_rises() -> None:
    found = read_ramp(LRS, made((1e-5, 2.3), (1e-2, 2.3), (2e-2, 2.5)), steps())
    assert found.falls is None
    assert found.lowest is None
    assert found.breaks == near(1.4e-2)


def test_a_network_that_dies_in_silence_is_given_away_by_its_leaps() -> None:
    found = read_ramp(LRS, made((1e-5, 2.3), (1e-1, 2.3)), steps(leaps_at=2e-3))
    assert found.breaks is None
    assert found.leaps == near(2e-3)
    assert found.high == pytest.approx(found.leaps * module.HIGH_OVER_DIVERGENCE)  # type: ignore[operator]


def test_steps_that_no_longer_grow_give_away_a_network_that_died_of_shorter_ones() -> None:
    changes = [module.LEAP_CHANGE / 2 * min(lr / 2e-3, 2e-3 / lr) for lr in LRS]
    found = read_ramp(LRS, made((1e-5, 2.3), (1e-1, 2.3)), changes)
    assert (found.breaks, found.leaps) == (None, None)
    assert found.edge == near(2e-3)


def test_a_ramp_on_which_nothing_breaks_is_searched_to_its_end_and_beyond() -> None:
    found = read_ramp(LRS, made((1e-5, 2.3), (1e-1, 1.0)), steps())
    assert found.breaks is None
    assert (found.high or 0) >= 1e-1


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_break(broken: float) -> None:
    losses = [*made((1e-5, 2.3), (1e-4, 2.3), (1e-2, 0.5))[:151], broken]
    found = read_ramp(LRS[:152], losses, steps()[:152], num_steps=201)
    assert found.breaks == near(LRS[150])
    assert found.losses[-1] == math.inf
    assert all(math.isfinite(loss) for loss in found.losses[:-1])
    assert found.high is not None


@pytest.mark.parametrize("losses", [[math.nan], [2.3, math.nan], [2.3] * 5 + [math.inf]])
def test_a_loss_that_is_not_finite_from_the_start_leaves_no_range(losses: list[float]) -> None:
    found = read_ramp(LRS[: len(losses)], losses, steps()[: len(losses)], num_steps=201)
    assert (found.low, found.high, found.falls) == (None, None, None)
    assert len(found.losses) == len(losses)


def test_the_range_reaches_above_the_rate_at_which_the_loss_was_seen_to_fall() -> None:
    """Steps may be large for the weights, as with a low-rank adapter, long before anything is learnt."""
    found = read_ramp(LRS, made((1e-5, 2.3), (1e-2, 2.3), (5e-2, 0.3), (1e-1, 0.3)), steps(leaps_at=1e-4))
    assert found.falls is not None
    assert found.high is not None
    assert found.high >= 1.4 * found.falls > 6 * 1e-4


def test_a_scale_of_the_loss_does_not_matter() -> None:
    losses = made((1e-5, 2.3), (1e-4, 2.3), (3e-3, 0.3), (1e-2, 0.3), (1.1e-2, 8.0))
    one, other = read_ramp(LRS, losses, steps()), read_ramp(LRS, [7 * loss for loss in losses], steps())
    assert replace(one, losses=[]) == replace(other, losses=[])


@pytest.mark.parametrize(
    ("num_images", "batch_size"), [(45_000, 128), (2_000, 32), (2_000, 2), (1_437, 64), (300, 500)]
)
def test_a_ramp_takes_less_than_an_epoch(num_images: int, batch_size: int) -> None:
    num_steps, of_ramp = plan_ramp(num_images, batch_size=batch_size)
    assert num_steps * of_ramp <= module.MAX_EPOCH_FRACTION * num_images
    assert of_ramp <= batch_size
    assert num_steps <= module.MAX_STEPS


def test_where_an_epoch_has_steps_enough_the_ramp_has_the_study_s_batches() -> None:
    assert plan_ramp(45_000, batch_size=128) == (250, 128)
    assert plan_ramp(2_000, batch_size=32) == (250, 7)


def test_it_is_the_same_again_and_another_seed_s_is_another() -> None:
    one, same, other = (range_test(make_config(seed=seed)) for seed in (3, 3, 4))
    assert replace(one, seconds=0) == replace(same, seconds=0)
    assert one.losses != other.losses


def test_it_depends_neither_on_the_learning_rate_of_the_trial_nor_on_its_schedule() -> None:
    config = make_config()
    other = replace(config, training=replace(config.training, lr=0.5, schedule="cosine", epochs=3, warmup_epochs=1.0))
    one, two = (range_test(each) for each in (config, other))
    assert replace(one, seconds=0) == replace(two, seconds=0)


def test_progress_is_told_after_each_step() -> None:
    told: list[tuple[int, int]] = []
    found = range_test(make_config(), progress=lambda done, of: told.append((done, of)))
    assert [done for done, _ in told] == list(range(1, len(found.lrs) + 1))
    assert {of for _, of in told} == {plan_ramp(300, batch_size=32)[0]}


class Broken(nn.Module):
    """Gives losses that are not finite, from one of its steps on."""

    def __init__(self, *, channels: int, num_classes: int, after: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * 32 * 32, num_classes)
        self.after, self.calls = after, 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.calls += 1
        logits_BL: Tensor = self.linear(images_BCHW.flatten(1))
        return logits_BL * (math.nan if self.calls > self.after else 1.0)


@pytest.mark.parametrize("after", [0, 1, 60])
def test_it_outlives_a_network_that_gives_nan(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpo.train import models

    monkeypatch.setitem(models.MODELS, "broken", Broken)
    config = replace(make_config(), model=ModelConfig(name="broken", options={"after": after}))
    found = range_test(config)
    assert len(found.lrs) == after + 1, "the ramp ends there"
    assert found.epochs <= 1
    assert (found.low is None) == (after < 60)


def probe(*, channels: int, num_classes: int, scale: float) -> nn.Module:
    """Return a frozen body and a head that starts at zero, or near it, as in linear probing and fine-tuning."""
    body = nn.Sequential(nn.Conv2d(channels, 32, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    head = nn.Linear(512, num_classes)
    nn.init.zeros_(head.bias)
    nn.init.normal_(head.weight, std=scale)
    return nn.Sequential(body.requires_grad_(False), head)


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_weights_that_start_at_zero_are_no_measure_of_a_step(
    optimizer: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, over all digits: the best rate of Adam is 6.5e-3."""
    from hpo.train import models

    monkeypatch.setitem(models.MODELS, "probe", probe)
    config = replace(make_config(optimizer), model=ModelConfig(name="probe", options={"scale": scale}))
    found = range_test(config)
    assert found.from_zero
    assert found.leaps is None
    assert found.low is not None
    assert found.high is not None
    assert found.falls is not None
    assert found.low < found.falls < found.high
    if optimizer == "adam":
        assert found.low <= 3e-3
        assert found.high >= 1e-2


def test_weights_of_the_usual_size_are_a_measure_of_a_step() -> None:
    assert not range_test(make_config()).from_zero


def test_of_a_last_layer_on_a_frozen_body_the_loss_alone_counts() -> None:
    frozen = replace(make_config().training, freeze=("body",))
    found = range_test(replace(make_config(), training=frozen))
    assert found.is_linear
    assert found.leaps is None
    assert found.edge is not None
    assert found.high == pytest.approx(min(found.edge * module.LINEAR_HIGH_OVER_DIVERGENCE, module.MAX_LR))
    assert "only the last layer is trained" in "\n".join(range_test_report(Ramp({}, found).as_dict()))
    some = range_test(replace(make_config(), training=replace(frozen, freeze=("0", "2"))))
    assert not some.is_linear
    assert some.lrs != found.lrs


def test_what_is_frozen_for_some_epochs_is_trained_in_the_ramp() -> None:
    for_a_while = replace(make_config().training, freeze=("body",), freeze_epochs=1)
    found, whole = range_test(replace(make_config(), training=for_a_while)), range_test(make_config())
    assert replace(found, seconds=0.0) == replace(whole, seconds=0.0)


def test_multipliers_of_groups_hold_in_the_ramp() -> None:
    halved = replace(make_config("sgd").training, groups={"head": {"lr": 0.5}, "body": {"lr": 0.5}})
    found, whole = range_test(replace(make_config("sgd"), training=halved)), range_test(make_config("sgd"))
    assert found.lrs[0] == pytest.approx(2 * whole.lrs[0], rel=1e-3)


def test_a_rate_at_which_weights_explode_ends_the_ramp() -> None:
    config = replace(make_config("sgd"), training=replace(make_config("sgd").training, momentum=0.99))
    found = range_test(config)
    assert found.breaks is not None
    assert len(found.lrs) < plan_ramp(300, batch_size=32)[0]


@pytest.mark.parametrize("optimizer", slow_except(BEST, "adam"))
def test_it_brackets_the_best_of_a_dense_grid_on_digits(optimizer: str) -> None:
    found = range_test(make_config(optimizer, data=replace(DIGITS, train_samples=None), width=0.25))
    check(found, *BEST[optimizer])


@pytest.mark.slow
def test_it_brackets_the_best_of_a_dense_grid_on_mnist(mnist_root: Path) -> None:
    data = DataConfig(name="mnist", root=str(mnist_root), train_samples=2000, validation_fraction=0.02)
    check(range_test(make_config(data=data, width=0.25)), MNIST_BEST, MNIST_BEST)


def check(found: RangeTest, low: float, high: float) -> None:
    assert found.low is not None
    assert found.high is not None
    assert found.low < low <= high < found.high
    assert found.high / found.low < 10**2.5, "a usual range has four decades"
    assert found.epochs < 1


def test_a_network_of_batch_norm_is_tested_too() -> None:
    config = replace(make_config(), model=ModelConfig(name="torchvision:mobilenet_v3_small"))
    found = range_test(replace(config, data=replace(DIGITS, train_samples=100)))
    assert found.high is not None
    assert torch.isfinite(torch.tensor(found.losses[:5])).all()
