"""The warnings of an answer: one function each, and the table of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpo.analysis.final_values import roughness_of
from hpo.analysis.response import MIN_LIVING_RATES, MIN_RATES, REACH_DECADES, Response
from hpo.analysis.text import metric_text, params_text, rate_text, resuming_command, value_text
from hpo.analysis.trials import (
    TRAINED,
    are_alike,
    direction_sign,
    has_rate,
    rate_bounds,
    search_trials,
    value_of,
)
from hpo.search.space import Range
from hpo.study.chance import counting_error, guess_value, lucky_value, standard_error
from hpo.study.records import ENDED, StudyRecord, TrialRecord
from hpo.study.stages import latest

EDGE_FACTOR = 1.1  # a rate within this factor of an end of the range counts as being at that end
MIN_TIED_RATES = 2 * MIN_RATES  # with fewer, a response cannot tell its noise from itself
AT_EDGE = 0.1  # share of the draws of the best learning rate that are at an end, to say that it may lie beyond
BEST_OF_MANY = 3.0  # standard deviations that the best of many trials of one rate is better than their mean, at most
MIN_CURVE_EPOCHS = 4  # of a curve, to tell whether it still rises


@dataclass(frozen=True)
class StudyWarning:
    """A warning in one sentence; `kind` is one of the keys of `WARNINGS`."""

    kind: str
    text: str


def find_warnings(
    study: StudyRecord,
    trials: Sequence[TrialRecord],
    winner: TrialRecord,
    response: Response | None,
    *,
    is_told_apart: bool = False,
) -> list[StudyWarning]:
    """Return the warnings of an answer.

    Args:
        study: The study.
        trials: Its trials.
        winner: The best trial of those that the answer is about.
        response: The response of the trials like the winner, if there is one.
        is_told_apart: Whether a confirmation found that one rate of such trials really is worse than another.
    """
    searched = [trial for trial in search_trials(trials) if has_rate(trial)]
    alike = [trial for trial in searched if are_alike(study, trial, winner)]
    context = WarningContext(study, alike, winner, response, is_told_apart, latest(trials), num_searched=len(searched))
    return [StudyWarning(kind, text) for kind, check in WARNINGS.items() if (text := check(context))]


@dataclass(frozen=True)
class WarningContext:
    """What a warning is decided by: the trials with a learning rate that are like the winner, and their response."""

    study: StudyRecord
    trials: Sequence[TrialRecord]
    winner: TrialRecord
    response: Response | None
    is_told_apart: bool = False  # a confirmation found that one rate is worse than another
    confirming: Sequence[TrialRecord] = ()  # of any combination of listed parameters
    num_searched: int = 0  # trials of the search with a learning rate, of any combination

    @property
    def complete(self) -> list[TrialRecord]:
        """The complete trials that have a value."""
        return [trial for trial in self.trials if trial.state == "complete" and trial.value is not None]

    @property
    def ended(self) -> list[TrialRecord]:
        """The trials whose end says something about their learning rate."""
        return [trial for trial in self.trials if trial.state in TRAINED]

    @property
    def noise(self) -> float | None:
        """The standard deviation of one trial's value: the response's, else the part due to the number of images."""
        if self.response is not None:
            return self.response.noise
        return counting_error(self.study.spec, self.study.metadata, value_of(self.winner))

    @property
    def plateau(self) -> tuple[float, float]:
        """The best learning rates: the response's plateau, or the winner's rate alone if there is no response."""
        rate = float(self.winner.params["lr"]) if has_rate(self.winner) else math.nan
        return self.response.plateau if self.response else (rate, rate)


def _guessing(context: WarningContext) -> str | None:
    """Warn if the best trial is no better than random guessing, or than one constant answer."""
    study, value = context.study, value_of(context.winner)
    spec, metadata, sign = study.spec, study.metadata, direction_sign(study)
    guess, by_luck = guess_value(spec, metadata), lucky_value(spec, metadata)
    if guess is None or by_luck is None:
        return None
    if "num_val" not in metadata:  # how far luck takes a loop of the user's own is seen in its trials alone
        by_luck += sign * BEST_OF_MANY * (context.noise or 0.0)
    if sign * value > sign * by_luck:
        return None
    classes = metadata.get("num_classes")
    what = f"guessing among {classes} classes"
    if spec.metric != "val_accuracy" or classes is None:
        what = f"guessing, with which the {metric_text(study)} is {value_text(guess, study)}"
    elif metadata.get("has_several_labels"):
        what = f"the same answer for all images, which is right for {guess:.1%} of the labels"
    elif guess > 1 / classes + standard_error(1 / classes, metadata["num_val"]):
        what = f"always naming the largest of {classes} classes, which is right for {guess:.1%} of the images"
    return f"the best trial is no better than {what}: give it more epochs, or other rates"


def _not_enough(context: WarningContext) -> str | None:
    """Warn if fewer than five learning rates have a value, among trials with the winner's optimizer and other lists."""
    known = len({trial.params["lr"] for trial in context.complete})
    if context.response is not None or not known:
        return None
    have = "rate has" if known == 1 else "rates have"
    needed = f"{MIN_RATES}, or {MIN_LIVING_RATES} where others diverged"
    text = f"{known} learning {have} a value; a fitted curve needs {needed}"
    count = len(context.trials)
    if count == context.num_searched:
        return text
    listed = params_text(context.study.spec.search.listed_values(context.winner.params))
    return f"only {count} of {context.num_searched} trials count, those with {listed}: {text}"


def _edge_of_range(context: WarningContext) -> str | None:
    """Warn if the best rate lies at an end of the searched range with a probability of 10 % or more.

    The warning names the command that widens the range. Values that are all equal, or guesses, say nothing of an end.
    """
    if len({trial.params["lr"] for trial in context.ended}) < 2:
        return None
    are_ends_equal = len(context.complete) > 1 and len({trial.value for trial in context.complete}) == 1
    if are_ends_equal or _are_all_equal(context) or _guessing(context):
        return None
    low, high = rate_bounds(context.study, context.trials)
    best = context.response.draws_of_best if context.response else context.plateau[:1]
    at = find_touched_end(best, low, high)
    if at is None:
        return None
    end, wider = (low, low / 10) if at == "low" else (high, high * 10)
    beyond = f"the best learning rate may lie beyond {end:.3g}, the {at} end of the searched range: "
    lr = context.study.spec.search.parameters.get("lr")
    can_widen = context.study.spec.search.sampler not in ("grid", "race") and isinstance(lr, Range) and lr.step is None
    if not can_widen:
        return f"{beyond}widen search.space.lr to {wider:.3g}"
    ends = f"{wider:.3g}:{high}" if at == "low" else f"{low}:{wider:.3g}"
    return f"{beyond}widen it with `{resuming_command(context.study, f'--widen lr={ends}')}`"


def find_touched_end(best: Sequence[float], low: float, high: float) -> str | None:
    """Return which end of a range, "low" or "high", the best learning rate may lie beyond, or None.

    Where it may lie beyond both ends, nothing tells which way to widen the range: None.

    Args:
        best: Learning rates that may be the best one, all equally likely.
        low: The lowest one of the range.
        high: The highest one.
    """
    at_low = statistics.fmean(rate <= low * EDGE_FACTOR for rate in best)
    at_high = statistics.fmean(rate >= high / EDGE_FACTOR for rate in best)
    if max(at_low, at_high) < AT_EDGE or min(at_low, at_high) >= AT_EDGE:
        return None
    return "low" if at_low >= at_high else "high"


def _most_diverged(context: WarningContext) -> str | None:
    """Warn if more than half of the trials diverged."""
    ended = context.ended
    diverged = [trial for trial in ended if trial.state == "diverged"]
    if len(diverged) <= len(ended) / 2:
        return None
    lowest = min(float(trial.params["lr"]) for trial in diverged)
    return f"{len(diverged)} of {len(ended)} trials diverged, from {lowest:.3g} on: search lower learning rates"


def _tied(context: WarningContext) -> str | None:
    """Warn if more than half of the trained rates are as good as the best, or all values are equal."""
    complete, ended, (first, last) = context.complete, context.ended, context.plateau
    response = context.response
    if context.is_told_apart:
        return None
    if _are_all_equal(context):
        return (
            f"the learning rate makes no difference: all {len(ended)} trials have the same {metric_text(context.study)}"
        )
    if response is not None:
        if len({trial.params["lr"] for trial in complete}) < MIN_TIED_RATES:
            return None
        tied = [trial for trial in complete if response.is_flat or first <= trial.params["lr"] <= last]
    else:
        margin = math.sqrt(2) * (context.noise or 0.0)  # of a difference of two
        tied = [trial for trial in complete if abs(value_of(trial) - value_of(context.winner)) <= margin]
    rates = {float(trial.params["lr"]) for trial in ended}
    tied_rates = {float(trial.params["lr"]) for trial in tied}
    if len(tied_rates) <= len(rates) / 2 or len(rates) < 2:
        return None
    return (
        f"the ranking is within the noise: {len(tied)} of {len(ended)} trials, "
        f"with learning rates from {min(tied_rates):.3g} to {max(tied_rates):.3g}, are tied"
    )


def _are_all_equal(context: WarningContext) -> bool:
    """Return whether trials at several learning rates had the same value after each epoch, and none diverged."""
    metric, by_epoch = context.study.spec.metric, dict[int, set[float | None]]()
    for trial in context.ended:
        for epoch, value in zip(trial.epochs, trial.curves.get(metric, ()), strict=False):
            by_epoch.setdefault(epoch, set()).add(value)
    rates = {trial.params["lr"] for trial in context.ended}
    is_any_diverged = any(trial.state == "diverged" for trial in context.ended)
    return (
        len(rates) > 1 and bool(by_epoch) and not is_any_diverged and all(len(seen) == 1 for seen in by_epoch.values())
    )


def _still_rising(context: WarningContext) -> str | None:
    """Warn if the best trials made a tenth or more of their total gain in the last quarter of the epochs."""
    first, last = context.plateau
    near = [trial for trial in context.complete if first <= trial.params["lr"] <= last] or [context.winner]
    sign = direction_sign(context.study)
    gains, rises, roughness = [], [], []
    for trial in near:
        curve = [value for value in trial.curves.get(context.study.spec.metric, ()) if value is not None]
        if len(curve) >= MIN_CURVE_EPOCHS:
            gains.append(sign * (curve[-1] - curve[-1 - len(curve) // 4]))
            rises.append(sign * (curve[-1] - curve[0]))
            roughness.append(roughness_of(curve))
    if not gains:
        return None
    # Of a mean of differences within curves; how far seeds differ moves both ends of a curve alike.
    noise = math.hypot(*roughness) / len(gains) * math.sqrt(2)
    if statistics.fmean(gains) <= max(2 * noise, statistics.fmean(rises) / 10):
        return None
    return "the curves are still rising at the end: with more epochs the best learning rate may move up or down"


def _pruned_away(context: WarningContext) -> str | None:
    """Warn if rates at which every trial was pruned, or dropped by a race, are expected to be clearly better."""
    response = context.response
    if response is None or response.is_flat:
        return None
    pruned, complete = (
        [math.log10(trial.params["lr"]) for trial in context.trials if trial.state == state]
        for state in ("pruned", "complete")
    )
    sign = direction_sign(context.study)
    least = sign * response.mean[response.index_of_best] + response.noise  # less is no reason to search again
    better = [
        lr
        for lr, mean, diverging in zip(response.lrs, response.mean, response.diverging, strict=True)
        if sign * mean > least and diverging < 0.5 and _distance(lr, pruned) <= REACH_DECADES < _distance(lr, complete)
    ]
    if not better:
        return None
    remedy = "every trial was pruned: compare them later, with a larger pruner.min_epochs or pruner.warmup_epochs"
    if context.study.spec.search.sampler == "race":
        remedy = "the race has dropped every trial: repeat it with a larger search.trainings"
    rates = f"{rate_text(min(better))} to {rate_text(max(better))}"
    return f"better values are expected at learning rates around {rates}, where {remedy}"


def _distance(lr: float, others: Sequence[float]) -> float:
    """Return how many decades a learning rate is away from the nearest of others, given as log10."""
    return min((abs(math.log10(lr) - other) for other in others), default=math.inf)


def _not_confirmed(context: WarningContext) -> str | None:
    """Warn if no trial of the confirmation completed."""
    return _all_failed(context.confirming, "confirm", "the trials that were to confirm it")


def _not_tested(context: WarningContext) -> str | None:
    """Warn if the test set could not be measured."""
    return _all_failed(context.confirming, "test", "the test set could not be measured; its trials")


def _all_failed(trials: Sequence[TrialRecord], kind: str, what: str) -> str | None:
    of_kind = [trial for trial in trials if trial.kind == kind]
    if not of_kind or any(trial.state not in ENDED or trial.state == "complete" for trial in of_kind):
        return None
    ends = sorted({f"{trial.state}: {trial.reason}" for trial in of_kind})
    return f"{what} did not complete, none of {len(of_kind)} ({'; '.join(ends[:2])})"


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
