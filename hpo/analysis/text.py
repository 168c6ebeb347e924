"""Texts of numbers, trials and studies, whether a terminal or a page shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.analysis.response import CONFIDENCE
from hpo.analysis.trials import is_rate
from hpo.search.race import course_of
from hpo.study.records import StudyRecord, TrialRecord
from hpo.train.imports import CALLER
from hpo.train.metrics import is_percent

METRIC_WORDS = {  # in sentences
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
    "top5": "validation top-5 accuracy",
    "macro_f1": "validation macro F1",
    "balanced_accuracy": "balanced validation accuracy",
    "auroc": "validation AUROC",
    "average_precision": "validation average precision",
}


def study_text(study: StudyRecord) -> str:
    """Return what a study searches, and on what data."""
    spec, metadata = study.spec, study.metadata
    text = f"{budget_text(study)}, {spec.search.sampler} over {', '.join(spec.search.parameters)}"
    if spec.confirm:
        text += f", then the best {spec.confirm.top} on up to {plural(spec.confirm.seeds, 'seed')} each"
    if "num_parameters" in metadata:
        text += (
            f"; {spec.model.name} ({metadata['num_parameters']:,} parameters) on {spec.data.name} "
            f"({metadata['num_train']:,} training, {metadata['num_val']:,} validation images, "
            f"{metadata['num_classes']} classes)"
        )
    return text


def budget_text(study: StudyRecord) -> str:
    """Return how many trials the search has at most, and what may end it before."""
    search, num_trials = study.spec.search, study.spec.num_trials
    if (course := course_of(study.spec)) is not None:
        return f"{num_trials} trials in {course.budget} epochs"
    hours = None if search.hours is None else f"{search.hours:g} h in training"
    limits = [limit for limit in (search.until, hours) if limit is not None]
    text = plural(num_trials, "trial")
    return f"at most {text}, until {' or '.join(limits)}" if limits else text


def search_end_text(study: StudyRecord, trials: Sequence[TrialRecord]) -> str | None:
    """Return after how many trials the search ended and why, or None where it had as many as it could have."""
    if study.search_end is None:
        return None
    num_begun = sum(trial.kind == "search" for trial in trials)
    return f"the search ended after {num_begun} of at most {study.spec.num_trials} trials: {study.search_end}"


def images_text(study: StudyRecord) -> str | None:
    """Return what was found in a study's folder of images, and what was left out; None where it has no folder."""
    return f"images: {study.metadata['images']}" if "images" in study.metadata else None


def weights_text(study: StudyRecord) -> str | None:
    """Return which tensors the networks of a study start with, and which are new; None where all are drawn."""
    return f"weights: {study.metadata['weights']}" if "weights" in study.metadata else None


def counts_text(trials: Sequence[TrialRecord]) -> str:
    """Return how many trials are in each state."""
    states = [trial.state for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def growth_text(study: StudyRecord) -> str | None:
    """Return how far the range of learning rates grew by itself, or None where it did not."""
    grown = [one["after"]["lr"] for one in study.widenings if one["grew"]]
    return f"the range grew to {interval_text((grown[-1]['low'], grown[-1]['high']))}" if grown else None


def trials_text(study: StudyRecord, trials: Sequence[TrialRecord]) -> str:
    """Return how many trials are in each state and, where the search grew or ended early, how far and why."""
    return "; ".join(filter(None, (counts_text(trials), growth_text(study), search_end_text(study, trials))))


def no_answer_text(trials: Sequence[TrialRecord]) -> str:
    """Return why a study with these trials has no answer, and what to do where all of them diverged."""
    text = f"no complete trial to choose from: {counts_text(trials)}"
    if not trials or any(trial.state != "diverged" for trial in trials):
        return text
    reasons = Counter(trial.reason for trial in trials if trial.reason).most_common(1)
    why = f" ({reasons[0][0]})" if reasons else ""
    rates = [float(trial.params["lr"]) for trial in trials if is_rate(trial.params.get("lr"))]
    remedy = f"search learning rates below {rate_text(min(rates))}, or check" if rates else "check"
    return f"{text}{why}: {remedy} the loss and the data"


def resuming_command(study: StudyRecord, option: str) -> str:
    """Return the command that resumes a study with an option, and with the code of the user's that it needs."""
    modules = dict.fromkeys(name.partition(":")[0] for name in study.spec.names_of_code())
    allowed = [f"--allow {module}" for module in modules if module != CALLER]
    return " ".join(["hpo resume", study.name, option, *allowed])


def marked_text(recommended: Mapping[str, Any], num_marked: int) -> str:
    """Return which trials of a table are marked."""
    what = "recommended values"
    if "lr" in recommended:
        what = f"recommended learning rate, {rate_text(recommended['lr'])}"
    if not num_marked:
        return f"none of these trials has the {what}"
    return f"marked: {plural(num_marked, 'trial')} with the {what}"


def rate_text(lr: Any) -> str:
    """Return a learning rate with two digits, and anything else as it is."""
    return f"{float(f'{lr:.2g}'):g}" if isinstance(lr, int | float) else str(lr)


def interval_text(interval: tuple[float, float]) -> str:
    """Return two learning rates as "LOW to HIGH"."""
    return " to ".join(map(rate_text, interval))


def peak_text(lr: float, interval: tuple[float, float]) -> str:
    """Return where the curves of all trials point so far, with its interval."""
    doubt = f"{100 * CONFIDENCE:.0f} % interval {interval_text(interval)}"
    return f"all curves so far point to lr={rate_text(lr)} ({doubt})"


def number_text(value: Any) -> str:
    """Return a float with four digits, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def metric_text(study: StudyRecord) -> str:
    """Return the study's metric in words."""
    return METRIC_WORDS.get(study.spec.metric, study.spec.metric)


def value_text(value: float, study: StudyRecord) -> str:
    """Return a value of the study's metric, an accuracy in percent."""
    return metric_value_text(value, study.spec.metric)


def metric_value_text(value: float, metric: str) -> str:
    """Return a value of one of a trial's curves, shares in percent."""
    return f"{100 * value:.2f} %" if is_percent(metric) and -1 <= value <= 1 else f"{value:.4g}"


def difference_text(study: StudyRecord, *differences: float, of: float) -> str:
    """Return differences between values of the study's metric, of which `of` is one, as "LOW to HIGH" if there are two.

    They have two digits; those of accuracies are in percentage points, to a hundredth, as the accuracies are.
    """
    if not is_shown_in_percent(of, study):
        return " to ".join(f"{float(f'{difference:.2g}'):g}" for difference in differences)
    points = [round(float(f"{100 * difference:.2g}"), 2) + 0.0 for difference in differences]  # + 0.0: no "-0"
    return " to ".join(f"{point:g}" for point in points) + " percentage points"


def is_shown_in_percent(value: float, study: StudyRecord) -> bool:
    """Return whether a value of the study's metric is an accuracy as a share of 1."""
    return is_percent(study.spec.metric) and -1 <= value <= 1


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
