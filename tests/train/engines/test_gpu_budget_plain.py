"""What a step of the plain engine would cost a GPU, seen on a CPU: it never waits, copies nothing, and launches few.

The budgets are what was counted; they may only fall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.batches import BatchLoader
from hpo.train.data.loading import DatasetCache
from hpo.train.data.sources import DeviceSource
from hpo.train.engines import plain
from hpo.train.engines.plain import PlainEngine, build_lane
from hpo.train.optim import OPTIMIZERS, build_optimizer
from tests.train.engines.gpu_calls import Calls

CPU = torch.device("cpu")
# Operations that launch kernels in a step of the article's network, with its optimizer as on a GPU. torch's for-each
# operations count as one, though some launch several; clipping counts as a CPU does it, tensor by tensor.
STEP_LAUNCHES = {
    "adam": 61, "adamw": 61, "sgd": 60, "nadam": 70, "radam": 70, "rmsprop": 66, "adagrad": 66, "adadelta": 72,
}  # fmt: skip


def build_optimizer_as_on_a_gpu(*args: Any, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer that is fused where ours are on a GPU, and else does what torch chooses there."""
    optimizer = build_optimizer(*args, **options | {"device_type": "cuda"})
    for group in optimizer.param_groups:
        group["foreach"] = not group.get("fused")
    return optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_never_wait_and_launch_few_kernels(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "build_optimizer", build_optimizer_as_on_a_gpu)
    training = TrainingConfig(lr=1e-2, epochs=3, batch_size=32, optimizer=optimizer, gradient_clip=1.0)
    data_config = DataConfig(train_samples=96, flip=True, crop=2)
    config = TrialConfig(model=ModelConfig(options={"width": 0.05}), data=data_config, training=training, seed=3)
    data = DatasetCache(device=CPU).get(data_config)
    engine, lane = PlainEngine(device="cpu"), build_lane(config, data=data, device=CPU)
    batches = data.train.batches(32, seed=0, epoch=0)
    engine.step(lane, *next(batches))

    def on_host(tensor: Tensor) -> bool:
        """Return whether it is a counter of steps, which torch keeps on the host but for fused optimizers."""
        kept = [
            state[name] for state in lane.optimizer.state.values() for name in ("step", "mu_product") if name in state
        ]
        is_fused = any(group.get("fused") for group in lane.optimizer.param_groups)
        return not is_fused and any(tensor.data_ptr() == counter.data_ptr() for counter in kept)

    for images_BCHW, labels_B in batches:
        with Calls(on_host=on_host) as calls:
            engine.step(lane, images_BCHW, labels_B)
        assert calls.waiting == []
        assert len(calls.launches) <= STEP_LAUNCHES[optimizer]


class CopiesToTheDevice(TorchDispatchMode):
    """A mode that counts operations which take a tensor of the host's, not a number, and give one of the device's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()}
        made = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        self.count += "cpu" in given and "cuda" in made
        return result


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_batches_copy_nothing_to_the_device_after_the_first(num_lanes: int) -> None:
    """The order of an epoch and its augmentation go there at once: four copies, however many batches there are."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        cuda = torch.device("cuda:0")
        loader = BatchLoader(
            source=DeviceSource(torch.empty(150, 32, 32, 3, dtype=torch.uint8, device=cuda)),
            labels_N=torch.zeros(150, dtype=torch.int64, device=cuda),
            mean_C11=torch.zeros(3, 1, 1, device=cuda),
            std_C11=torch.ones(3, 1, 1, device=cuda),
            flip=True,
            crop=2,
        )
        with CopiesToTheDevice() as copies:
            batches = loader.stacked_batches(32, [(seed, 0) for seed in range(num_lanes)])
            next(batches)
            assert copies.count == 4
            assert len(list(batches)) == 4
            assert copies.count == 4


def test_the_check_for_waiting_sees_what_waits() -> None:
    tensor = torch.arange(4.0)
    with Calls() as calls:
        float(tensor.sum())
        tensor[tensor > 1]
        tensor[tensor > 1] = 0.0
        tensor[torch.tensor([1])]
        bool(tensor[0] > 1)
    assert calls.waiting == ["_local_scalar_dense", "index", "index_put_", "_local_scalar_dense"]
