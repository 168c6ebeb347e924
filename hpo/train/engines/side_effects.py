"""What a network may do besides computing its outputs, which a stack or a CUDA graph would lose."""

from __future__ import annotations

import pickle
import random

import numpy
import torch
from torch import nn


class SideEffects:
    """Watches a network from here on: whether it draws random numbers on the host, or changes its own attributes."""

    def __init__(self, network: nn.Module, *, device: torch.device) -> None:
        self._network = network
        self._device = device
        self._attributes, self._generators = _attributes(network), self._generator_states()

    def found(self) -> str | None:
        """Return what the network has done, in words, or None."""
        if self._generator_states() != self._generators:
            return "it draws random numbers on the host"
        if _attributes(self._network) != self._attributes:
            return "its modules change their own attributes in training"
        return None

    def _generator_states(self) -> bytes:
        """Return the state of the generators other than the one that the lanes' are kept in."""
        of_host = torch.get_rng_state().numpy().tobytes() if self._device.type != "cpu" else b""
        return pickle.dumps((random.getstate(), numpy.random.get_state(), of_host))


def has_torchscript(network: nn.Module) -> bool:
    """Return whether a network has modules of TorchScript, whose parameters cannot be given with a call."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in network.modules())


def own_state(network: nn.Module) -> str | None:
    """Return the name of a class of module that keeps a state of its own beyond its tensors, or None."""
    for module in network.modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            return type(module).__name__
    return None


def _attributes(network: nn.Module) -> list[bytes]:
    """Return the state of its modules other than parameters and buffers, as far as it can be serialised."""
    states = []
    for module in network.modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        for key, value in own.items():
            try:
                states.append(pickle.dumps((key, value)))
            except Exception:  # whatever pickling a user's object raises
                states.append(repr((key, value)).encode())
    return states
