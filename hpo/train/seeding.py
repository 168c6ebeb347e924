"""Seeding of every generator of random numbers that training draws from."""

from __future__ import annotations

import random

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
