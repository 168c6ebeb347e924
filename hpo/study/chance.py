"""What guessing is worth: the value of a network that has learnt nothing, and how far luck takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpo.config.study_spec import StudySpec
from hpo.train.metrics import is_share


def guess_value(spec: StudySpec, metadata: Mapping[str, Any]) -> float | None:
    """Return what the metric is without having learnt anything, or None where that is not known.

    A loop of a user's own declares it.
    Of an accuracy, that is naming the largest class. Studies of older versions do not know how large their classes are;
    these count as equal.
    """
    if spec.objective is not None and spec.objective.guess is not None:
        return spec.objective.guess
    classes = metadata.get("num_classes") if spec.has_recipe else None
    if not classes:
        return None
    if spec.metric == "val_accuracy":
        return float(metadata.get("guess_accuracy", 1 / classes))
    known = metadata.get("guess_value", 1 / classes if spec.metric == "balanced_accuracy" else None)
    return None if known is None else float(known)


def lucky_value(spec: StudySpec, metadata: Mapping[str, Any]) -> float | None:
    """Return a value that guessing may have by luck: where it is better, something is learnt; None as `guess_value`.

    Without a number of validation images, luck is not known: it is what guessing is worth.
    """
    guess = guess_value(spec, metadata)
    if guess is None or not is_share(spec.metric) or "num_val" not in metadata or not 0 <= guess <= 1:
        return guess
    return guess + (counting_error(spec, metadata, guess) or standard_error(guess, metadata["num_val"]))


def counting_error(spec: StudySpec, metadata: Mapping[str, Any], value: float) -> float | None:
    """Return the standard error of a trial's value that the number of validation images alone makes.

    None where that is not known: of a loss, and of a metric of a user's own.
    """
    is_counted = spec.metric in ("val_accuracy", "top5")
    num_images = metadata.get("num_val" if is_counted else "num_effective")
    return standard_error(value, num_images) if num_images and 0 <= value <= 1 else None


def standard_error(accuracy: float, num_images: int) -> float:
    """Return the standard error of an accuracy measured on so many images.

    By Agresti and Coull (1998), so that an accuracy of 100 % is not certain either.
    """
    count = num_images + 4
    share = (accuracy * num_images + 2) / count
    return math.sqrt(share * (1 - share) / count)
