"""A check on one batch that two networks do in a stack what each does alone.

Rounding alone makes gradients of deep networks with batch norm as different as a wrong dropout mask does. The check
therefore runs in float64, where a difference is no rounding, and then in strict float32, where outputs and buffers may
be a few times as far from float64 as those of the networks alone. In the precision of training only exceptions and
types count.
Shapes: K lanes (networks), B batch, C H W image, L classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpo.train.engines.lane_state import autocast, numerics
from hpo.train.engines.side_effects import SideEffects
from hpo.train.engines.stacked_network import NotStackable, StackedNetwork
from hpo.train.engines.vmap_ops import DropoutNotes, DropoutReplay
from hpo.train.imports import describe_error
from hpo.train.seeding import generators_kept

MAX_IMAGES = 8  # of the batch: float64 takes twice the memory and, on most devices, several times as long
# How far apart results may be, relative to the largest of their sort. In float64, 1e-6 is far above rounding in 40
# layers and below a forgotten eps. In float32, 1e-3 is far above rounding in a few layers and below what another mask
# of dropout makes. Gradients are not judged there: an activation that rounding moved across zero changed them by 0.1.
EXACT_TOLERANCE, FLOAT32_TOLERANCE = 1e-6, 1e-3
MAX_ERROR_RATIO = 4.0  # of the error in a stack to the error alone, both to float64


def check_stackable(
    network: StackedNetwork, other: nn.Module, images_BCHW: Tensor, *, amp_dtype: torch.dtype | None
) -> None:
    """Raise NotStackable where a network and another one, stacked, do not do what each does alone.

    Both train on the batch and are evaluated on it. The state of all generators is as before afterwards.

    Args:
        network: The stack, which learns from the check in which order the networks draw their dropout masks.
        other: A network like its own, with other parameters.
        images_BCHW: A batch of training images.
        amp_dtype: The precision of training; None: float32 throughout.
    """
    images_BCHW = images_BCHW[:MAX_IMAGES]
    batches = [images_BCHW, images_BCHW.flip(0)]
    pair = [network.model, other]
    with generators_kept(images_BCHW.device), numerics(tf32=False):
        alone = _run_alone(network, pair, batches)
        stacked = _run_stacked(network, pair, batches)
        exact = _run_exactly(network, pair, batches, masks=[lane.masks for lane in alone])
        reference = alone
        if exact is not None:
            reference, exactly_stacked = exact
            _check_agreement(exactly_stacked, reference, reference, tolerance=EXACT_TOLERANCE)
        _check_agreement(stacked, alone, reference, tolerance=FLOAT32_TOLERANCE, with_grads=exact is None)
        if amp_dtype is not None:
            with autocast(images_BCHW.device, amp_dtype):
                alone = _run_alone(network, pair, batches)  # also notes the order of the masks in this precision
                stacked = _run_stacked(network, pair, batches)
            if _dtypes(stacked) != _dtypes(alone):
                raise NotStackable(f"stacked, it computes in another precision than alone under {amp_dtype}")


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    """What a network gives that trains on a batch, and is evaluated then."""

    logits_BL: Tensor
    evaluated_BL: Tensor
    grads: Sequence[Tensor]
    buffers: Sequence[Tensor]
    masks: Sequence[Tensor] = ()  # of dropout, where they were noted


def _sorts(lanes: Sequence[_Outputs], *, with_grads: bool = True) -> list[list[Tensor]]:
    """Return the tensors of all lanes, with those together that are judged by the largest among them.

    One tensor cannot be judged by itself. The gradient of a bias in front of a batch norm, for example, and the running
    mean of a channel without an activation, are nothing but rounding.
    """
    buffers = [buffer for lane in lanes for buffer in lane.buffers]
    sorts = [
        [lane.logits_BL for lane in lanes],
        [lane.evaluated_BL for lane in lanes],
        [grad for lane in lanes for grad in lane.grads if with_grads],
        [buffer for buffer in buffers if buffer.is_floating_point()],
        [buffer for buffer in buffers if not buffer.is_floating_point()],
    ]
    return [[tensor for tensor in tensors if tensor.numel()] for tensors in sorts]


def _dtypes(lanes: Sequence[_Outputs]) -> list[torch.dtype]:
    return [tensor.dtype for tensors in _sorts(lanes) for tensor in tensors]


def _check_agreement(
    stacked: Sequence[_Outputs],
    alone: Sequence[_Outputs],
    reference: Sequence[_Outputs],
    *,
    tolerance: float,
    with_grads: bool = True,
) -> None:
    """Raise NotStackable where the error in the stack exceeds a multiple of the error alone, and the tolerance."""
    sorts = (_sorts(lanes, with_grads=with_grads) for lanes in (stacked, alone, reference))
    for in_stack, own, exact in zip(*sorts, strict=True):
        largest = max((float(tensor.abs().max()) for tensor in exact), default=0.0)
        allowed = max(MAX_ERROR_RATIO * _error(own, exact), tolerance * largest, torch.finfo(torch.float64).tiny)
        if not _error(in_stack, exact) <= allowed:  # so that NaN is refused
            raise NotStackable("stacked, it gives other results than alone")


def _error(tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest difference."""
    pairs = zip(tensors, exact, strict=True)
    return max((float((tensor.double() - right.double()).abs().max()) for tensor, right in pairs), default=0.0)


def _run_alone(network: StackedNetwork, pair: Sequence[nn.Module], batches: Sequence[Tensor]) -> list[_Outputs]:
    """Train copies of the networks alone; raise NotStackable where one does more than compute its outputs."""
    outputs = []
    for seed, (given, images_BCHW) in enumerate(zip(pair, batches, strict=True)):
        model = copy.deepcopy(given).train()
        torch.manual_seed(seed)
        watch = SideEffects(model, device=images_BCHW.device)
        notes = DropoutNotes(network.generators)
        logits_BL, grads = _train(model, images_BCHW, notes)
        network.custom_ops.dropouts = notes.inputs
        if (found := watch.found()) is not None:
            raise NotStackable(found)
        with torch.no_grad():
            evaluated_BL = model.eval()(batches[0])
        buffers = list(model.buffers())
        outputs.append(
            _Outputs(logits_BL=logits_BL, evaluated_BL=evaluated_BL, grads=grads, buffers=buffers, masks=notes.masks)
        )
    return outputs


def _run_exactly(
    network: StackedNetwork, pair: Sequence[nn.Module], batches: Sequence[Tensor], *, masks: Sequence[Sequence[Tensor]]
) -> tuple[list[_Outputs], list[_Outputs]] | None:
    """Return what the networks give in float64 alone and stacked, with the dropout masks of float32.

    None for networks that cannot do that, because their modules name a precision or memory runs out; they are judged
    in float32 alone.
    """
    batches = [images_BCHW.double() for images_BCHW in batches]
    alone = []
    try:
        for given, images_BCHW, own_masks in zip(pair, batches, masks, strict=True):
            model = copy.deepcopy(given).double().train()
            replay = DropoutReplay(own_masks)
            logits_BL, grads = _train(model, images_BCHW, replay)
            with torch.no_grad(), replay:
                evaluated_BL = model.eval()(batches[0])
            if not replay.is_exact:
                return None
            buffers = list(model.buffers())
            alone.append(_Outputs(logits_BL=logits_BL, evaluated_BL=evaluated_BL, grads=grads, buffers=buffers))
        network.custom_ops.masks_KB = [torch.stack(of_lanes) for of_lanes in zip(*masks, strict=True)]
        return alone, _run_stacked(network, [copy.deepcopy(model).double() for model in pair], batches)
    except torch.AcceleratorError:  # the device's own errors, after which it is of no use
        raise
    except Exception:
        return None
    finally:
        network.custom_ops.masks_KB = None


def _train(
    model: nn.Module, images_BCHW: Tensor, mode: DropoutNotes | DropoutReplay
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the outputs of a network in training, and the gradients of their squares."""
    with mode:
        logits_BL = model(images_BCHW)
    grads = torch.autograd.grad(_loss(logits_BL), list(model.parameters()), allow_unused=True)
    if any(grad is None for grad in grads):
        raise NotStackable("it has parameters that its output does not depend on")
    return logits_BL.detach(), [grad for grad in grads if grad is not None]


def _run_stacked(network: StackedNetwork, pair: Sequence[nn.Module], batches: Sequence[Tensor]) -> list[_Outputs]:
    """Train the networks on a batch each, stacked, and evaluate both on the first batch."""
    one, other = pair
    buffers = {name: torch.stack([buffer, other.get_buffer(name)]) for name, buffer in one.named_buffers()}
    leaves = {
        name: torch.stack([parameter.detach(), other.get_parameter(name).detach()]).requires_grad_()
        for name, parameter in one.named_parameters()
    }
    network.generators.seed([0, 1])
    try:
        logits_KBL = network(leaves, buffers, torch.stack(list(batches)), training=True)
        grads = torch.autograd.grad(_loss(logits_KBL), list(leaves.values()))
        with torch.no_grad():
            evaluated_KBL = network(leaves, buffers, batches[0], training=False)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # whatever vmap cannot map, and whatever modules raise for what they get
        raise NotStackable(f"{describe_error(error)}".split("\n")[0][:200]) from None
    return [
        _Outputs(
            logits_BL=logits_KBL[lane].detach(),
            evaluated_BL=evaluated_KBL[lane],
            grads=[grad[lane] for grad in grads],
            buffers=[buffer[lane] for buffer in buffers.values()],
        )
        for lane in range(len(pair))
    ]


def _loss(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).square().sum()
