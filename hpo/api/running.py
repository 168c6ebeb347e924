"""The public functions that train: run a study, join it, serve a store, resume a study, stop it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hpo.api.learning import learn
from hpo.api.reading import Result, result_of
from hpo.api.stores import delete, open_study, storage_url
from hpo.config.earlier_studies import adopt_learned_points, adopt_stored_data
from hpo.config.import_policy import GivenStudy, allowed_for, code_digests, load_own_spec, parse_allow
from hpo.config.study_spec import StudySpec
from hpo.config.widening import adopt_widened_ranges, parse_widening, widened_spec
from hpo.display.choice import shown_progress
from hpo.errors import StudyStopped, UserError
from hpo.lr_range import resolve as ranges
from hpo.reports.publisher import Publisher
from hpo.store.database import Unreachable
from hpo.store.retry import OUTAGE_S, STORE_ERRORS
from hpo.store.store import Store
from hpo.study.records import CODE, StudyRecord
from hpo.system.devices import choose_devices
from hpo.train.imports import ImportAllowlist
from hpo.workers import preflight
from hpo.workers.executors import Executor, Local, Ray, choose_executor
from hpo.workers.launcher import Launcher
from hpo.workers.launching import make_launcher
from hpo.workers.supervisor import OnTick

logger = logging.getLogger(__name__)

SERVE_POLL_S = 2.0  # between looks for a study that has trials waiting

# Called with the store and the study once before training; returns a function that is called while it goes on.
Watcher = Callable[[Store, StudyRecord], OnTick]
# Called with what runs the workers, and with what the preflight found; opens or creates the study.
Opener = Callable[[Launcher, Mapping[str, Any]], tuple[Store, StudyRecord]]


def run(
    spec: GivenStudy,
    *,
    executor: Executor | None = None,
    devices: str | None = None,
    workers: int | None = None,
    in_process: bool = False,
    storage: str | None = None,
    code_folder: str | Path | None = None,
    fresh: bool = False,
    progress: bool | None = None,
    watcher: Watcher | None = None,
) -> Result:
    """Run a study to its end, or resume it; a finished study is answered from the store, without training.

    Args:
        spec: The settings of the study as nested dictionaries, a StudySpec, the path of a study file, or the name of
            a study that comes with hpo. In place of a `package.module:name`, dictionaries may have the function or the
            class itself. What a worker process cannot import, such as a lambda or a function of a notebook, needs
            `hpo.InProcess()`.
        executor: Where its workers run. Default: `hpo.Local()`, one process for each device of this machine.
        devices: Short for `executor=hpo.Local(devices)`.
        workers: Short for `executor=hpo.Local(workers=workers)`.
        in_process: Short for `executor=hpo.InProcess()`.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.
        code_folder: Where modules of your own that the study names are looked for. Default: the study file's folder,
            or else that of the running script.
        fresh: Whether to delete the study of this name, once everything else is checked, and to start it anew.
        progress: Whether to show how far it is: as a table in a notebook, live on a terminal, as lines elsewhere.
            Default: in a notebook and on a terminal.
        watcher: Shows it instead. Called with the store and the study before training; returns a function that is
            called several times a second while workers run.

    Returns:
        The answer and all trials.

    Raises:
        UserError: The request is wrong. Nothing has been written.
        StudyStopped: The study cannot finish, or was interrupted.
    """
    executor = choose_executor(executor, devices=devices, workers=workers, in_process=in_process)
    spec, allowed = load_own_spec(spec, folder=code_folder)
    url = storage_url(storage)
    spec = _settle(spec, url, fresh=fresh)
    if not fresh and (finished := _find_finished(spec, url)) is not None:
        _warn_of_changed_code(finished[1], code_digests(spec, allowed))
        return result_of(*finished)
    launcher = make_launcher(executor, spec, allowed, url=url)
    opener = partial(_create, spec, url, fresh=fresh)
    return _run_to_end(spec, allowed, opener, launcher, watcher=watcher, progress=progress)


def submit(
    spec: GivenStudy,
    *,
    executor: Executor | None = None,
    storage: str | None = None,
    code_folder: str | Path | None = None,
    fresh: bool = False,
) -> bool:
    """Start a study on a Ray cluster, or resume it there, and return once it trains without this process.

    Args:
        spec: As in `run`.
        executor: The cluster. Default: `hpo.Ray()`, the one that RAY_ADDRESS names or that runs on this machine.
        storage: URL of the store, which must be Postgres. Default: HPO_STORAGE.
        code_folder: As in `run`.
        fresh: As in `run`.

    Returns:
        False where the study is finished, so that nothing was started.

    Raises:
        UserError: The request is wrong, or the executor ends with this process. Nothing has been written.
        StudyStopped: The workers cannot start.
    """
    spec, allowed = load_own_spec(spec, folder=code_folder)
    url = storage_url(storage)
    spec = _settle(spec, url, fresh=fresh)
    if not fresh and _find_finished(spec, url) is not None:
        return False
    launcher = make_launcher(executor or Ray(), spec, allowed, url=url)
    if not launcher.can_be_left:
        raise UserError("--detach needs a Ray that outlives this command: --on auto, or --on ray://HOST:PORT")
    with _opened(spec, allowed, partial(_create, spec, url, fresh=fresh), launcher) as (store, study):
        launcher.submit(store, study)
    return True


def check(
    spec: StudySpec,
    *,
    executor: Executor | None = None,
    storage: str | None = None,
    code_folder: str | Path | None = None,
) -> None:
    """Check what `run` checks of a study before it trains it, but not the devices; a finished study is not checked.

    Args:
        spec: The study.
        executor: As in `run`.
        storage: As in `run`.
        code_folder: As in `run`.

    Raises:
        UserError: `run` would refuse the study.
    """
    url = storage_url(storage)
    spec = _settle(spec, url)
    if _find_finished(spec, url) is None:
        _, allowed = load_own_spec(spec, folder=code_folder)
        launcher = make_launcher(executor or Local(), spec, allowed, url=url)
        with launcher, allowed_for(spec, allowed).importable():
            metadata = launcher.call(preflight.run_preflight, spec, launcher.device_kinds)
        if _find(spec.name, url)[1] is None:
            preflight.judge_random_images(spec, metadata, is_new=True)


def join(
    name: str,
    *,
    executor: Executor | None = None,
    storage: str | None = None,
    allow: Sequence[str] = (),
    progress: bool | None = None,
    watcher: Watcher | None = None,
) -> Result:
    """Add workers to a study in a store, and return when the study has ended.

    Args:
        name: The study.
        executor: Where the workers run. Default: `hpo.Local()`, one process for each device of this machine.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.
        allow: Code of your own that the study may import: modules by their names, or folders of modules. Whoever can
            write to the store chooses what a study imports, so any other name is refused.
        progress: As in `run`.
        watcher: As in `run`.

    Returns:
        The answer and all trials.

    Raises:
        UserError: The request is wrong, or the study names code that is not allowed.
        StudyStopped: The study cannot finish, or was interrupted.
    """
    store, study = open_study(name, storage=storage)
    if not store.trials.num_left(study):
        return result_of(store, study)

    def join_it(_: Launcher, metadata: Mapping[str, Any]) -> tuple[Store, StudyRecord]:
        store.studies.check_joins(study, study.spec, metadata=metadata)
        return store, study

    allowed = parse_allow(allow)
    launcher = make_launcher(executor or Local(), study.spec, allowed, url=storage_url(storage))
    return _run_to_end(study.spec, allowed, join_it, launcher, watcher=watcher, progress=progress)


def serve(
    first: str | None = None,
    *,
    executor: Local | None = None,
    storage: str | None = None,
    allow: Sequence[str] = (),
    watcher: Watcher | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Add workers of this machine to every study of a store that has trials waiting, until interrupted.

    Studies are served in the order in which they were started, one after the other. A study that cannot be trained
    here is skipped until it is started again.

    Args:
        first: The study that is served before the others.
        executor: The workers. Default: `hpo.Local()`, one process for each device.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.
        allow: As in `join`.
        watcher: As in `run`.
        say: Called with each message: that it waits, that a study is finished, why one is skipped.

    Raises:
        UserError: The request is wrong, or there is no such store.
        StudyStopped: It was interrupted.
    """
    executor = executor or Local()
    choose_devices(executor.devices)
    parse_allow(allow)
    store = Store(storage_url(storage))
    passed_over: set[tuple[int, float]] = set()
    told: set[str] = set()  # which studies cannot be read
    last_message = ""
    while True:
        try:
            _tell_of_damage(store, told, say)
            study, message = _next_study(store, first, passed_over), "waiting for a study"
        except STORE_ERRORS as error:
            study, message = None, f"the store does not answer, waiting for it: {error}"
        if study is None:
            if message != last_message:
                say(message)
            last_message = message
            time.sleep(SERVE_POLL_S)
            continue
        last_message = ""
        try:
            join(study.name, executor=executor, storage=storage, allow=allow, progress=False, watcher=watcher)
            say(f"study {study.name} is finished")
        except (Unreachable, *STORE_ERRORS) as error:
            say(f"the store does not answer, waiting for it: {error}")
            time.sleep(SERVE_POLL_S)
        except StudyStopped as error:
            if error.interrupted:
                raise
            say(str(error))
            passed_over.add((study.study_id, study.started))
        except UserError as error:
            say(f"study {study.name} is skipped: {error}")
            passed_over.add((study.study_id, study.started))


def resume(
    name: str,
    *,
    executor: Executor | None = None,
    storage: str | None = None,
    trials: int | None = None,
    until: str | None = None,
    hours: float | None = None,
    widen: Sequence[str] = (),
    retry_failed: bool = False,
    allow: Sequence[str] = (),
    progress: bool | None = None,
    watcher: Watcher | None = None,
) -> Result:
    """Resume a study that was stopped or interrupted.

    Args:
        name: The study.
        executor: As in `join`.
        storage: As in `join`.
        trials: The new number of trials, to enlarge the study; finished trials stay. Where `search.until` or
            `search.hours` has ended the search, they do not hold any more. Default: as it was.
        until: The new `search.until`. Default: as it was.
        hours: The new `search.hours`. Default: as it was.
        widen: Ranges to widen, each as "KEY=LOW:HIGH", such as "lr=1e-6:10". All trials stay. Without `trials` the
            study gets as many more as the wider range needs to be searched as densely.
        retry_failed: Whether to train the trials that have failed again, each from its start.
        allow: As in `join`.
        progress: As in `run`.
        watcher: As in `run`.

    Returns:
        The answer and all trials.

    Raises:
        UserError: The request is wrong, or the study cannot be enlarged to so many trials.
        StudyStopped: The study cannot finish, or was interrupted.
    """
    store, study = open_study(name, storage=storage)
    has_failed = retry_failed and store.trials.counts(study.study_id).get("failed", 0) > 0
    widening = dict(map(parse_widening, widen))
    spec = widened_spec(study.spec, widening) if widening else study.spec
    has_bounds = bool(widening) or (trials, until, hours) != (None, None, None)
    if not has_bounds and not has_failed and not store.trials.num_left(study):
        return result_of(store, study)

    def open_again(_: Launcher, metadata: Mapping[str, Any]) -> tuple[Store, StudyRecord]:
        store.studies.check_joins(study, study.spec, metadata=metadata)
        if has_bounds:
            store.searches.enlarge(study, trials, until=until, hours=hours, widening=widening)
        if retry_failed:
            store.studies.retry_failed(study)
        store.studies.start(study)
        return store, store.studies.get(name)

    allowed = parse_allow(allow)
    launcher = make_launcher(executor or Local(), spec, allowed, url=storage_url(storage))
    return _run_to_end(spec, allowed, open_again, launcher, watcher=watcher, progress=progress)


def stop(name: str, *, storage: str | None = None) -> bool:
    """Ask every worker of a study, on every machine, to save after the current epoch and exit.

    Args:
        name: The study.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        False where the study is finished, so that nothing was asked.

    Raises:
        UserError: There is no such study.
    """
    store, study = open_study(name, storage=storage)
    if not store.trials.num_left(study):
        return False
    store.studies.request_stop(study)
    return True


def _create(
    spec: StudySpec, url: str, launcher: Launcher, metadata: Mapping[str, Any], *, fresh: bool = False
) -> tuple[Store, StudyRecord]:
    """Create the study, with the learning rates that a range test finds where the spec asks for one."""
    known = _find(spec.name, url)[1]
    if fresh and known is not None:
        delete(spec.name, storage=url)
        known = None
    preflight.judge_random_images(spec, metadata, is_new=known is None)
    if known is not None:
        spec = adopt_widened_ranges(spec, known.spec, known.widenings)
    closed, found = ranges.resolve(
        spec,
        measure=lambda spec: launcher.call(
            ranges.measure_ramps, spec, launcher.devices, launcher.threads, on_device=True
        ),
        stored=lambda: _find(spec.name, url)[1],
    )
    store = Store(url, create=True)
    study = store.studies.create(closed, metadata={**metadata, **found})
    store.studies.start(study)
    return store, study


def _find(name: str, url: str) -> tuple[Store, StudyRecord] | tuple[None, None]:
    """Return the store and the study, where both are there."""
    try:
        store = Store(url)
        return store, store.studies.get(name)
    except UserError:
        return None, None  # whatever else may be wrong is told when the store is opened for writing


def _settle(spec: StudySpec, url: str, *, fresh: bool = False) -> StudySpec:
    """Return the spec with what its study has where a file may leave it open; of a new study, with what it learns."""
    known = None if fresh else _find(spec.name, url)[1]
    if known is None:
        return learn(spec, url)
    return adopt_learned_points(adopt_stored_data(spec, known.spec), known.spec)


def _find_finished(spec: StudySpec, url: str) -> tuple[Store, StudyRecord] | None:
    """Return the spec's study where the store has it with nothing left to train."""
    store, study = _find(spec.name, url)
    if store is None or study is None:
        return None
    spec = adopt_widened_ranges(ranges.adopt_stored_ranges(spec, study), study.spec, study.widenings)
    has_other_limits = study.search_end is not None and study.spec.search.limits != spec.search.limits
    if study.spec.differences(spec) or study.spec.num_trials < spec.num_trials or has_other_limits:
        return None
    if store.trials.num_left(replace(study, spec=spec)):  # a confirmation, which the study may not have had before
        return None
    return store, study


@contextmanager
def _checked(spec: StudySpec, allowed: ImportAllowlist, launcher: Launcher) -> Iterator[dict[str, Any]]:
    """Enter the launcher, let modules of the user's own be imported, check everything; give the metadata found.

    The launcher's workers start meanwhile.
    """
    with launcher, allowed_for(spec, allowed).importable():
        launcher.start_early()
        with chdir(os.curdir):  # which the user's modules may leave when they are imported
            metadata = launcher.call(preflight.run_preflight, spec, launcher.device_kinds)
        preflight.check_devices(launcher.own_devices, launcher.proofs())
        yield {**metadata, **({CODE: digests} if (digests := code_digests(spec, allowed)) else {})}


@contextmanager
def _opened(
    spec: StudySpec, allowed: ImportAllowlist, opener: Opener, launcher: Launcher
) -> Iterator[tuple[Store, StudyRecord]]:
    """Check everything, then open the study with the metadata that was found."""
    with _checked(spec, allowed, launcher) as metadata:
        store, study = opener(launcher, metadata)
        store.trials.get_all(study)  # raises where the study is damaged
        _warn_of_changed_code(study, metadata.get(CODE, {}))
        yield store.retrying(for_s=OUTAGE_S), study


def _run_to_end(
    spec: StudySpec,
    allowed: ImportAllowlist,
    opener: Opener,
    launcher: Launcher,
    *,
    watcher: Watcher | None,
    progress: bool | None,
) -> Result:
    """Open the study and train until nothing of it is left; show how far it is."""
    with nullcontext(watcher) if watcher else shown_progress(progress) as shown:
        return _train_to_end(spec, allowed, opener, launcher, watcher=shown)


def _train_to_end(
    spec: StudySpec, allowed: ImportAllowlist, opener: Opener, launcher: Launcher, *, watcher: Watcher | None
) -> Result:
    with _opened(spec, allowed, opener, launcher) as (store, study), Publisher(store, study) as publisher:
        watch = watcher(store, study) if watcher else None

        def look(store: Store) -> None:
            store.studies.check_exists(study)
            publisher.publish_if_due()
            if watch is not None:
                watch(store)

        try:
            launcher.run(store, study, on_tick=look)
        except KeyError:  # Optuna's, where there is no such study
            store.studies.check_exists(study)
            raise
    store.studies.check_exists(study)
    study = store.studies.get(study.name)
    left = store.trials.num_left(study)
    if study.stop == "failure":
        raise StudyStopped(f"study {study.name!r} was stopped: {study.stop_reason}", can_resume=left > 0)
    if left and study.stop is None:
        raise StudyStopped(f"study {study.name!r} has {left} trials left, which were added meanwhile", can_resume=True)
    if left:
        raise StudyStopped(f"study {study.name!r} was stopped with {left} trials left", can_resume=True)
    return result_of(store, study)


def _warn_of_changed_code(study: StudyRecord, digests: Mapping[str, str]) -> None:
    """Say which files of users' own code have changed since the study began, where it is known how they were."""
    known = study.metadata.get(CODE, {})
    changed = sorted(file for file in known.keys() | digests.keys() if known.get(file) != digests.get(file))
    if known and changed:
        logger.warning(
            "%s changed since study %s began; to train all of it with the new code, start it anew with --fresh",
            " and ".join(changed) + (" has" if len(changed) == 1 else " have"),
            study.name,
        )


def _tell_of_damage(store: Store, told: set[str], say: Callable[[str], None]) -> None:
    """Say once of each study that cannot be read why it is skipped."""
    for problem in set(store.studies.load_all()[1].values()) - told:
        told.add(problem)
        say(f"skipped: {problem}")


def _next_study(store: Store, first: str | None, passed_over: Container[tuple[int, float]]) -> StudyRecord | None:
    """Return the study to serve: the one named first, else the one that was started first; None where none has work."""
    waiting = [
        study
        for study in store.studies.get_all()
        if study.stop is None and (study.study_id, study.started) not in passed_over and _has_work(store, study)
    ]
    return min(waiting, key=lambda study: (study.name != first, study.started), default=None)


def _has_work(store: Store, study: StudyRecord) -> bool:
    """Return whether a new worker would find a trial to take, or, by joining the study, why it cannot be read."""
    try:
        counts = store.trials.counts(study.study_id)
    except UserError:
        return True
    if "running" in counts:
        return store.workers.num_claimable(study) > 0
    return "waiting" in counts or store.trials.num_left(study) > 0
