"""Optimizers as a table: the name of each, and the keys of [training] that it understands.

torch is imported only to build an optimizer, because reading a study file needs the table without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError, unknown_name
from hpo.train.config import TrainingConfig
from hpo.train.engines import stacked_optimizers as updates
from hpo.train.engines.stacked_optimizers import Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An entry of OPTIMIZERS; `keys` are the keys of [training] that it understands beyond `lr`."""

    torch_class: str  # name in torch.optim
    keys: frozenset[str]
    update: Update  # the same rule for many trials at once
    fused_on_cuda: bool = False  # one kernel can update all parameters


_ADAM_KEYS = frozenset({"beta1", "beta2", "eps", "weight_decay"})

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(
        torch_class="SGD",
        keys=frozenset({"momentum", "nesterov", "weight_decay"}),
        update=updates.SGD,
        fused_on_cuda=True,
    ),
    "adam": Optimizer(torch_class="Adam", keys=_ADAM_KEYS, update=updates.ADAM, fused_on_cuda=True),
    "adamw": Optimizer(torch_class="AdamW", keys=_ADAM_KEYS, update=updates.ADAMW, fused_on_cuda=True),
    "nadam": Optimizer(torch_class="NAdam", keys=_ADAM_KEYS, update=updates.NADAM),
    "radam": Optimizer(torch_class="RAdam", keys=_ADAM_KEYS, update=updates.RADAM),
    "rmsprop": Optimizer(
        torch_class="RMSprop", keys=frozenset({"momentum", "eps", "weight_decay"}), update=updates.RMSPROP
    ),
    "adagrad": Optimizer(torch_class="Adagrad", keys=frozenset({"eps", "weight_decay"}), update=updates.ADAGRAD),
    "adadelta": Optimizer(torch_class="Adadelta", keys=frozenset({"eps", "weight_decay"}), update=updates.ADADELTA),
}


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], training: TrainingConfig, *, device_type: str
) -> torch.optim.Optimizer:
    """Return the torch optimizer that `training` describes; keys that it does not understand are not passed.

    Raises UserError for an unknown optimizer, a learning rate that is not set, and settings that torch refuses.
    """
    import torch

    entry = OPTIMIZERS.get(training.optimizer)
    if entry is None:
        raise unknown_name("training.optimizer", training.optimizer, OPTIMIZERS)
    if training.lr is None:
        raise UserError("training.lr must be given, or searched as search.space.lr; got neither")
    arguments: dict[str, Any] = {key: getattr(training, key) for key in entry.keys - {"beta1", "beta2", "eps"}}
    if "beta1" in entry.keys:
        arguments["betas"] = (training.beta1, training.beta2)
    if "eps" in entry.keys and training.eps is not None:
        arguments["eps"] = training.eps
    if entry.fused_on_cuda and device_type == "cuda":
        arguments["fused"] = True
    try:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, entry.torch_class)(
            parameters, lr=training.lr, **arguments
        )
    except ValueError as error:  # torch's own rules, such as Nesterov's need of a momentum
        raise UserError(f"training.optimizer = {training.optimizer!r} refuses its settings: {error}") from error
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group of an optimizer its learning rate: `lr` times its own multiplier, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)


def with_eps(training: TrainingConfig) -> TrainingConfig:
    """Return the same settings with the optimizer's own eps where none is given."""
    import torch

    if training.eps is not None:
        return training
    parameters = inspect.signature(getattr(torch.optim, OPTIMIZERS[training.optimizer].torch_class)).parameters
    return replace(training, eps=parameters["eps"].default if "eps" in parameters else 0.0)
