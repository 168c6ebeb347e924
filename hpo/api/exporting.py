"""The public functions that write files: a study's best trial as a study file, and its report."""

from __future__ import annotations

import json
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
from hpo.report.publisher import publish_report
from hpo.search.proposals import check_values
from hpo.store.retry import STORE_ERRORS

HEADER = "The best trial of study"  # begins every export; no other file is overwritten


def export(name: str, *, storage: str | None = None) -> dict[str, Any]:
    """Return the best trial of a study as the settings of a study that trains it alone.

    Args:
        name: The study.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        The content of a study file, for `StudySpec.from_dict`. Its only trial has the best trial's values and seed.

    Raises:
        UserError: There is no such study.
        StudyStopped: No trial has completed.
    """
    return _answer_and_settings(name, storage)[1]


def write_export(name: str, output: str | Path, *, storage: str | None = None) -> None:
    """Write the best trial of a study to a file.

    Args:
        name: The study.
        output: The file: a study file where it ends in .toml, the answer and the study in one where it ends in .json.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Raises:
        UserError: There is no such study, or `output` has another ending, cannot be written or is no earlier export.
        StudyStopped: No trial has completed.
    """
    path = Path(output)
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--output must end in .toml or .json, got {str(output)!r}")
    found, settings = _answer_and_settings(name, storage)
    if path.suffix == ".toml":
        text = f"# {HEADER} {name}\n\n{tomli_w.dumps(settings)}"
    else:
        answer = {"what": f"{HEADER} {name}", "study": name, **found.as_dict(), "spec": settings}
        text = json.dumps(answer, indent=2) + "\n"
    if path.exists() and HEADER not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"--output {path} exists and is no export of ours; name another file")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None


def write_report(
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
    from hpo.report import output_file, study_report
    from hpo.report import render as report

    path = Path(output or f"{name}.{form or 'html'}")
    if path.suffix[1:] not in report.FORMATS and form is None:
        raise UserError(f"--output must end in {', '.join(f'.{form}' for form in report.FORMATS)}, got {str(output)!r}")
    form = form or path.suffix[1:]
    report.check_request(form, figure)
    store, study = open_study(name, storage=storage)
    all_trials = store.trials.get_all(study)
    made = study_report.make_report(study, all_trials, analysis.find_best(study, all_trials), storage=str(store.url))
    output_file.write_report_file(path, report.render_report(made, form, figure=figure))
    with suppress(*STORE_ERRORS):  # a store that can only be read has a report all the same
        publish_report(store, made)
    return path


def _answer_and_settings(name: str, storage: str | None) -> tuple[Best, dict[str, Any]]:
    """Return the answer and the settings that train the best trial again, from one look at the study."""
    store, study = open_study(name, storage=storage)
    all_trials = store.trials.get_all(study)
    found = answer_of(study, all_trials)
    numbers = [found.trial] if found.confirmation is None else found.confirmation.winner.trials
    best = next(trial for trial in all_trials if trial.number in numbers and trial.state == "complete")
    check_values(study.spec, best.params)
    stacked = any(agreed["convolution"] for agreed in store.studies.shared_values(study).values())
    again = single_trial_spec(
        study.spec, best.params, name=f"{name[:95]}-best", seed=best.attributes["seed"], stacked=stacked
    )
    return found, again.frozen()
