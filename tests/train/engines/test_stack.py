"""A lone row is doubled where digits are kept, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.stack import TrialStack

CONFIG = TrialConfig(
    model=ModelConfig(options={"width": 0.05}),
    data=DataConfig(train_samples=150),
    training=TrainingConfig(lr=1e-2, batch_size=64, epochs=2),
    seed=3,
)


@contextmanager
def counted_rows(stack: TrialStack) -> Iterator[list[int]]:
    """Yield the number of rows of each step in here."""
    rows: list[int] = []
    step = stack.step

    def counting(images_KBCHW: Tensor, labels_KB: Tensor, factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        rows.append(len(images_KBCHW))
        return step(images_KBCHW, labels_KB, factors)

    stack.step = counting  # type: ignore[method-assign]
    yield rows


def stack_on(device: torch.device) -> TrialStack:
    stack = TrialStack(CONFIG, data=DatasetCache(device=device).get(CONFIG.data), device=device, convolution="grouped")
    stack.admit(CONFIG)
    return stack


def test_a_lone_row_is_trained_twice_on_a_cpu() -> None:
    stack = stack_on(torch.device("cpu"))
    with counted_rows(stack) as rows:
        stack.run_epoch()
    assert set(rows) == {2}
    assert len(stack) == 1


def test_a_lone_row_is_trained_once_where_digits_are_not_promised() -> None:
    stack = stack_on(torch.device("cpu"))
    stack._keeps_digits = False
    plain = PlainEngine(device="cpu")
    plain.admit(CONFIG)
    with counted_rows(stack) as rows:
        for _ in range(2):
            assert stack.run_epoch()[0].val_loss == pytest.approx(plain.run_epoch()[0].val_loss, rel=1e-4)
    assert set(rows) == {1}
    assert len(stack) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_lone_row_is_trained_once_on_a_gpu() -> None:
    stack = stack_on(torch.device("cuda"))
    with counted_rows(stack) as rows:
        stack.run_epoch()
    assert set(rows) == {1}
