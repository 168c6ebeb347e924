"""Batches hold every image once, and are the same wherever the images are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpo.train.data import sources
from hpo.train.data.batches import BatchLoader, flip_and_crop
from hpo.train.data.sources import DeviceSource, batch_bounds
from tests.train.data.datasets_under_test import epoch, load


def test_batches_hold_every_picture_once_and_never_a_single_one() -> None:
    assert batch_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert batch_bounds(9, 4) == [(0, 4), (4, 9)]
    assert batch_bounds(1, 4) == [(0, 1)]
    assert batch_bounds(3, 1) == [(0, 1), (1, 2), (2, 3)]
    data = load(train_samples=129)
    sizes = [len(labels) for _, labels in data.train.batches(64, seed=0)]
    assert sizes == [64, 65]
    assert len(sizes) == data.train.num_batches(64)
    assert torch.equal(epoch(data)[1].bincount(), data.train.labels_N.bincount())


def test_batches_are_normalised_float32_channels_last() -> None:
    data = load(placement="device")
    images, labels = next(data.train.batches(64, seed=0))
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (64, 1, 32, 32)
    assert labels.dtype == torch.int64
    everything = epoch(data)[0]
    assert abs(float(everything.mean())) < 1e-4
    assert abs(float(everything.std()) - 1) < 1e-3


@pytest.mark.parametrize("name", ["digits", "image_folder"])
@pytest.mark.parametrize("augment", [{}, {"flip": True}, {"flip": True, "crop": 4}])
def test_device_and_stream_give_the_same_batches(name: str, augment: dict[str, Any], image_folder_root: Path) -> None:
    source = {"name": name, "root": str(image_folder_root), **augment}
    kept, streamed = load(**source, placement="device"), load(**source, placement="stream")
    assert (kept.mean, kept.std) == (streamed.mean, streamed.std)
    for ours, theirs in zip(epoch(kept, number=1), epoch(streamed, number=1), strict=True):
        assert torch.equal(ours, theirs)


def test_an_epoch_depends_on_the_seed_and_the_epoch() -> None:
    data = load(flip=True, crop=2)
    images = epoch(data, seed=1, number=0)[0]
    assert torch.equal(images, epoch(data, seed=1, number=0)[0])
    assert not torch.equal(images, epoch(data, seed=2, number=0)[0])
    assert not torch.equal(images, epoch(data, seed=1, number=1)[0])


def test_reading_batches_leaves_torchs_generator_alone() -> None:
    """Or a trial's dropout would depend on where its images are kept."""
    for placement in ("device", "stream"):
        data = load(placement=placement)
        torch.manual_seed(0)
        epoch(data)
        assert torch.initial_seed() == 0
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1))


def test_flip_and_crop_are_those_of_one_picture_at_a_time() -> None:
    images = torch.randint(0, 256, (20, 6, 6, 3), dtype=torch.uint8)
    flips = torch.rand(20) < 0.5
    offsets = torch.randint(0, 5, (20, 2))
    together = flip_and_crop(images, flips_B=flips, offsets_B2=offsets, padding=2)
    for image, flip, (row, column), result in zip(images, flips, offsets.tolist(), together, strict=True):
        padded = torch.nn.functional.pad(image, (0, 0, 2, 2, 2, 2))[row : row + 6, column : column + 6]
        assert torch.equal(result, padded.flip(1) if flip else padded)


def test_auto_placement_keeps_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def store(available: int) -> str:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
        return type(load().train.source).__name__

    assert store(0) == "DeviceSource"  # so few that the memory that is free does not decide it
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)
    num_bytes = 1438 * 32 * 32
    assert store(num_bytes * 4 + 4) == "DeviceSource"
    assert store(num_bytes * 4) == "StreamSource"


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
