"""The public functions that read studies: all of a store, where one stands, its trials, its answer, comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from hpo.analysis import answer as analysis
from hpo.analysis import comparison
from hpo.analysis.answer import Best
from hpo.analysis.comparison import Comparison
from hpo.analysis.peak import find_peak
from hpo.analysis.text import no_answer_text, search_end_text
from hpo.analysis.trials import race_progress
from hpo.api.stores import open_study, storage_url
from hpo.errors import StudyStopped, UserError
from hpo.store.retry import STORE_ERRORS
from hpo.store.store import Store
from hpo.study.records import StudyRecord, TrialRecord, trial_as_dict


@dataclass(frozen=True)
class Result:
    """A finished study: its name, its answer and all of its trials."""

    study: str
    best: Best
    trials: list[TrialRecord]


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
    damages = store.studies.damages()
    for study in store.studies.get_all():
        try:
            counts = store.trials.counts(study.study_id)
        except UserError as error:
            damages[study.name] = str(error)
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
        - workers: The living workers: `worker`, `host`, `pid`, `device`, `trial` and `epoch` of each of its `lanes`,
          and the seconds since its last sign of life (`seen_s`).
        - failed_devices: `host` and `device`, the number of `failures` since the study was started, and the `reason` of
          the latest.

    Raises:
        UserError: There is no such study.
    """
    store, study = open_study(name, storage=storage)
    with suppress(*STORE_ERRORS):  # a store that can only be read has a status all the same
        store.workers.reap(study)
    all_trials = store.trials.get_all(study)
    found, peak = analysis.find_best(study, all_trials), find_peak(study, all_trials)
    race = race_progress(study, all_trials)
    return {
        "study": name,
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
    """Return the living workers of a study, each with what it trains."""
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
    return Result(study.name, answer_of(study, all_trials), all_trials)


def answer_of(study: StudyRecord, all_trials: Sequence[TrialRecord]) -> Best:
    """Return the answer of a study; raise StudyStopped where no trial has completed."""
    found = analysis.find_best(study, all_trials)
    if found is None:
        again = ""
        if any(trial.state == "failed" for trial in all_trials):
            again = f"; once the cause is mended: hpo resume {study.name} --retry-failed, or hpo run SPEC --fresh"
        raise StudyStopped(f"study {study.name!r} has {no_answer_text(all_trials)}{again}")
    return found
