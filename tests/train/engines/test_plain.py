"""The plain engine: repeatable to the digit, honest about divergence, and blind to the test set unless asked."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpo.errors import UserError
from hpo.train.checkpoint import Checkpoint
from hpo.train.config import DataConfig, EpochResult, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import SplitDataset, load_data
from hpo.train.engines.divergence import SAME_OUTPUT, is_exploding, output_spread
from hpo.train.engines.plain import PlainEngine, build_lane
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.optim import OPTIMIZERS
from hpo.train.schedules import SCHEDULES
from tests.rows import slow_except

TINY = ModelConfig(options={"width": 0.05})
QUARTER = ModelConfig(options={"width": 0.25})
DIGITS = DataConfig(train_samples=260)
ALL_DIGITS = DataConfig()


def trial(
    *, model: ModelConfig = TINY, data: DataConfig = DIGITS, seed: int = 0, lr: float = 1e-3, **training: Any
) -> TrialConfig:
    return TrialConfig(
        model=model,
        data=data,
        training=TrainingConfig(**{"lr": lr, "epochs": 2, "batch_size": 64} | training),
        seed=seed,
    )


def train(config: TrialConfig, *, engine: Engine | None = None) -> list[EpochResult]:
    """Every epoch of a trial, or those until it diverges, without their wall time."""
    engine = engine or PlainEngine(device="cpu")
    lane = engine.admit(config)
    results = []
    for _ in range(config.training.epochs):
        [result] = engine.run_epoch()
        results.append(replace(result, seconds=0.0))
        if result.diverged:
            break
    engine.evict(lane)
    return results


# The contract


def test_lanes_are_taken_and_freed() -> None:
    engine: Engine = PlainEngine(device="cpu")
    assert engine.free_lanes == 1
    lane = engine.admit(trial())
    assert engine.free_lanes == 0
    [result] = engine.run_epoch()
    assert (result.lane, result.epoch, result.diverged) == (lane, 1, None)
    assert result.seconds > 0
    assert result.test_accuracy is None
    assert engine.run_epoch()[0].epoch == 2
    engine.evict(lane)
    assert engine.free_lanes == 1


def test_a_trial_that_cannot_be_admitted_leaves_its_lane_free() -> None:
    engine = PlainEngine(device="cpu")
    with pytest.raises(UserError, match=r"training.optimizer must be one of"):
        engine.admit(trial(optimizer="adm"))
    assert engine.free_lanes == 1
    assert len(train(trial(), engine=engine)) == 2


def test_stops_before_the_next_step() -> None:
    calls = iter([False, False, True])
    engine = PlainEngine(device="cpu", should_stop=lambda: next(calls))
    lane = engine.admit(trial())
    with pytest.raises(Stopped):
        engine.run_epoch()
    with pytest.raises(AssertionError, match=r"in the middle of an epoch"):
        engine.checkpoint(lane)
    engine.evict(lane)
    assert engine.free_lanes == 1


def test_a_checkpoint_is_a_copy_and_can_be_gone_on_from_more_than_once() -> None:
    """`tests/train/test_checkpoint.py` goes on from those of every optimizer and schedule, through files."""

    def tensors(checkpoint: Checkpoint) -> list[torch.Tensor]:
        moments = checkpoint.state["optimizer"]["state"].values()
        return [*checkpoint.state["model"].values(), *(value for one in moments for value in one.values())]

    def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return len(one) == len(other) and all(map(torch.equal, one, other))

    engine: Engine = PlainEngine(device="cpu")
    config = trial(epochs=3)
    lane = engine.admit(config)
    engine.run_epoch()
    checkpoint = engine.checkpoint(lane)
    as_made = copy.deepcopy(tensors(checkpoint))
    later = [replace(engine.run_epoch()[0], seconds=0.0) for _ in range(2)]
    assert not are_equal(tensors(engine.checkpoint(lane)), as_made)
    for _ in range(2):
        engine.evict(lane)
        lane = engine.admit(config, checkpoint)
        assert engine.free_lanes == 0
        assert are_equal(tensors(engine.checkpoint(lane)), as_made)
        assert [replace(engine.run_epoch()[0], seconds=0.0) for _ in range(2)] == later
        assert are_equal(tensors(checkpoint), as_made)
    assert [result.epoch for result in engine.checkpoint(lane).results] == [1, 2, 3]
    assert later == train(config)[1:]  # making a checkpoint changes no digit


def test_a_checkpoint_of_another_network_is_refused() -> None:
    engine: Engine = PlainEngine(device="cpu")
    lane = engine.admit(trial())
    checkpoint = engine.checkpoint(lane)
    engine.evict(lane)
    engine.admit(trial(model=ModelConfig(options={"width": 0.1})))
    other = replace(checkpoint, state=engine.checkpoint(lane).state)
    engine.evict(lane)
    with pytest.raises(UserError, match=r"model.name = 'article_cnn' must be the network that it was .* size mismatch"):
        engine.admit(trial(), other)
    assert engine.free_lanes == 1


OWN_STATE = """
from torch import nn

class Keeps(nn.Linear):
    def get_extra_state(self):
        return {"seen": [1, object()]}

def network():
    return nn.Sequential(nn.Flatten(), Keeps(1024, 10))
"""


def test_a_state_that_could_not_be_read_again_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "own_state.py").write_text(OWN_STATE)
    engine: Engine = PlainEngine(device="cpu")
    lane = engine.admit(trial(model=ModelConfig(name="own_state:network")))
    engine.run_epoch()
    with pytest.raises(UserError, match=r"'own_state:network'.*\['1._extra_state'\]\['seen'\]\[1\] must .* got object"):
        engine.checkpoint(lane)


def test_the_data_set_is_loaded_once_for_trials_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def counted(config: DataConfig, *, device: torch.device) -> SplitDataset:
        loads.append(config)
        return load_data(config, device=device)

    monkeypatch.setattr("hpo.train.data.loading.load_data", counted)
    engine = PlainEngine(device="cpu")
    for config in (trial(epochs=1), trial(epochs=1, lr=1e-2), trial(epochs=1, data=replace(DIGITS, flip=True))):
        train(config, engine=engine)
    assert len(loads) == 2


# Repeatable


def test_the_same_trial_gives_the_same_digits_whatever_ran_before() -> None:
    torch.set_num_threads(2)
    config = trial(data=replace(DIGITS, flip=True, crop=2), seed=5)
    engine = PlainEngine(device="cpu")
    first = train(config, engine=engine)
    train(trial(seed=9), engine=engine)
    torch.rand(17)
    assert train(config, engine=engine) == first == train(config)
    assert train(replace(config, seed=6)) != first


def test_a_data_set_that_draws_its_pictures_is_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "own_drawn.py").write_text(
        "import numpy, random\n"
        "def data():\n"
        "    pictures = numpy.random.randint(0, 256, (40, 1, 32, 32)).astype('uint8')\n"
        "    labels = random.sample([0, 1] * 20, 40)\n"
        "    return (pictures, numpy.array(labels)), None\n"
    )
    config = trial(data=DataConfig(name="own_drawn:data"))
    assert train(config) == train(config)


def test_placement_changes_no_digit() -> None:
    """Dropout included: reading the images draws nothing from torch's generator."""
    dropout = ModelConfig(name="torchvision:mobilenet_v3_small", options={"dropout": 0.5})
    data = replace(DIGITS, train_samples=64, flip=True)
    for config in (trial(data=data), trial(data=data, model=dropout, epochs=1)):
        streamed = replace(config, data=replace(data, placement="stream"))
        assert train(streamed) == train(replace(config, data=replace(data, placement="device")))


def test_results_mean_what_they_say() -> None:
    """Held to a loop over single steps by hand."""
    config = trial(epochs=1, label_smoothing=0.1, gradient_clip=0.5, momentum=0.9, optimizer="sgd", lr=0.1)
    [result] = train(config)
    data = load_data(config.data, device="cpu")
    model = build_lane(config, data=data, device=torch.device("cpu")).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, hits = 0.0, 0
    for images, labels in data.train.batches(64, seed=0, epoch=0):
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses, hits = losses + loss.item() * len(labels), hits + int((logits.argmax(1) == labels).sum())
    assert result.train_loss == pytest.approx(losses / 260, rel=1e-6)
    assert result.train_accuracy == hits / 260
    batches = list(data.val.batches(1000))
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    with torch.no_grad():
        logits = model(images)
    assert result.val_loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert result.val_accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert result.lr == 0.1


def test_a_network_of_batch_norms_trains_where_one_picture_is_left_over() -> None:
    model = ModelConfig(name="torchvision:resnet18")
    assert len(train(trial(model=model, data=replace(DIGITS, train_samples=65), epochs=1))) == 1


# Learning rates


def test_warmup_and_schedule_reach_the_optimizer() -> None:
    results = train(trial(epochs=3, lr=1e-2, warmup_epochs=1, schedule="cosine"))
    steps = math.ceil(260 / 64)
    cosine = [(1 + math.cos(math.pi * step / (2 * steps))) / 2 for step in range(2 * steps)]
    assert [result.lr for result in results] == pytest.approx([1e-2, 1e-2 * cosine[steps - 1], 1e-2 * cosine[-1]])


def test_plateau_follows_the_validation_loss() -> None:
    results = train(trial(epochs=4, lr=1e-9, schedule="plateau", plateau_epochs=0, gamma=0.5))
    assert [result.lr for result in results] == [1e-9, 1e-9, 0.5e-9, 0.25e-9]


@pytest.mark.parametrize("part", slow_except(range(3), 0))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_with_every_schedule(optimizer: str, part: int) -> None:
    """Each part has all optimizers and all schedules, in other pairs."""
    engine = PlainEngine(device="cpu")
    for schedule in [*SCHEDULES][(list(OPTIMIZERS).index(optimizer) + part) % 3 :: 3]:
        config = trial(
            data=replace(DIGITS, train_samples=60),
            optimizer=optimizer,
            schedule=schedule,
            batch_size=30,
            warmup_epochs=0.5,
            milestones=(1,),
        )
        results = train(config, engine=engine)
        assert len(results) == 2, schedule
        assert all(math.isfinite(result.train_loss + result.val_loss) for result in results), schedule


def test_learns_digits() -> None:
    last = train(trial(model=QUARTER, data=ALL_DIGITS, epochs=4, lr=1e-3, batch_size=32))[-1]
    assert last.diverged is None
    assert last.val_accuracy > 0.6


# Divergence


@pytest.mark.parametrize("lr", slow_except([1e2, 1e6, 1e30], 1e2))
def test_sgd_at_a_huge_rate_diverges_within_one_epoch(lr: float) -> None:
    results = train(trial(model=QUARTER, data=ALL_DIGITS, optimizer="sgd", lr=lr))
    assert len(results) == 1
    assert results[0].diverged


@pytest.mark.parametrize("lr", slow_except([0.1, 1.0], 0.1))
def test_adam_at_a_high_rate_collapses(lr: float) -> None:
    """The article's network does not overflow: every image ends with the same output."""
    result = train(trial(model=QUARTER, data=ALL_DIGITS, lr=lr, epochs=3))[-1]
    assert result.diverged == "collapsed: every input gets the same output"


SLOW_STARTS = [("adam", 1e-5), ("adam", 1e-6), ("sgd", 1e-6), ("adam", 1e-12)]


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_every_loss_tells_the_dead_from_the_slow(loss: str) -> None:
    for optimizer, lr, dies in (("adam", 0.3, True), ("sgd", 1e6, True), ("adam", 1e-6, False), ("sgd", 1e-6, False)):
        results = train(trial(optimizer=optimizer, lr=lr, loss=loss, class_weights="balanced"))
        assert (results[-1].diverged is not None) == dies, (optimizer, lr)


@pytest.mark.parametrize(
    ("model", "optimizer", "lr"),
    slow_except(
        [(model, *start) for model in (TINY, QUARTER) for start in SLOW_STARTS],
        *[(TINY, *start) for start in SLOW_STARTS],
        (QUARTER, *SLOW_STARTS[0]),
    ),
    ids=lambda given: given.options["width"] if isinstance(given, ModelConfig) else given,
)
def test_a_slow_start_is_not_called_diverged(model: ModelConfig, optimizer: str, lr: float) -> None:
    results = train(trial(model=model, data=ALL_DIGITS, optimizer=optimizer, lr=lr))
    assert [result.diverged for result in results] == [None, None]
    assert results[-1].val_loss == pytest.approx(math.log(10), abs=0.02)


def test_the_measured_spreads_stay_far_from_the_threshold() -> None:
    data = load_data(ALL_DIGITS, device="cpu")
    for seed in range(3):
        for model in (TINY, QUARTER):
            lane = build_lane(trial(model=model, seed=seed), data=data, device=torch.device("cpu"))
            assert output_spread(lane.model, data) > 50 * SAME_OUTPUT


OWN_MODELS = """
from torch import nn

def deep():
    layers = [nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()]
    for _ in range(25):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))

def large_weights():
    layer = nn.Linear(1024, 10)
    nn.init.normal_(layer.weight, std=3.0)
    return nn.Sequential(nn.Flatten(), layer)
"""


@pytest.mark.parametrize("name", ["deep", "large_weights"])
def test_a_bad_initialisation_is_not_called_diverged(name: str, tmp_path: Path) -> None:
    """Neither a network that could never tell images apart nor one whose loss starts above 10 ln(classes)."""
    (tmp_path / "own_badly_drawn.py").write_text(OWN_MODELS)
    model = ModelConfig(name=f"own_badly_drawn:{name}")
    for seed in range(3):
        results = train(trial(model=model, lr=1e-9, seed=seed))
        assert [result.diverged for result in results] == [None, None]
    assert (results[0].train_loss > 10 * math.log(10)) == (name == "large_weights")


def test_exploding_means_far_above_a_guess_and_above_the_trials_first_loss() -> None:
    steps = torch.arange(100.0)
    assert is_exploding(2 + steps, first_loss=2.3, guess_loss=2.3)
    assert is_exploding(torch.tensor([2.3, 2.3, 1e6, 1e9]), first_loss=2.3, guess_loss=2.3)
    assert is_exploding(torch.full((100,), 1000.0), first_loss=2.3, guess_loss=2.3)  # a plateau, in a later epoch
    assert not is_exploding(2 + steps, first_loss=2.3, guess_loss=13.9)  # less than ten times a guess
    assert not is_exploding(102 - steps, first_loss=2.3, guess_loss=2.3)  # fell back to near a guess
    assert not is_exploding(torch.full((100,), 50.0), first_loss=40.0, guess_loss=2.3)  # as high as it began


def test_a_network_that_tells_pictures_apart_has_not_diverged_however_high_its_loss() -> None:
    lane = build_lane(trial(), data=load_data(DIGITS, device="cpu"), device=torch.device("cpu"))
    lane.first_loss = 2.3
    high = torch.full((8,), 500.0)
    assert lane.why_diverged(high, val_loss=400.0, val_accuracy=0.8) is None
    assert lane.why_diverged(high, val_loss=400.0, val_accuracy=0.1) == "exploding loss"


def test_non_finite_losses_are_seen_wherever_they_are() -> None:
    data = load_data(DIGITS, device="cpu")
    lane = build_lane(trial(), data=data, device=torch.device("cpu"))
    fine = torch.full((4,), 2.3)
    assert lane.why_diverged(fine, val_loss=2.3, val_accuracy=0.5) is None
    assert lane.why_diverged(torch.tensor([2.3, math.nan, 2.3]), val_loss=2.3, val_accuracy=0.5) == "non-finite loss"
    assert lane.why_diverged(fine, val_loss=math.inf, val_accuracy=0.5) == "non-finite loss"


# The test set


def test_the_test_set_is_read_only_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "own_unreadable_test.py").write_text(
        "import numpy\n"
        "class Unreadable:\n"
        "    def __len__(self): raise AssertionError('the test part was read')\n"
        "    __getitem__ = __len__\n"
        "def data():\n"
        "    pictures = numpy.random.RandomState(0).randint(0, 256, (40, 1, 32, 32)).astype('uint8')\n"
        "    return (pictures, numpy.arange(40) % 2), Unreadable()\n"
        "def without_test():\n"
        "    return data()[0], None\n"
    )
    config = trial(data=DataConfig(name="own_unreadable_test:data"))
    assert len(train(config)) == 2
    asked = replace(config, training=replace(config.training, report_test_accuracy=True))
    with pytest.raises(UserError, match=r"cannot give its labels: AssertionError: the test part was read"):
        train(asked)
    with pytest.raises(UserError, match=r"training.report_test_accuracy needs a test set"):
        train(replace(asked, data=DataConfig(name="own_unreadable_test:without_test")))


def test_reporting_the_test_accuracy_changes_nothing_else() -> None:
    config = trial()
    asked = train(replace(config, training=replace(config.training, report_test_accuracy=True)))
    for result in asked:
        assert result.test_accuracy is not None
        assert 0 <= result.test_accuracy <= 1
    assert [replace(result, test_accuracy=None) for result in asked] == train(config)


def test_bf16_needs_a_device_that_has_it() -> None:
    with pytest.raises(UserError, match=r"training.precision = 'bf16' needs a GPU that computes in bf16.*cpu"):
        PlainEngine(device="cpu").admit(trial(precision="bf16"))


# Real images


def test_trains_on_mnist(mnist_root: Path) -> None:
    data = DataConfig(name="mnist", root=str(mnist_root), train_samples=2000, validation_fraction=0.01)
    results = train(trial(model=QUARTER, data=data, lr=2e-3))
    assert results[-1].val_accuracy > 0.5
    assert results[-1].diverged is None


@pytest.mark.slow
def test_cifar10_learns_and_collapses(cifar10_root: Path) -> None:
    """The article's finding on real images: Adam at 1e-3 learns, at 1e-1 every image gets the same output."""
    data = DataConfig(name="image_folder", root=str(cifar10_root), train_samples=1500, validation_fraction=0.01)
    engine = PlainEngine(device="cpu")
    learned = train(trial(model=QUARTER, data=data, lr=1e-3, epochs=4), engine=engine)[-1]
    assert learned.diverged is None
    assert learned.val_loss < 2.25
    dead = train(trial(model=QUARTER, data=data, lr=1e-1, epochs=4), engine=engine)[-1]
    assert dead.diverged == "collapsed: every input gets the same output"


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains_on_a_gpu(precision: Any) -> None:
    config = trial(model=QUARTER, data=replace(ALL_DIGITS, flip=True, crop=2), epochs=3, lr=3e-3, precision=precision)
    engine = PlainEngine(device="cuda")
    assert train(config, engine=engine)[-1].diverged is None
    high = replace(config, training=replace(config.training, lr=0.3))
    assert train(high, engine=engine)[-1].diverged


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_goes_on_on_a_gpu_from_a_checkpoint_of_either_device(optimizer: str) -> None:
    """To rounding: a GPU's kernels add in another order each time."""
    config = trial(model=QUARTER, optimizer=optimizer, epochs=3)
    gpu = PlainEngine(device="cuda")
    whole = train(config, engine=gpu)
    for before in (gpu, PlainEngine(device="cpu")):
        lane = before.admit(config)
        before.run_epoch()
        checkpoint = before.checkpoint(lane)
        before.evict(lane)
        lane = gpu.admit(config, checkpoint)
        for expected in whole[1:]:
            assert gpu.run_epoch()[0].train_loss == pytest.approx(expected.train_loss, rel=1e-2)
        moments = gpu.checkpoint(lane).state["optimizer"]["state"].values()
        assert {str(value.device) for one in moments for value in one.values() if value is not None} == {"cpu"}
        gpu.evict(lane)


ZERO_HEAD = """
from torch import nn
def zero_head(*, channels, num_classes):
    head = nn.Linear(channels * 32 * 32, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 1024), nn.ReLU(), head)
"""


@pytest.mark.parametrize(("lr", "dies"), [(1e-6, False), (1e-2, False), (1e3, True)])
def test_a_last_layer_that_starts_at_zero_is_judged_like_any_other(lr: float, dies: bool, tmp_path: Path) -> None:
    """As drawn it gives every image the same output, exactly; one step later it does so only if it is dead."""
    (tmp_path / "own_zero_head.py").write_text(ZERO_HEAD)
    results = train(trial(model=ModelConfig(name="own_zero_head:zero_head"), optimizer="sgd", lr=lr))
    assert (results[-1].diverged is not None) == dies
