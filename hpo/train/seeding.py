"""Seeding of every generator of random numbers that training draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from hpo.train.config import derive_seed


def seed_generators(*parts: int | str) -> None:
    """Seed every generator that a network may draw from: torch's on all devices, and those of `random` and `numpy`.

    Engines do this before they draw a network and before each epoch. The trial's seed and the epoch are then the whole
    state of its generators, so a checkpoint has none to keep.
    """
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


@contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Bring the generators back afterwards, also that of torch on a GPU.

    A module that draws when it is first imported must not change a trial, nor must a network that is only tried.
    """
    states = GeneratorStates()
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        try:
            yield
        finally:
            states.restore()


class GeneratorStates:
    """The states of the generators of this moment: torch's on the CPU, and those of `random` and `numpy`."""

    def __init__(self) -> None:
        self._torch, self._random = torch.get_rng_state(), random.getstate()
        self._numpy = numpy.random.get_state()

    def restore(self) -> None:
        """Bring the generators back to these states."""
        torch.set_rng_state(self._torch)
        random.setstate(self._random)
        numpy.random.set_state(self._numpy)
