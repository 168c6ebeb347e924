"""Trials -> the answer: the best learning rate, how sure that is, where training breaks, and what to beware of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hpo.analysis.confirmation import Confirmation, confirmation
from hpo.analysis.response import LEAST_RATES, Response, Trials, respond
from hpo.search.space import Conditional
from hpo.study.records import ENDED, StudyRecord, TrialRecord
from hpo.study.stages import latest

COMPARED = 5  # trials are compared after as many epochs as so many of them have come to
WINDOW = 3  # epochs whose mean counts: one epoch's accuracy is noisy
DECADES = 1.0  # to either side of the best one: over more, the response is no parabola
PARABOLA_RATES = 4  # that a parabola is fitted to; three always fit
EDGE_FACTOR = 1.1  # as near as that to the end of the range is at the end
LEAST_EPOCHS = 4  # of a curve, to say whether it still rises
TRAINED = ("complete", "pruned", "diverged")


@dataclass(frozen=True)
class Peak:
    """The learning rate that the trials point to, compared after so many epochs; not `fitted`: the best one's."""

    lr: float
    epochs: int
    fitted: bool


@dataclass(frozen=True)
class StudyWarning:
    """What there is to beware of, in a sentence; `kind` is one of the keys of `WARNINGS`."""

    kind: str
    text: str


@dataclass(frozen=True)
class Best:
    """The answer of a study. `trial`, `params` and `value` are those of the best complete trial.

    `responses` has the response for each combination of listed parameters (optimizer, batch size...) of which enough is
    known, and `response` is that of the best trial's. `interval` is that response's for the best learning rate; where
    there is none, the tried rates that did as well, or None where the study has no learning rate or no picture count.
    """

    trial: int
    params: Mapping[str, Any]
    value: float
    interval: tuple[float, float] | None
    responses: Sequence[tuple[Mapping[str, Any], Response]] = ()
    response: Response | None = None
    warnings: Sequence[StudyWarning] = field(default=())
    confirmation: Confirmation | None = None  # of trials trained again on fresh seeds, where there was one
    range_test: Sequence[Mapping[str, Any]] | None = None  # where the range of learning rates came from one

    @property
    def lr(self) -> float | None:
        """The learning rate to train with, of `recommended`."""
        return self.recommended.get("lr")

    @property
    def recommended(self) -> dict[str, Any]:
        """The values to train with: those that were confirmed, else the best trial's with the response's best rate."""
        if self.confirmation is not None:
            return dict(self.confirmation.winner.params)
        return {**self.params, "lr": self.response.best} if self.response else dict(self.params)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the curves of the responses."""
        return {
            "trial": self.trial,
            "params": dict(self.params),
            "value": self.value,
            "lr": self.lr,
            "recommended": self.recommended,
            "interval": self.interval,
            "response": None if self.response is None else self.response.in_figures(),
            "responses": [{"params": dict(params), **response.in_figures()} for params, response in self.responses],
            "warnings": [asdict(warning) for warning in self.warnings],
            "confirmation": None if self.confirmation is None else self.confirmation.as_dict(),
            "range_test": self.range_test,
        }


def searched(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Without those that confirm what was found."""
    return [trial for trial in trials if trial.kind == "search"]


def best_trial(study: StudyRecord, trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The complete trial with the best value, or None where no trial completed.

    Equal values are common with few validation pictures: then the lower validation loss wins, then the earlier trial.
    """
    complete = [trial for trial in searched(trials) if trial.state == "complete" and trial.value is not None]
    sign = _sign(study)
    return min(complete, key=lambda trial: (-sign * _value(trial), _last_loss(trial), trial.number), default=None)


def best(study: StudyRecord, trials: Sequence[TrialRecord]) -> Best | None:
    """The answer, or None where no trial completed."""
    winner = best_trial(study, trials)
    if winner is None:
        return None
    confirmed, every = confirmation(study, trials, first=_value(winner)), trials
    trials = searched(trials)
    responses = [
        (group, found) for group, alike in _groups(study, trials) if (found := response(study, alike)) is not None
    ]
    listed = study.spec.search.listed_values
    group = listed(confirmed.winner.params if confirmed else winner.params)
    lead = best_trial(study, [trial for trial in trials if listed(trial.params) == group]) or winner
    mine = next((found for other, found in responses if other == group and _has_rate(lead)), None)
    interval = mine.interval if mine else learning_rate_interval(study, trials, lead)
    beware = warnings(study, every, lead, mine)
    tested = study.facts.get("range_test")
    return Best(winner.number, winner.params, _value(winner), interval, responses, mine, beware, confirmed, tested)


def response(study: StudyRecord, trials: Sequence[TrialRecord]) -> Response | None:
    """The response of trials that differ in their learning rate; None where too few rates have a value.

    A pruned trial counts with what complete trials have still gained from its last epoch on, on average; it is the more
    doubtful the more they gained, the more they differ in that, and the further they were from it at that epoch. Trials
    that differ in another range count all the same: it is part of the noise.
    """
    import numpy as np

    sign, metric = _sign(study), study.spec.metric
    rated = [trial for trial in trials if _has_rate(trial)]
    complete = [trial for trial in rated if trial.state == "complete" and trial.value is not None]
    curves = {trial.number: dict(zip(trial.epochs, trial.curves.get(metric, ()), strict=False)) for trial in rated}
    seen = [(float(trial.params["lr"]), sign * _value(trial), 0.0) for trial in complete]
    for trial in rated:
        if trial.state != "pruned" or trial.value is None:
            continue
        epoch = trial.epochs[-1] if trial.epochs else 0
        at_epoch = [(_value(other), curves[other.number].get(epoch)) for other in complete]
        known = [(last, then) for last, then in at_epoch if then is not None]
        if known:
            gains = [sign * (last - then) for last, then in known]
            gain = statistics.fmean(gains)
            # They are the survivors: a trial that was worse, and far from them, may have gained anything.
            apart = abs(_value(trial) - statistics.fmean(then for _, then in known))
            doubt = max(statistics.pstdev(gains), abs(gain) / 2, apart)
            seen.append((float(trial.params["lr"]), sign * _value(trial) + gain, doubt))
    if not seen:
        return None
    lrs, values, doubts = np.array(seen).T
    diverged = [float(trial.params["lr"]) for trial in rated if trial.state == "diverged"]
    classes = None if study.spec.objective else study.facts.get("num_classes")
    low, high = _searched(study, trials)
    found = respond(
        Trials(np.log10(lrs), values, doubts, np.log10(diverged), floor=1 / classes if classes else math.inf),
        low=low,
        high=high,
    )
    return found if found is None or sign == 1 else found.mirrored()


def warnings(
    study: StudyRecord, trials: Sequence[TrialRecord], winner: TrialRecord, found: Response | None
) -> list[StudyWarning]:
    """What there is to beware of in an answer; `found` is the response of the winner's like, where there is one."""
    alike = [trial for trial in searched(trials) if _has_rate(trial) and _is_alike(study, trial, winner)]
    evidence = Evidence(study, alike, winner, found, latest(trials))
    return [StudyWarning(kind, text) for kind, check in WARNINGS.items() if (text := check(evidence))]


@dataclass(frozen=True)
class Evidence:
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
        return standard_error(_value(self.winner), num_val) if num_val else None

    @property
    def plateau(self) -> tuple[float, float]:
        """The best learning rates; the winner's alone where there is no response."""
        rate = float(self.winner.params["lr"]) if _has_rate(self.winner) else math.nan
        return self.response.plateau if self.response else (rate, rate)


def _guessing(evidence: Evidence) -> str | None:
    classes, value = evidence.study.facts.get("num_classes"), _value(evidence.winner)
    if not classes or value > 1 / classes + standard_error(1 / classes, evidence.study.facts["num_val"]):
        return None
    return f"the best trial is no better than guessing among {classes} classes: give it more epochs, or other rates"


def _not_enough(evidence: Evidence) -> str | None:
    known = len({trial.params["lr"] for trial in evidence.complete})
    if evidence.response is not None or not known:
        return None
    have = "rate has" if known == 1 else "rates have"
    return f"{known} learning {have} a value, which is not enough for a curve; {LEAST_RATES} are"


def _edge_of_range(evidence: Evidence) -> str | None:
    if len({trial.params["lr"] for trial in evidence.ended}) < 2:
        return None
    low, high = _searched(evidence.study, evidence.trials)
    first, last = evidence.plateau
    at = "low" if first <= low * EDGE_FACTOR else "high" if last >= high / EDGE_FACTOR else None
    if at is None:
        return None
    end, wider = (low, low / 10) if at == "low" else (high, high * 10)
    return (
        f"the best learning rate may lie beyond {end:.3g}, the {at} end of what was searched: "
        f"widen search.space.lr to {wider:.3g}"
    )


def _most_diverged(evidence: Evidence) -> str | None:
    ended = evidence.ended
    diverged = [trial for trial in ended if trial.state == "diverged"]
    if len(diverged) <= len(ended) / 2:
        return None
    lowest = min(float(trial.params["lr"]) for trial in diverged)
    return f"{len(diverged)} of {len(ended)} trials diverged, from {lowest:.3g} on: search lower learning rates"


def _tied(evidence: Evidence) -> str | None:
    complete, ended, (first, last) = evidence.complete, evidence.ended, evidence.plateau
    if evidence.response is not None:
        tied = [trial for trial in complete if first <= trial.params["lr"] <= last]
    else:
        margin = math.sqrt(2) * (evidence.noise or 0.0)  # of a difference of two
        tied = [trial for trial in complete if abs(_value(trial) - _value(evidence.winner)) <= margin]
    rates, tied_rates = ({float(trial.params["lr"]) for trial in some} for some in (ended, tied))
    if len(tied_rates) <= len(rates) / 2 or len(rates) < 2:
        return None
    return (
        f"the ranking is within the noise: {len(tied)} of {len(ended)} trials, "
        f"with learning rates from {min(tied_rates):.3g} to {max(tied_rates):.3g}, are tied"
    )


def _still_rising(evidence: Evidence) -> str | None:
    first, last = evidence.plateau
    near = [trial for trial in evidence.complete if first <= trial.params["lr"] <= last] or [evidence.winner]
    sign, gains, rises = _sign(evidence.study), [], []
    for trial in near:
        curve = [value for value in trial.curves.get(evidence.study.spec.metric, ()) if value is not None]
        if len(curve) >= LEAST_EPOCHS:
            gains.append(sign * (curve[-1] - curve[-1 - len(curve) // 4]))
            rises.append(sign * (curve[-1] - curve[0]))
    noise = (evidence.noise or 0.0) * math.sqrt(2 / max(1, len(gains)))  # of a mean difference
    if not gains or statistics.fmean(gains) <= max(2 * noise, statistics.fmean(rises) / 10):
        return None
    return "the curves are still rising at the end: with more epochs the best learning rate may move up or down"


def _pruned_away(evidence: Evidence) -> str | None:
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


def _not_confirmed(evidence: Evidence) -> str | None:
    return _all_failed(evidence.confirming, "confirm", "the trials that were to confirm it")


def _not_tested(evidence: Evidence) -> str | None:
    return _all_failed(evidence.confirming, "test", "the test set could not be measured; its trials")


def _all_failed(trials: Sequence[TrialRecord], kind: str, what: str) -> str | None:
    mine = [trial for trial in trials if trial.kind == kind]
    if not mine or any(trial.state not in ENDED or trial.state == "complete" for trial in mine):
        return None
    ends = sorted({f"{trial.state}: {trial.reason}" for trial in mine})
    return f"{what} did not complete, none of {len(mine)} ({'; '.join(ends[:2])})"


WARNINGS: dict[str, Callable[[Evidence], str | None]] = {
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


def learning_rate_interval(
    study: StudyRecord, trials: Sequence[TrialRecord], winner: TrialRecord
) -> tuple[float, float] | None:
    """The tried learning rates around the winner's that did as well, as (lowest, highest).

    "As well" is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984): a validation
    accuracy within one binomial standard error of the winner's, for the number of validation pictures; replicates of a
    learning rate count with their mean. From the winner outward, the interval ends at the first learning rate that did
    worse, was pruned, or diverged. Trials that differ from the winner in a listed parameter (optimizer, batch size...)
    do not count; those that differ in a range count all the same.
    """
    num_val = study.facts.get("num_val")
    if not _has_rate(winner) or not num_val:
        return None
    least = _value(winner) - standard_error(_value(winner), num_val)
    alike = [trial for trial in trials if _is_comparable(study, trial, winner)]
    rates = sorted({float(trial.params["lr"]) for trial in alike})
    as_good = [_mean([trial for trial in alike if trial.params["lr"] == rate]) >= least for rate in rates]
    low = high = rates.index(float(winner.params["lr"]))
    while low > 0 and as_good[low - 1]:
        low -= 1
    while high < len(rates) - 1 and as_good[high + 1]:
        high += 1
    return rates[low], rates[high]


def peak(study: StudyRecord, trials: Sequence[TrialRecord]) -> Peak | None:
    """Where the trials so far point, ended or not; None where no learning rate above 0 is searched or reported on.

    The best trial alone is the luckiest; the others say where the top of the response is. A parabola in log lr is
    fitted by least squares (a response surface: Box and Wilson, J. Royal Statistical Society B 13, 1951) to the trials
    within DECADES of the best one and with its listed parameters, after as many epochs as COMPARED trials have come to,
    each counting with its mean over the last WINDOW of those. The peak is its top, within the rates that were tried;
    where it has none, or too few rates, the best one. After few epochs it says where to look, and not what will win.
    `make bench-search` measures how soon it is right.
    """
    import numpy as np

    sign = _sign(study)
    curves = {
        trial.number: [math.nan if value is None else sign * value for value in trial.curves[study.spec.metric]]
        for trial in searched(trials)
        if _has_rate(trial) and trial.state != "failed" and trial.curves.get(study.spec.metric)
    }
    if not curves:
        return None
    lengths = sorted(map(len, curves.values()), reverse=True)
    epoch = lengths[min(COMPARED, len(lengths)) - 1]
    with np.errstate(over="ignore"):
        values = {
            number: float(np.mean(curve[max(0, epoch - WINDOW) : epoch]))
            for number, curve in curves.items()
            if len(curve) >= epoch
        }
    known = [trial for trial in trials if math.isfinite(values.get(trial.number, math.nan))]
    if not known:
        return None
    leader = max(known, key=lambda trial: values[trial.number])
    top = float(leader.params["lr"])
    fitted = [
        trial
        for trial in known
        if _is_alike(study, trial, leader) and abs(math.log10(trial.params["lr"] / top)) <= DECADES
    ]
    x = np.log10([trial.params["lr"] for trial in fitted])
    if len(set(x)) < PARABOLA_RATES:
        return Peak(top, epoch, fitted=False)
    parabola = np.polynomial.Polynomial.fit(x, [values[trial.number] for trial in fitted], 2)
    if parabola.deriv(2)(0) >= 0:
        return Peak(top, epoch, fitted=False)
    return Peak(float(10 ** np.clip(parabola.deriv().roots()[0], x.min(), x.max())), epoch, fitted=True)


def _groups(study: StudyRecord, trials: Sequence[TrialRecord]) -> list[tuple[dict[str, Any], list[TrialRecord]]]:
    """The trials of each combination of listed parameters, in the order in which they first come."""
    groups: list[tuple[dict[str, Any], list[TrialRecord]]] = []
    for trial in trials:
        key = study.spec.search.listed_values(trial.params)
        known = next((alike for other, alike in groups if other == key), None)
        if known is None:
            groups.append((key, known := []))
        known.append(trial)
    return groups


def _searched(study: StudyRecord, trials: Sequence[TrialRecord]) -> tuple[float, float]:
    """The lowest and the highest learning rate that these trials, which are alike, could have or had."""
    rates = [float(trial.params["lr"]) for trial in trials if _has_rate(trial)]
    parameter = study.spec.search.parameters.get("lr")
    if isinstance(parameter, Conditional):
        case = trials[0].params.get(parameter.by)
        parameter = next((values for name, values in parameter.cases.items() if name == str(case)), None)
    bounds = [float(value) for value in parameter.extreme_values() if is_rate(value)] if parameter else []
    return min(rates + bounds), max(rates + bounds)


def _sign(study: StudyRecord) -> int:
    return -1 if study.spec.direction == "minimize" else 1


def _has_rate(trial: TrialRecord) -> bool:
    """A loop of the user's may call anything `lr`."""
    return is_rate(trial.params.get("lr"))


def is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_comparable(study: StudyRecord, trial: TrialRecord, winner: TrialRecord) -> bool:
    return _has_rate(trial) and trial.state in TRAINED and _is_alike(study, trial, winner)


def _is_alike(study: StudyRecord, trial: TrialRecord, winner: TrialRecord) -> bool:
    listed = study.spec.search.listed_values
    return listed(trial.params) == listed(winner.params)


def _mean(replicates: Sequence[TrialRecord]) -> float:
    """The mean value of complete trials; where one did not complete, no value is as good."""
    values = [trial.value if trial.state == "complete" else None for trial in replicates]
    return -math.inf if None in values else statistics.fmean(value for value in values if value is not None)


def standard_error(accuracy: float, num_pictures: int) -> float:
    """Of an accuracy measured on so many pictures, by Agresti and Coull (1998), who do not call 100 % certain."""
    count = num_pictures + 4
    share = (accuracy * num_pictures + 2) / count
    return math.sqrt(share * (1 - share) / count)


def _value(trial: TrialRecord) -> float:
    assert trial.value is not None
    return trial.value


def _last_loss(trial: TrialRecord) -> float:
    losses = trial.curves.get("val_loss", ())
    return losses[-1] if losses and losses[-1] is not None else math.inf
