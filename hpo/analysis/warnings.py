"""The warnings of an answer, one function each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpo.analysis.response import MIN_RATES, Response
from hpo.analysis.trials import (
    TRAINED,
    are_alike,
    direction_sign,
    has_rate,
    rate_bounds,
    search_trials,
    standard_error,
    value_of,
)
from hpo.study.records import ENDED, StudyRecord, TrialRecord
from hpo.study.stages import latest

EDGE_FACTOR = 1.1  # as near as that to the end of the range is at the end
MIN_CURVE_EPOCHS = 4  # of a curve, to say whether it still rises


@dataclass(frozen=True)
class StudyWarning:
    """What there is to beware of, in a sentence; `kind` is one of the keys of `WARNINGS`."""

    kind: str
    text: str


def find_warnings(
    study: StudyRecord, trials: Sequence[TrialRecord], winner: TrialRecord, found: Response | None
) -> list[StudyWarning]:
    """What there is to beware of in an answer; `found` is the response of the winner's like, where there is one."""
    alike = [trial for trial in search_trials(trials) if has_rate(trial) and are_alike(study, trial, winner)]
    evidence = WarningContext(study, alike, winner, found, latest(trials))
    return [StudyWarning(kind, text) for kind, check in WARNINGS.items() if (text := check(evidence))]


@dataclass(frozen=True)
class WarningContext:
    """What a warning is given for: the trials with a learning rate that are like the winner, and their response."""

    study: StudyRecord
    trials: Sequence[TrialRecord]
    winner: TrialRecord
    response: Response | None
    confirming: Sequence[TrialRecord] = ()  # of whatever combination

    @property
    def complete(self) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.state == "complete" and trial.value is not None]

    @property
    def ended(self) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.state in TRAINED]

    @property
    def noise(self) -> float | None:
        """The standard deviation of one trial's value: the response's, or else what the pictures alone give."""
        num_val = self.study.facts.get("num_val")
        if self.response is not None:
            return self.response.noise
        return standard_error(value_of(self.winner), num_val) if num_val else None

    @property
    def plateau(self) -> tuple[float, float]:
        """The best learning rates; the winner's alone where there is no response."""
        rate = float(self.winner.params["lr"]) if has_rate(self.winner) else math.nan
        return self.response.plateau if self.response else (rate, rate)


def _guessing(evidence: WarningContext) -> str | None:
    classes, value = evidence.study.facts.get("num_classes"), value_of(evidence.winner)
    if not classes or value > 1 / classes + standard_error(1 / classes, evidence.study.facts["num_val"]):
        return None
    return f"the best trial is no better than guessing among {classes} classes: give it more epochs, or other rates"


def _not_enough(evidence: WarningContext) -> str | None:
    known = len({trial.params["lr"] for trial in evidence.complete})
    if evidence.response is not None or not known:
        return None
    have = "rate has" if known == 1 else "rates have"
    return f"{known} learning {have} a value, which is not enough for a curve; {MIN_RATES} are"


def _edge_of_range(evidence: WarningContext) -> str | None:
    if len({trial.params["lr"] for trial in evidence.ended}) < 2:
        return None
    low, high = rate_bounds(evidence.study, evidence.trials)
    first, last = evidence.plateau
    at = "low" if first <= low * EDGE_FACTOR else "high" if last >= high / EDGE_FACTOR else None
    if at is None:
        return None
    end, wider = (low, low / 10) if at == "low" else (high, high * 10)
    return (
        f"the best learning rate may lie beyond {end:.3g}, the {at} end of what was searched: "
        f"widen search.space.lr to {wider:.3g}"
    )


def _most_diverged(evidence: WarningContext) -> str | None:
    ended = evidence.ended
    diverged = [trial for trial in ended if trial.state == "diverged"]
    if len(diverged) <= len(ended) / 2:
        return None
    lowest = min(float(trial.params["lr"]) for trial in diverged)
    return f"{len(diverged)} of {len(ended)} trials diverged, from {lowest:.3g} on: search lower learning rates"


def _tied(evidence: WarningContext) -> str | None:
    complete, ended, (first, last) = evidence.complete, evidence.ended, evidence.plateau
    if evidence.response is not None:
        tied = [trial for trial in complete if first <= trial.params["lr"] <= last]
    else:
        margin = math.sqrt(2) * (evidence.noise or 0.0)  # of a difference of two
        tied = [trial for trial in complete if abs(value_of(trial) - value_of(evidence.winner)) <= margin]
    rates, tied_rates = ({float(trial.params["lr"]) for trial in some} for some in (ended, tied))
    if len(tied_rates) <= len(rates) / 2 or len(rates) < 2:
        return None
    return (
        f"the ranking is within the noise: {len(tied)} of {len(ended)} trials, "
        f"with learning rates from {min(tied_rates):.3g} to {max(tied_rates):.3g}, are tied"
    )


def _still_rising(evidence: WarningContext) -> str | None:
    first, last = evidence.plateau
    near = [trial for trial in evidence.complete if first <= trial.params["lr"] <= last] or [evidence.winner]
    sign, gains, rises = direction_sign(evidence.study), [], []
    for trial in near:
        curve = [value for value in trial.curves.get(evidence.study.spec.metric, ()) if value is not None]
        if len(curve) >= MIN_CURVE_EPOCHS:
            gains.append(sign * (curve[-1] - curve[-1 - len(curve) // 4]))
            rises.append(sign * (curve[-1] - curve[0]))
    noise = (evidence.noise or 0.0) * math.sqrt(2 / max(1, len(gains)))  # of a mean difference
    if not gains or statistics.fmean(gains) <= max(2 * noise, statistics.fmean(rises) / 10):
        return None
    return "the curves are still rising at the end: with more epochs the best learning rate may move up or down"


def _pruned_away(evidence: WarningContext) -> str | None:
    first, last = evidence.plateau
    near = [trial for trial in evidence.trials if first <= trial.params["lr"] <= last]
    pruned = sum(trial.state == "pruned" for trial in near)
    complete = sum(trial.state == "complete" for trial in near)
    if pruned < 2 or pruned <= complete:
        return None
    return (
        f"pruning dropped {pruned} of the {len(near)} trials between {first:.3g} and {last:.3g}, where the best rates "
        "are: compare them later, with a larger pruner.min_epochs or pruner.warmup_epochs"
    )


def _not_confirmed(evidence: WarningContext) -> str | None:
    return _all_failed(evidence.confirming, "confirm", "the trials that were to confirm it")


def _not_tested(evidence: WarningContext) -> str | None:
    return _all_failed(evidence.confirming, "test", "the test set could not be measured; its trials")


def _all_failed(trials: Sequence[TrialRecord], kind: str, what: str) -> str | None:
    mine = [trial for trial in trials if trial.kind == kind]
    if not mine or any(trial.state not in ENDED or trial.state == "complete" for trial in mine):
        return None
    ends = sorted({f"{trial.state}: {trial.reason}" for trial in mine})
    return f"{what} did not complete, none of {len(mine)} ({'; '.join(ends[:2])})"


WARNINGS: dict[str, Callable[[WarningContext], str | None]] = {
    "guessing": _guessing,
    "not-enough": _not_enough,
    "edge-of-range": _edge_of_range,
    "most-diverged": _most_diverged,
    "tied": _tied,
    "still-rising": _still_rising,
    "pruned-away": _pruned_away,
    "not-confirmed": _not_confirmed,
    "not-tested": _not_tested,
}
