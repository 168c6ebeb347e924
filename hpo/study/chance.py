"""What guessing is worth: the accuracy of a network that has learnt nothing, and how far luck takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpo.config.study_spec import StudySpec


def guess_accuracy(spec: StudySpec, metadata: Mapping[str, Any]) -> float | None:
    """Return the accuracy of always naming the largest class, or None where the trials classify nothing of ours.

    Only of the accuracy that is known, and of one that counts classes alike, whatever their sizes.

    Studies of older versions do not know how large their classes are; these count as equal.
    """
    classes = None if spec.objective else metadata.get("num_classes")
    if classes and spec.metric == "balanced_accuracy":
        return 1 / float(classes)
    if spec.metric != "val_accuracy":
        return None
    return float(metadata.get("guess_accuracy", 1 / classes)) if classes else None


def lucky_accuracy(spec: StudySpec, metadata: Mapping[str, Any]) -> float | None:
    """Return an accuracy that guessing may have by luck: above it, something is learnt; None as in `guess_accuracy`."""
    guess = guess_accuracy(spec, metadata)
    return None if guess is None else guess + standard_error(guess, metadata["num_val"])


def counting_error(spec: StudySpec, metadata: Mapping[str, Any], value: float) -> float | None:
    """Return the standard error of a trial's value that the number of validation images alone makes.

    None where that is not known: of what is no share of the images, and of what a user's own loop measures.
    """
    num_val = metadata.get("num_val")
    return standard_error(value, num_val) if num_val and spec.metric in ("val_accuracy", "top5") else None


def standard_error(accuracy: float, num_images: int) -> float:
    """Return the standard error of an accuracy measured on so many images.

    By Agresti and Coull (1998), so that an accuracy of 100 % is not certain either.
    """
    count = num_images + 4
    share = (accuracy * num_images + 2) / count
    return math.sqrt(share * (1 - share) / count)
