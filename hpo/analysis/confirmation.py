"""Confirmation: the best learning rates of a search, trained again in full on fresh seeds, and what came of them.

The best trial of a search is the luckiest of many, chosen by the values that it is then praised for. So `confirm.top`
different learning rates are each trained on `confirm.seeds` seeds that no trial of the search had, the same ones for
each. The highest mean of their values wins, and only then are the winner's networks measured on the test set, once.
These trials follow those of the search in its study, are never pruned, and no sampler or pruner is shown them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hpo.analysis.response import CONFIDENCE
from hpo.search.space import Categorical, Conditional, Range, Scalar
from hpo.study.records import ENDED, StudyRecord, TrialRecord

if TYPE_CHECKING:
    from hpo.analysis.answer import Best
from hpo.study.stages import Planned, due, latest

MIN_APART_DECADES = 0.1  # decades: learning rates closer than this are one and the same
STANDARD_CONFIDENCE = 0.6827  # of a normal distribution lies within one standard deviation


@dataclass(frozen=True)
class Candidate:
    """A learning rate that was trained again. `values` has one entry for each seed; None: it did not complete."""

    params: Mapping[str, Any]
    trials: Sequence[int]
    values: Sequence[float | None]
    mean: float | None  # of those that completed
    num_diverged: int


@dataclass(frozen=True)
class RunnerUp:
    """The second best mean against the winner's: the differences of equal seeds, in the winner's favour."""

    params: Mapping[str, Any]
    difference: float
    interval: tuple[float, float]  # holds the true difference with CONFIDENCE, by Student's t
    is_worse: bool  # the whole interval is above 0


@dataclass(frozen=True)
class Confirmation:
    """What came of the confirmation. The winner is the first of `candidates`: fewest seeds diverged, then best mean.

    `value` is what is to be expected of a trial with the winner's parameters: its mean, drawn towards the mean of all
    candidates as far as their differences are no larger than their noise would make them, because it was chosen as the
    highest (empirical Bayes: Efron and Morris, J. American Statistical Association 70, 1975). `standard_error` is that
    of a candidate's mean, from the spread about the means of all, wide enough for so few seeds (Student's t, 68 %).
    """

    candidates: Sequence[Candidate]
    value: float
    standard_error: float | None  # None where too few trials completed to know
    inflation: float  # by how much the value of the search's best trial was better than `value`
    runner_up: RunnerUp | None  # None where there is none, or fewer than two seeds completed for both
    test_value: float | None  # the winner's mean accuracy on the test set; None where it was not (yet) measured
    test_standard_error: float | None

    @property
    def winner(self) -> Candidate:
        return self.candidates[0]

    def as_dict(self) -> dict[str, Any]:
        return {"params": dict(self.winner.params), **asdict(self)}


def plan_due_trials(study: StudyRecord, trials: Sequence[TrialRecord], found: Best) -> list[Planned]:
    """The trials that are due after these, whose answer so far is `found`."""
    assert study.spec.confirm is not None
    stage = due(study, trials)
    if stage == "confirm":
        used = [trial.replicate + 1 for trial in trials if trial.replicate is not None]
        seeds = range(max(used, default=0), max(used, default=0) + study.spec.confirm.seeds)
        return [Planned(stage, params, seed) for params in candidates(study, trials, found) for seed in seeds]
    if stage == "test":
        assert found.confirmation is not None
        tested = [trial for trial in trials if trial.number in found.confirmation.winner.trials]
        return [
            Planned(stage, trial.params, trial.replicate or 0, trial.number)
            for trial in tested
            if trial.state == "complete"
        ]
    return []


def candidates(study: StudyRecord, trials: Sequence[TrialRecord], found: Best) -> list[dict[str, Scalar]]:
    """What is to be trained again, at most `confirm.top` of them: the answer's rate, then those of the best trials.

    A searched seed is left out; trials that differ in nothing else count with their mean.
    """
    assert study.spec.confirm is not None
    answer = _without_seed(found.params)
    rate = _free_rate(study, answer)
    if found.response is not None and rate is not None:
        ends = [float(end) for end in rate.extreme_values()]  # Optuna takes nothing beyond them, not by a last digit
        answer["lr"] = min(max(float(f"{found.response.best:.6g}"), min(ends)), max(ends))
    values: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for trial in trials:
        if trial.kind == "search" and trial.state == "complete" and trial.value is not None:
            values.setdefault(tuple(_without_seed(trial.params).items()), []).append(trial.value)
    ranked = sorted(values, key=lambda key: statistics.fmean(values[key]), reverse=study.spec.direction == "maximize")
    chosen: list[dict[str, Scalar]] = []
    for params in [answer, *map(dict, ranked)]:
        if all(_are_apart(study, params, other) for other in chosen):
            chosen.append(params)
    return chosen[: study.spec.confirm.top]


def find_confirmation(study: StudyRecord, trials: Sequence[TrialRecord], *, first: float) -> Confirmation | None:
    """What came of the study's confirmation; None before its trials have ended, or where none of them completed.

    `first` is the value of the best trial of the search.
    """
    found = latest(trials)
    again = [trial for trial in found if trial.kind == "confirm"]
    if any(trial.state not in ENDED for trial in again) or all(trial.state != "complete" for trial in again):
        return None
    sign = -1 if study.spec.direction == "minimize" else 1
    groups: list[list[TrialRecord]] = []
    for trial in again:
        group = next((group for group in groups if group[0].params == trial.params), None)
        groups.append([trial]) if group is None else group.append(trial)
    measured = [one for one in map(_candidate, groups) if one.mean is not None]
    ranked = sorted(measured, key=lambda one: (one.num_diverged, -sign * _mean_of(one)))
    rivals = [one for one in ranked if one.num_diverged == ranked[0].num_diverged]
    num_val = study.facts.get("num_val")
    grain = 1 / num_val if num_val and not study.spec.objective else 0.0  # of an accuracy: one picture
    value, error = _expected(rivals, grain=grain)
    tests = [trial.curves["test_accuracy"][-1] for trial in found if trial.kind == "test" and trial.state == "complete"]
    tested = [accuracy for accuracy in tests if accuracy is not None]
    return Confirmation(
        candidates=[*ranked, *(one for one in map(_candidate, groups) if one.mean is None)],
        value=value,
        standard_error=error,
        inflation=sign * (first - value),
        runner_up=_runner_up(rivals, sign=sign, grain=grain),
        test_value=statistics.fmean(tested) if tested else None,
        test_standard_error=_student_error(statistics.stdev(tested), len(tested)) if len(tested) > 1 else None,
    )


def _candidate(trials: Sequence[TrialRecord]) -> Candidate:
    trials = sorted(trials, key=lambda trial: trial.replicate or 0)
    values = [trial.value if trial.state == "complete" else None for trial in trials]
    known = [value for value in values if value is not None]
    return Candidate(
        params=dict(trials[0].params),
        trials=[trial.number for trial in trials],
        values=values,
        mean=statistics.fmean(known) if known else None,
        num_diverged=sum(trial.state == "diverged" for trial in trials),
    )


def _expected(rivals: Sequence[Candidate], *, grain: float) -> tuple[float, float | None]:
    """The value and the standard error of `Confirmation`, of candidates of which the first one has the best mean.

    `grain` is the least by which two values differ: values that are all alike are that uncertain still.
    """
    known = [[value for value in one.values if value is not None] for one in rivals]
    freedom = sum(len(values) - 1 for values in known)
    if freedom < 1:
        return _mean_of(rivals[0]), None
    off = [value - statistics.fmean(values) for values in known for value in values]
    deviation = max(math.hypot(*off) / math.sqrt(freedom), grain / math.sqrt(12))  # hypot: a loss may be of any size
    means = [_mean_of(one) for one in rivals]
    middle = statistics.fmean(means)
    noise = deviation / math.sqrt(len(known[0]))  # of the winner's mean
    spread = math.hypot(*(mean - middle for mean in means)) / math.sqrt(max(1, len(means) - 1))
    share = 1.0 if len(means) == 1 or noise == 0 else 1 - min(1.0, noise / spread) ** 2 if spread else 0.0
    return middle + share * (means[0] - middle), _student_error(deviation, len(known[0]), freedom=freedom)


def _runner_up(rivals: Sequence[Candidate], *, sign: int, grain: float) -> RunnerUp | None:
    if len(rivals) < 2:
        return None
    from scipy.stats import t

    pairs = zip(rivals[0].values, rivals[1].values, strict=True)
    differences = [sign * (mine - theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    if len(differences) < 2:
        return None
    mean, count = statistics.fmean(differences), len(differences)
    deviation = math.hypot(*(one - mean for one in differences)) / math.sqrt(count - 1)
    deviation = max(deviation, grain / math.sqrt(6))
    reach = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return RunnerUp(rivals[1].params, mean, (mean - reach, mean + reach), is_worse=mean - reach > 0)


def _student_error(deviation: float, count: int, *, freedom: int | None = None) -> float:
    """The standard error of a mean of `count` values, wide enough for so few to hold it in 68 % of all cases."""
    from scipy.stats import t

    return float(t.ppf((1 + STANDARD_CONFIDENCE) / 2, freedom or count - 1)) * deviation / math.sqrt(count)


def _mean_of(one: Candidate) -> float:
    assert one.mean is not None
    return one.mean


def _without_seed(params: Mapping[str, Any]) -> dict[str, Scalar]:
    return {key: value for key, value in params.items() if key != "seed"}


def _free_rate(study: StudyRecord, params: Mapping[str, Scalar]) -> Range | Categorical | None:
    """What the learning rate is searched in, where one between those that were tried can be trained.

    That is neither so for a list, but a grid's, which Optuna is told is a range, nor where it has steps.
    """
    spec = study.spec.search
    parameter = spec.parameters.get("lr")
    if isinstance(parameter, Conditional):
        parameter = parameter.cases.get(str(params.get(parameter.by)))
    if parameter is None or isinstance(parameter, Conditional):
        return None
    is_free = spec.sampler == "grid" or (isinstance(parameter, Range) and parameter.step is None)
    return parameter if is_free else None


def _are_apart(study: StudyRecord, one: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> bool:
    """Whether two trials differ in a listed parameter or by APART in their learning rate, or have none and differ."""
    lists = study.spec.search.listed_values(one)
    if any(one.get(key) != other.get(key) for key in lists):
        return True
    mine, theirs = one.get("lr"), other.get("lr")
    if isinstance(mine, int | float) and isinstance(theirs, int | float) and mine > 0 and theirs > 0:
        return abs(math.log10(mine / theirs)) > MIN_APART_DECADES
    return one != other
