"""Studies that a store has had since before there were all settings: how they read their images stays as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.config.study_spec import StudySpec
from hpo.train.config import EARLIER_RESIZE, IMAGE_FOLDER
from hpo.train.metrics import METRICS


def stored_spec(settings: Mapping[str, Any]) -> StudySpec:
    """Return the spec of a study in a store, whose settings are those that `StudySpec.frozen` gave when it was made.

    Raises UserError where a setting is wrong.
    """
    data = settings.get("data") if isinstance(settings, dict) else None
    if isinstance(data, dict) and data.get("name") == IMAGE_FOLDER:
        settings = {**settings, "data": {"resize": EARLIER_RESIZE, **data}}
    training = settings.get("training") if isinstance(settings, dict) else None
    if isinstance(training, dict) and training.get("metric") in METRICS:  # whose direction did not matter
        kept = {key: value for key, value in training.items() if key != "metric_direction"}
        settings = {**settings, "training": kept}
    return StudySpec.from_dict(settings)


def adopt_stored_data(spec: StudySpec, stored: StudySpec) -> StudySpec:
    """Return the spec with the stored study's way to read its images where it names none of its own.

    Args:
        spec: The spec of whoever runs the study again, perhaps by the file that it was made from.
        stored: The spec in the store.
    """
    optional = ("resize", "validation_fraction")
    left_out = {name: getattr(stored.data, name) for name in optional if getattr(spec.data, name) is None}
    return spec.model_copy(update={"data": dataclasses.replace(spec.data, **left_out)})


def adopt_learned_points(spec: StudySpec, stored: StudySpec) -> StudySpec:
    """Return the spec with the points that the stored study has learned from earlier ones, if it names the same ones.

    Args:
        spec: The spec of whoever runs the study again, perhaps by the file that it was made from.
        stored: The spec in the store.
    """
    own, learned = spec.search.try_first, stored.search.try_first
    if not spec.search.learn_from or spec.search.learn_from != stored.search.learn_from:
        return spec
    return with_first_points(spec, learned[len(own) :]) if own == learned[: len(own)] else spec


def with_first_points(spec: StudySpec, points: Sequence[Mapping[str, Any]]) -> StudySpec:
    """Return the spec with further points to try first.

    Raises UserError where a point is not in the space, or where there are more of them than trials.
    """
    settings = spec.frozen()
    settings["search"]["try_first"] = [*spec.search.try_first, *map(dict, points)]
    return StudySpec.from_dict(settings)
