"""Optimizers that a CUDA graph can hold: each number that changes from step to step is read on the device.

Where torch has a fused kernel, it makes the step, with its learning rate in a tensor. Elsewhere our own update rules
(`stacked_optimizers.py`) do, over all parameters at once. Both begin a trial from the state of a torch.optim optimizer.
Shapes: S steps of an epoch, P parameters of a network, N numbers of an update rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpo.train.config import TrainingConfig
from hpo.train.engines.lane_state import LaneState
from hpo.train.optim import OPTIMIZERS, build_optimizer, update_rule, with_eps

ALIGNMENT_NUMBERS = 64  # float32: 256 bytes, as torch aligns a tensor of its own; the padding has no gradient


class NotCapturable(Exception):
    """Trials of this kind cannot be trained by CUDA graphs; the message says why."""


class CapturableOptimizer(Protocol):
    """An optimizer of fixed parameters, whose steps a CUDA graph can hold."""

    def load(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the moments of another trial's optimizer, whose parameters are in the same order."""

    def begin_epoch(self, lane: LaneState, *, num_steps: int) -> None:
        """Put the numbers of the steps of an epoch on the device."""

    def select_step(self, step_1: Tensor) -> None:
        """Have the next `step` use the numbers of this step of the epoch, an int64 (1,) on the device."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def step(self) -> object:
        """Change the parameters by their gradients."""

    def moments(self, names: Sequence[str]) -> Sequence[Mapping[str, Tensor]]:
        """Return these moments, by name, of each parameter."""


def build_capturable_optimizer(
    parameters: Sequence[nn.Parameter], training: TrainingConfig, *, num_steps: int, device: torch.device
) -> CapturableOptimizer:
    """Return the optimizer that `training` describes, for epochs of `num_steps` steps.

    Settings other than the learning rate may be constants of its steps. Raises UserError as `build_optimizer` does.
    """
    if OPTIMIZERS[training.optimizer].fused_on_cuda:
        return FusedOptimizer(parameters, training, num_steps=num_steps, device=device)
    return RuleOptimizer(parameters, training, num_steps=num_steps, device=device)


class FusedOptimizer:
    """A fused optimizer of torch.optim, with its learning rate in a tensor."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], training: TrainingConfig, *, num_steps: int, device: torch.device
    ) -> None:
        self._lrs_S = torch.zeros(num_steps, device=device)
        self._lr = torch.zeros((), device=device)
        self._optimizer = build_optimizer(parameters, training, device_type="cuda")  # fused, which a CPU has too
        self._parameters = parameters
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr
            if "capturable" in group:
                group["capturable"] = device.type == "cuda"
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with warnings.catch_warnings():  # torch warns once of steps that are not captured
            warnings.simplefilter("ignore", UserWarning)
            self._optimizer.step()  # at a learning rate of 0, so that there are moments to load
        self._optimizer.zero_grad()

    @torch.no_grad()
    def load(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the moments of another trial's optimizer; see `CapturableOptimizer`."""
        for mine, other in zip(self._parameters, _parameters_of(optimizer), strict=True):
            given = optimizer.state.get(other, {})
            for name, value in self._optimizer.state[mine].items():
                if isinstance(value, Tensor):
                    moment = given.get(name)
                    value.zero_() if moment is None else value.copy_(moment)

    def begin_epoch(self, lane: LaneState, *, num_steps: int) -> None:
        """Put the learning rates of an epoch on the device; see `CapturableOptimizer`."""
        lrs = [lane.lr_at(step, num_steps=num_steps) for step in range(num_steps)]
        self._lrs_S.copy_(torch.tensor(lrs, dtype=torch.float64))

    def select_step(self, step_1: Tensor) -> None:
        """Have the next step use this learning rate; see `CapturableOptimizer`."""
        self._lr.copy_(self._lrs_S.index_select(0, step_1)[0])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Change the parameters by their gradients."""
        _gradients_of(self._parameters)
        self._optimizer.step()

    def moments(self, names: Sequence[str]) -> Sequence[Mapping[str, Tensor]]:
        """Return these moments of each parameter; see `CapturableOptimizer`."""
        states = [self._optimizer.state[parameter] for parameter in self._parameters]
        return [{name: state[name] for name in names} for state in states]


class RuleOptimizer:
    """An update rule of ours over all parameters of a network, which become views of one row."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], training: TrainingConfig, *, num_steps: int, device: torch.device
    ) -> None:
        build_optimizer(parameters, training, device_type=device.type)  # refuses wrong settings
        training = with_eps(training)
        self._rule = update_rule(training)
        self._parameters = parameters
        self._names = list(self._rule.factors(training, 0.0, 1))
        self._numbers_SN = torch.zeros((num_steps, len(self._names)), device=device)
        self._numbers_1N = torch.zeros((1, len(self._names)), device=device)
        num_params = sum(_room_for(parameter) for parameter in parameters)
        self._params_1P, self._grads_1P = (torch.zeros((1, num_params), device=device) for _ in range(2))
        self._moments = {name: torch.zeros((1, num_params), device=device) for name in self._rule.moments}
        self._grads = _cut(self._grads_1P, parameters)
        self._moments_of = {name: _cut(row, parameters) for name, row in self._moments.items()}
        with torch.no_grad():
            for parameter, view in zip(parameters, _cut(self._params_1P, parameters), strict=True):
                view.copy_(parameter)
                parameter.data = view

    @torch.no_grad()
    def load(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the moments of another trial's optimizer; see `CapturableOptimizer`."""
        states = [optimizer.state.get(parameter, {}) for parameter in _parameters_of(optimizer)]
        for name, views in self._moments_of.items():
            for view, state in zip(views, states, strict=True):
                moment = state.get(name)
                view.zero_() if moment is None else view.copy_(moment)

    def begin_epoch(self, lane: LaneState, *, num_steps: int) -> None:
        """Put the numbers of the rule on the device; see `CapturableOptimizer`."""
        training, steps_done = with_eps(lane.config.training), lane.epoch * num_steps
        factors = (
            self._rule.factors(training, lane.lr_at(step, num_steps=num_steps), steps_done + step + 1)
            for step in range(num_steps)
        )
        numbers = [[of_step[name] for name in self._names] for of_step in factors]
        self._numbers_SN.copy_(torch.tensor(numbers, dtype=torch.float64))

    def select_step(self, step_1: Tensor) -> None:
        """Have the next step use these numbers; see `CapturableOptimizer`."""
        self._numbers_1N.copy_(self._numbers_SN.index_select(0, step_1))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by their gradients."""
        torch._foreach_copy_(self._grads, _gradients_of(self._parameters))
        factors = dict(zip(self._names, torch.split(self._numbers_1N, 1, dim=1), strict=True))
        self._rule.apply(self._params_1P, self._grads_1P, self._moments, factors)

    def moments(self, names: Sequence[str]) -> Sequence[Mapping[str, Tensor]]:
        """Return these moments of each parameter; see `CapturableOptimizer`."""
        return [{name: self._moments_of[name][index] for name in names} for index in range(len(self._parameters))]


def _cut(row_1P: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return views of a row with the parameters' shapes and memory formats."""
    views, start = [], 0
    for parameter in parameters:
        strides = torch.empty_like(parameter, device="meta").stride()  # dense, whatever the parameter's own are
        views.append(row_1P.as_strided(parameter.shape, strides, start))
        start += _room_for(parameter)
    return views


def _room_for(parameter: Tensor) -> int:
    """Return how many numbers of a row a parameter takes, so that the next one begins where fast kernels need it to."""
    return -(-parameter.numel() // ALIGNMENT_NUMBERS) * ALIGNMENT_NUMBERS


def _gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients. Raises NotCapturable where one is missing: torch.optim passes over such a parameter."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(gradients) < len(parameters):
        raise NotCapturable("it has parameters that its output does not depend on")
    return gradients


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
