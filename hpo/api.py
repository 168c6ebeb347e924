"""The public functions: run a study, read what it found, stop it, go on with it, export its best trial."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from hpo import analysis, launch, preflight
from hpo.analysis import Best
from hpo.devices import choose_devices
from hpo.errors import StudyStopped, UserError
from hpo.ledger import ENDED, STORE_ERRORS
from hpo.records import Study, Trial
from hpo.spec import StudySpec
from hpo.store import Store

HEADER = "The best trial of study"  # begins every export, which alone may be written over
DEFAULT_STORAGE = "sqlite:///hpo.db"

# Called with the store and the study once before training; returns what to call while it goes on.
Watcher = Callable[[Store, Study], launch.Watch]


@dataclass(frozen=True)
class Result:
    """A study that is done: its best trial and all of them."""

    study: str
    best: Best
    trials: list[Trial]


def run(
    spec: StudySpec | str | Path,
    *,
    storage: str | None = None,
    devices: str = "auto",
    workers: int | None = None,
    in_process: bool = False,
    code_folder: str | Path | None = None,
    watcher: Watcher | None = None,
) -> Result:
    """Runs a study to its end, or goes on with it; a finished one is answered from the store.

    `spec` is a StudySpec or the path of a study file. `workers` is the number of processes, by default one a device;
    `in_process` trains in the calling process instead. Modules of your own that the study names are looked for in
    `code_folder`: by default the study file's folder, or the running script's for a StudySpec. Raises UserError for a
    wrong request, before anything is written, and StudyStopped where the study cannot finish.
    """
    if not isinstance(spec, StudySpec):
        code_folder = code_folder or Path(spec).parent
        spec = StudySpec.from_toml(spec)
    if workers is not None and in_process:
        raise UserError(f"--workers has no meaning with --in-process, got {workers}")
    folder = str(Path(code_folder or sys.path[0] or os.getcwd()).resolve())
    url = storage_url(storage)
    if (done := _finished(spec, url)) is not None:
        return _result(*done)

    def create(facts: Mapping[str, Any]) -> tuple[Store, Study]:
        store = Store(url, create=True)
        study = store.create_study(spec, facts={**facts, "code_folder": folder})
        store.start(study)
        return store, study

    return _train(spec, folder, create, devices=devices, workers=workers, in_process=in_process, watcher=watcher)


def join(
    name: str,
    *,
    storage: str | None = None,
    devices: str = "auto",
    workers: int | None = None,
    watcher: Watcher | None = None,
) -> Result:
    """Adds workers of this machine to a study in the store, and returns when the study has ended.

    Modules of the user's own are looked for where they were when the study was created, else in the working directory.
    """
    store = Store(storage_url(storage))
    study = store.study(name)
    if not _num_left(store, study):
        return _result(store, study)

    def join_it(facts: Mapping[str, Any]) -> tuple[Store, Study]:
        store.check_joins(study, study.spec, facts=facts)
        return store, study

    return _train(study.spec, _code_folder(study), join_it, devices=devices, workers=workers, watcher=watcher)


def resume(
    name: str,
    *,
    storage: str | None = None,
    trials: int | None = None,
    devices: str = "auto",
    workers: int | None = None,
    watcher: Watcher | None = None,
) -> Result:
    """Goes on with a study that was stopped or interrupted; `trials` enlarges its budget, keeping what was trained.

    Modules of the user's own are looked for as `join` does.
    """
    store = Store(storage_url(storage))
    study = store.study(name)
    if trials is None and not _num_left(store, study):
        return _result(store, study)

    def go_on(facts: Mapping[str, Any]) -> tuple[Store, Study]:
        store.check_joins(study, study.spec, facts=facts)
        if trials is not None:
            store.enlarge(study, trials)
        store.start(study)
        return store, store.study(name)

    return _train(study.spec, _code_folder(study), go_on, devices=devices, workers=workers, watcher=watcher)


def stop(name: str, *, storage: str | None = None) -> bool:
    """Asks every worker of a study, on every machine, to let go of its trial at the end of its epoch and leave.

    Returns False, and asks nothing, where the study is finished.
    """
    store = Store(storage_url(storage))
    study = store.study(name)
    if not _num_left(store, study):
        return False
    store.request_stop(study)
    return True


def studies(*, storage: str | None = None) -> list[dict[str, Any]]:
    """The studies in the store: name, number of trials in each state, whether stopped."""
    store = Store(storage_url(storage))
    return [
        {"study": study.name, "trials": store.counts(study.study_id), "stop": study.stop} for study in store.studies()
    ]


def status(name: str, *, storage: str | None = None) -> dict[str, Any]:
    """Where a study stands: trials by state, the best so far, and its workers with what each is doing."""
    store = Store(storage_url(storage))
    study = store.study(name)
    with suppress(*STORE_ERRORS):  # a store that can only be read can be looked at all the same
        store.reap(study)
    all_trials = store.trials(study)
    running = {trial.worker_id: trial for trial in all_trials if trial.state == "running"}
    found = analysis.best(study, all_trials)
    return {
        "study": name,
        "storage": str(store.url),
        "trials": store.counts(study.study_id),
        "stop": study.stop,
        "stop_reason": study.stop_reason,
        "best": found.as_dict() if found else None,
        "workers": [
            {
                "host": worker.host,
                "pid": worker.pid,
                "device": worker.device,
                "trial": running[worker.worker_id].number if worker.worker_id in running else None,
                "epoch": max(running[worker.worker_id].epochs, default=0) if worker.worker_id in running else None,
                "seen_s": round(worker.seen_s, 1),
            }
            for worker in store.workers(study)
            if worker.alive
        ],
    }


def trials(name: str, *, storage: str | None = None) -> list[dict[str, Any]]:
    """Every trial of a study, waiting ones included, with one entry for each epoch in each of its curves."""
    store = Store(storage_url(storage))
    return [_trial_dict(trial) for trial in store.trials(store.study(name))]


def best(name: str, *, storage: str | None = None) -> Best:
    """The best complete trial so far and the interval of learning rates that did as well.

    Raises StudyStopped where no trial has completed.
    """
    store = Store(storage_url(storage))
    study = store.study(name)
    return _best(study, store.trials(study))


def export(name: str, *, storage: str | None = None) -> dict[str, Any]:
    """The best trial as a study: the settings of a study file whose only trial has the best trial's values."""
    return _exported(name, storage)[1]


def write_export(name: str, output: str | Path, *, storage: str | None = None) -> None:
    """Writes the best trial to `output`: a study file for .toml, the study file and the answer in one for .json."""
    path = Path(output)
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--output must end in .toml or .json, got {str(output)!r}")
    found, settings = _exported(name, storage)
    if path.suffix == ".toml":
        text = f"# {HEADER} {name}\n\n{tomli_w.dumps(settings)}"
    else:
        answer = {"what": f"{HEADER} {name}", "study": name, **found.as_dict(), "spec": settings}
        text = json.dumps(answer, indent=2) + "\n"
    if path.exists() and HEADER not in path.read_text(errors="replace"):
        raise UserError(f"--output {path} exists and is no export of ours; name another file")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None


def storage_url(storage: str | None) -> str:
    """The URL of the store: as given, else HPO_STORAGE, else hpo.db in the working directory."""
    return storage or os.environ.get("HPO_STORAGE") or DEFAULT_STORAGE


def _finished(spec: StudySpec, url: str) -> tuple[Store, Study] | None:
    """The spec's study where the store holds it with no slot left to train."""
    try:
        store = Store(url)
        study = store.study(spec.name)
    except UserError:
        return None  # no store or no such study; what else may be wrong is said when it is opened for writing
    counts = store.counts(study.study_id)
    if set(counts) - set(ENDED) or sum(counts.values()) < spec.num_trials or study.spec.differences(spec):
        return None
    return store, study


def _train(
    spec: StudySpec,
    folder: str,
    open_study: Callable[[Mapping[str, Any]], tuple[Store, Study]],
    *,
    devices: str,
    workers: int | None,
    in_process: bool = False,
    watcher: Watcher | None,
) -> Result:
    """Checks everything, then opens the study with the facts that were found, and trains until none of it is left."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    chosen = choose_devices(devices)
    launcher: launch.Launcher
    if in_process:
        launcher = launch.InProcess(chosen[0])
    else:
        launcher = launch.LocalProcesses(chosen, workers=workers, python_path=folder)
    with _importable(folder):
        store, study = open_study(preflight.check(spec, chosen))
        launcher.run(store, study, watch=watcher(store, study) if watcher else lambda: None)
    study = store.study(study.name)
    left = _num_left(store, study)
    if study.stop == "failure":
        raise StudyStopped(f"study {study.name!r} was stopped: {study.stop_reason}", can_go_on=left > 0)
    if left:
        raise StudyStopped(f"study {study.name!r} was stopped with {left} trials left", can_go_on=True)
    return _result(store, study)


def _num_left(store: Store, study: Study) -> int:
    return sum(count for state, count in store.counts(study.study_id).items() if state not in ENDED)


def _code_folder(study: Study) -> str:
    folder = str(study.facts.get("code_folder", ""))
    return folder if os.path.isdir(folder) else os.getcwd()


def _result(store: Store, study: Study) -> Result:
    all_trials = store.trials(study)
    return Result(study.name, _best(study, all_trials), all_trials)


def _best(study: Study, all_trials: list[Trial]) -> Best:
    found = analysis.best(study, all_trials)
    if found is None:
        states = [trial.state for trial in all_trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        raise StudyStopped(f"study {study.name!r} has no complete trial to choose from: {counts}")
    return found


def _exported(name: str, storage: str | None) -> tuple[Best, dict[str, Any]]:
    """The best trial and the settings that train it again, from one look at the study."""
    store = Store(storage_url(storage))
    study = store.study(name)
    all_trials = store.trials(study)
    found = _best(study, all_trials)
    seed = next(trial.attributes["seed"] for trial in all_trials if trial.number == found.trial)
    return found, study.spec.of_trial(found.params, name=f"{name[:95]}-best", seed=seed).frozen()


def _trial_dict(trial: Trial) -> dict[str, Any]:
    curves: Mapping[str, Any] = {"train_loss": [], "val_accuracy": [], **trial.curves}
    return {
        **{name: list(values) for name, values in curves.items()},
        "number": trial.number,
        "state": trial.state,
        "params": dict(trial.params),
        "value": trial.value,
        "attempt": trial.attempt,
        "epochs": list(trial.epochs),
        "reason": trial.reason,
        "error": trial.error,
        **{key: value for key, value in trial.attributes.items() if key != "ended"},
        "duration_s": round(trial.ended - trial.started, 3) if trial.ended and trial.started else None,
    }


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Modules in this folder can be imported here, for the checks, as they can in the workers."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
