"""Many networks of one architecture run as one."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn

from hpo.train.engines.vmap_ops import CustomOps, DropoutLayouts, GroupedConvolution, LaneGenerators, MatmulConvolution
from hpo.train.imports import describe_error

# How far a stacked network's outputs may be from its own, relative to the largest: far above rounding in float32 or
# bf16, far below what another mask of dropout or a forgotten running mean makes.
SAME_FLOAT32, SAME_BF16 = 1e-3, 5e-2


class NotStackable(Exception):
    """Why networks of this kind cannot be run as one."""


class StackedNetwork:
    """Networks like `model`, whose parameters and buffers are given with each call, stacked."""

    def __init__(self, model: nn.Module, *, device: torch.device, convolution: str = "grouped") -> None:
        """`model` is on the device, `convolution` one of CONVOLUTIONS; call `check` before anything else.

        Raises NotStackable where such networks cannot be run as one."""
        for module in model.modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise NotStackable(f"{type(module).__name__} keeps a state of its own (get_extra_state)")
        if not all(parameter.requires_grad and parameter.is_floating_point() for parameter in model.parameters()):
            raise NotStackable("it has parameters that are not trained")
        self._model = model
        self.streams = LaneGenerators(device)
        self._ours = CustomOps(
            self.streams, convolution=MatmulConvolution if convolution == "products" else GroupedConvolution
        )

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor, *, training: bool
    ) -> Tensor:
        """The outputs (K, B, L) for each lane's pictures (K, B, C, H, W), or for the same ones (B, C, H, W).

        Parameters and buffers have K in front of their own shapes; in training, buffers are changed in place, and
        dropout draws from `streams`. Differentiable with regard to the parameters.
        """
        self._model.train(training)

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(self._model, (params, buffers), (images,))
            return logits

        lanewise = torch.vmap(one, in_dims=(0, 0, 0 if images.dim() == 5 else None), randomness="error")
        with self._ours:
            logits_KBL: Tensor = lanewise(dict(params), dict(buffers), images)
        return logits_KBL

    def check(self, other: nn.Module, images_BCHW: Tensor, *, autocast: Callable[[], torch.autocast]) -> None:
        """Raises NotStackable where this network beside another does not do on these pictures what each does alone."""
        networks = [copy.deepcopy(network) for network in (self._model, other)]
        pictures = [images_BCHW, images_BCHW.flip(0)]
        stacked_buffers = {
            name: torch.stack([buffer, other.get_buffer(name)]) for name, buffer in self._model.named_buffers()
        }
        leaves = {
            name: torch.stack([parameter.detach(), other.get_parameter(name).detach()]).requires_grad_()
            for name, parameter in self._model.named_parameters()
        }
        with _generators_restored(images_BCHW.device), autocast():
            alone = [
                self._alone(network, images, seed=seed)
                for seed, (network, images) in enumerate(zip(networks, pictures, strict=True))
            ]
            self.streams.seed([0, 1])
            try:
                logits_KBL = self(leaves, stacked_buffers, torch.stack(pictures), training=True)
                grads = torch.autograd.grad(logits_KBL.float().square().sum(), list(leaves.values()))
                with torch.no_grad():
                    evaluated_KBL = self(leaves, stacked_buffers, images_BCHW, training=False)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever vmap says of what it cannot map, and modules of what they get
                raise NotStackable(f"{describe_error(error)}".split("\n")[0][:200]) from None
            with torch.no_grad():
                evaluated = [network.eval()(images_BCHW) for network in networks]
        tolerance = SAME_FLOAT32 if alone[0][0].dtype == torch.float32 else SAME_BF16
        for lane, (network, (logits_BL, own_grads)) in enumerate(zip(networks, alone, strict=True)):
            # Measured against the largest of their sort: a bias in front of a batch norm has a gradient, and a channel
            # without an activation a running mean, that are nothing but rounding.
            buffers = [(buffer, stacked_buffers[name][lane]) for name, buffer in network.named_buffers()]
            sorts = [
                [(logits_BL, logits_KBL[lane].detach())],
                [(evaluated[lane], evaluated_KBL[lane])],
                [(own, stacked[lane]) for own, stacked in zip(own_grads, grads, strict=True)],
                [pair for pair in buffers if pair[0].numel() and pair[0].is_floating_point()],
                [pair for pair in buffers if pair[0].numel() and not pair[0].is_floating_point()],
            ]
            for pairs in filter(None, sorts):
                largest = max(float(own.abs().max()) for own, _ in pairs)
                differences = [float((stacked - own).abs().max()) for own, stacked in pairs]
                if not all(difference <= tolerance * max(largest, 1e-30) for difference in differences):  # nor NaN
                    raise NotStackable("stacked, it gives other results than alone")

    def _alone(self, network: nn.Module, images_BCHW: Tensor, *, seed: int) -> tuple[Tensor, list[Tensor]]:
        """Outputs in training and gradients of a network alone, which sees what it does beside computing them."""
        torch.manual_seed(seed)
        network.train()
        generators, attributes = _other_generators(), _attributes(network)
        with DropoutLayouts() as layouts:
            logits_BL = network(images_BCHW)
        self._ours.layouts = layouts.seen
        if _other_generators() != generators:
            raise NotStackable("it draws from Python's or NumPy's generator")
        if _attributes(network) != attributes:
            raise NotStackable("its modules change their own attributes in training")
        grads = torch.autograd.grad(logits_BL.float().square().sum(), list(network.parameters()), allow_unused=True)
        if any(grad is None for grad in grads):
            raise NotStackable("it has parameters that its output does not depend on")
        return logits_BL.detach(), [grad for grad in grads if grad is not None]


def _attributes(network: nn.Module) -> list[bytes]:
    """The state of its modules beside parameters and buffers, as far as it can be written down."""
    states = []
    for module in network.modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        for key, value in own.items():
            try:
                states.append(pickle.dumps((key, value)))
            except Exception:  # whatever pickling a user's object does
                states.append(repr((key, value)).encode())
    return states


def _other_generators() -> bytes:
    """The state of the generators that are not torch's."""
    return pickle.dumps((random.getstate(), numpy.random.get_state()))


@contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
