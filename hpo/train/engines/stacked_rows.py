"""The tensors of stacked trials: each trial is one row of the parameters, the optimizer's moments and the buffers.

Shapes: K lanes, P parameters of a network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpo.train.engines.stacked_optimizers import Update


class StackedRows:
    """The rows of trials whose networks are like `model` and whose optimizer has the moments of `update`."""

    def __init__(self, model: nn.Module, update: Update, *, device: torch.device) -> None:
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        num_params = sum(shape.numel() for shape in self._shapes.values())
        self.params_KP = torch.empty((0, num_params), device=device)
        self.moments = {name: torch.empty((0, num_params), device=device) for name in update.moments}
        self.buffers = {name: buffer[None][:0] for name, buffer in model.named_buffers()}
        self.leaves: dict[str, Tensor] = {}
        """The parameters under the network's names, each (K, ...): views of the rows, which steps change in place."""

    def append(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Add a row with the state of a network and of its optimizer; where memory runs out, change nothing."""
        parameters = list(model.parameters())
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        moments = {
            name: [
                _moment_or_zeros(state.get(name), parameter)
                for state, parameter in zip(states, parameters, strict=True)
            ]
            for name in self.moments
        }
        grown_params = torch.cat([self.params_KP, _flat_row(parameters)])
        grown_moments = {name: torch.cat([self.moments[name], _flat_row(given)]) for name, given in moments.items()}
        grown_buffers = {name: torch.cat([self.buffers[name], buffer[None]]) for name, buffer in model.named_buffers()}
        self.params_KP, self.moments, self.buffers = grown_params, grown_moments, grown_buffers
        self._cut_leaves()

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be repeated."""
        indices = list(rows)
        params_KP = self.params_KP[indices]
        moments = {name: tensor[indices] for name, tensor in self.moments.items()}
        self.buffers = {name: tensor[indices] for name, tensor in self.buffers.items()}
        self.params_KP, self.moments = params_KP, moments
        self._cut_leaves()

    @torch.no_grad()
    def load(self, row: int, model: nn.Module) -> None:
        """Copy the parameters and buffers of a row into a network."""
        for parameter, values in zip(model.parameters(), self._split(self.params_KP[row]), strict=True):
            parameter.copy_(values.view(parameter.shape))
        for name, buffer in model.named_buffers():
            buffer.copy_(self.buffers[name][row])

    def moments_of(self, row: int, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return these moments of a row for each parameter, in the parameters' shapes."""
        columns = {name: self._split(self.moments[name][row]) for name in names}
        return [
            {name: columns[name][index].view(shape) for name in names}
            for index, shape in enumerate(self._shapes.values())
        ]

    def _cut_leaves(self) -> None:
        self.leaves = {
            name: columns.view(len(columns), *shape).detach().requires_grad_()
            for (name, shape), columns in zip(self._shapes.items(), self._split(self.params_KP), strict=True)
        }

    def _split(self, rows: Tensor) -> Sequence[Tensor]:
        return torch.split(rows, [shape.numel() for shape in self._shapes.values()], dim=-1)


def _flat_row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])[None]


def _moment_or_zeros(moment: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if moment is None else moment
