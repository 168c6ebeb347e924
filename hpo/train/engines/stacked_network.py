"""Many networks of one architecture run as one: their parameters stacked, the forward pass mapped over them.

torch.vmap does the mapping, with operations of our own (`vmap_ops.py`) in the place of some of torch's.
`stack_probe.py` finds networks that would give other results in a stack than alone.
Shapes: K lanes (networks), B batch, C H W image, L classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpo.train.engines.side_effects import has_torchscript, own_state
from hpo.train.engines.vmap_ops import CONVOLUTIONS, CustomOps, LaneGenerators


class NotStackable(Exception):
    """Networks of this kind cannot be run as one; the message says why."""


class StackedNetwork:
    """Networks like `model`, whose parameters and buffers are given with each call, stacked."""

    def __init__(self, model: nn.Module, *, device: torch.device, convolution: str = "grouped") -> None:
        """Make a stack of networks; `check_stackable` comes before anything else.

        Args:
            model: A network, on the device.
            device: Where the networks run.
            convolution: How convolutions are computed, one of CONVOLUTIONS.

        Raises:
            NotStackable: Such networks cannot be run as one.
        """
        if has_torchscript(model):
            raise NotStackable("it has modules of TorchScript")
        if (name := own_state(model)) is not None:
            raise NotStackable(f"{name} keeps a state of its own (get_extra_state)")
        if not all(parameter.requires_grad and parameter.is_floating_point() for parameter in model.parameters()):
            raise NotStackable("it has parameters that are not trained")
        self.model = model
        self.generators = LaneGenerators(device)
        self.custom_ops = CustomOps(self.generators, convolution=CONVOLUTIONS[convolution])

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor, *, training: bool
    ) -> Tensor:
        """Return the outputs (K, B, L), differentiable with regard to the parameters.

        Args:
            params: The parameters by name, with K in front of their own shapes.
            buffers: The buffers by name, likewise; training changes them in place.
            images: Each lane's images (K, B, C, H, W), or the same ones for all (B, C, H, W).
            training: Whether the networks train; dropout then draws from `generators`.
        """
        self.model.train(training)

        def run_one(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(self.model, (params, buffers), (images,))
            return logits

        run_all = torch.vmap(run_one, in_dims=(0, 0, 0 if images.dim() == 5 else None), randomness="error")
        with self.custom_ops:
            logits_KBL: Tensor = run_all(dict(params), dict(buffers), images)
        return logits_KBL
