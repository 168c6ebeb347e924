"""Metrics that a search can optimize: the table of those with a name, and functions of users' own.

scikit-learn counts, from the outputs for all validation images at once. Nothing that takes long is imported before a
metric is computed, because reading a study file needs the table.
Shapes: N images, L classes.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hpo.errors import UserError, unknown_name
from hpo.train.config import TrainingConfig, metric_name
from hpo.train.imports import as_finite, describe_error, import_object, is_import_path

if TYPE_CHECKING:
    from torch import Tensor

TOP = 5  # classes that the metric top5 looks among
NUM_GUESSES = 16  # random answers that say what guessing is worth
ACCURACY_NAME = re.compile(r"accuracy$|(^|[^a-z])acc$", re.IGNORECASE)  # also val_acc, as LightningModules log it
MAX_GUESSED_IMAGES = 2000  # that these are about: AUROC takes a millisecond for each class of so many


@dataclass(frozen=True, kw_only=True)
class Metric:
    """An entry of METRICS; `keys` are the keys of [training] that it reads.

    A `form` of "share" says that values lie between 0 and 1, and one of "percent" that they are also shown so.
    """

    direction: str = "maximize"
    form: Literal["percent", "share", "any"] = "share"
    count: Callable[[Tensor, Tensor], float] | None = None  # of outputs (N, L) and labels (N,); None: engines do
    keys: frozenset[str] = frozenset()
    takes_several_labels: bool = True  # of an image
    about: str = ""  # in the reference


def metric_direction(training: TrainingConfig) -> str:
    """Return whether to `maximize` or `minimize` the metric."""
    entry = METRICS.get(training.metric)
    return training.metric_direction if entry is None else entry.direction


def is_percent(name: str) -> bool:
    """Return whether values of a metric, by the name that it is reported under, are shares of images, as accuracies."""
    return METRICS[name].form == "percent" if name in METRICS else ACCURACY_NAME.search(name) is not None


def is_share(name: str) -> bool:
    """Return whether values of a metric, by the name that it is reported under, lie between 0 and 1."""
    return METRICS[name].form != "any" if name in METRICS else ACCURACY_NAME.search(name) is not None


def needs_outputs(metric: str) -> bool:
    """Return whether a metric is computed from the outputs for all validation images."""
    return metric not in METRICS or METRICS[metric].count is not None


def measure(metric: str, logits_NL: Tensor | None, labels_N: Tensor) -> dict[str, float]:
    """Return the metric by its name where the engines do not count it themselves; nan where an output is not finite.

    Raises UserError for an unknown metric, and a user's own that returns no finite number.
    """
    if not needs_outputs(metric):
        return {}
    assert logits_NL is not None, "the outputs were not kept"
    if not logits_NL.isfinite().all():
        return {metric_name(metric): math.nan}
    count = METRICS[metric].count if metric in METRICS else _own_metric(metric)
    assert count is not None
    return {metric_name(metric): count(logits_NL, labels_N.cpu())}


def guess(metric: str, *, priors_L: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Return what guessing is worth in a metric of the table whose values are shares; nothing for any other.

    Args:
        metric: The metric.
        priors_L: The share of each class in the training images.
        labels_N: The labels of the validation images.

    Returns:
        `guess_value`: the value of a constant answer or of random ones, whichever is better. `num_effective`: of how
        many images a share would vary as much as random answers do, where that can be told.
    """
    import torch

    if metric not in METRICS or METRICS[metric].count is None:
        return {}
    some_N = labels_N[:: math.ceil(len(labels_N) / MAX_GUESSED_IMAGES)].cpu()
    shape, generator = (len(some_N), len(priors_L)), torch.Generator().manual_seed(0)
    drawn = [measure(metric, torch.randn(shape, generator=generator), some_N)[metric] for _ in range(NUM_GUESSES)]
    constant = measure(metric, priors_L.cpu().float().expand(shape), some_N)[metric]
    mean, variance = statistics.fmean(drawn), statistics.variance(drawn)
    found = {"guess_value": round(max(mean, constant), 4)}
    if variance > 0:
        found["num_effective"] = max(1, round(mean * (1 - mean) / variance * len(labels_N) / len(some_N)))
    return found


def check_metric(metric: str, *, num_classes: int, labels_N: Tensor) -> None:
    """Refuse a metric that cannot be computed for a data set with these validation labels. Raises UserError."""
    import torch

    several = sorted(name for name, entry in METRICS.items() if entry.takes_several_labels)
    if labels_N.dim() == 2 and metric in METRICS and metric not in several:
        raise UserError(
            f"training.metric must be one of {', '.join(several)}, or a function of your own, where images have a "
            f"label for each class; got {metric!r}"
        )
    if metric == "top5" and num_classes <= TOP:
        raise UserError(f"training.metric = 'top5' needs more than {TOP} classes, got {num_classes}")
    outputs_NL = torch.randn((len(labels_N), num_classes), generator=torch.Generator().manual_seed(0))
    measure(metric, outputs_NL, labels_N)


def _own_metric(name: str) -> Callable[[Tensor, Tensor], float]:
    setting = f"training.metric = {name!r}"
    if not is_import_path(name):
        raise unknown_name("training.metric", name, METRICS)
    function = import_object(name, setting="training.metric")

    def count(logits_NL: Tensor, labels_N: Tensor) -> float:
        try:
            returned: Any = function(logits_NL, labels_N)
        except Exception as error:  # whatever the user's function raises
            raise UserError(f"{setting} failed: {describe_error(error)}") from error
        value = as_finite(returned)
        if value is None:
            raise UserError(f"{setting} must return a finite number, got {returned!r}")
        return value

    return count


def _top5(logits_NL: Tensor, labels_N: Tensor) -> float:
    best_N5 = logits_NL.topk(TOP, dim=1).indices
    return float((best_N5 == labels_N[:, None]).any(1).double().mean())


def _macro_f1(logits_NL: Tensor, labels_N: Tensor) -> float:
    from sklearn.metrics import f1_score

    named = logits_NL.argmax(1) if labels_N.dim() == 1 else (logits_NL > 0).int()
    return float(f1_score(labels_N.int().numpy(), named.numpy(), average="macro", zero_division=0.0))


def _balanced_accuracy(logits_NL: Tensor, labels_N: Tensor) -> float:
    from sklearn.metrics import recall_score

    present = sorted(set(labels_N.tolist()))
    return float(recall_score(labels_N.numpy(), logits_NL.argmax(1).numpy(), labels=present, average="macro"))


def _auroc(logits_NL: Tensor, labels_N: Tensor) -> float:
    """Return the mean over the classes of the area under the curve of each class against the others."""
    from sklearn.metrics import roc_auc_score

    areas = [float(roc_auc_score(*of_class)) for of_class in _one_against_the_rest(logits_NL, labels_N)]
    return sum(areas) / len(areas) if areas else 0.5


def _average_precision(logits_NL: Tensor, labels_N: Tensor) -> float:
    """Return the mean over the classes of the average precision of each class against the others."""
    from sklearn.metrics import average_precision_score

    areas = [float(average_precision_score(*of_class)) for of_class in _one_against_the_rest(logits_NL, labels_N)]
    return sum(areas) / len(areas) if areas else 0.0


def _one_against_the_rest(logits_NL: Tensor, labels_N: Tensor) -> Iterator[tuple[Any, Any]]:
    """Yield which images are of a class, and their outputs for it, of each class that some images have, but not all."""
    shares_NL = (logits_NL.double().softmax(1) if labels_N.dim() == 1 else logits_NL.double()).numpy()
    for label in range(logits_NL.shape[1]):
        is_of_class_N = (labels_N == label if labels_N.dim() == 1 else labels_N[:, label] > 0).numpy()
        if is_of_class_N.any() and not is_of_class_N.all():
            yield is_of_class_N, shares_NL[:, label]


METRICS: dict[str, Metric] = {
    "val_accuracy": Metric(
        form="percent",
        about="the share of validation images that get the right class, or of labels that are right",
    ),
    "val_loss": Metric(
        direction="minimize",
        form="any",
        about="the mean loss of the validation images",
    ),
    "top5": Metric(
        form="percent",
        count=_top5,
        takes_several_labels=False,
        about="the share of images whose class is among the five likeliest",
    ),
    "macro_f1": Metric(
        count=_macro_f1,
        about="F1, averaged over the classes",
    ),
    "balanced_accuracy": Metric(
        form="percent",
        count=_balanced_accuracy,
        takes_several_labels=False,
        about="the accuracy of each class, averaged over the classes",
    ),
    "auroc": Metric(
        count=_auroc,
        about="the area under the ROC curve of each class against the others, averaged over the classes",
    ),
    "average_precision": Metric(
        count=_average_precision,
        about="the average precision of each class against the others, averaged over the classes (mAP)",
    ),
}
