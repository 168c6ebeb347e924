"""Whether a trial with an optimizer of a library's or a user's own can be trained, and resumed to the digit."""

from __future__ import annotations

import pickle
from dataclasses import replace

import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.checkpoint import Checkpoint, config_digest, storable_copy
from hpo.train.config import TrialConfig
from hpo.train.data.loading import SplitDataset
from hpo.train.engines.plain import PlainEngine, PlainLaneState, build_lane, restore
from hpo.train.imports import describe_error
from hpo.train.seeding import seed_generators

CPU = torch.device("cpu")
STEPS_BEFORE, STEPS_AFTER = 2, 2  # of a restart, as trained here
LARGEST_LR = 1e-2  # weights that are not finite would be the same whatever is lost


def check_optimizer_resumes(config: TrialConfig, *, data: SplitDataset, batch: tuple[Tensor, Tensor]) -> None:
    """Train a trial on a batch for some steps on the CPU, with a restart among them and without.

    Raises UserError where the optimizer fails, or a restart changes a digit: its state_dict() then lacks something.
    """
    setting = f"training.optimizer = {config.training.optimizer!r}"
    lr = min(config.training.lr or 1.0, LARGEST_LR)
    config = replace(config, training=replace(config.training, lr=lr, compile=False, precision="fp32"))
    engine = PlainEngine(device="cpu")

    def train(lane: PlainLaneState, *, first: int, num_steps: int) -> None:
        lane.begin_training()
        for step in range(first, first + num_steps):
            seed_generators(config.seed, "optimizer", step)
            engine.step(lane, *batch)
        lane.begin_evaluation()

    whole = build_lane(config, data=data, device=CPU)
    try:
        train(whole, first=0, num_steps=STEPS_BEFORE)
        state = {"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict(), "first_loss": 0.0}
        kept = storable_copy(state, setting=setting)
        train(whole, first=STEPS_BEFORE, num_steps=STEPS_AFTER)
        resumed = build_lane(config, data=data, device=CPU)
        restore(resumed, Checkpoint(config_digest=config_digest(config), epoch=0, state=kept, results=()))
        train(resumed, first=STEPS_BEFORE, num_steps=STEPS_AFTER)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever the optimizer raises
        network = f"model.name = {config.model.name!r}"
        raise UserError(f"{setting} cannot train {network}: {describe_error(error)}") from error
    lost = _other_attribute(whole.optimizer, resumed.optimizer)
    if not all(map(_same, whole.model.state_dict().values(), resumed.model.state_dict().values())) or lost:
        raise UserError(
            f"{setting} cannot be resumed: its state_dict() lacks {lost or 'something that its steps depend on'}, "
            "so an interrupted trial could end with other weights"
        )


def _other_attribute(whole: torch.optim.Optimizer, resumed: torch.optim.Optimizer) -> str | None:
    """Return the name of an attribute that a restart has changed, such as a generator, even if no weight shows it."""
    for name, value in vars(whole).items():
        if name not in ("state", "param_groups", "defaults") and not _same(value, vars(resumed).get(name)):
            try:
                if pickle.dumps(value) != pickle.dumps(vars(resumed).get(name)):
                    return name
            except Exception:  # of whatever cannot be pickled, such as a function: it is no state
                continue
    return None


def _same(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
