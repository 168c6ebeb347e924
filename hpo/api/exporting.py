"""The public functions that write files: what a study recommends as a study file, and its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from hpo.analysis import answer as analysis
from hpo.analysis.answer import Best
from hpo.api.reading import answer_of
from hpo.api.stores import open_study
from hpo.config.study_spec import single_trial_spec
from hpo.errors import UserError
from hpo.reports.publisher import publish_report
from hpo.search.proposals import check_values
from hpo.store.retry import STORE_ERRORS
from hpo.study.records import TrialRecord

HEADER = "Exported from study"  # begins every export; no other file is overwritten
HEADERS = (HEADER, "The best trial of study")  # that of older versions, too


def export(name: str, *, trial: int | None = None, storage: str | None = None) -> dict[str, Any]:
    """Return the recommended values of a study as the settings of a study that trains these alone.

    Args:
        name: The study.
        trial: The number of a trial to train again instead. Default: what the study recommends.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        The content of a study file, for `StudySpec.from_dict`. Its only trial has the seed of the trial that has been
        trained with these values, if there is one, and of the best trial if not.

    Raises:
        UserError: There is no such study or trial, or the trial has not begun.
        StudyStopped: No trial has completed.
    """
    return _answer_and_settings(name, trial, storage)[1]


def write_export(name: str, output: str | Path, *, trial: int | None = None, storage: str | None = None) -> None:
    """Write the recommended values of a study to a file.

    Args:
        name: The study.
        output: The file: a study file where it ends in .toml, the answer and the study in one where it ends in .json.
        trial: The number of a trial to train again instead. Default: what the study recommends.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Raises:
        UserError: There is no such study or trial, or `output` has another ending, cannot be written or is no earlier
            export.
        StudyStopped: No trial has completed.
    """
    path = Path(output)
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--output must end in .toml or .json, got {str(output)!r}")
    found, settings = _answer_and_settings(name, trial, storage)
    exported = "what it recommends" if trial is None else f"trial {trial}"
    what = f"{HEADER} {name}: {exported}"
    if path.suffix == ".toml":
        text = f"# {what}\n\n{tomli_w.dumps(settings)}"
    else:
        text = json.dumps({"what": what, "study": name, **found.as_dict(), "spec": settings}, indent=2) + "\n"
    if path.exists() and not any(header in path.read_text(encoding="utf-8", errors="replace") for header in HEADERS):
        raise UserError(f"--output {path} exists and was not written by hpo export; name another file")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None


def report(
    name: str,
    output: str | Path | None = None,
    *,
    form: str | None = None,
    figure: str = "response",
    storage: str | None = None,
) -> Path:
    """Write the report of a study, and show the same in optuna-dashboard.

    Args:
        name: The study.
        output: The file. Default: the study's name with the form's ending.
        form: "html", "png", "svg", "md" or "json". Default: the ending of `output`, else "html".
        figure: The figure that a png or svg shows.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        The path of the file.

    Raises:
        UserError: There is no such study, form or figure, or `output` is a file that is no earlier report.
    """
    from hpo.reports import output_file, render, study_report

    path = Path(output or f"{name}.{form or 'html'}")
    if path.suffix[1:] not in render.FORMATS and form is None:
        raise UserError(f"--output must end in {', '.join(f'.{form}' for form in render.FORMATS)}, got {str(output)!r}")
    form = form or path.suffix[1:]
    render.check_request(form, figure)
    store, study = open_study(name, storage=storage)
    all_trials = store.trials.get_all(study)
    made = study_report.make_report(study, all_trials, analysis.find_best(study, all_trials), storage=str(store.url))
    output_file.write_report_file(path, render.render_report(made, form, figure=figure))
    with suppress(*STORE_ERRORS):  # a store that can only be read has a report all the same
        publish_report(store, made)
    return path


def _answer_and_settings(name: str, number: int | None, storage: str | None) -> tuple[Best, dict[str, Any]]:
    """Return the answer, and the settings to train from one look at a study."""
    store, study = open_study(name, storage=storage)
    all_trials = store.trials.get_all(study)
    found = answer_of(study, all_trials)
    if number is None:
        trained, label = _recommended_trial(found, all_trials), "best"
        values = found.recommended
    else:
        trained, label = find_trial(all_trials, number), f"trial-{number}"
        values = dict(trained.params)
    check_values(study.spec, trained.params)
    stacked = any(agreed["convolution"] for agreed in store.studies.shared_values(study).values())
    again = single_trial_spec(
        study.spec, values, name=f"{name[:85]}-{label}", seed=trained.attributes["seed"], stacked=stacked
    )
    return found, again.frozen()


def _recommended_trial(found: Best, all_trials: Sequence[TrialRecord]) -> TrialRecord:
    """Return the trial whose seed is trained again: one with exactly the recommended values, or the best one."""
    complete = [trial for trial in all_trials if trial.state == "complete" and trial.kind != "test"]
    numbers = [found.trial] if found.confirmation is None else found.confirmation.winner.trials
    ranked = sorted(complete, key=lambda trial: (trial.params != found.recommended, trial.number not in numbers))
    return ranked[0]


def find_trial(all_trials: Sequence[TrialRecord], number: int) -> TrialRecord:
    """Return the trial of this number; raise UserError, naming --trial, where there is none or it has not begun."""
    trial = next((trial for trial in all_trials if trial.number == number), None)
    if trial is None:
        raise UserError(f"--trial must be the number of a trial of the study, 0 to {len(all_trials) - 1}, got {number}")
    if "seed" not in trial.attributes:
        raise UserError(f"--trial must be a trial that has begun, got {number}, which is {trial.state}")
    return trial
