"""Averaged weights: what is averaged, and that they are validated, kept and tested in place of those in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.weight_average import WeightAverage
from tests.train.engines.trials import BATCH_NORM, train, trial


def test_an_average_is_exponential_once_its_decay_has_risen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = WeightAverage(copy.deepcopy(model), decay=0.9)
    expected = copy.deepcopy(model).state_dict()
    for step in range(100):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3))
        average.update(model, step=step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            is_count = not tensor.is_floating_point()
            expected[name] = tensor.clone() if is_count else decay * expected[name] + (1 - decay) * tensor
    for name, tensor in average.network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_average_is_validated_kept_and_tested(ema: float | None) -> None:
    config = trial(model=BATCH_NORM, ema=ema, report_test_accuracy=True, metric="auroc")
    engine = PlainEngine(device="cpu")
    last = train(engine, config)
    in_training = last.state.get("in_training")
    assert (in_training is None) == (ema is None)
    tested = engine.test_metrics(config, last)
    assert tested.keys() == {"test_accuracy", "test_loss", "test_auroc"}
    assert tested["test_accuracy"] == last.results[-1].test_accuracy
    if in_training is not None:
        assert any(not torch.equal(last.state["model"][name], tensor) for name, tensor in in_training.items())
        plain = train(PlainEngine(device="cpu"), trial(model=BATCH_NORM))
        for name, tensor in plain.state["model"].items():
            assert torch.equal(in_training[name], tensor)  # the average changes nothing of the training
        assert [r.train_loss for r in last.results] == [r.train_loss for r in plain.results]
        assert [r.val_loss for r in last.results] != [r.val_loss for r in plain.results]
