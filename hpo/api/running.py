"""The public functions: run a study, read what it found, stop it, go on with it, export its best trial."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from hpo.analysis import answer as analysis
from hpo.analysis import comparison
from hpo.analysis.answer import Best
from hpo.analysis.comparison import Comparison
from hpo.analysis.text import no_answer
from hpo.config.import_policy import ImportAllowlist, load_own_spec
from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped, UserError
from hpo.lr_range import resolve as ranges
from hpo.report.publisher import Publisher, publish
from hpo.store.database import Unreachable
from hpo.store.retry import OUTAGE_S, STORE_ERRORS
from hpo.store.studies import Store
from hpo.study.records import ENDED, StudyRecord, TrialRecord, trial_as_dict
from hpo.system.devices import choose_devices
from hpo.workers import preflight
from hpo.workers.executors import Executor, Local, Ray
from hpo.workers.launcher import Launcher
from hpo.workers.launching import make_launcher
from hpo.workers.supervisor import Watch

HEADER = "The best trial of study"  # begins every export, which alone may be written over
DEFAULT_STORAGE = "sqlite:///hpo.db"
IDLE_S = 2.0  # between looks for a study with trials waiting

# Called with the store and the study once before training; returns what to call while it goes on.
Watcher = Callable[[Store, StudyRecord], Watch]
# Called with what runs the workers, and what the preflight found; opens or creates the study.
Opener = Callable[[Launcher, Mapping[str, Any]], tuple[Store, StudyRecord]]


@dataclass(frozen=True)
class Result:
    """A study that is done: its best trial and all of them."""

    study: str
    best: Best
    trials: list[TrialRecord]


def run(
    spec: StudySpec | str | Path,
    *,
    storage: str | None = None,
    executor: Executor | None = None,
    code_folder: str | Path | None = None,
    watcher: Watcher | None = None,
) -> Result:
    """Runs a study to its end, or goes on with it; a finished one is answered from the store.

    `spec` is a StudySpec or the path of a study file. `executor` says where its workers run, by default `hpo.Local()`:
    one process a device of this machine. Modules of your own that the study names are looked for in `code_folder`: by
    default the study file's folder, or the running script's for a StudySpec. Raises UserError for a wrong request,
    before anything is written, and StudyStopped where the study cannot finish.
    """
    spec, allowed = load_own_spec(spec, folder=code_folder)
    url = storage_url(storage)
    if (done := _finished(spec, url)) is not None:
        return _result(*done)
    launcher = make_launcher(executor or Local(), spec, allowed, url=url)
    return _train(spec, allowed, partial(_create, spec, url), launcher, watcher=watcher)


def submit(
    spec: StudySpec | str | Path,
    *,
    executor: Executor | None = None,
    storage: str | None = None,
    code_folder: str | Path | None = None,
) -> bool:
    """Starts a study on a Ray cluster, or goes on with it there, and returns once it trains without this process.

    Arguments and errors as in `run`. Returns False, and starts nothing, where the study is finished.
    """
    spec, allowed = load_own_spec(spec, folder=code_folder)
    url = storage_url(storage)
    if _finished(spec, url) is not None:
        return False
    launcher = make_launcher(executor or Ray(), spec, allowed, url=url)
    if not launcher.can_be_left:
        raise UserError("--detach needs a Ray that outlives this command: --on auto, or --on ray://HOST:PORT")
    with _opened(spec, allowed, partial(_create, spec, url), launcher) as (store, study):
        launcher.submit(store, study)
    return True


def _create(spec: StudySpec, url: str, launcher: Launcher, facts: Mapping[str, Any]) -> tuple[Store, StudyRecord]:
    closed, found = ranges.resolve(
        spec,
        measure=lambda spec: launcher.ask(ranges.measure, spec, launcher.request, on_device=True),
        stored=lambda: _stored(spec.name, url)[1],
    )
    store = Store(url, create=True)
    study = store.create_study(closed, facts={**facts, **found})
    store.start(study)
    return store, study


def check(
    spec: StudySpec,
    *,
    storage: str | None = None,
    executor: Executor | None = None,
    code_folder: str | Path | None = None,
) -> None:
    """Raises UserError for whatever would keep `run` from training the study; a finished one is not looked at."""
    url = storage_url(storage)
    if _finished(spec, url) is None:
        _, allowed = load_own_spec(spec, folder=code_folder)
        launcher = make_launcher(executor or Local(), spec, allowed, url=url)
        with _checked(spec, allowed, launcher):
            pass


def join(
    name: str,
    *,
    storage: str | None = None,
    executor: Executor | None = None,
    allow: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> Result:
    """Adds workers, by default of this machine, to a study in the store; returns when the study has ended.

    `allow` names what the study may import of code of one's own: modules, and folders of modules. Anything else that
    the study names is refused with a UserError, because whoever can write to the store chooses those names.
    """
    url = storage_url(storage)
    store = Store(url)
    study = store.study(name)
    if not store.num_left(study):
        return _result(store, study)

    def join_it(_: Launcher, facts: Mapping[str, Any]) -> tuple[Store, StudyRecord]:
        store.check_joins(study, study.spec, facts=facts)
        return store, study

    allowed = ImportAllowlist.parse(allow)
    launcher = make_launcher(executor or Local(), study.spec, allowed, url=url)
    return _train(study.spec, allowed, join_it, launcher, watcher=watcher)


def serve(
    first: str | None = None,
    *,
    storage: str | None = None,
    executor: Local | None = None,
    allow: Sequence[str] = (),
    watcher: Watcher | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Adds workers of this machine to whatever study of the store has trials waiting, for ever: until interrupted.

    Where several have, the one named `first` comes first, and the others as they were started.

    A study that cannot be trained here is passed over, and `say` is told why, until it is started again.
    """
    executor = executor or Local()
    choose_devices(executor.devices)
    ImportAllowlist.parse(allow)
    store = Store(storage_url(storage))
    passed_over: set[tuple[int, float]] = set()
    said = ""
    while True:
        found, now_said = [], "waiting for a study"
        try:
            found = [study for study in store.studies() if study.stop is None and _waits(store, study)]
        except STORE_ERRORS as error:
            now_said = f"the store does not answer, waiting for it: {error}"
        found.sort(key=lambda study: (study.name != first, study.started))
        todo = next((study for study in found if (study.study_id, study.started) not in passed_over), None)
        if todo is None:
            if said != now_said:
                say(now_said)
            said = now_said
            time.sleep(IDLE_S)
            continue
        said = ""
        try:
            join(todo.name, executor=executor, storage=storage, allow=allow, watcher=watcher)
            say(f"study {todo.name} is finished")
        except (Unreachable, *STORE_ERRORS) as error:
            say(f"the store does not answer, waiting for it: {error}")
            time.sleep(IDLE_S)
        except StudyStopped as error:
            if error.interrupted:
                raise
            say(str(error))
            passed_over.add((todo.study_id, todo.started))
        except UserError as error:
            say(f"study {todo.name} is passed over: {error}")
            passed_over.add((todo.study_id, todo.started))


def resume(
    name: str,
    *,
    storage: str | None = None,
    trials: int | None = None,
    executor: Executor | None = None,
    allow: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> Result:
    """Goes on with a study that was stopped or interrupted; `trials` enlarges its budget, keeping what was trained.

    `executor` and `allow` as in `join`.
    """
    url = storage_url(storage)
    store = Store(url)
    study = store.study(name)
    if trials is None and not store.num_left(study):
        return _result(store, study)

    def open_again(_: Launcher, facts: Mapping[str, Any]) -> tuple[Store, StudyRecord]:
        store.check_joins(study, study.spec, facts=facts)
        if trials is not None:
            store.enlarge(study, trials)
        store.start(study)
        return store, store.study(name)

    allowed = ImportAllowlist.parse(allow)
    launcher = make_launcher(executor or Local(), study.spec, allowed, url=url)
    return _train(study.spec, allowed, open_again, launcher, watcher=watcher)


def stop(name: str, *, storage: str | None = None) -> bool:
    """Asks every worker of a study, on every machine, to let go of its trial at the end of its epoch and leave.

    Returns False, and asks nothing, where the study is finished.
    """
    store = Store(storage_url(storage))
    study = store.study(name)
    if not store.num_left(study):
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
    running: dict[str | None, list[dict[str, int]]] = {}
    for trial in all_trials:
        if trial.state == "running":
            doing = {"trial": trial.number, "epoch": max(trial.epochs, default=0)}
            running.setdefault(trial.worker_id, []).append(doing)
    found, peak = analysis.best(study, all_trials), analysis.peak(study, all_trials)
    return {
        "study": name,
        "storage": str(store.url),
        "trials": store.counts(study.study_id),
        "stop": study.stop,
        "stop_reason": study.stop_reason,
        "best": found.as_dict() if found else None,
        "peak": asdict(peak) if peak else None,
        "workers": [
            {
                "worker": worker.worker_id,
                "host": worker.host,
                "pid": worker.pid,
                "device": worker.device,
                **running.get(worker.worker_id, [{"trial": None, "epoch": None}])[0],
                "lanes": running.get(worker.worker_id, []),
                "seen_s": round(worker.seen_s, 1),
            }
            for worker in store.workers(study)
            if worker.alive
        ],
    }


def trials(name: str, *, storage: str | None = None) -> list[dict[str, Any]]:
    """Every trial of a study, waiting ones included, with one entry for each epoch in each of its curves."""
    store = Store(storage_url(storage))
    return [trial_as_dict(trial) for trial in store.trials(store.study(name))]


def best(name: str, *, storage: str | None = None) -> Best:
    """The answer so far: the best trial, the response to the learning rate, and what there is to beware of.

    Raises StudyStopped where no trial has completed.
    """
    store = Store(storage_url(storage))
    study = store.study(name)
    return _best(study, store.trials(study))


def compare(names: Sequence[str], *, storage: str | None = None) -> Comparison:
    """Studies side by side: the best learning rate of each, in what they differ, and what follows from that.

    Raises StudyStopped where a study has no complete trial.
    """
    if len(set(names)) < len(names):
        raise UserError(f"each study must be named once, got {' '.join(names)}")
    store = Store(storage_url(storage))
    studies = [store.study(name) for name in names]
    answers = [(study, store.trials(study)) for study in studies]
    return comparison.compare([(study, all_trials, _best(study, all_trials)) for study, all_trials in answers])


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


def write_report(
    name: str,
    output: str | Path | None = None,
    *,
    form: str | None = None,
    figure: str = "response",
    storage: str | None = None,
) -> Path:
    """Writes the report of a study, and has optuna-dashboard show the same; returns the file's path.

    `form` is html, png, svg, md or json, by default what `output` ends in, or else html; `output` is by default the
    study's name. Images show one `figure`. Raises UserError for what there is not, and where `output` is another file.
    """
    from hpo.report import render as report

    path = Path(output or f"{name}.{form or 'html'}")
    if path.suffix[1:] not in report.FORMATS and form is None:
        raise UserError(f"--output must end in {', '.join(f'.{form}' for form in report.FORMATS)}, got {str(output)!r}")
    form = form or path.suffix[1:]
    report.check_request(form, figure)
    store = Store(storage_url(storage))
    study = store.study(name)
    all_trials = store.trials(study)
    made = report.make(study, all_trials, analysis.best(study, all_trials), storage=str(store.url))
    report.write(path, report.render(made, form, figure=figure))
    with suppress(*STORE_ERRORS):  # a store that can only be read can be reported on all the same
        publish(store, made)
    return path


def storage_url(storage: str | None) -> str:
    """The URL of the store: as given, else HPO_STORAGE, else hpo.db in the working directory."""
    return storage or os.environ.get("HPO_STORAGE") or DEFAULT_STORAGE


def _stored(name: str, url: str) -> tuple[Store, StudyRecord] | tuple[None, None]:
    try:
        store = Store(url)
        return store, store.study(name)
    except UserError:
        return None, None  # no store or no such study; what else may be wrong is said when it is opened for writing


def _finished(spec: StudySpec, url: str) -> tuple[Store, StudyRecord] | None:
    """The spec's study where the store holds it with no slot left to train."""
    store, study = _stored(spec.name, url)
    if store is None or study is None:
        return None
    spec = ranges.adopt(spec, study)
    counts = store.counts(study.study_id)
    if set(counts) - set(ENDED) or study.spec.differences(spec) or study.spec.num_trials < spec.num_trials:
        return None
    if store.num_left(replace(study, spec=spec)):  # a confirmation, which the study may not have had before
        return None
    return store, study


@contextmanager
def _checked(spec: StudySpec, allowed: ImportAllowlist, launcher: Launcher) -> Iterator[dict[str, Any]]:
    """The launcher is ready, modules of one's own can be imported, and all is checked; gives the facts found."""
    allowed.check(spec)
    with launcher, allowed.importable():
        yield launcher.ask(preflight.check, spec, launcher.kinds)


@contextmanager
def _opened(
    spec: StudySpec, allowed: ImportAllowlist, open_study: Opener, launcher: Launcher
) -> Iterator[tuple[Store, StudyRecord]]:
    """Checks everything, then opens the study with the facts that were found."""
    with _checked(spec, allowed, launcher) as facts:
        store, study = open_study(launcher, facts)
        store.patience_s = OUTAGE_S
        yield store, study


def _train(
    spec: StudySpec, allowed: ImportAllowlist, open_study: Opener, launcher: Launcher, *, watcher: Watcher | None
) -> Result:  # fmt: skip
    """Opens the study and trains until none of it is left."""
    with _opened(spec, allowed, open_study, launcher) as (store, study), Publisher(store, study) as publisher:
        watch = watcher(store, study) if watcher else lambda: None

        def look() -> None:
            publisher.look()
            watch()

        launcher.run(store, study, watch=look)
    study = store.study(study.name)
    left = store.num_left(study)
    if study.stop == "failure":
        raise StudyStopped(f"study {study.name!r} was stopped: {study.stop_reason}", can_resume=left > 0)
    if left:
        raise StudyStopped(f"study {study.name!r} was stopped with {left} trials left", can_resume=True)
    return _result(store, study)


def _waits(store: Store, study: StudyRecord) -> bool:
    """Whether a worker that came would find a trial to take."""
    counts = store.counts(study.study_id)
    return "waiting" in counts or ("running" not in counts and store.num_left(study) > 0)


def _result(store: Store, study: StudyRecord) -> Result:
    all_trials = store.trials(study)
    return Result(study.name, _best(study, all_trials), all_trials)


def _best(study: StudyRecord, all_trials: list[TrialRecord]) -> Best:
    found = analysis.best(study, all_trials)
    if found is None:
        raise StudyStopped(f"study {study.name!r} has {no_answer(all_trials)}")
    return found


def _exported(name: str, storage: str | None) -> tuple[Best, dict[str, Any]]:
    """The best trial and the settings that train it again, from one look at the study."""
    store = Store(storage_url(storage))
    study = store.study(name)
    all_trials = store.trials(study)
    found = _best(study, all_trials)
    numbers = [found.trial] if found.confirmation is None else found.confirmation.winner.trials
    best = next(trial for trial in all_trials if trial.number in numbers and trial.state == "complete")
    stacked = any(agreed["convolution"] for agreed in store.shared_values(study).values())
    again = study.spec.single_trial_spec(
        best.params, name=f"{name[:95]}-best", seed=best.attributes["seed"], stacked=stacked
    )
    return found, again.frozen()
