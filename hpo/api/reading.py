"""The public functions that read studies: all of a store, where one stands, its trials, its answer, comparisons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hpo.analysis import answer as analysis
from hpo.analysis import comparison
from hpo.analysis.answer import Best
from hpo.analysis.answer_text import describe_answer
from hpo.analysis.comparison import Comparison
from hpo.analysis.peak import find_peak
from hpo.analysis.text import (
    cell_text,
    counts_text,
    metric_text,
    no_answer_text,
    resuming_command,
    search_end_text,
    value_text,
)
from hpo.analysis.trials import direction_sign, race_progress, search_trials
from hpo.api.stores import open_study, storage_url
from hpo.errors import StudyStopped, UserError
from hpo.store.retry import STORE_ERRORS
from hpo.store.store import Store
from hpo.study.records import StudyRecord, TrialRecord, trial_as_dict
from hpo.system.html import html_paragraph, html_table

if TYPE_CHECKING:
    import optuna
    import pandas

MAX_HTML_ROWS = 20  # trials that a notebook shows, the best ones first


@dataclass(frozen=True, repr=False)
class Result:
    """A finished study: its name, its answer and all of its trials.

    Attributes:
        study: Its name.
        best: Its answer.
        trials: All of its trials, those that confirmed or tested included.
        record: Its settings, and what was found about its data and network.
        url: The store, with its password.
    """

    study: str
    best: Best
    trials: list[TrialRecord]
    record: StudyRecord
    url: str

    @property
    def optuna_study(self) -> optuna.Study:
        """The study for Optuna's own tools, such as `optuna.visualization`."""
        import optuna

        return optuna.load_study(study_name=self.study, storage=Store(self.url).storage)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the trials as a pandas DataFrame, a row each.

        The columns are `number`, `kind`, `state`, `value`, `epochs`, `duration_s`, `seed`, and for each searched
        parameter `params_NAME`, as Optuna names them.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("to_dataframe needs pandas: pip install 'hpo-studies[notebook]'") from None
        return pandas.DataFrame([_dataframe_row(trial) for trial in self.trials])

    def __repr__(self) -> str:
        return f"Result({self.study!r}, {self.best!r}, {counts_text(self.trials)})"

    def _repr_html_(self) -> str:
        text, sign = describe_answer(self.record, self.best), direction_sign(self.record)
        searched = search_trials(self.trials)
        searched.sort(key=lambda trial: -math.inf if trial.value is None else sign * trial.value, reverse=True)
        keys = list(dict.fromkeys(key for trial in searched for key in trial.params))
        rows = [
            [
                trial.number,
                *(cell_text(trial.params.get(key)) for key in keys),
                "" if trial.value is None else value_text(trial.value, self.record),
                trial.state,
                len(trial.epochs),
            ]
            for trial in searched
        ]
        more = f"{len(rows) - MAX_HTML_ROWS} more trials: result.trials" if len(rows) > MAX_HTML_ROWS else ""
        return "".join(
            [
                html_paragraph(text.headline, bold=True),
                html_table((), [(line.label, line) for line in text.lines]),
                *(html_paragraph(f"warning: {warning}") for warning in text.warnings),
                html_table(["trial", *keys, metric_text(self.record), "state", "epochs"], rows[:MAX_HTML_ROWS]),
                html_paragraph(more) if more else "",
            ]
        )


def _dataframe_row(trial: TrialRecord) -> dict[str, Any]:
    own = {"number": trial.number, "kind": trial.kind, "state": trial.state, "value": trial.value}
    own |= {"epochs": len(trial.epochs), "duration_s": trial.duration_s, "seed": trial.attributes.get("seed")}
    return own | {f"params_{key}": value for key, value in trial.params.items()}


def studies(*, storage: str | None = None) -> list[dict[str, Any]]:
    """List the studies in a store.

    Args:
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        One dictionary a study: its name (`study`), the number of trials in each state (`trials`), whether it was
        stopped (`stop`: None, "requested" or "failure"), and, where it cannot be read, why (`damaged`, else None).

    Raises:
        UserError: There is no such store.
    """
    store = Store(storage_url(storage))
    found: list[dict[str, Any]] = []
    records, damages = store.studies.load_all()
    counts_of = store.studies.counts(records)
    for study in records:
        counts = counts_of[study.study_id]
        if isinstance(counts, UserError):
            damages[study.name] = str(counts)
        else:
            found.append({"study": study.name, "trials": counts, "stop": study.stop, "damaged": None})
    found += [{"study": name, "trials": {}, "stop": None, "damaged": problem} for name, problem in damages.items()]
    return found


def status(name: str, *, storage: str | None = None) -> dict[str, Any]:
    """Return where a study stands.

    Args:
        name: The study.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        Plain data under these keys:

        - study, storage: The study, and the URL of its store.
        - trials: The number of trials in each state.
        - race: The `epochs` that a race has trained, and its `budget`; None if it is over, or the sampler is another.
        - stop, stop_reason: Whether it was stopped, by request or by a failure, and why.
        - search_end: After how many trials the search ended and why, if it ended early.
        - best: The answer so far, as `hpo best --json` prints it; None if no trial has completed.
        - peak: Where all trials point to while they train; None if nothing is known.
        - workers: The live workers: `worker`, `host`, `pid`, `device`, `trial` and `epoch` of each of its `lanes`,
          and the seconds since it was last seen (`seen_s`).
        - failed_devices: `host` and `device`, the number of `failures` since the study was started, and the `reason` of
          the latest.

    Raises:
        UserError: There is no such study.
    """
    return status_of(*open_study(name, storage=storage))


def status_of(store: Store, study: StudyRecord) -> dict[str, Any]:
    """Return where a study of an open store stands, as `status` does."""
    with suppress(*STORE_ERRORS):  # a store that can only be read has a status all the same
        store.workers.reap(study)
    all_trials = store.trials.get_all(study)
    found = analysis.find_best(study, all_trials)
    peak = find_peak(study, all_trials, responses=found.responses if found else ())
    race = race_progress(study, all_trials)
    return {
        "study": study.name,
        "storage": str(store.url),
        "trials": dict(Counter(trial.state for trial in all_trials)),
        "race": None if race is None else {"epochs": race[0], "budget": race[1]},
        "stop": study.stop,
        "stop_reason": study.stop_reason,
        "search_end": search_end_text(study, all_trials),
        "best": found.as_dict() if found else None,
        "peak": asdict(peak) if peak else None,
        "workers": _workers(store, study, all_trials),
        "failed_devices": [
            {"host": failed.host, "device": failed.device, "failures": failed.count, "reason": failed.reason}
            for failed in store.workers.device_failures(study).values()
        ],
    }


def _workers(store: Store, study: StudyRecord, all_trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return the live workers of a study, each with what it trains."""
    lanes: dict[str | None, list[dict[str, int]]] = {}
    for trial in all_trials:
        if trial.state == "running":
            lane = {"trial": trial.number, "epoch": max(trial.epochs, default=0)}
            lanes.setdefault(trial.worker_id, []).append(lane)
    return [
        {
            "worker": worker.worker_id,
            "host": worker.host,
            "pid": worker.pid,
            "device": worker.device,
            **lanes.get(worker.worker_id, [{"trial": None, "epoch": None}])[0],
            "lanes": lanes.get(worker.worker_id, []),
            "seen_s": round(worker.seen_s, 1),
        }
        for worker in store.workers.get_all(study)
        if worker.alive
    ]


def trials(name: str, *, storage: str | None = None) -> list[dict[str, Any]]:
    """List the trials of a study, those that wait included.

    Args:
        name: The study.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        One dictionary a trial, as `hpo trials --json` prints it. Each of its `curves` has one entry for each of its
        `epochs`; None stands for a number that was not finite.

    Raises:
        UserError: There is no such study.
    """
    store, study = open_study(name, storage=storage)
    return [trial_as_dict(trial) for trial in store.trials.get_all(study)]


def best(name: str, *, storage: str | None = None) -> Best:
    """Return the answer of a study so far.

    Args:
        name: The study.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        The best trial, the response to the learning rate with its interval, and the warnings.

    Raises:
        UserError: There is no such study.
        StudyStopped: No trial has completed.
    """
    store, study = open_study(name, storage=storage)
    return answer_of(study, store.trials.get_all(study))


def compare(names: Sequence[str], *, storage: str | None = None) -> Comparison:
    """Compare studies: the best learning rate of each, in what they differ, and what follows from that.

    Args:
        names: The studies, all in one store; the others are compared with the first one.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        One side for each study, or for each combination of the lists that a study searched; conclusions and caveats.

    Raises:
        UserError: A study is not there, or is named twice.
        StudyStopped: A study has no complete trial.
    """
    if len(set(names)) < len(names):
        raise UserError(f"each study must be named once, got {' '.join(names)}")
    store = Store(storage_url(storage))
    found = [(study, store.trials.get_all(study)) for study in [store.studies.get(name) for name in names]]
    return comparison.compare_answers(
        [(study, all_trials, answer_of(study, all_trials)) for study, all_trials in found]
    )


def result_of(store: Store, study: StudyRecord) -> Result:
    """Return the result of a study; raise StudyStopped where no trial has completed."""
    all_trials = store.trials.get_all(study)
    url = store.url.render_as_string(hide_password=False)
    return Result(study.name, answer_of(study, all_trials), all_trials, study, url)


def answer_of(study: StudyRecord, all_trials: Sequence[TrialRecord]) -> Best:
    """Return the answer of a study; raise StudyStopped where no trial has completed."""
    found = analysis.find_best(study, all_trials)
    if found is None:
        again = ""
        if any(trial.state == "failed" for trial in all_trials):
            again = f"; once the cause is mended: {resuming_command(study, '--retry-failed')}, or hpo run SPEC --fresh"
        raise StudyStopped(f"study {study.name!r} has {no_answer_text(all_trials)}{again}")
    return found
