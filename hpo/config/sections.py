"""The tables of a study file beside [model], [data], [training], as frozen models; spec.py has the rules for them."""

from __future__ import annotations

from typing import Any

from hpo.search.config import Section


class ObjectiveSpec(Section):
    """A user's own training loop, and which of the metrics it reports is searched for."""

    function: str
    metric: str = "val_accuracy"
    direction: str = "maximize"


class EngineSpec(Section):
    """How a device is shared among trials."""

    lanes: Any = "auto"  # trials that a worker trains at once; auto: as many as are fastest, measured


class ConfirmSpec(Section):
    """How many of the best learning rates are trained again after the search, each on how many fresh seeds."""

    top: int = 3
    seeds: int = 5


class CheckpointsSpec(Section):
    """Where trials in training are kept, so that another worker can go on with them, and how many of the best stay."""

    url: str | None = None  # None: beside the study's logs, which other machines do not see
    keep_best: int = 1
