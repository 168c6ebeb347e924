"""The answer and what belongs to it in words: one writer for each sentence, whether a terminal or a page shows it."""

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
    """What is searched, on what."""
    spec, facts = study.spec, study.facts
    text = f"{spec.num_trials} trials, {spec.search.sampler} over {', '.join(spec.search.parameters)}"
    if spec.confirm:
        text += f", then the best {spec.confirm.top} on {spec.confirm.seeds} seeds each"
    if "num_parameters" in facts:
        text += (
            f"; {spec.model.name} ({facts['num_parameters']:,} parameters) on {spec.data.name} "
            f"({facts['num_train']:,} training, {facts['num_val']:,} validation pictures, "
            f"{facts['num_classes']} classes)"
        )
    return text


def counts_text(trials: Sequence[TrialRecord]) -> str:
    """How many trials there are in each state."""
    states = [trial.state for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def no_answer_text(trials: Sequence[TrialRecord]) -> str:
    return f"no complete trial to choose from: {counts_text(trials)}"


def answer_lines(study: StudyRecord, found: Best) -> list[str]:
    """The answer in words, the warnings last."""
    values = ", ".join(f"{key} {number_text(value)}" for key, value in found.params.items() if key != "lr")
    trial = f"{study.spec.metric} {value_text(found.value, study)}, trial {found.trial}"
    if found.confirmation is not None:
        lines = confirmation_lines(study, found.confirmation)
        if found.response is not None:
            listed = params_text(study.spec.search.listed_values(found.recommended))
            best = f"{rate_text(found.response.best)}{f' with {listed}' if listed else ''}"
            lines.append(f"the response to the learning rate in the search is best at {best}")
            lines += response_lines(study, found.response)
            low, high = found.response.interval
            if found.lr is not None and not low <= found.lr <= high:
                lines.append(f"what was confirmed, {rate_text(found.lr)}, is outside of that interval")
        lines.append(f"the best trial of the search: {params_text(found.params)}, {trial}; the luckiest, too")
    elif found.response is not None:
        lines = [f"best learning rate: {rate_text(found.response.best)}" + (f" ({values})" if values else "")]
        lines += response_lines(study, found.response)
        lines.append(f"the best trial: learning rate {number_text(found.params['lr'])}, {trial}; the luckiest, too")
    else:
        subject = f"best learning rate: {number_text(found.params['lr'])}" if "lr" in found.params else "best"
        lines = [f"{subject}{f' ({values})' if values else ''}, {trial}"]
        if found.interval is not None:
            low, high = found.interval
            lines.append(
                "as good within one standard error: the tried learning rates "
                f"from {number_text(low)} to {number_text(high)}"
                if low < high
                else "no other learning rate that was tried came within one standard error"
            )
    for params, other in found.responses:
        if other is not found.response:
            lines.append(
                f"with {params_text(params)}: {rate_text(other.best)} ({interval_text(other.interval)}), "
                f"{study.spec.metric} {value_text(other.value, study)}"
            )
    lines += range_text.range_test_lines(study, best=found.lr, params=found.recommended)
    return lines + [f"beware: {warning.text}" for warning in found.warnings]


def confirmation_lines(study: StudyRecord, found: Confirmation) -> list[str]:
    """What came of training the best learning rates again."""
    winner = found.winner
    count = sum(value is not None for value in winner.values)
    values = ", ".join(f"{key} {number_text(value)}" for key, value in winner.params.items() if key != "lr")
    subject = f"best learning rate: {number_text(winner.params['lr'])}" if "lr" in winner.params else "best"
    lines = [
        f"{subject}{f' ({values})' if values else ''}, confirmed on {count} fresh seed{'s' * (count != 1)}: "
        f"{study.spec.metric} {_with_error(found.value, found.standard_error, study)}"
    ]
    if winner.mean is not None and value_text(winner.mean, study) != value_text(found.value, study):
        lines.append(
            f"the mean of its seeds is {value_text(winner.mean, study)}; that of the best of several is too high, "
            "and is drawn towards the others'"
        )
    lines.append(
        f"the search's best trial was {value_text(abs(found.inflation), study)} "
        f"{'better' if found.inflation >= 0 else 'worse'} than what was confirmed"
    )
    if found.test_value is not None:
        error = found.test_standard_error
        lines.append(f"on the test set, which nothing was chosen by: {_with_error(found.test_value, error, study)}")
    if found.runner_up is not None:
        other, (low, high) = found.runner_up, found.runner_up.interval
        verdict = "really is worse" if other.is_worse else "is not told apart from it"
        behind = value_text(other.difference, study)
        lines.append(
            f"the runner-up, {params_text(other.params)}, {verdict}: seed by seed it is {behind} "
            f"behind ({value_text(low, study)} to {value_text(high, study)})"
        )
    for one in found.candidates:
        if one.num_diverged:
            lines.append(f"{params_text(one.params)}: {one.num_diverged} of its {len(one.values)} seeds diverged")
    return lines


def _with_error(value: float, error: float | None, study: StudyRecord) -> str:
    return value_text(value, study) + (f" ± {value_text(error, study)}" if error is not None else "")


def response_lines(study: StudyRecord, found: Response) -> list[str]:
    """What a response says beside its best learning rate."""
    low, high = map(rate_text, found.interval)
    lines = [
        f"with {CONFIDENCE:.0%} confidence the best one is between {low} and {high}; "
        f"not told apart from it: {interval_text(found.plateau)}",
        f"a trial there is expected to have {study.spec.metric} {value_text(found.value, study)}, give or take "
        f"{value_text(found.noise, study)}",
    ]
    if found.edge is not None:
        edge = found.edge
        lines.append(f"half of the trials diverge at {rate_text(edge.lr)} ({interval_text(edge.interval)})")
    return lines


def rate_text(lr: float) -> str:
    return f"{lr:.2g}"


def interval_text(interval: tuple[float, float]) -> str:
    """Two learning rates."""
    return " to ".join(map(rate_text, interval))


def peak_text(lr: float, epochs: int) -> str:
    return f"all trials together, compared after {epochs} epoch{'s' * (epochs > 1)}, point to lr={lr:.3g}"


def number_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def value_text(value: float, study: StudyRecord) -> str:
    return f"{value:.2%}" if study.spec.metric.endswith("accuracy") and -1 <= value <= 1 else f"{value:.4g}"


def params_text(params: Mapping[str, Any]) -> str:
    """A trial's values in a line."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()
    )


def cell_text(value: Any) -> str:
    """A cell of a table."""
    return "" if value is None else number_text(value)
