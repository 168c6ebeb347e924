"""The exponential moving average of a network's weights, which is validated, kept and exported in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpo.train.models import named_tensors


class WeightAverage:
    """An average of the parameters and buffers of a network over the steps of its training."""

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        """Begin with the weights of a network that nobody else changes.

        Args:
            network: A network like the one in training, with the same weights. It will hold the average.
            decay: What share of the average a step leaves; less in the first steps.
        """
        self.network = network
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, *, step: int) -> None:
        """Take in the weights after a step of the training, counted from 0.

        The decay rises as (1 + step) / (10 + step) to its value, or the first weights would weigh on for long.
        """
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        averages, tensors = list[Tensor](), list[Tensor]()
        trained = named_tensors(model)
        for name, average in named_tensors(self.network).items():
            if average.is_floating_point():
                averages.append(average)
                tensors.append(trained[name])
            else:  # a count, such as that of the batches of a batch norm
                average.copy_(trained[name])
        torch._foreach_lerp_(averages, tensors, share)
