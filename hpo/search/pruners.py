"""The pruners as a lookup table: their options and how each is built; importing this loads no Optuna."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hpo.search.race import course_of

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

    from hpo.search.config import SearchSettings

INTERLEAVED_TRIALS = 8  # trials that take turns of an epoch where the pruner compares them early: it learns sooner


@dataclass(frozen=True)
class PrunerEntry:
    """One entry of PRUNERS: its options with their defaults (None: see `build`), built from them and max_epochs.

    `compares` tells what of other trials the pruner reads: the "values" of complete ones, what it has noted of all at
    its "rungs", or nothing. `judges` tells whether the pruner may stop trials after an epoch. After other epochs nobody
    waits for it. A rung that was passed unjudged, in an epoch reported late, is judged with the next one.
    """

    defaults: Mapping[str, Any]
    build: Callable[[dict[str, Any], int], BasePruner]
    about: str = field(kw_only=True)  # in the reference
    judges: Callable[[dict[str, Any], int], bool] = lambda options, epoch: True
    compares: Literal["values", "rungs"] | None = None
    compares_early: bool = False  # compares trials in training, and does better with several of them alongside


def _none(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import NopPruner

    return NopPruner()


def _percentile(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import PercentilePruner

    # Optuna's percentile keeps that percentage of the trials; so does ours.
    return PercentilePruner(
        options.get("percentile", 50.0),
        n_startup_trials=options["startup_trials"],
        n_warmup_steps=options["warmup_epochs"],
    )


def _asha(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import SuccessiveHalvingPruner

    return SuccessiveHalvingPruner(
        min_resource=options["min_epochs"], reduction_factor=options["reduction_factor"], bootstrap_count=0
    )


def _hyperband(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import HyperbandPruner

    # With max_resource="auto" nothing is pruned until one trial has completed.
    return HyperbandPruner(
        min_resource=min(options["min_epochs"], max_epochs),
        max_resource=max_epochs,
        reduction_factor=options["reduction_factor"],
    )


def _patient(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import PatientPruner

    return PatientPruner(None, patience=options["patience"], min_delta=options["min_delta"])


def _threshold(options: dict[str, Any], max_epochs: int) -> BasePruner:
    from optuna.pruners import ThresholdPruner

    return ThresholdPruner(lower=options["lower"], upper=options["upper"], n_warmup_steps=options["warmup_epochs"])


def _at_rungs(options: dict[str, Any], epoch: int) -> bool:
    """Return whether epoch is min_epochs x reduction_factor^k, for k = 0, 1, ..."""
    rung = options["min_epochs"]
    while rung < epoch:
        rung *= options["reduction_factor"]
    return bool(rung == epoch)


PRUNERS: dict[str, PrunerEntry] = {
    "none": PrunerEntry(
        {},
        _none,
        judges=lambda options, epoch: False,
        about="drops nothing",
    ),
    "median": PrunerEntry(
        {"startup_trials": 5, "warmup_epochs": 1},
        _percentile,
        compares="values",
        about="drops a trial below the median of complete trials at the same epoch",
    ),
    "percentile": PrunerEntry(
        {"percentile": 50.0, "startup_trials": 5, "warmup_epochs": 1},
        _percentile,
        compares="values",
        about="keeps the trials among the best percentage of complete trials at the same epoch",
    ),
    "asha": PrunerEntry(
        {"min_epochs": 1, "reduction_factor": 3},
        _asha,
        _at_rungs,
        compares="rungs",
        compares_early=True,
        about="successive halving: at each rung, one trial in `reduction_factor` is trained further",
    ),
    "hyperband": PrunerEntry(
        {"min_epochs": 1, "reduction_factor": 3},
        _hyperband,
        _at_rungs,
        compares="rungs",
        compares_early=True,
        about="several successive halvings side by side, with different first rungs",
    ),
    "patient": PrunerEntry(
        {"patience": 3, "min_delta": 0.0},
        _patient,
        about="drops a trial that has not improved for some epochs",
    ),
    "threshold": PrunerEntry(
        {"lower": None, "upper": None, "warmup_epochs": 1},
        _threshold,
        about="drops a trial whose value is below or above a bound",
    ),
}


def build_pruner(spec: SearchSettings) -> BasePruner:
    """Return the study's pruner, with our defaults where the study file is silent."""
    return PRUNERS[spec.pruner.name].build(_pruner_options(spec), spec.max_epochs)


def may_prune_after(epoch: int, spec: SearchSettings) -> bool:
    """Return whether the study's pruner or its race may stop a trial that has reached this epoch."""
    course = course_of(spec)
    if course is not None:
        return epoch in course.rungs
    return PRUNERS[spec.pruner.name].judges(_pruner_options(spec), epoch)


def is_rung(epoch: int, spec: SearchSettings) -> bool:
    """Return whether this is one of the few epochs at which the study's pruner judges.

    A pruner that judges after every epoch has no rungs.
    """
    entry = PRUNERS[spec.pruner.name]
    return entry.judges is _at_rungs and entry.judges(_pruner_options(spec), epoch)


def _pruner_options(spec: SearchSettings) -> dict[str, Any]:
    return {**PRUNERS[spec.pruner.name].defaults, **spec.pruner.model_dump(exclude={"name"}, exclude_none=True)}
