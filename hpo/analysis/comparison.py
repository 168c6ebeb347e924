"""Studies side by side: the best learning rate of each, in what they differ, and what can and cannot be concluded.

Two best learning rates are told apart where the interval of their ratio does not hold 1: that of the ratios of all
pairs of what their responses say that each may be. (That two intervals do not overlap is a much stricter rule: Schenker
and Gentleman, The American Statistician 55, 2001.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hpo.analysis.answer import Best
from hpo.analysis.response import CONFIDENCE, Response
from hpo.analysis.trials import best_trial
from hpo.analysis.warnings import find_warnings
from hpo.config.sections import STUDY_NEUTRAL_KEYS
from hpo.config.study_file import flatten
from hpo.study.records import StudyRecord, TrialRecord
from hpo.train.optim import OPTIMIZERS, SCHEDULES

# What is not what a study asks: how it was searched, and which of many equal draws it was.
NOT_COMPARED = (
    "name", "search.", "pruner.", "confirm.", "engine.", "checkpoints.", "training.seed",
    "training.report_test_accuracy", "data.validation_fraction", "data.split_seed", "data.train_fraction",
)  # fmt: skip
UNBOUNDED = "edge-of-range"  # the warning of an interval that may reach further than what was searched


@dataclass(frozen=True)
class ComparedStudy:
    """A study, or one combination of the lists that it searched. Learning rates are None where too little is known."""

    study: str
    params: Mapping[str, Any]  # of the combination
    factors: Mapping[str, Any]  # its settings in which the sides are not all alike
    lr: float | None
    interval: tuple[float, float] | None
    ratio: tuple[float, float] | None  # of its best learning rate and the first side's, with CONFIDENCE
    plateau: tuple[float, float] | None
    edge: float | None
    value: float | None  # expected at the best learning rate
    metric: str
    confirmed: float | None  # the learning rate that won a confirmation, where that was of this combination
    num_trials: int
    warnings: Sequence[str]  # their kinds


@dataclass(frozen=True)
class Comparison:
    """The sides, the first one being what the others are compared with, and sentences on what follows from them."""

    sides: Sequence[ComparedStudy]
    conclusions: Sequence[str]
    caveats: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compared_name(side: ComparedStudy) -> str:
    """The study and, where it has several combinations of lists, this one's."""
    listed = ", ".join(f"{key} {_setting_text(value)}" for key, value in side.params.items())
    return f"{side.study} ({listed})" if listed else side.study


def changed_settings(first: ComparedStudy, side: ComparedStudy) -> dict[str, Any]:
    """The settings in which a side differs from the first one; not those that follow from another one of their section.

    Momentum is what an SGD has and an Adam has not, and a width what one network has and another has not.
    """
    changed = {key: value for key, value in side.factors.items() if value != first.factors.get(key)}
    common = {key for key in changed if key in first.factors and key in side.factors}
    sections = {key.partition(".")[0] for key in common}
    return {key: value for key, value in changed.items() if key in common or key.partition(".")[0] not in sections}


def compare_answers(answers: Sequence[tuple[StudyRecord, Sequence[TrialRecord], Best]]) -> Comparison:
    """The comparison of studies, each with its trials and its answer."""
    sides, settings, responses = [], [], []
    for study, trials, found in answers:
        known = {key: value for key, value in flatten(study.spec.frozen()) if _is_compared(key)}
        if "num_train" in study.facts:
            known["data.train_samples"] = study.facts["num_train"]  # whichever of two settings said it, or neither
        for params, response in _responses(study, found):
            listed = {_setting_key(key): value for key, value in params.items()}
            settings.append(_used_settings(known | listed))
            sides.append(_compared_study(study, trials, found, params, response))
            responses.append(response)
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
    sides = [
        replace(side, factors={key: one[key] for key in differing if key in one}, ratio=_ratio(responses[0], response))
        for side, one, response in zip(sides, settings, responses, strict=True)
    ]
    sides[0] = replace(sides[0], ratio=None)
    first, *others = sides
    conclusions = [sentence for side in others for sentence in _conclude(first, side)]
    known_sides = [side for side in sides if side.plateau is not None]
    if len(known_sides) > 1:
        conclusions.append(_conclude_on_all(known_sides))
    return Comparison(sides, conclusions, _caveats(sides))


def _responses(study: StudyRecord, found: Best) -> list[tuple[Mapping[str, Any], Response | None]]:
    if found.responses:
        return list(found.responses)
    return [(study.spec.search.listed_values(found.params), None)]


def _ratio(first: Response | None, other: Response | None) -> tuple[float, float] | None:
    import numpy as np

    if first is None or other is None:
        return None
    ratios = np.divide.outer(np.array(other.tops), np.array(first.tops))
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _compared_study(
    study: StudyRecord, trials: Sequence[TrialRecord], found: Best, params: Mapping[str, Any], response: Response | None
) -> ComparedStudy:
    alike = [t for t in trials if t.kind == "search" and study.spec.search.listed_values(t.params) == params]
    lead = best_trial(study, alike)
    beware = find_warnings(study, alike, lead, response) if lead is not None else []
    return ComparedStudy(
        study=study.name,
        params=params,
        factors={},
        lr=response.best if response else None,
        interval=response.interval if response else None,
        ratio=None,
        plateau=response.plateau if response else None,
        edge=response.edge.lr if response and response.edge else None,
        value=response.value if response else found.value,
        metric=study.spec.metric,
        num_trials=len(alike),
        confirmed=found.lr
        if found.confirmation and study.spec.search.listed_values(found.recommended) == params
        else None,
        warnings=[warning.kind for warning in beware],
    )


def _conclude(first: ComparedStudy, side: ComparedStudy) -> list[str]:
    changed = changed_settings(first, side)
    instead = {
        key: f"{_setting_text(value)} instead of {_setting_text(first.factors.get(key))}"
        for key, value in changed.items()
    }
    what = " and ".join(f"{key} {values}" for key, values in instead.items())
    subject = f"{compared_name(side)}{f', with {what},' if what else ''}"
    if side.ratio is None or first.lr is None or side.lr is None:
        return [
            f"{subject} cannot be compared: too few of its learning rates or of {compared_name(first)}'s have a value"
        ]
    low, high = side.ratio
    sentence = f"{subject} has its best learning rate at {side.lr:.2g}, "
    times = f"{_factor_text(low)} to {_factor_text(high)} times"
    if low <= 1 <= high:
        sentence += f"not told apart from {first.lr:.2g} of {compared_name(first)}: {times} that is possible"
    else:
        sentence += f"{times} {first.lr:.2g} of {compared_name(first)}"
    if len(changed) > 1:
        sentence += f"; it differs in {len(changed)} settings, and which of them does it cannot be told"
    return [sentence]


def _conclude_on_all(sides: Sequence[ComparedStudy]) -> str:
    """Whether one learning rate is as good as the best on every side."""
    low = max(side.plateau[0] for side in sides if side.plateau)
    high = min(side.plateau[1] for side in sides if side.plateau)
    if low <= high:
        return (
            f"learning rates from {low:.2g} to {high:.2g} are not told apart from the best in any of these {len(sides)}"
        )
    return f"no learning rate is as good as the best in all of these {len(sides)}"


def _caveats(sides: Sequence[ComparedStudy]) -> list[str]:
    caveats = []
    for side in sides:
        if side.confirmed is not None and side.interval and not side.interval[0] <= side.confirmed <= side.interval[1]:
            caveats.append(
                f"{compared_name(side)}: {side.confirmed:.2g} was confirmed, which its interval does not hold"
            )
        if UNBOUNDED in side.warnings:
            caveats.append(
                f"{compared_name(side)}: the best rate may lie beyond what was searched; its interval is a bound"
            )
        if "still-rising" in side.warnings:
            caveats.append(
                f"{compared_name(side)}: its curves are still rising; after more epochs its best rate may be another"
            )
    if len({side.metric for side in sides}) > 1:
        caveats.append("the values are of different metrics; only learning rates can be compared")
    caveats.append(
        f"each best rate is in its interval with {CONFIDENCE:.0%} confidence, for the one split of the data that its "
        "study has"
    )
    return caveats


def _setting_text(value: Any) -> str:
    return "the default" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _factor_text(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"


def _setting_key(key: str) -> str:
    """A key of the search space as the setting that it stands for."""
    return key if key.startswith(("model.", "data.")) else f"training.{key}"


def _used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the settings of other optimizers and schedules than the one that is used."""
    mine = {"name"}
    for table, kind in ((OPTIMIZERS, "training.optimizer"), (SCHEDULES, "training.schedule")):
        entry = table.get(str(settings.get(kind)))
        mine |= set(entry.keys) if entry else set()
    others = {key for table in (OPTIMIZERS, SCHEDULES) for entry in table.values() for key in entry.keys} - mine
    return {key: value for key, value in settings.items() if key.removeprefix("training.") not in others}


def _is_compared(key: str) -> bool:
    return key not in STUDY_NEUTRAL_KEYS and not key.startswith(NOT_COMPARED)
