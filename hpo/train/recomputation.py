"""Activation checkpointing (Chen et al., arXiv 1604.06174): activations are computed again in the backward pass.

A network that offers it by `set_grad_checkpointing`, as timm's do, does it itself. In any other one, each plain
nn.Sequential gives its blocks to torch.utils.checkpoint, and layers that are no blocks in stretches of about the square
root of their number. Parameters keep their names. Random numbers are those of the first time, and buffers, such as the
statistics of batch norm, are kept by `buffers_kept`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpo.errors import UserError
from hpo.train.imports import describe_error
from hpo.train.modules import named_network

SETTING = "training.activation_checkpointing"


def recompute_activations(model: nn.Module, *, name: str) -> None:
    """Have a network compute its activations again in the backward pass instead of keeping them.

    Args:
        model: The network; it is changed in place.
        name: The value of model.name.

    Raises:
        UserError: The network offers no parts that can be computed again.
    """
    network = named_network(model)
    switch = getattr(network, "set_grad_checkpointing", None)
    if callable(switch):
        try:
            switch(True)
        except Exception as error:  # timm's networks assert that they can
            raise UserError(
                f"{SETTING} cannot be used with model.name = {name!r}: its set_grad_checkpointing raised "
                f"{describe_error(error)}"
            ) from error
    elif not _recompute_sequentials(network):
        raise UserError(
            f"{SETTING} needs a network with an nn.Sequential of several layers, or with a method "
            f"set_grad_checkpointing(enable), as timm's have; model.name = {name!r} has neither"
        )


@contextmanager
def buffers_kept(model: nn.Module | None) -> Iterator[None]:
    """Put the buffers of a network back to what they were: what is computed again would change them twice."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()] if model is not None else []
    yield
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)


class RecomputedSequential(nn.Sequential):
    """A sequential network that keeps the inputs of its parts alone, and computes the rest again."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what nn.Sequential does."""
        for part in _parts(list(self)) if torch.is_grad_enabled() else self:
            input = part(input)
        return input


def _recompute_sequentials(network: nn.Module) -> bool:
    """Change each plain nn.Sequential that is not inside of a block; return whether there is one."""
    children = list(network.children())
    is_found = _is_sequential(network) and len(children) > 1
    if is_found:
        network.__class__ = RecomputedSequential
        children = [child for child in children if _has_blocks(child)]
    for child in children:
        is_found |= _recompute_sequentials(child)
    return is_found


def _is_sequential(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, RecomputedSequential)


def _has_blocks(module: nn.Module) -> bool:
    """Return whether a module is a sequence of blocks, and not one block itself."""
    return _is_sequential(module) and any(list(child.children()) for child in module.children())


def _is_in_place(module: nn.Module) -> bool:
    """Return whether a module says that it changes its input, which is then gone when it is computed again."""
    if isinstance(module, nn.Sequential) and len(module):
        return _is_in_place(module[0])
    return bool(getattr(module, "inplace", False))


def _parts(modules: Sequence[nn.Module]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield what to call one after the other: blocks and stretches of layers that are computed again."""
    layers: list[list[nn.Module]] = [[]]  # each with the modules behind it that change its output in place
    for module in modules:
        if _is_in_place(module):
            layers[-1].append(module)
        else:
            layers.append([module])
    yield from layers[0]  # these change their input in place, which would be needed again
    for is_block, run in groupby(layers[1:], key=lambda layer: bool(list(layer[0].children()))):
        stretch = list(run)
        length = 1 if is_block else math.ceil(len(stretch) / math.isqrt(len(stretch)))
        for start in range(0, len(stretch), length):
            part = [module for layer in stretch[start : start + length] for module in layer]
            yield part[0] if len(part) == 1 and (not is_block or _has_blocks(part[0])) else _Recomputed(part)


class _Recomputed:
    """Modules whose activations are computed again, but for the first one's input."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def __call__(self, input: Tensor) -> Tensor:
        result: Tensor = checkpoint(self._run, input, use_reentrant=False)
        return result

    def _run(self, input: Tensor) -> Tensor:
        for module in self._modules:
            input = module(input)
        return input
