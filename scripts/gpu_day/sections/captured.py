"""Captured lanes against the plain engine, for several networks and every optimizer; and sixteen lanes of one seed."""

from __future__ import annotations

from hpo.train.config import EpochResult, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.captured_optimizers import NotCapturable
from hpo.train.optim import OPTIMIZERS
from scripts.gpu_day.common import (
    Section,
    deterministic_convolutions,
    device,
    difference,
    plain_engine,
    small_trial,
    train,
    with_training,
)

EPOCHS = 3


def run(section: Section) -> None:
    one_seed(section)
    trials = {f"same.dropout.{name}": small_trial(section, model="dropout", optimizer=name) for name in OPTIMIZERS}
    trials |= {f"same.{model}.adam": small_trial(section, model=model) for model in ("two_convolutions", "batch_norm")}
    # Of these, rounding alone makes something else, as `plain_from_itself` says.
    trials |= {f"deep.{model}.adam": small_trial(section, model=model) for model in ("article_cnn", "residual")}
    trials["bf16.dropout.adam"] = small_trial(section, model="dropout", precision="auto")
    cache = DatasetCache(device=device())
    for key, config in trials.items():
        with section.trying(key):
            compare(section, key, config, cache=cache)


def compare(section: Section, key: str, config: TrialConfig, *, cache: DatasetCache) -> None:
    """Say how far a lane that trained another trial before is from the plain engine, and that one from itself."""
    lanes = CapturedLanes(device=device(), dataset_cache=cache)
    try:
        train(lanes, with_training(config, seed=99), epochs=1)
    except NotCapturable as error:
        section.say(key, {"not_captured": str(error)})
        return
    plain = train(plain_engine(dataset_cache=cache), config, epochs=EPOCHS)
    again = train(plain_engine(dataset_cache=cache), config, epochs=EPOCHS)
    captured = train(lanes, config, epochs=EPOCHS)
    itself = {f"{name}_plain_from_itself": number for name, number in difference(config, plain, again).items()}
    last = {"last_train_loss": [trained.results[-1].train_loss for trained in (plain, captured)]}
    section.say(key, difference(config, plain, captured) | itself | last)


def one_seed(section: Section) -> None:
    """Say how many results lanes of one seed have that train at a time: more than one where they race."""
    cache = DatasetCache(device=device())
    for model in ("article_cnn", "dropout"):
        config = small_trial(section, model=model, num_images=4000, epochs=2, precision="auto")
        key = f"one_seed.{model}"
        with section.trying(key), deterministic_convolutions():
            alone = losses_of_lanes(config, 1, cache=cache)
            among = losses_of_lanes(config, section.pick(16, 2), cache=cache)
            section.say(key, {"num_results": len({*alone, *among}), "alone": alone, "among": sorted({*among})})


def losses_of_lanes(config: TrialConfig, count: int, *, cache: DatasetCache) -> list[tuple[float, float]]:
    """Return the losses of the last epoch of so many lanes with one trial."""
    lanes = CapturedLanes(device=device(), dataset_cache=cache)
    results: list[EpochResult] = []
    for _ in range(count):
        lanes.admit(config)
    for _ in range(config.training.epochs):
        results = lanes.run_epoch()
    return [(result.train_loss, result.val_loss) for result in results]
