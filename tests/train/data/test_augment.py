"""Augmentation is drawn from the seed, the epoch and the image alone, whatever the batch, lane and placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.train.config import DataConfig, derive_seed
from hpo.train.data.augment import LISTED_FATES, Augmentation
from tests.train.data.datasets_under_test import EVERY_AUGMENTATION, epoch, load

OWN = """
import random, numpy, torch

def brighten(image, amount=5):
    assert image.dtype == torch.uint8
    return image + random.randrange(amount) + int(numpy.random.randint(5)) + int(torch.randint(5, ()))

class Mirror:
    def __init__(self, p=0.5):
        self.p = p
    def __call__(self, image):
        return image.flip(2) if torch.rand(()) < self.p else image

def shrink(image):
    return image[:, ::2, ::2]

def floats(image):
    return image / 255

def nothing(image):
    pass

def fails(image):
    raise RuntimeError("no such color")
"""
OWN_ENTRIES = ["own_augment:brighten", {"name": "own_augment:brighten", "amount": 9}, "own_augment:Mirror"]


@pytest.fixture(autouse=True)
def own(own_code: Path) -> None:
    (own_code / "own_augment.py").write_text(OWN)


def build(*entries: Any, channels: int = 3, size: int = 16) -> Augmentation:
    return Augmentation(DataConfig(augment=entries), shape_CHW=(channels, size, size))


def noise(num: int = 24, size: int = 16) -> Tensor:
    return torch.randint(256, (num, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("augment", [*EVERY_AUGMENTATION, *OWN_ENTRIES], ids=str)
def test_an_image_is_the_same_in_every_batch(augment: Any) -> None:
    augmentation, images = build(augment), noise()
    draws = [(1, 2, number) for number in range(len(images))]
    before = torch.get_rng_state()
    together = augmentation(images, draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert (together.shape, together.dtype) == (images.shape, torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1)).tolist()
    for part in (order[:1], order[1:8], order[8:]):
        assert torch.equal(augmentation(images[part], [draws[number] for number in part]), together[part])
    assert torch.equal(build(augment)(images, draws), together)
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(augmentation(images, [(*other, number) for number in range(len(images))]), together)


@pytest.mark.parametrize("name", LISTED_FATES)
@pytest.mark.parametrize("max_pixels", [0, 2**16])
def test_a_batch_is_what_torchvision_makes_of_each_image(
    name: str, max_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.train.data.augment.MAX_EXACT_PIXELS", max_pixels)
    images, transform = noise(num=200), getattr(v2, name)()
    together = build(name)(images, [(0, 0, number) for number in range(200)])
    for number, image_HWC in enumerate(images):
        torch.manual_seed(derive_seed(0, 0, number, "augment", 0))
        alone = transform(image_HWC.permute(2, 0, 1).contiguous())
        assert torch.equal(together[number].permute(2, 0, 1), alone), number


def test_batches_are_augmented_alike_on_the_device_streamed_and_in_lanes() -> None:
    keys: dict[str, Any] = {
        "augment": ["RandAugment", {"name": "RandomCrop", "padding": 4}],
        "flip": True,
        "train_samples": 150,
    }
    kept, streamed = load(**keys, placement="device"), load(**keys, placement="stream")
    assert torch.equal(epoch(kept)[0], epoch(streamed)[0])
    assert torch.equal(epoch(kept)[0], epoch(kept, batch_size=32)[0])
    assert not torch.equal(epoch(kept)[0], epoch(kept, number=1)[0])
    assert not torch.equal(epoch(kept)[0], epoch(load(train_samples=150, flip=True))[0])
    lanes = list(kept.train.stacked_batches(64, [(1, 0), (5, 3)]))
    for lane, (seed, number) in enumerate([(1, 0), (5, 3)]):
        images, labels = epoch(kept, seed=seed, number=number)
        assert torch.equal(torch.cat([images_KBCHW[lane] for images_KBCHW, _ in lanes]), images)
        assert torch.equal(torch.cat([labels_KB[lane] for _, labels_KB in lanes]), labels)
    plain = load(train_samples=150, flip=True)
    for ours, theirs in zip(kept.val.batches(64), plain.val.batches(64), strict=True):
        assert torch.equal(ours[0], theirs[0])  # and the normalisation is that of images as they are


def spec(augment: Any) -> StudySpec:
    return StudySpec.from_dict({"name": "s", "search": {"space": {"lr": [0.1]}}, "data": {"augment": augment}})


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("RandAugment", "data.augment must be a list, got 'RandAugment'"),
        ([3], r"data.augment must be a list of names and of tables with a name, such as .*; got 3"),
        ([{"magnitude": 9}], "tables with a name, such as .*; got {'magnitude': 9}"),
        (
            ["RandAugmnt"],
            r"data.augment: each name must be one of AugMix.*got 'RandAugmnt' \(did you mean 'RandAugment'",
        ),
        (["MixUp"], "data.augment: MixUp mixes the images of a batch; set training.mixup = 0.2"),
        (["ToTensor"], "data.augment: each name must be one of .*got 'ToTensor'"),
    ],
)
def test_a_name_that_is_none_is_found_in_the_study_file(augment: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec(augment)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (
            {"name": "RandAugment", "magnitud": 9},
            r"data.augment: magnitud is not an option of RandAugment, which takes num_ops, .*did you mean 'magnitude'",
        ),
        (
            {"name": "AutoAugment", "policy": "cifar"},
            "policy of AutoAugment must be one of imagenet, cifar10, svhn; got",
        ),
        ("RandomAffine", "data.augment: RandomAffine cannot be built with no options: TypeError: .*'degrees'"),
        ({"name": "RandomErasing", "p": 7}, "data.augment: RandomErasing cannot be built with p=7: ValueError"),
        ({"name": "RandomErasing", "scale": [2.0, 1.0]}, "RandomErasing cannot transform an image: RuntimeError"),
        ({"name": "RandomCrop", "size": 8}, r"RandomCrop must give a uint8 tensor of the image's shape \(3, 16, 16\)"),
        ("own_augment:shrink", r"own_augment:shrink must give .*, got torch.uint8 of shape \(3, 8, 8\)"),
        ("own_augment:floats", "own_augment:floats must give .*, got torch.float32 of"),
        ("own_augment:nothing", "own_augment:nothing must give .*, got NoneType"),
        ("own_augment:fails", "own_augment:fails cannot transform an image: RuntimeError: no such color"),
        ("own_augment:absent", "data.augment = 'own_augment:absent'.* must be one of"),
        ({"name": "own_augment:Mirror", "q": 1}, "q is not an option of own_augment:Mirror, which takes p"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_trained(
    augment: Any, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    assert spec([augment]).frozen()["data"]["augment"] == [augment]
    with pytest.raises(UserError, match=message) as raised:
        build(augment)
    assert "\n" not in str(raised.value)
    assert not [w for w in recwarn.list if "torchvision" in w.filename]  # garbage of other tests may warn, too


def test_own_augmentation_is_code_that_has_to_be_allowed() -> None:
    assert spec(["RandAugment", *OWN_ENTRIES]).names_of_code() == {
        "own_augment:brighten": "data.augment",
        "own_augment:Mirror": "data.augment",
    }
