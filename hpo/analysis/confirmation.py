"""Confirmation: what came of the best learning rates of a search when they were trained again on fresh seeds.

The best trial of a search is the luckiest of many: it was chosen by the value that it is then praised for. So
`confirm.top` different learning rates are each trained in full on seeds that no trial of the search had, the same seeds
for each: up to `confirm.seeds`, as long as the race over seeds (`hpo.study.seed_race`) needs more. The highest mean of
their values wins. Only then are the winner's networks measured on the test set, once. These trials follow those of the
search in its study. They are never pruned, and no sampler or pruner is shown them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpo.analysis.text import rate_text
from hpo.analysis.trials import direction_sign
from hpo.study.records import ENDED, StudyRecord, TrialRecord
from hpo.study.seed_race import SeedResults, find_lead
from hpo.study.stages import latest
from hpo.train.config import name_on_test_set

STANDARD_CONFIDENCE = 0.6827  # the share of a normal distribution within one standard deviation


@dataclass(frozen=True)
class Candidate:
    """A learning rate that was trained again.

    Attributes:
        params: Its values.
        trials: The numbers of its trials, one for each seed.
        values: The value of each trial; None if it did not complete.
        mean: The mean value of those that completed.
        num_diverged: How many seeds diverged.
    """

    params: Mapping[str, Any]
    trials: Sequence[int]
    values: Sequence[float | None]
    mean: float | None
    num_diverged: int


@dataclass(frozen=True)
class RunnerUp:
    """The second best mean against the winner's, by the differences of equal seeds.

    The winner was chosen as the best of several, so either of the two might have led. The two-sided interval allows for
    that: however many equally good rates are compared, it calls the second worse in at most 5 % of confirmations
    (Gutmann and Maymin, Annals of Statistics 15, 1987; Hung and Fithian, Annals of Statistics 47, 2019). It is wrong
    most often where only two are equal: a third one that comes near makes the lead smaller. It also allows for the
    looks after earlier seeds, see `hpo.study.seed_race`.

    Attributes:
        params: Its values.
        difference: The winner's mean less the runner-up's, over equal seeds; positive if the winner leads.
        interval: Holds the true difference, at this look and the others, with 95 % confidence.
        is_worse: Whether the whole interval is above 0.
    """

    params: Mapping[str, Any]
    difference: float
    interval: tuple[float, float]
    is_worse: bool


@dataclass(frozen=True)
class Confirmation:
    """The result of a confirmation.

    The winner is the first of `candidates`: the one with the fewest diverged seeds, and of those the best mean. Its
    mean is shrunk towards the mean of all candidates as far as noise explains their differences, because the winner was
    chosen as the highest (empirical Bayes: Efron and Morris, J. American Statistical Association 70, 1975). The
    standard error is that of a candidate's mean, from the spread about the means of all, wide enough for so few seeds
    (Student's t, 68 %).

    Attributes:
        candidates: The rates that were trained again, the winner first.
        value: The value to expect of a trial with the winner's values.
        standard_error: The standard error of `value`; None if too few trials completed to know.
        inflation: By how much the value of the search's best trial was better than `value`.
        runner_up: The second best rate; None if there is none, or fewer than two seeds completed for both.
        test_value: The winner's mean in the study's metric on the test set; None if it was not measured.
        test_standard_error: The standard error of `test_value`.
        test_metric: The name of `test_value`, such as `test_auroc`; of older versions `test_accuracy`.
    """

    candidates: Sequence[Candidate]
    value: float
    standard_error: float | None
    inflation: float
    runner_up: RunnerUp | None
    test_value: float | None
    test_standard_error: float | None
    test_metric: str

    @property
    def winner(self) -> Candidate:
        """The candidate that won."""
        return self.candidates[0]

    @property
    def worse(self) -> list[Candidate]:
        """The candidates that really are worse: the runner-up, if it is, and what left the race over seeds before."""
        told = self.runner_up.params if self.runner_up is not None and self.runner_up.is_worse else None
        num_seeds = len(self.winner.values)
        return [rate for rate in self.candidates[1:] if rate.params == told or len(rate.values) < num_seeds]

    def as_dict(self) -> dict[str, Any]:
        """Return the confirmation as plain data for JSON."""
        return {"params": dict(self.winner.params), **asdict(self)}


def find_confirmation(study: StudyRecord, trials: Sequence[TrialRecord], *, search_value: float) -> Confirmation | None:
    """Return the result of the study's confirmation, or None if its trials have not all ended or none completed.

    `search_value` is the value of the best trial of the search.
    """
    following = latest(trials)
    confirming = [trial for trial in following if trial.kind == "confirm"]
    if any(trial.state not in ENDED for trial in confirming) or all(trial.state != "complete" for trial in confirming):
        return None
    sign = direction_sign(study)
    candidates = [_candidate(group) for group in _group_by_params(confirming)]
    measured = [candidate for candidate in candidates if candidate.mean is not None]
    # Those that left the race over seeds before others are behind them.
    ranked = sorted(
        measured, key=lambda candidate: (-len(candidate.values), candidate.num_diverged, -sign * _mean_of(candidate))
    )
    rivals = [candidate for candidate in ranked if candidate.num_diverged == ranked[0].num_diverged]
    value, error = _expected_value(rivals, grain=study.grain)
    tests = [trial for trial in following if trial.kind == "test" and trial.state == "complete"]
    if study.spec.objective is not None:  # whose loop may have measured the test set while it confirmed
        wanted = name_on_test_set(study.spec.metric)
        tests = [trial for trial in confirming if trial.number in ranked[0].trials and wanted in trial.curves]
    test_metric = find_test_metric(study, tests)
    last = [trial.curves[test_metric][-1] for trial in tests]
    tested = [number for number in last if number is not None]
    return Confirmation(
        candidates=[*ranked, *(candidate for candidate in candidates if candidate.mean is None)],
        value=value,
        standard_error=error,
        inflation=sign * (search_value - value),
        runner_up=_runner_up(study, rivals, sign=sign),
        test_value=statistics.fmean(tested) if tested else None,
        test_standard_error=_student_error(statistics.stdev(tested), len(tested)) if len(tested) > 1 else None,
        test_metric=test_metric,
    )


def find_test_metric(study: StudyRecord, tests: Sequence[TrialRecord]) -> str:
    """Return what is reported of the test set in the study's metric; earlier versions measured its accuracy alone."""
    wanted = name_on_test_set(study.spec.metric)
    return wanted if all(wanted in trial.curves for trial in tests) else "test_accuracy"


def exclude_worse(rates: tuple[float, float], *, worse: Sequence[float], winner: float) -> tuple[float, float]:
    """Return what is left of the learning rates, (lowest, highest), that are said to do equally well.

    A worse rate goes, with those beyond it and those that are nearer to it than to the winner. If none is left, the
    winner's rate stands alone.
    """
    low, high = rates
    for rate in worse:
        shown = [float(rate_text(end)) for end in (low, rate, high)]
        if shown == sorted(shown):
            middle = math.sqrt(rate * winner)
            low, high = (max(low, middle), high) if rate < winner else (low, min(high, middle))
    return (low, high) if low <= high else (winner, winner)


def _group_by_params(trials: Sequence[TrialRecord]) -> list[list[TrialRecord]]:
    groups: list[list[TrialRecord]] = []
    for trial in trials:
        group = next((group for group in groups if group[0].params == trial.params), None)
        if group is None:
            groups.append(group := [])
        group.append(trial)
    return groups


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


def _expected_value(rivals: Sequence[Candidate], *, grain: float) -> tuple[float, float | None]:
    """Return `value` and `standard_error` of a `Confirmation`; the first of the rivals has the best mean.

    `grain` is the smallest difference that two values can have. Values that are all alike are still that uncertain.
    """
    known = [[value for value in rival.values if value is not None] for rival in rivals]
    freedom = sum(len(values) - 1 for values in known)
    if freedom < 1:
        return _mean_of(rivals[0]), None
    deviations = [value - statistics.fmean(values) for values in known for value in values]
    # hypot: a loss may be of any size.
    deviation = max(math.hypot(*deviations) / math.sqrt(freedom), grain / math.sqrt(12))
    means = [_mean_of(rival) for rival in rivals]
    middle = statistics.fmean(means)
    noise = deviation / math.sqrt(len(known[0]))  # of the winner's mean
    spread = math.hypot(*(mean - middle for mean in means)) / math.sqrt(max(1, len(means) - 1))
    share = 1.0 if len(means) == 1 else _signal_share(noise, spread)
    return middle + share * (means[0] - middle), _student_error(deviation, len(known[0]), freedom=freedom)


def _signal_share(noise: float, spread: float) -> float:
    """Return the share of a spread, a standard deviation, that noise does not explain."""
    if noise == 0:
        return 1.0
    return 1 - min(1.0, noise / spread) ** 2 if spread else 0.0


def _runner_up(study: StudyRecord, rivals: Sequence[Candidate], *, sign: int) -> RunnerUp | None:
    if len(rivals) < 2:
        return None
    max_seeds = study.spec.confirm.seeds if study.spec.confirm else len(rivals[0].values)
    won, second = (
        SeedResults([None if value is None else sign * value for value in rival.values], rival.num_diverged)
        for rival in rivals[:2]
    )
    lead = find_lead(won, second, max_seeds=max_seeds, grain=study.grain)
    return None if lead is None else RunnerUp(rivals[1].params, lead.mean, lead.interval, is_worse=lead.is_certain)


def _student_error(deviation: float, count: int, *, freedom: int | None = None) -> float:
    """Return the standard error of a mean of `count` values, wide enough for so few to hold it in 68 % of all cases."""
    from scipy.stats import t

    return float(t.ppf((1 + STANDARD_CONFIDENCE) / 2, freedom or count - 1)) * deviation / math.sqrt(count)


def _mean_of(candidate: Candidate) -> float:
    assert candidate.mean is not None
    return candidate.mean
