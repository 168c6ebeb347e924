"""The answer in words: a headline, the lines that matter most, the details, and the warnings.

Every surface shows these: a terminal as aligned lines, a page as cards and a list, Markdown as a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpo.analysis import range_text
from hpo.analysis.answer import Best, trial_of_weights
from hpo.analysis.confirmation import Confirmation
from hpo.analysis.response import CONFIDENCE, Response
from hpo.analysis.text import (
    difference_text,
    interval_text,
    metric_text,
    number_text,
    params_text,
    plural,
    rate_text,
    trials_text,
    value_text,
)
from hpo.analysis.trials import direction_sign
from hpo.study.records import StudyRecord, TrialRecord
from hpo.train.config import name_on_test_set

NUM_LINES = 3  # that are shown without the details
HEADLINE_DOUBTS = {  # warnings that the best rate may be another one, although it is confirmed or the interval narrow
    "pruned-away": "better values are expected elsewhere",
    "edge-of-range": "the best may lie beyond the searched range",
}


@dataclass(frozen=True)
class AnswerLine:
    """A finding: its label, the finding itself in a few signs, and what it means."""

    label: str
    fact: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.fact} ({self.note})" if self.note else self.fact


@dataclass(frozen=True)
class AnswerText:
    """The answer of a study in words."""

    headline: str
    lines: Sequence[AnswerLine]
    details: Sequence[AnswerLine]
    warnings: Sequence[str]

    @property
    def sentences(self) -> list[str]:
        """The answer and its details as a list of texts, without the warnings."""
        return [self.headline, *(f"{line.label}: {line}" for line in (*self.lines, *self.details))]


def describe_answer(study: StudyRecord, answer: Best) -> AnswerText:
    """Return the answer of a study in words."""
    findings = list(_findings(study, answer))
    warnings = [warning.text for warning in answer.warnings]
    return AnswerText(_headline(answer), findings[:NUM_LINES], findings[NUM_LINES:], warnings)


def answer_lines(study: StudyRecord, answer: Best, *, source: str | None = None, verbose: bool = True) -> list[str]:
    """Return the answer as lines of a terminal: the headline, then labels with their texts below each other.

    Args:
        study: The study.
        answer: Its answer.
        source: Where the answer is from, by `source_text`. Default: this is not said.
        verbose: Whether to show the details.
    """
    text = describe_answer(study, answer)
    rows = [(line.label, str(line)) for line in (*text.lines, *(text.details if verbose else ()))]
    if source is not None:
        rows += [("weights", weights) for weights in weights_lines(study, answer)]
        rows.append(("study", source))
    rows += [("warning", warning) for warning in text.warnings]
    width = max((len(label) for label, _ in rows), default=0) + 1
    return [text.headline, *(f"  {f'{label}:':<{width}}  {line}" for label, line in rows)]


def source_text(study: StudyRecord, trials: Sequence[TrialRecord], *, storage: str, is_trained: bool) -> str:
    """Return which study an answer is from, and whether it was trained for it."""
    without = "" if is_trained else "; answered from the store, nothing trained"
    return f"{study.name} in {storage} ({trials_text(study, trials)}{without})"


def weights_lines(study: StudyRecord, answer: Best) -> list[str]:
    """Return how to get the weights that the answer recommends; nothing where none are kept."""
    if study.spec.objective is not None or not study.spec.checkpoints.keep_best:
        return []
    trial = trial_of_weights(study, answer)
    return [f"of trial {trial}: hpo export {study.name} --weights best.safetensors"]


def _headline(answer: Best) -> str:
    recommended, response = answer.recommended, answer.response
    others = ", ".join(f"{key} {number_text(value)}" for key, value in recommended.items() if key != "lr")
    if answer.lr is None:
        return f"best values: {others}"
    headline = f"best learning rate: {rate_text(answer.lr)}" + (f" ({others})" if others else "")
    kinds = {warning.kind for warning in answer.warnings}
    doubt = next((f", but {doubt}" for kind, doubt in HEADLINE_DOUBTS.items() if kind in kinds), "")
    if answer.confirmation is not None:
        return f"{headline}, confirmed on {_seeds_text(answer.confirmation)}{doubt}"
    if response is None:
        return f"{headline}, the best of those tried"
    if not response.is_determined:
        return f"{headline} so far, but not determined"
    return f"{headline} so far{doubt}" if doubt else headline


def _findings(study: StudyRecord, answer: Best) -> Iterator[AnswerLine]:
    """Yield the findings of an answer, the most important ones first."""
    confirmation, response = answer.confirmation, answer.response
    if confirmation is not None:
        yield from _confirmed_lines(study, confirmation)
    if response is not None:
        yield _interval_line(study, response, answer)
        if confirmation is None:
            yield _expected_line(study, response)
    elif confirmation is None:
        yield _best_trial_line(study, answer)
        yield from _tried_lines(answer)
    yield from _other_lines(study, answer)
    if response is not None:
        yield from _edge_lines(response)
    if response is not None and confirmation is None:
        yield _gain_line(study, response)
    if response is not None or confirmation is not None:
        yield _best_trial_line(study, answer)
    if confirmation is not None:
        if response is not None:
            yield _search_line(study, answer, response)
        yield from _seeds_lines(study, confirmation)
    for line in range_text.range_test_lines(study, best=answer.lr, params=answer.recommended):
        yield AnswerLine("range test", line)


# What the response says


def response_lines(study: StudyRecord, answer: Best, response: Response) -> list[AnswerLine]:
    """Return what one of the responses of an answer says, its best learning rate first."""
    label = "the search points to" if answer.confirmation else "best learning rate"
    lines = [_interval_line(study, response, answer), _expected_line(study, response), *_edge_lines(response)]
    return [AnswerLine(label, rate_text(response.best)), *lines]


def _interval_line(study: StudyRecord, response: Response, answer: Best) -> AnswerLine:
    low, high = response.interval
    if answer.is_open(response):
        is_race = study.spec.search.sampler == "race"
        remedy = "repeat the race with a larger search.trainings" if is_race else "try more rates"
        note = f"any of these may be best: {remedy}"
    elif response is answer.response and any(warning.kind == "pruned-away" for warning in answer.warnings):
        note = "better values are expected at rates that were dropped: see the warning"
    elif rate_text(response.plateau[0]) == rate_text(response.plateau[1]):
        note = "no other rate does as well"
    elif answer.confirmation is None:
        note = f"{interval_text(response.plateau)} do equally well"
    else:
        note = f"in the search, {interval_text(response.plateau)} did equally well"
    if response is answer.response and answer.lr is not None and not low <= answer.lr <= high:
        note += f"; the confirmed rate, {rate_text(answer.lr)}, is outside it"
    return AnswerLine(f"{100 * CONFIDENCE:.0f} % interval", interval_text(response.interval), note)


def _expected_line(study: StudyRecord, response: Response) -> AnswerLine:
    noise = difference_text(study, response.noise, of=response.value)
    doubt = f"± {noise} from seed to seed"
    if not response.is_determined:  # the noise is not known then, either
        low, high = (
            value_text(band[response.index_of_best], study) for band in (response.trial_low, response.trial_high)
        )
        doubt = "" if low == high else f"{low} to {high} is possible"
    note = ", ".join(filter(None, (f"{metric_text(study)} of a trial", doubt)))
    return AnswerLine("expected", value_text(response.value, study), note)


def _gain_line(study: StudyRecord, response: Response) -> AnswerLine:
    gain = difference_text(study, response.gain, of=response.value)
    return AnswerLine("one more trial", f"+{gain}", "expected gain, at the most informative rate")


def edge_label(response: Response) -> str:
    """Return what half of the trials do at the edge of divergence."""
    return "half learn nothing" if response.num_guessing and not response.num_diverged else "half diverge"


def _edge_lines(response: Response) -> Iterator[AnswerLine]:
    if response.divergence_lr is not None:
        note, num_guessing = interval_text(response.divergence_lr.interval), response.num_guessing
        if num_guessing and response.num_diverged:
            verb = "counts" if num_guessing == 1 else "count"
            note += f"; {plural(num_guessing, 'trial')} that learned nothing {verb} as diverged"
        yield AnswerLine(f"{edge_label(response)} at", rate_text(response.divergence_lr.lr), note)


def _other_lines(study: StudyRecord, answer: Best) -> Iterator[AnswerLine]:
    """Yield the best rate of each other combination of listed parameters."""
    for params, response in answer.responses:
        if response is not answer.response:
            interval, value = interval_text(response.interval), value_text(response.value, study)
            yield AnswerLine(f"with {params_text(params)}", rate_text(response.best), f"{interval}; {value}")


# What single trials say


def _best_trial_line(study: StudyRecord, answer: Best) -> AnswerLine:
    """Return the best trial, with how much of its value was luck if that is known."""
    note = f"{metric_text(study)} {value_text(answer.value, study)}"
    confirmation = answer.confirmation
    if confirmation is not None:
        comparative = "better" if confirmation.inflation >= 0 else "worse"
        difference = difference_text(study, abs(confirmation.inflation), of=confirmation.value)
        note += f", {difference} {comparative} than confirmed"
    elif answer.num_complete > 1:
        note += f", optimistic: the best of {answer.num_complete}"
    return AnswerLine("best trial", f"#{answer.trial}, {params_text(answer.params)}", note)


def _tried_lines(answer: Best) -> Iterator[AnswerLine]:
    if answer.interval is not None:
        is_alone = answer.interval[0] == answer.interval[1]
        fact = "no other rate" if is_alone else interval_text(answer.interval)
        yield AnswerLine("as good", fact, "of those tried, within one standard error")


# What the confirmation says


def confirmation_lines(study: StudyRecord, confirmation: Confirmation) -> list[AnswerLine]:
    """Return what came of training the best learning rates again."""
    return [*_confirmed_lines(study, confirmation), *_seeds_lines(study, confirmation)]


def _confirmed_lines(study: StudyRecord, confirmation: Confirmation) -> Iterator[AnswerLine]:
    note = f"{metric_text(study)}, {_error_text(study, confirmation.value, confirmation.standard_error)}"
    note += f"on {_seeds_text(confirmation)}"
    yield AnswerLine("confirmed", value_text(confirmation.value, study), note)
    if confirmation.test_value is not None:
        value, error = confirmation.test_value, confirmation.test_standard_error
        if confirmation.test_metric == name_on_test_set(study.spec.metric):
            label, fact = metric_text(study).replace("validation", "test"), value_text(value, study)
            doubt = _error_text(study, value, error)
        else:
            label, fact = "test accuracy", f"{100 * value:.2f} %"
            doubt = "" if error is None else f"± {float(f'{100 * error:.2g}'):g} percentage points, "
        yield AnswerLine(label, fact, f"{doubt}not used for selection")


def _search_line(study: StudyRecord, answer: Best, response: Response) -> AnswerLine:
    note = "best by the trials of the search alone"
    if listed := study.spec.search.listed_values(answer.recommended):
        note += f", with {params_text(listed)}"
    return AnswerLine("the search", rate_text(response.best), note)


def _seeds_lines(study: StudyRecord, confirmation: Confirmation) -> Iterator[AnswerLine]:
    winner, value = confirmation.winner, confirmation.value
    other = confirmation.runner_up
    if other is not None:
        verdict = "really is worse" if other.is_worse else "not told apart"
        behind = difference_text(study, other.difference, of=value)
        interval = difference_text(study, *other.interval, of=value)
        yield AnswerLine("runner-up", params_text(other.params), f"{verdict}: {behind} behind; {interval}")
    if winner.mean is not None and value_text(winner.mean, study) != value_text(value, study):
        extreme = "high" if direction_sign(study) > 0 else "low"
        note = f"too {extreme}, as the best of several; expect {value_text(value, study)}"
        yield AnswerLine("mean of seeds", value_text(winner.mean, study), note)
    if study.spec.confirm and any(len(rate.values) < study.spec.confirm.seeds for rate in confirmation.candidates):
        counts = [f"{params_text(rate.params)} on {len(rate.values)}" for rate in confirmation.candidates]
        note = f"of at most {study.spec.confirm.seeds}: rates that are clearly worse get no more"
        yield AnswerLine("seeds", "; ".join(counts), note)
    for candidate in confirmation.candidates:
        if candidate.num_diverged:
            diverged = f"{candidate.num_diverged} of {plural(len(candidate.values), 'seed')}"
            yield AnswerLine("diverged", params_text(candidate.params), diverged)


def _seeds_text(confirmation: Confirmation) -> str:
    return plural(sum(value is not None for value in confirmation.winner.values), "fresh seed")


def _error_text(study: StudyRecord, value: float, error: float | None) -> str:
    return "" if error is None else f"± {difference_text(study, error, of=value)}, "
