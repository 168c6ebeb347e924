"""What a stacked step would cost a GPU, seen on a CPU: it never waits, is the same calls each time, and launches few.

A step that waits for the device, or that launches more kernels than the device has work for, is slow there whatever
its kernels do. The budgets are what was counted; they may only fall.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.stack import TrialStack
from hpo.train.engines.stacked_network import StackedNetwork
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from tests.train.engines.dispatch import Calls
from tests.train.engines.trials import WITH_RULE

CPU = torch.device("cpu")
LANES = 3
# Kernels that a step of the article's network launches with Adam, by the method of its convolutions, and how many more
# or fewer another optimizer takes.
STEP_LAUNCHES = {"grouped": 109, "products": 154}
MORE_LAUNCHES = {
    "adam": 0, "adamw": 0, "sgd": -4, "nadam": 2, "radam": 1, "rmsprop": -2, "adagrad": -4, "adadelta": 2,
    "adamax": -2,
}  # fmt: skip


def steps_of(convolution: str, optimizer: str) -> list[Calls]:
    """Return the calls of two steps with different learning rates, after a first one."""
    training = TrainingConfig(
        lr=1e-2, epochs=3, batch_size=32, schedule="cosine", optimizer=optimizer, gradient_clip=1.0
    )
    data_config = DataConfig(train_samples=96, flip=True, crop=2)
    config = TrialConfig(model=ModelConfig(options={"width": 0.05}), data=data_config, training=training, seed=3)
    data = DatasetCache(device=CPU).get(data_config)
    stack = TrialStack(config, data=data, device=CPU, convolution=convolution)
    for seed in range(LANES):
        stack.admit(replace(config, seed=seed))
    factors = stack.factors(stack.num_steps)
    batches = stack.batches()
    stack.step(*next(batches), factors[0])
    steps = []
    for of_step in (factors[step] for step in range(1, stack.num_steps)):
        with Calls() as calls:
            images_KBCHW, labels_KB = next(batches)
            num_batch_calls = len(calls.seen)
            stack.step(images_KBCHW, labels_KB, of_step)
        assert calls.waiting == []
        calls.seen = calls.seen[num_batch_calls:]
        steps.append(calls)
    assert len(steps) == 2
    return steps


EVERY_WAY = [
    pytest.param(convolution, optimizer, marks=[] if optimizer in ("adam", "sgd") else [pytest.mark.slow])
    for convolution in CONVOLUTIONS
    for optimizer in WITH_RULE
]


@pytest.mark.parametrize(("convolution", "optimizer"), EVERY_WAY)
def test_steps_never_wait_and_are_the_same_calls_each_time(convolution: str, optimizer: str) -> None:
    """All that changes from step to step lies on the device: a graph of one step would do the next one, too."""
    one, other = steps_of(convolution, optimizer)
    assert one.seen == other.seen
    assert len(one.launches) <= STEP_LAUNCHES[convolution] + MORE_LAUNCHES[optimizer]


def test_the_check_for_waiting_sees_what_waits() -> None:
    tensor = torch.arange(4.0)
    with Calls() as calls:
        float(tensor.sum())
        tensor[tensor > 1]
        tensor[tensor > 1] = 0.0
        tensor[torch.tensor([1])]
        bool(tensor[0] > 1)
    assert calls.waiting == ["_local_scalar_dense", "index", "index_put_", "_local_scalar_dense"]


class Residual(nn.Module):
    """A block with every sort of operation in place on the output of an operation of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu_(self.convolution(images))
        features = self.norm(features)
        features += images
        features = F.leaky_relu_(features)
        features = F.elu_(F.avg_pool2d(features, 2))
        return F.hardtanh_(self.head(features.flatten(1)))


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_operations_in_place_cost_no_copies(convolution: str) -> None:
    """Autograd would record them on a view as a change of the viewed tensor: four passes over memory for one."""
    networks = [Residual() for _ in range(LANES)]
    stacked = StackedNetwork(networks[0], device=CPU, convolution=convolution)
    params, buffers = torch.func.stack_module_state(networks)
    with Calls() as calls:
        logits_KBL = stacked(params, buffers, torch.ones(LANES, 8, 4, 8, 8), training=True)
        torch.autograd.grad(logits_KBL.sum(), list(params.values()))
    names = [name for name, _ in calls.seen]
    assert "relu_" in names
    assert {"copy_", "as_strided", "new_empty_strided"} & set(names) == set()
