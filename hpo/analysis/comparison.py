"""Studies compared: the best learning rate of each, in what they differ, and what can and cannot be concluded.

Two best learning rates are told apart if the interval of their ratio does not hold 1. That interval is the one of the
ratios of all pairs of draws from their responses. (That two intervals do not overlap is a much stricter rule: Schenker
and Gentleman, The American Statistician 55, 2001.) The more studies are compared with the first one, the wider these
intervals are, so that all of them hold together with CONFIDENCE (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hpo.analysis.answer import Best, find_worse_rates
from hpo.analysis.response import CONFIDENCE, Response
from hpo.analysis.text import cell_text, interval_text, metric_value_text, number_text, params_text, rate_text
from hpo.analysis.trials import best_trial, search_trials
from hpo.analysis.warnings import find_warnings
from hpo.config.sections import STUDY_NEUTRAL_KEYS
from hpo.config.study_file import flatten
from hpo.config.trial_settings import PLUG_INS, keys_of, known_keys
from hpo.study.records import StudyRecord, TrialRecord
from hpo.system.html import html_paragraph, html_table

# Settings that do not change the question of a study: how it was searched, and which of many equal draws it was.
NOT_COMPARED = (
    "name",
    "search.",
    "pruner.",
    "confirm.",
    "engine.",
    "checkpoints.",
    "training.seed",
    "training.report_test_accuracy",
    "data.validation_fraction",
    "data.split_seed",
    "data.train_fraction",
)
UNBOUNDED = "edge-of-range"  # the warning that an interval may reach further than what was searched


@dataclass(frozen=True)
class ComparedStudy:
    """A study, or one combination of its listed parameters. Learning rates are None if too little is known.

    Attributes:
        study: The study.
        params: The values of the combination.
        factors: Its settings in which the compared studies are not all alike.
        lr: The learning rate to train with: the confirmed one if there is one, else the best one by the response.
        interval: Holds its best learning rate with 90 % confidence.
        ratio: Which factors between its best learning rate and the first study's are possible; all hold together with
            90 % confidence.
        plateau: The learning rates that do equally well.
        divergence_lr: The learning rate at which half of the trials diverge.
        value: The value that is expected there.
        metric: What the value is.
        confirmed: The learning rate that won a confirmation, if that was of this combination.
        num_trials: How many trials count.
        warnings: The kinds of its warnings.
    """

    study: str
    params: Mapping[str, Any]
    factors: Mapping[str, Any]
    lr: float | None
    interval: tuple[float, float] | None
    ratio: tuple[float, float] | None
    plateau: tuple[float, float] | None
    divergence_lr: float | None
    value: float | None
    metric: str
    confirmed: float | None
    num_trials: int
    warnings: Sequence[str]

    @property
    def label(self) -> str:
        """The study's name and, if it has several combinations of listed parameters, this one's values."""
        listed = ", ".join(f"{key} {_setting_text(value)}" for key, value in self.params.items())
        return f"{self.study} ({listed})" if listed else self.study

    def as_dict(self) -> dict[str, Any]:
        """Return the plain data, under the keys that JSON output has always had."""
        return {"edge" if key == "divergence_lr" else key: value for key, value in asdict(self).items()}


@dataclass(frozen=True, repr=False)
class Comparison:
    """Compared studies, all with the first one, and sentences on what follows from them.

    Attributes:
        studies: The compared studies, the first one first; one for each combination of listed parameters.
        conclusions: What can be concluded, a sentence each.
        caveats: What cannot be concluded, a sentence each.
    """

    studies: Sequence[ComparedStudy]
    conclusions: Sequence[str]
    caveats: Sequence[str]

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """The columns, and for each study a text for each of them."""
        columns = ["study", "with", "best rate", "90 % interval", "as good", "diverges at", self.studies[0].metric]
        rows = [
            [
                study.label,
                "" if study is self.studies[0] else params_text(changed_settings(self.studies[0], study)),
                cell_text(study.lr and rate_text(study.lr)),
                cell_text(study.interval and interval_text(study.interval)),
                cell_text(study.plateau and interval_text(study.plateau)),
                cell_text(study.divergence_lr and rate_text(study.divergence_lr)),
                "" if study.value is None else metric_value_text(study.value, study.metric),
            ]
            for study in self.studies
        ]
        return columns, rows

    def __repr__(self) -> str:
        rates = ", ".join(f"{study.label}: lr={cell_text(study.lr and rate_text(study.lr))}" for study in self.studies)
        return f"Comparison({rates})"

    def _repr_html_(self) -> str:
        sentences = [html_paragraph(line, bold=True) for line in self.conclusions]
        sentences += [html_paragraph(f"warning: {line}") for line in self.caveats]
        return html_table(*self.table) + "".join(sentences)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data for JSON."""
        return {
            "sides": [study.as_dict() for study in self.studies],
            "conclusions": self.conclusions,
            "caveats": self.caveats,
        }


def changed_settings(first: ComparedStudy, other: ComparedStudy) -> dict[str, Any]:
    """Return the settings of `other` that differ from `first`, without those that follow from another one.

    SGD has a momentum and Adam has none, and each network has its own options: a setting that only one of the two has
    is left out if a setting of the same section differs in both.
    """
    changed = {key: value for key, value in other.factors.items() if value != first.factors.get(key)}
    common = {key for key in changed if key in first.factors and key in other.factors}
    sections = {key.partition(".")[0] for key in common}
    return {key: value for key, value in changed.items() if key in common or key.partition(".")[0] not in sections}


def compare_answers(answers: Sequence[tuple[StudyRecord, Sequence[TrialRecord], Best]]) -> Comparison:
    """Return the comparison of studies, each given with its trials and its answer."""
    compared, settings, responses = [], [], []
    for study, trials, answer in answers:
        of_study = {key: value for key, value in flatten(study.spec.frozen()) if _is_compared(key)}
        if "num_train" in study.metadata:
            # Two settings can say it, or neither.
            of_study["data.train_samples"] = study.metadata["num_train"]
        for params, response in _responses(study, answer):
            listed = {_setting_key(key): value for key, value in params.items()}
            settings.append(_used_settings(of_study | listed))
            compared.append(_compared_study(study, trials, answer, params, response))
            responses.append(response)
    keys = dict.fromkeys(key for of_study in settings for key in of_study)
    differing = [key for key in keys if any(of_study.get(key) != settings[0].get(key) for of_study in settings)]
    compared = [
        replace(
            study,
            factors={key: of_study[key] for key in differing if key in of_study},
            ratio=_ratio(responses[0], response, num_compared=len(compared) - 1),
        )
        for study, of_study, response in zip(compared, settings, responses, strict=True)
    ]
    compared[0] = replace(compared[0], ratio=None)
    first, *others = compared
    conclusions = [_conclude(first, other) for other in others]
    known = [study for study in compared if study.plateau is not None]
    if len(known) > 1:
        conclusions.append(_conclude_on_all(known))
    return Comparison(compared, conclusions, _caveats(compared))


def _responses(study: StudyRecord, answer: Best) -> list[tuple[Mapping[str, Any], Response | None]]:
    if answer.responses:
        return list(answer.responses)
    return [(study.spec.search.listed_values(answer.params), None)]


def _ratio(first: Response | None, other: Response | None, *, num_compared: int) -> tuple[float, float] | None:
    import numpy as np

    if first is None or other is None:
        return None
    ratios = np.divide.outer(np.array(other.draws_of_best), np.array(first.draws_of_best))
    tail = (1 - CONFIDENCE) / 2 / max(num_compared, 1)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def _compared_study(
    study: StudyRecord,
    trials: Sequence[TrialRecord],
    answer: Best,
    params: Mapping[str, Any],
    response: Response | None,
) -> ComparedStudy:
    listed_values = study.spec.search.listed_values
    alike = [trial for trial in search_trials(trials) if listed_values(trial.params) == params]
    leader = best_trial(study, alike)
    confirmation = answer.confirmation if listed_values(answer.recommended) == params else None
    confirmed = answer.lr if confirmation else None
    is_told_apart = bool(find_worse_rates(study, confirmation))
    warnings = []
    if leader is not None:
        warnings = find_warnings(study, alike, leader, response, is_told_apart=is_told_apart)
    return ComparedStudy(
        study=study.name,
        params=params,
        factors={},
        lr=confirmed or (response.best if response else None),
        interval=response.interval if response else None,
        ratio=None,
        plateau=response.plateau if response else None,
        divergence_lr=response.divergence_lr.lr if response and response.divergence_lr else None,
        value=(confirmation or response or answer).value,
        metric=study.spec.metric,
        confirmed=confirmed,
        num_trials=len(alike),
        warnings=[warning.kind for warning in warnings],
    )


def _conclude(first: ComparedStudy, other: ComparedStudy) -> str:
    """Return what follows from two studies, in a sentence."""
    changed = changed_settings(first, other)
    changes = [
        f"{key} {_setting_text(value)} instead of {_setting_text(first.factors.get(key))}"
        for key, value in changed.items()
    ]
    subject = other.label
    if changes:
        subject += f", with {' and '.join(changes)},"
    if other.ratio is None or first.lr is None or other.lr is None:
        return f"{subject} cannot be compared: too few of its learning rates or of {first.label}'s have a value"
    low, high = map(_factor_text, other.ratio)
    sentence = f"{subject} has its best learning rate at {other.lr:.2g}, "
    if other.ratio[0] <= 1 <= other.ratio[1]:
        sentence += (
            f"which cannot be told apart from the {first.lr:.2g} of {first.label}: their ratio may be {low} to {high}"
        )
    else:
        sentence += f"{low} to {high} times the {first.lr:.2g} of {first.label}"
    if len(changed) > 1:
        sentence += f"; the two differ in {len(changed)} settings, so it is not known which one matters"
    return sentence


def _conclude_on_all(studies: Sequence[ComparedStudy]) -> str:
    """Return whether one learning rate is as good as the best in all of the studies, in a sentence."""
    low = max(study.plateau[0] for study in studies if study.plateau)
    high = min(study.plateau[1] for study in studies if study.plateau)
    if low <= high:
        rates = f"learning rates from {low:.2g} to {high:.2g}"
        return f"{rates} cannot be told apart from the best in any of these {len(studies)} studies"
    return f"no learning rate is as good as the best in all of these {len(studies)} studies"


def _caveats(studies: Sequence[ComparedStudy]) -> list[str]:
    caveats = []
    for study in studies:
        label, interval, confirmed = study.label, study.interval, study.confirmed
        if confirmed is not None and interval and not interval[0] <= confirmed <= interval[1]:
            caveats.append(f"{label}: the confirmed rate, {confirmed:.2g}, is outside its interval")
        if UNBOUNDED in study.warnings:
            caveats.append(
                f"{label}: the best rate may lie outside the searched range, so its interval is only a bound"
            )
        if "still-rising" in study.warnings:
            caveats.append(f"{label}: its curves are still rising, so its best rate may change with more epochs")
    if len({study.metric for study in studies}) > 1:
        caveats.append("the studies have different metrics, so only their learning rates can be compared")
    caveats.append(
        f"each {100 * CONFIDENCE:.0f} % interval holds for the one split of the data on which its study was trained"
    )
    return caveats


def _setting_text(value: Any) -> str:
    return "the default" if value is None else number_text(value)


def _factor_text(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"


def _setting_key(parameter: str) -> str:
    """Return the setting that a parameter of the search space stands for."""
    return parameter if parameter.startswith(("model.", "data.")) else f"training.{parameter}"


def _used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without those of optimizers and schedules that are not used."""
    used = {"name"}
    for kind in PLUG_INS:
        used |= keys_of(kind, str(settings[f"training.{kind}"])) if f"training.{kind}" in settings else set()
    unused = {key for kind in PLUG_INS for key in known_keys(kind)} - used
    return {key: value for key, value in settings.items() if key.removeprefix("training.") not in unused}


def _is_compared(key: str) -> bool:
    return key not in STUDY_NEUTRAL_KEYS and not key.startswith(NOT_COMPARED)
