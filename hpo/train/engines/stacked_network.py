"""Many networks of one architecture run as one: their parameters stacked, the forward pass mapped over them.

torch.vmap does the mapping, with operations of our own (`vmap_ops.py`) in the place of some of torch's. A check on one
batch finds networks that would give other results in a stack than alone.
Shapes: K lanes (networks), B batch, C H W image, L classes.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn

from hpo.train.engines.vmap_ops import CONVOLUTIONS, CustomOps, DropoutLayouts, LaneGenerators
from hpo.train.imports import describe_error

# How far a stacked network's results may be from its own, relative to the largest of their sort: far above rounding in
# float32 or bf16, and far below what another mask of dropout or a forgotten running mean makes.
FLOAT32_TOLERANCE, BF16_TOLERANCE = 1e-3, 5e-2


class NotStackable(Exception):
    """Networks of this kind cannot be run as one; the message says why."""


class StackedNetwork:
    """Networks like `model`, whose parameters and buffers are given with each call, stacked."""

    def __init__(self, model: nn.Module, *, device: torch.device, convolution: str = "grouped") -> None:
        """Make a stack of networks; call `check` before anything else.

        Args:
            model: A network, on the device.
            device: Where the networks run.
            convolution: How convolutions are computed, one of CONVOLUTIONS.

        Raises:
            NotStackable: Such networks cannot be run as one.
        """
        for module in model.modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise NotStackable(f"{type(module).__name__} keeps a state of its own (get_extra_state)")
        if not all(parameter.requires_grad and parameter.is_floating_point() for parameter in model.parameters()):
            raise NotStackable("it has parameters that are not trained")
        self._model = model
        self.generators = LaneGenerators(device)
        self._custom_ops = CustomOps(self.generators, convolution=CONVOLUTIONS[convolution])

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
        self._model.train(training)

        def run_one(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(self._model, (params, buffers), (images,))
            return logits

        run_all = torch.vmap(run_one, in_dims=(0, 0, 0 if images.dim() == 5 else None), randomness="error")
        with self._custom_ops:
            logits_KBL: Tensor = run_all(dict(params), dict(buffers), images)
        return logits_KBL

    def check(self, other: nn.Module, images_BCHW: Tensor, *, autocast: Callable[[], torch.autocast]) -> None:
        """Raise NotStackable where this network and another one, stacked, do not do what each does alone.

        Both train on the batch and are evaluated on it. The state of all generators is as before afterwards.
        """
        networks = [copy.deepcopy(network) for network in (self._model, other)]
        batches = [images_BCHW, images_BCHW.flip(0)]
        with _generators_restored(images_BCHW.device), autocast():
            outputs = [
                self._run_alone(network, images, seed=seed)
                for seed, (network, images) in enumerate(zip(networks, batches, strict=True))
            ]
            stacked = self._run_stacked(other, batches)
            with torch.no_grad():
                evaluated = [network.eval()(images_BCHW) for network in networks]
        tolerance = FLOAT32_TOLERANCE if outputs[0].logits_BL.dtype == torch.float32 else BF16_TOLERANCE
        for lane, (network, alone) in enumerate(zip(networks, outputs, strict=True)):
            buffers = [(buffer, stacked.buffers[name][lane]) for name, buffer in network.named_buffers()]
            sorts = [
                [(alone.logits_BL, stacked.logits_KBL[lane].detach())],
                [(evaluated[lane], stacked.evaluated_KBL[lane])],
                [(own, grads[lane]) for own, grads in zip(alone.grads, stacked.grads, strict=True)],
                [pair for pair in buffers if pair[0].numel() and pair[0].is_floating_point()],
                [pair for pair in buffers if pair[0].numel() and not pair[0].is_floating_point()],
            ]
            if not all(_agree(pairs, tolerance=tolerance) for pairs in sorts if pairs):
                raise NotStackable("stacked, it gives other results than alone")

    def _run_stacked(self, other: nn.Module, batches: Sequence[Tensor]) -> _StackedOutputs:
        """Train this network and another on a batch each, stacked, and evaluate both on the first batch."""
        buffers = {name: torch.stack([buffer, other.get_buffer(name)]) for name, buffer in self._model.named_buffers()}
        leaves = {
            name: torch.stack([parameter.detach(), other.get_parameter(name).detach()]).requires_grad_()
            for name, parameter in self._model.named_parameters()
        }
        self.generators.seed([0, 1])
        try:
            logits_KBL = self(leaves, buffers, torch.stack(list(batches)), training=True)
            grads = torch.autograd.grad(logits_KBL.float().square().sum(), list(leaves.values()))
            with torch.no_grad():
                evaluated_KBL = self(leaves, buffers, batches[0], training=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever vmap cannot map, and whatever modules raise for what they get
            raise NotStackable(f"{describe_error(error)}".split("\n")[0][:200]) from None
        return _StackedOutputs(logits_KBL, grads, evaluated_KBL, buffers)

    def _run_alone(self, network: nn.Module, images_BCHW: Tensor, *, seed: int) -> _AloneOutputs:
        """Train a network alone on a batch; raise NotStackable where it does more than compute its outputs."""
        torch.manual_seed(seed)
        network.train()
        generators, attributes = _other_generators(), _attributes(network)
        with DropoutLayouts() as layouts:
            logits_BL = network(images_BCHW)
        self._custom_ops.layouts = layouts.seen
        if _other_generators() != generators:
            raise NotStackable("it draws from Python's or NumPy's generator")
        if _attributes(network) != attributes:
            raise NotStackable("its modules change their own attributes in training")
        grads = torch.autograd.grad(logits_BL.float().square().sum(), list(network.parameters()), allow_unused=True)
        if any(grad is None for grad in grads):
            raise NotStackable("it has parameters that its output does not depend on")
        return _AloneOutputs(logits_BL.detach(), [grad for grad in grads if grad is not None])


@dataclass(frozen=True)
class _AloneOutputs:
    """The outputs and the gradients of one network that trained alone on a batch."""

    logits_BL: Tensor
    grads: Sequence[Tensor]


@dataclass(frozen=True)
class _StackedOutputs:
    """The outputs, gradients and buffers of networks that trained in a stack, and what they give in evaluation."""

    logits_KBL: Tensor
    grads: Sequence[Tensor]
    evaluated_KBL: Tensor
    buffers: Mapping[str, Tensor]


def _agree(pairs: Sequence[tuple[Tensor, Tensor]], *, tolerance: float) -> bool:
    """Return whether tensors of one sort, alone and stacked, agree relative to the largest of them.

    One tensor cannot be judged by itself. The gradient of a bias in front of a batch norm, for example, and the running
    mean of a channel without an activation, are nothing but rounding.
    """
    largest = max(float(own.abs().max()) for own, _ in pairs)
    differences = [float((stacked - own).abs().max()) for own, stacked in pairs]
    return all(difference <= tolerance * max(largest, 1e-30) for difference in differences)  # False for NaN


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


def _other_generators() -> bytes:
    """Return the state of the generators that are not torch's."""
    return pickle.dumps((random.getstate(), numpy.random.get_state()))


@contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    """Give every generator the state back that it has now."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
