"""Optimizers: the table of those with a name, their options, and those of timm and of users' own modules.

torch is imported only to build an optimizer, because reading a study file needs the table without it.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError, did_you_mean, unknown_name
from hpo.train.config import TIMM, TrainingConfig
from hpo.train.engines import stacked_optimizers as updates
from hpo.train.engines.stacked_optimizers import Update
from hpo.train.imports import describe_error, import_object, import_timm, is_import_path

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An entry of OPTIMIZERS; `keys` are the keys of [training] that it understands beyond `lr`."""

    class_name: str
    keys: frozenset[str]
    options: Mapping[str, Any] = field(default_factory=dict)  # its further arguments, with their defaults
    update: Update | None = None  # the same rule for many trials at once, without options; None: there is none
    fused_on_cuda: bool = False  # one kernel can update all parameters
    module: str = "torch.optim"


_ADAM_KEYS = frozenset({"beta1", "beta2", "eps", "weight_decay"})

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(
        class_name="SGD",
        keys=frozenset({"momentum", "nesterov", "weight_decay"}),
        options={"dampening": 0.0},
        update=updates.SGD,
        fused_on_cuda=True,
    ),
    "adam": Optimizer(
        class_name="Adam",
        keys=_ADAM_KEYS,
        options={"amsgrad": False, "decoupled_weight_decay": False},
        update=updates.ADAM,
        fused_on_cuda=True,
    ),
    "adamw": Optimizer(
        class_name="AdamW", keys=_ADAM_KEYS, options={"amsgrad": False}, update=updates.ADAMW, fused_on_cuda=True
    ),
    "nadam": Optimizer(
        class_name="NAdam",
        keys=_ADAM_KEYS,
        options={"momentum_decay": 4e-3, "decoupled_weight_decay": False},
        update=updates.NADAM,
    ),
    "radam": Optimizer(
        class_name="RAdam", keys=_ADAM_KEYS, options={"decoupled_weight_decay": False}, update=updates.RADAM
    ),
    "adamax": Optimizer(class_name="Adamax", keys=_ADAM_KEYS, update=updates.ADAMAX),
    "rmsprop": Optimizer(
        class_name="RMSprop",
        keys=frozenset({"momentum", "eps", "weight_decay"}),
        options={"alpha": 0.99, "centered": False},
        update=updates.RMSPROP,
    ),
    "adagrad": Optimizer(
        class_name="Adagrad",
        keys=frozenset({"eps", "weight_decay"}),
        options={"lr_decay": 0.0, "initial_accumulator_value": 0.0},
        update=updates.ADAGRAD,
    ),
    "adadelta": Optimizer(
        class_name="Adadelta", keys=frozenset({"eps", "weight_decay"}), options={"rho": 0.9}, update=updates.ADADELTA
    ),
    "adafactor": Optimizer(
        class_name="Adafactor",
        keys=frozenset({"weight_decay"}),
        options={"beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0},
    ),
    "asgd": Optimizer(
        class_name="ASGD", keys=frozenset({"weight_decay"}), options={"lambd": 1e-4, "alpha": 0.75, "t0": 1e6}
    ),
    "rprop": Optimizer(class_name="Rprop", keys=frozenset(), options={"etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}),
    "muon": Optimizer(
        module="hpo.train.muon",
        class_name="MuonWithAdamW",
        keys=_ADAM_KEYS,
        options={
            "momentum": 0.95,
            "nesterov": True,
            "ns_coefficients": (3.4445, -4.7750, 2.0315),
            "ns_steps": 5,
            "adjust_lr_fn": "match_rms_adamw",
        },
    ),
}
# Optimizers of torch.optim that cannot train these networks, and why.
REFUSED_OPTIMIZERS = {
    "lbfgs": "it calls the network several times a step, through a closure, and hpo calls it once",
    "sparseadam": "it needs sparse gradients, and those of these networks are dense",
}
OWN_OPTIMIZER_KEYS = frozenset({"weight_decay"})  # of timm's and of users' own; their other arguments are options
# Arguments that have a place of their own in [training].
_PLACES = {
    "lr": ("training.lr or search.space.lr", "lr"),
    "betas": ("training.beta1 and training.beta2", "beta1"),
    **{key: (f"training.{key}", key) for key in ("eps", "weight_decay", "momentum", "nesterov")},
}
# Arguments that say how a step is computed on a device, and one that would have it climb.
NOT_OPTIONS = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize"})
_NO_OWN_OPTIONS = OWN_OPTIMIZER_KEYS | NOT_OPTIONS | {"lr"}


def optimizer_keys(name: str) -> frozenset[str]:
    """Return the keys of [training] that an optimizer understands beyond `lr`."""
    return OPTIMIZERS[name].keys if name in OPTIMIZERS else OWN_OPTIMIZER_KEYS


def check_optimizer_options(options: Mapping[str, Any], names: Collection[str], *, setting: str) -> None:
    """Refuse an option that none of these optimizers takes, and a value of the wrong type.

    An optimizer that is not in the table is imported, and judges the values of its options. Raises UserError, naming
    the option after `setting`.
    """
    taken = {name: _options_of(name) for name in names}
    subject = f"optimizer {', '.join(sorted(names))}"
    for key, value in options.items():
        place, known_as = _PLACES.get(key, ("", ""))
        takers = [name for name, known in taken.items() if _takes(known, key)]
        if not takers and any(known_as == "lr" or known_as in optimizer_keys(name) for name in names):
            raise UserError(f"{setting}.{key} has a place of its own: {place}")
        if key in NOT_OPTIONS:
            raise UserError(f"{setting}.{key} cannot be set: how a step is computed is hpo's choice")
        if not takers:
            valid = sorted({option for known in taken.values() for option in known or ()})
            raise UserError(
                f"{setting}.{key} is not an option of {subject}{did_you_mean(key, valid)}, "
                f"which takes {', '.join(valid) or 'no options'}"
            )
        for name in takers:
            if name in OPTIMIZERS:
                _check_type(f"{setting}.{key}", value, OPTIMIZERS[name].options[key])


def why_no_rule(training: TrainingConfig) -> str | None:
    """Return why no update rule trains several such trials at once, or None where one does."""
    entry = OPTIMIZERS.get(training.optimizer)
    if entry is None or entry.update is None:
        return f"optimizer {training.optimizer!r} has no update rule for several trials at once"
    if training.optimizer_options:
        return "the update rules for several trials at once know no training.optimizer_options"
    return None


def update_rule(training: TrainingConfig) -> Update:
    """Return the update rule for trials of which `why_no_rule` knows nothing to say."""
    rule = OPTIMIZERS[training.optimizer].update
    assert rule is not None, f"optimizer {training.optimizer!r} has no update rule"
    return rule


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], training: TrainingConfig, *, device_type: str
) -> torch.optim.Optimizer:
    """Return the torch optimizer that `training` describes; settings that it does not understand are not passed.

    Raises UserError for an unknown optimizer, a learning rate that is not set, and settings that the optimizer refuses.
    """
    import torch

    name, setting = training.optimizer, f"training.optimizer = {training.optimizer!r}"
    make = _optimizer_class(name)
    if training.lr is None:
        raise UserError("training.lr must be given, or searched as search.space.lr; got neither")
    arguments = _arguments(training, device_type=device_type)
    try:
        optimizer = make(parameters, lr=training.lr, **arguments)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch's own rules, such as Nesterov's need of a momentum, and whatever others raise
        reason = str(error) if isinstance(error, ValueError) else describe_error(error)
        raise UserError(f"{setting} refuses its settings: {reason}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{setting} must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if any(one.default is one.empty for one in inspect.signature(optimizer.step).parameters.values()):
        raise UserError(f"{setting} cannot be used: {REFUSED_OPTIMIZERS['lbfgs']}")
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group of an optimizer its learning rate: `lr` times its own multiplier, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)


def set_optimizer_mode(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Tell an optimizer that asks for it whether its network is trained now or evaluated.

    A schedule-free optimizer (Defazio et al., arXiv 2405.15682) evaluates an average of the weights that it trains.
    """
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


def with_eps(training: TrainingConfig) -> TrainingConfig:
    """Return the same settings with the optimizer's own eps where none is given."""
    if training.eps is not None:
        return training
    parameters = inspect.signature(_optimizer_class(training.optimizer)).parameters
    return replace(training, eps=parameters["eps"].default if "eps" in parameters else 0.0)


def _optimizer_class(name: str) -> Callable[..., Any]:
    """Return the class, or a function that makes the optimizer, that training.optimizer names."""
    setting = "training.optimizer"
    if name in REFUSED_OPTIMIZERS:
        raise UserError(f"{setting} cannot be {name!r}: {REFUSED_OPTIMIZERS[name]}")
    if name.startswith(TIMM):
        return _timm_class(name)
    if is_import_path(name):
        return import_object(name, setting=setting)
    if name not in OPTIMIZERS:
        raise unknown_name(setting, name, OPTIMIZERS)
    entry = OPTIMIZERS[name]
    found: Callable[..., Any] = getattr(importlib.import_module(entry.module), entry.class_name)
    return found


def _timm_class(name: str) -> Callable[..., Any]:
    optimizers = import_timm(f"training.optimizer = {name!r}").optim
    names = optimizers.list_optimizers()
    if name.removeprefix(TIMM) not in names:
        raise unknown_name("training.optimizer", name, [f"{TIMM}{one}" for one in names])
    found: Callable[..., Any] = optimizers.get_optimizer_class(name.removeprefix(TIMM))
    return found


def _options_of(name: str) -> Collection[str] | None:
    """Return the names of the options that an optimizer takes; None: any."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name].options
    parameters = list(inspect.signature(_optimizer_class(name)).parameters.values())[1:]
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return {one.name for one in parameters} - _NO_OWN_OPTIONS


def _takes(options: Collection[str] | None, key: str) -> bool:
    return key not in _NO_OWN_OPTIONS if options is None else key in options


def _arguments(training: TrainingConfig, *, device_type: str) -> dict[str, Any]:
    """Return the arguments of the optimizer besides the parameters and the learning rate."""
    name, options = training.optimizer, _options_of(training.optimizer)
    keys = optimizer_keys(name)
    if name not in OPTIMIZERS:
        check_optimizer_options(training.optimizer_options, [name], setting="training.optimizer_options")
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in training.optimizer_options.items()
        if _takes(options, key)
    }
    if name not in OPTIMIZERS:
        takes_decay = "weight_decay" in inspect.signature(_optimizer_class(name)).parameters or options is None
        if training.weight_decay and not takes_decay:
            raise UserError(f"training.weight_decay does not apply to optimizer {name}, which has no such argument")
        return arguments | ({"weight_decay": training.weight_decay} if takes_decay else {})
    arguments |= {key: getattr(training, key) for key in keys - {"beta1", "beta2", "eps"}}
    if "beta1" in keys:
        arguments["betas"] = (training.beta1, training.beta2)
    if "eps" in keys and training.eps is not None:
        arguments["eps"] = training.eps
    if OPTIMIZERS[name].fused_on_cuda and device_type == "cuda":
        arguments["fused"] = True
    return arguments


def _check_type(setting: str, value: Any, default: Any) -> None:
    """Refuse a value that is not of the kind of an option's default: true or false, a text, numbers."""
    if isinstance(default, tuple):
        words = f"a list of {len(default)} numbers"
        is_right = isinstance(value, list | tuple) and len(value) == len(default) and all(map(_is_number, value))
    elif isinstance(default, bool | str):
        words = "true or false" if isinstance(default, bool) else "a text"
        is_right = isinstance(value, type(default))
    elif isinstance(default, int):
        words, is_right = "an integer", isinstance(value, int) and not isinstance(value, bool)
    else:
        words, is_right = "a finite number", _is_number(value)
    if not is_right:
        raise UserError(f"{setting} must be {words}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
