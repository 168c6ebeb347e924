"""Metrics are what scikit-learn says of all validation images at once; one of a user's own is held to a number."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn import metrics as sklearn_metrics

from hpo.errors import UserError
from hpo.train.config import TrainingConfig
from hpo.train.metrics import (
    METRICS,
    check_metric,
    guess,
    is_percent,
    is_share,
    measure,
    metric_direction,
    needs_outputs,
)

GENERATOR = torch.Generator().manual_seed(0)
LABELS_N = torch.randint(0, 7, (300,), generator=GENERATOR)
LOGITS_NL = torch.randn(300, 7, generator=GENERATOR) + 2 * torch.nn.functional.one_hot(LABELS_N, 7)
SHARES_NL = LOGITS_NL.double().softmax(1).numpy()
BEST_N = LOGITS_NL.argmax(1).numpy()
EXPECTED = {
    "top5": sklearn_metrics.top_k_accuracy_score(LABELS_N, LOGITS_NL.numpy(), k=5),
    "macro_f1": sklearn_metrics.f1_score(LABELS_N, BEST_N, average="macro"),
    "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(LABELS_N, BEST_N),
    "auroc": sklearn_metrics.roc_auc_score(LABELS_N, SHARES_NL, multi_class="ovr"),
    "average_precision": sklearn_metrics.average_precision_score(LABELS_N, SHARES_NL),
}
# Of images that may be of several classes.
LABELS_NL = torch.nn.functional.one_hot(LABELS_N, 7).float().maximum((LOGITS_NL.roll(1, 0) > 1.2).float())
OF_SEVERAL = {
    "macro_f1": sklearn_metrics.f1_score(LABELS_NL, LOGITS_NL > 0, average="macro"),
    "auroc": sklearn_metrics.roc_auc_score(LABELS_NL, LOGITS_NL),
    "average_precision": sklearn_metrics.average_precision_score(LABELS_NL, LOGITS_NL),
}


@pytest.mark.parametrize("name", METRICS)
def test_metric_is_scikit_learns(name: str) -> None:
    assert needs_outputs(name) == (name in EXPECTED)
    measured = measure(name, LOGITS_NL, LABELS_N)
    assert measured == pytest.approx({name: EXPECTED[name]} if name in EXPECTED else {})
    assert metric_direction(TrainingConfig(metric=name)) == ("minimize" if name == "val_loss" else "maximize")


@pytest.mark.parametrize("name", METRICS)
def test_images_of_several_classes_have_scikit_learns_metrics_or_a_sentence(name: str) -> None:
    if METRICS[name].takes_several_labels:
        check_metric(name, num_classes=7, labels_N=LABELS_NL)
        measured = measure(name, LOGITS_NL, LABELS_NL)
        assert measured == pytest.approx({name: OF_SEVERAL[name]} if name in OF_SEVERAL else {})
        return
    with pytest.raises(UserError, match=r"training.metric must be one of auroc, average_precision, macro_f1, val_acc"):
        check_metric(name, num_classes=7, labels_N=LABELS_NL)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_class_without_a_validation_image_and_outputs_that_are_not_finite(name: str) -> None:
    some_N = LABELS_N != 3
    (value,) = measure(name, LOGITS_NL[some_N], LABELS_N[some_N]).values()
    assert 0.4 < value < 1
    (value,) = measure(name, torch.full((2, 7), math.inf), torch.tensor([0, 1])).values()
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("top5", 0.71),
        ("macro_f1", 0.14),
        ("balanced_accuracy", 1 / 7),
        ("auroc", 0.5),
        ("average_precision", 0.16),
    ],
)
def test_guessing_is_worth_what_constant_or_random_answers_are(name: str, expected: float) -> None:
    found = guess(name, priors_L=torch.bincount(LABELS_N).float() / 300, labels_N=LABELS_N)
    assert found["guess_value"] == pytest.approx(expected, abs=0.06)
    # Of a share of 300 images, or of an AUROC by Hanley and McNeil (1982), for 7 classes that are no more certain.
    assert 100 < found["num_effective"] < 2500
    constant = torch.zeros(300, dtype=torch.int64).index_fill(0, torch.arange(30), 1)
    value = guess(name, priors_L=torch.tensor([0.9, 0.1, *[0.0] * 5]), labels_N=constant)["guess_value"]
    assert value == {"top5": 1.0}.get(name, value)
    assert is_share(name)


def test_an_accuracy_is_shown_in_percent_and_no_metric_of_another_kind() -> None:
    assert [name for name in METRICS if is_percent(name)] == ["val_accuracy", "top5", "balanced_accuracy"]
    for name in ("my_accuracy", "acc", "val_acc", "val/Acc"):  # the names under which users' own loops report it
        assert is_percent(name)
        assert is_share(name)
    assert not is_percent("mistakes")
    assert not is_percent("acceleration")
    assert not is_percent("vacc")
    assert not guess("val_loss", priors_L=torch.ones(7) / 7, labels_N=LABELS_N)


OWN_METRICS = """
def share(outputs, labels):
    return (outputs.argmax(1) == labels).float().mean()

def nothing(outputs, labels):
    return None

def huge(outputs, labels):
    return 10**400

def raises(outputs, labels):
    return 1 / 0
"""


def test_a_metric_of_ones_own_goes_by_the_functions_name(own_code: Path) -> None:
    (own_code / "own_metrics.py").write_text(OWN_METRICS)
    expected = {"share": float((LABELS_N.numpy() == BEST_N).mean())}
    assert measure("own_metrics:share", LOGITS_NL, LABELS_N) == pytest.approx(expected)
    training = TrainingConfig(metric="own_metrics:share", metric_direction="minimize")
    assert metric_direction(training) == "minimize"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_metrics:nothing", "'own_metrics:nothing' must return a finite number, got None"),
        ("own_metrics:huge", "'own_metrics:huge' must return a finite number, got 1000"),
        ("own_metrics:raises", "'own_metrics:raises' failed: ZeroDivisionError"),
        ("top5", "'top5' needs more than 5 classes, got 5"),
        ("auc", "must be one of auroc.*got 'auc'"),
    ],
)
def test_what_is_no_metric_is_refused(name: str, message: str, own_code: Path) -> None:
    (own_code / "own_metrics.py").write_text(OWN_METRICS)
    with pytest.raises(UserError, match=f"training.metric .*{message}") as caught:
        check_metric(name, num_classes=5, labels_N=LABELS_N.clamp(max=4))
    assert "\n" not in str(caught.value)
