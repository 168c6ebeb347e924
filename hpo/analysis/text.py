"""Texts of the answer: one writer for each sentence, whether a terminal or a page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.analysis import range_text
from hpo.analysis.response import CONFIDENCE, Response

if TYPE_CHECKING:
    from hpo.analysis.answer import Best
    from hpo.analysis.confirmation import Confirmation
    from hpo.study.records import StudyRecord, TrialRecord


def study_text(study: StudyRecord) -> str:
    """Return what a study searches, and on what data."""
    spec, metadata = study.spec, study.metadata
    text = f"{spec.num_trials} trials, {spec.search.sampler} over {', '.join(spec.search.parameters)}"
    if spec.confirm:
        text += f", then the best {spec.confirm.top} on {spec.confirm.seeds} seeds each"
    if "num_parameters" in metadata:
        text += (
            f"; {spec.model.name} ({metadata['num_parameters']:,} parameters) on {spec.data.name} "
            f"({metadata['num_train']:,} training, {metadata['num_val']:,} validation pictures, "
            f"{metadata['num_classes']} classes)"
        )
    return text


def images_text(study: StudyRecord) -> str | None:
    """Return what was found in a study's folder of images, and what was left out; None where it has no folder."""
    return f"images for training and validation: {study.metadata['images']}" if "images" in study.metadata else None


def counts_text(trials: Sequence[TrialRecord]) -> str:
    """Return how many trials are in each state."""
    states = [trial.state for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def no_answer_text(trials: Sequence[TrialRecord]) -> str:
    """Return why a study with these trials has no answer."""
    return f"no complete trial to choose from: {counts_text(trials)}"


def answer_lines(study: StudyRecord, answer: Best) -> list[str]:
    """Return the answer in sentences, the warnings last."""
    if answer.confirmation is not None:
        lines = _confirmed_lines(study, answer, answer.confirmation)
    elif answer.response is not None:
        subject = f"best learning rate: {rate_text(answer.response.best)}"
        rate = number_text(answer.params["lr"])
        lines = [
            subject + _other_values(answer.params) + _open_text(answer.response),
            *response_lines(study, answer.response),
            f"the best trial: learning rate {rate}, {_trial_text(study, answer)}; the luckiest, too",
        ]
    else:
        lines = _best_trial_lines(study, answer)
    for params, response in answer.responses:
        if response is not answer.response:
            lines.append(
                f"with {params_text(params)}: {rate_text(response.best)} ({interval_text(response.interval)}), "
                f"{study.spec.metric} {value_text(response.value, study)}"
            )
    lines += range_text.range_test_lines(study, best=answer.lr, params=answer.recommended)
    return lines + [f"warning: {warning.text}" for warning in answer.warnings]


def _open_text(response: Response) -> str:
    """Return what follows the best learning rate where the trials leave it open, or nothing."""
    if response.is_determined:
        return ""
    return f" so far, but not determined: any from {interval_text(response.interval)} may be best; try more rates"


def _confirmed_lines(study: StudyRecord, answer: Best, confirmation: Confirmation) -> list[str]:
    lines = confirmation_lines(study, confirmation)
    if answer.response is not None:
        best = rate_text(answer.response.best)
        if listed := study.spec.search.listed_values(answer.recommended):
            best += f" with {params_text(listed)}"
        lines.append(f"the response to the learning rate in the search is best at {best}")
        lines += response_lines(study, answer.response)
        low, high = answer.response.interval
        if answer.lr is not None and not low <= answer.lr <= high:
            lines.append(f"what was confirmed, {rate_text(answer.lr)}, is outside of that interval")
    trial = _trial_text(study, answer)
    return [*lines, f"the best trial of the search: {params_text(answer.params)}, {trial}; the luckiest, too"]


def _best_trial_lines(study: StudyRecord, answer: Best) -> list[str]:
    lines = [f"{_best_rate_text(answer.params)}{_other_values(answer.params)}, {_trial_text(study, answer)}"]
    if answer.interval is not None:
        low, high = answer.interval
        if low < high:
            rates = f"from {number_text(low)} to {number_text(high)}"
            lines.append(f"as good within one standard error: the tried learning rates {rates}")
        else:
            lines.append("no other learning rate that was tried came within one standard error")
    return lines


def _trial_text(study: StudyRecord, answer: Best) -> str:
    return f"{study.spec.metric} {value_text(answer.value, study)}, trial {answer.trial}"


def _best_rate_text(params: Mapping[str, Any]) -> str:
    return f"best learning rate: {number_text(params['lr'])}" if "lr" in params else "best"


def _other_values(params: Mapping[str, Any]) -> str:
    """Return the values other than the learning rate in brackets, or nothing if there are none."""
    values = ", ".join(f"{key} {number_text(value)}" for key, value in params.items() if key != "lr")
    return f" ({values})" if values else ""


def confirmation_lines(study: StudyRecord, confirmation: Confirmation) -> list[str]:
    """Return what came of training the best learning rates again, in sentences."""
    winner, value = confirmation.winner, confirmation.value
    seeds = plural(sum(value is not None for value in winner.values), "fresh seed")
    lines = [
        f"{_best_rate_text(winner.params)}{_other_values(winner.params)}, confirmed on {seeds}: "
        f"{study.spec.metric} {_with_error(value, confirmation.standard_error, study)}"
    ]
    if winner.mean is not None and value_text(winner.mean, study) != value_text(value, study):
        lines.append(
            f"the mean of its seeds is {value_text(winner.mean, study)}; that of the best of several is too high, "
            "and is drawn towards the others'"
        )
    comparative = "better" if confirmation.inflation >= 0 else "worse"
    difference = value_text(abs(confirmation.inflation), study)
    lines.append(f"the search's best trial was {difference} {comparative} than what was confirmed")
    if confirmation.test_value is not None:
        test = _with_error(confirmation.test_value, confirmation.test_standard_error, study)
        lines.append(f"on the test set, which nothing was chosen by: {test}")
    if confirmation.runner_up is not None:
        other, (low, high) = confirmation.runner_up, confirmation.runner_up.interval
        verdict = "really is worse" if other.is_worse else "is not told apart from it"
        behind = value_text(other.difference, study)
        lines.append(
            f"the runner-up, {params_text(other.params)}, {verdict}: seed by seed it is {behind} "
            f"behind ({value_text(low, study)} to {value_text(high, study)})"
        )
    for candidate in confirmation.candidates:
        if candidate.num_diverged:
            diverged = f"{candidate.num_diverged} of its {len(candidate.values)} seeds diverged"
            lines.append(f"{params_text(candidate.params)}: {diverged}")
    return lines


def _with_error(value: float, error: float | None, study: StudyRecord) -> str:
    return value_text(value, study) + (f" ± {value_text(error, study)}" if error is not None else "")


def response_lines(study: StudyRecord, response: Response) -> list[str]:
    """Return what a response says apart from its best learning rate, in sentences."""
    low, high = map(rate_text, response.interval)
    lines = [
        f"with {CONFIDENCE:.0%} confidence the best one is between {low} and {high}; "
        f"not told apart from it: {interval_text(response.plateau)}",
        f"a trial there is expected to have {study.spec.metric} {value_text(response.value, study)}, give or take "
        f"{value_text(response.noise, study)}",
    ]
    if response.divergence_lr is not None:
        rate, interval = rate_text(response.divergence_lr.lr), interval_text(response.divergence_lr.interval)
        lines.append(f"half of the trials diverge at {rate} ({interval})")
    return lines


def rate_text(lr: float) -> str:
    """Return a learning rate with two digits."""
    return f"{lr:.2g}"


def interval_text(interval: tuple[float, float]) -> str:
    """Return two learning rates as "LOW to HIGH"."""
    return " to ".join(map(rate_text, interval))


def peak_text(lr: float, interval: tuple[float, float]) -> str:
    """Return where the curves of all trials point so far, with its interval."""
    return f"all curves so far point to lr={rate_text(lr)} ({CONFIDENCE:.0%} interval {interval_text(interval)})"


def number_text(value: Any) -> str:
    """Return a float with four digits, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def value_text(value: float, study: StudyRecord) -> str:
    """Return a value of the study's metric, an accuracy in percent."""
    return f"{value:.2%}" if study.spec.metric.endswith("accuracy") and -1 <= value <= 1 else f"{value:.4g}"


def params_text(params: Mapping[str, Any]) -> str:
    """Return a trial's values in one line."""
    return " ".join(f"{key}={number_text(value)}" for key, value in params.items())


def cell_text(value: Any) -> str:
    """Return a table cell; None is empty."""
    return "" if value is None else number_text(value)


def plural(count: int, noun: str) -> str:
    """Return "1 epoch", "2 epochs"..."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def paragraph_text(lines: Sequence[str]) -> str:
    """Return lines of the answer as the sentences of one paragraph."""
    return " ".join(f"{line[0].upper()}{line[1:]}." for line in lines)
