"""Parameter groups: multipliers of the learning rate and of the weight decay by module, and modules that are frozen.

A parameter's multipliers are the product of those of all patterns that name it or a module around it, of
`layer_decay`, and of `no_decay`. A frozen module is a fixed function: its parameters are not trained, its batch norm
keeps its statistics, and its dropout is off.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hpo.errors import UserError
from hpo.train.config import TrainingConfig
from hpo.train.modules import BODY, HEAD, head_of, is_inside, named_network

MAX_MODULES_LISTED = 12
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Multipliers:
    """The multipliers of one parameter's learning rate and weight decay."""

    lr: float = 1.0
    weight_decay: float = 1.0

    def scaled(self, training: TrainingConfig) -> TrainingConfig:
        """Return the settings of a trial as they hold for the parameter, except for its learning rate."""
        return replace(training, weight_decay=training.weight_decay * self.weight_decay)


def has_groups(training: TrainingConfig) -> bool:
    """Return whether some parameters are trained differently from others."""
    return bool(training.groups) or training.layer_decay != 1 or training.no_decay != "none" or bool(training.freeze)


def multipliers_of(model: nn.Module, training: TrainingConfig, *, num_classes: int) -> list[Multipliers]:
    """Return the multipliers of each parameter, in the order of `model.parameters()`.

    Raises UserError, naming the setting, for a pattern that names no module and no parameter.
    """
    network = named_network(model)
    names = [name for name, _ in network.named_parameters()]
    lrs, decays = [1.0] * len(names), [1.0] * len(names)
    for pattern, group in training.groups.items():
        named = _covered_by(pattern, network, num_classes=num_classes, setting=f"training.groups.{pattern}")
        for index in (index for index, name in enumerate(names) if name in named):
            lrs[index] *= group.get("lr", 1.0)
            decays[index] *= group.get("weight_decay", 1.0)
    if training.layer_decay != 1:
        layers = layers_of(network)
        for index, name in enumerate(names):
            lrs[index] *= training.layer_decay ** (max(layers.values()) - layers[name])
    if training.no_decay == "auto":
        decays = [
            0.0 if parameter.dim() <= 1 else decay
            for parameter, decay in zip(network.parameters(), decays, strict=True)
        ]
    return [Multipliers(lr, decay) for lr, decay in zip(lrs, decays, strict=True)]


def parameter_groups(model: nn.Module, training: TrainingConfig, multipliers: Sequence[Multipliers]) -> Any:
    """Return what torch.optim takes: groups of the parameters with the same multipliers, or all parameters at once.

    A group has its multiplier of the learning rate as `lr_multiplier`, and the places of its parameters in the network
    as `places`.
    """
    if not has_groups(training):
        return model.parameters()
    assert training.lr is not None
    groups: dict[Multipliers, dict[str, Any]] = {}
    for place, (parameter, multiplier) in enumerate(zip(model.parameters(), multipliers, strict=True)):
        group = {
            "params": [],
            "lr": training.lr * multiplier.lr,
            "weight_decay": multiplier.scaled(training).weight_decay,
            "lr_multiplier": multiplier.lr,
            "places": [],
        }
        groups.setdefault(multiplier, group)["params"].append(parameter)
        groups[multiplier]["places"].append(place)
    return list(groups.values())


def set_trained(model: nn.Module, training: TrainingConfig, *, epoch: int, num_classes: int) -> None:
    """Put a network into training mode for an epoch, counted from 0, but what is frozen in that epoch.

    Raises UserError, naming the setting, for a pattern that names nothing, and where nothing is left to train.
    """
    model.train()
    if not training.freeze:
        return
    network = named_network(model)
    frozen: set[str] = set()
    for pattern in training.freeze:
        frozen |= _covered_by(pattern, network, num_classes=num_classes, setting="training.freeze")
    if all(name in frozen for name, _ in network.named_parameters()):
        raise UserError(f"training.freeze must leave something to train; got {list(training.freeze)}")
    is_frozen_now = training.freeze_epochs is None or epoch < training.freeze_epochs
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(not is_frozen_now)
    for name, module in network.named_modules():
        inside = [f"{name}.{inner}".lstrip(".") for inner, _ in module.named_parameters()]
        if is_frozen_now and (name in frozen or (inside and frozen.issuperset(inside))):
            module.eval()


def layers_of(network: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter, counted from the input.

    A layer is an element of a container such as nn.Sequential, or a module of the network beside it. What has no matrix
    of weights, such as a norm, belongs to the layer before it.
    """
    layers: dict[str, int] = {}
    layer = -1
    for block in _blocks(network, "", is_outside=True):
        if layer < 0 or any(parameter.dim() > 1 for parameter in block.values()):
            layer += 1
        layers |= dict.fromkeys(block, layer)
    return {name: layers.get(name, 0) for name, _ in network.named_parameters()}


def _blocks(module: nn.Module, name: str, *, is_outside: bool) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters of each block of a module, by their names in the network."""
    prefix = f"{name}." if name else ""
    is_container = type(module) in CONTAINERS
    has_container = any(type(inner) in CONTAINERS for inner in module.children())
    if not (is_container or (is_outside and (not name or has_container))) or not list(module.children()):
        if block := {f"{prefix}{inner}": parameter for inner, parameter in module.named_parameters()}:
            yield block
        return
    for inner_name, inner in module.named_children():
        yield from _blocks(inner, f"{prefix}{inner_name}", is_outside=is_outside and not is_container)


def _covered_by(pattern: str, network: nn.Module, *, num_classes: int, setting: str) -> set[str]:
    """Return the modules and parameters that a pattern names, with all that is inside of them."""
    names = {name for name, _ in [*network.named_modules(), *network.named_parameters()]}
    named = {name for name in names if name and any(fnmatchcase(outer, pattern) for outer in _path(name))}
    if not named and pattern in (HEAD, BODY):
        head = head_of(network, num_classes=num_classes)
        if head is None:
            raise UserError(
                f"{setting}: {pattern!r} needs a network with a layer that has an output for each of the {num_classes} "
                "classes; name its modules instead"
            )
        in_head = {name for name in names if is_inside(name, head)}
        if pattern == HEAD:
            return in_head
        around = {outer for name in in_head for outer in _path(name)}
        holders = {outer for name in network.state_dict() for outer in _path(name)}
        return (names & holders) - in_head - around  # without such as a dropout in front of the head
    if not named:
        near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.5)
        tops = [name for name, _ in network.named_children()]
        more = f" and {len(tops) - MAX_MODULES_LISTED} more" if len(tops) > MAX_MODULES_LISTED else ""
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UserError(
            f"{setting}: {pattern!r} names no module of the network; {hint}"
            f"it has {', '.join([HEAD, BODY, *tops[:MAX_MODULES_LISTED]])}{more}"
        )
    return named


def _path(name: str) -> list[str]:
    """Return a name with those of all modules around it: a, a.b and a.b.c of a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: index + 1]) for index in range(len(parts))]
