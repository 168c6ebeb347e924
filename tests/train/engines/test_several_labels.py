"""Images with a label for each class train in the plain engine, and the dead are told from the slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.train.config import TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.captured_optimizers import NotCapturable
from hpo.train.engines.plain import PlainEngine
from tests.train.engines.trials import ARTICLE, CPU, assert_equal, train, trial

# Digits by what is true of them: they are odd, large, primes, and (rarely) a nine.
QUESTIONS = """
import numpy
from sklearn.datasets import load_digits

def digits():
    found = load_digits()
    images = numpy.kron(found.images * 15, numpy.ones((4, 4))).astype("uint8")[:, None]
    is_prime = numpy.isin(found.target, [2, 3, 5, 7])
    labels = numpy.stack([found.target % 2, found.target > 4, is_prime, found.target == 9], 1)
    return (images[:800], labels[:800]), (images[800:900], labels[800:900])
"""


@pytest.fixture
def of_digits(own_code: Path) -> Any:
    (own_code / "own_questions.py").write_text(QUESTIONS)

    def make(**training: Any) -> TrialConfig:
        data = {"name": "own_questions:digits", "train_samples": None, "flip": False, "crop": 0}
        return trial(model=ARTICLE, data=data, **{"loss": "bce", "metric": "auroc"} | training)

    return make


def test_it_learns_and_resumes_bit_for_bit_with_mixed_images_too(of_digits: Any) -> None:
    config = of_digits(mixup=0.2, epochs=6, label_smoothing=0.1)
    engine = PlainEngine(device="cpu")
    engine.admit(config)
    for _ in range(3):
        engine.run_epoch()
    half = engine.checkpoint(0)
    there = PlainEngine(device="cpu")
    there.admit(config, half)
    for _ in range(3):
        there.run_epoch()
    whole = train(PlainEngine(device="cpu"), config)
    assert_equal(there.checkpoint(0), whole)
    last = whole.results[-1]
    assert last.measured["auroc"] > 0.8
    assert 0.5 < last.val_accuracy <= 1
    assert 0.5 < last.train_accuracy <= 1
    tested = engine.test_metrics(config, whole)
    assert tested["test_auroc"] > 0.8


def test_the_dead_are_told_from_the_slow(of_digits: Any) -> None:
    for lr, is_dead in ((1.0, True), (1e-7, False)):
        results = train(PlainEngine(device="cpu"), of_digits(lr=lr)).results
        assert (results[-1].diverged is not None) == is_dead, lr


def test_a_captured_lane_says_that_it_has_one_class_an_image(of_digits: Any) -> None:
    config = of_digits(metric="val_loss")
    lanes = CapturedLanes(device=CPU, dataset_cache=DatasetCache(device=torch.device("cpu")))
    with pytest.raises(NotCapturable, match="its images have several labels each"):
        lanes.admit(config, None)
