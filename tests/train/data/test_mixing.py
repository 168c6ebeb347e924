"""Mixed batches: shares and labels agree with the pixels, and follow from the seed, the epoch and the step alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpo.train.config import TrainingConfig
from hpo.train.data.mixing import Mix, mix_batch

LABELS = torch.arange(7)


def mixed(step: int, *, seed: int = 1, epoch: int = 0, **training: Any) -> tuple[Tensor, Mix]:
    """Return a mixed batch of seven images, each of its own level, so that a pixel says of which it is."""
    images = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    images_BCHW, mix = mix_batch(images, LABELS, TrainingConfig(**training), seed=seed, epoch=epoch, step=step)
    assert mix is not None
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert images[:, 0, 0, 0].tolist() == LABELS.tolist()
    return images_BCHW, mix


@pytest.mark.parametrize("training", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 0.5}], ids=str)
def test_the_share_is_that_of_the_pixels(training: dict[str, Any]) -> None:
    shares, num_pasted = [], 0
    for step in range(40):
        images_BCHW, mix = mixed(step, **training)
        assert torch.equal(mix.labels_B, LABELS.flip(0))
        expected = mix.share * LABELS + (1 - mix.share) * LABELS.flip(0)
        assert images_BCHW.mean((1, 2, 3)).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        num_pasted += set(images_BCHW[0].flatten().tolist()) <= {0.0, 6.0}
        shares.append(mix.share)
    assert min(shares) < 0.4
    assert max(shares) > 0.6
    assert (num_pasted == 40) == ("mixup" not in training)
    assert (num_pasted > 2) == ("cutmix" in training)


def test_what_is_drawn_follows_from_seed_epoch_and_step() -> None:
    images, mix = mixed(3, mixup=1.0)
    torch.manual_seed(5)
    again, same = mixed(3, mixup=1.0)
    assert torch.equal(images, again)
    assert same.share == mix.share
    others = [mixed(4, mixup=1.0), mixed(3, seed=2, mixup=1.0), mixed(3, epoch=1, mixup=1.0)]
    assert len({mix.share, *(other.share for _, other in others)}) == 4


def test_without_mixing_the_batch_is_as_it_is() -> None:
    images = torch.rand(4, 1, 8, 8)
    result, mix = mix_batch(images, LABELS[:4], TrainingConfig(), seed=0, epoch=0, step=0)
    assert result is images
    assert mix is None
