"""The public function that writes a study's trials to loggers: from the store, in a process that trains nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from hpo.analysis.answer import find_best
from hpo.analysis.text import plural
from hpo.api.stores import open_study
from hpo.errors import StudyStopped, UserError
from hpo.loggers.runs import make_runs
from hpo.loggers.table import Logger, open_logger
from hpo.store.retry import OUTAGE_S
from hpo.store.store import Store
from hpo.study.records import StudyRecord

FOLLOW_S = 5.0  # between two looks at a study that is followed


def log(
    name: str,
    to: Sequence[str],
    *,
    storage: str | None = None,
    follow: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write a study to loggers: each trial that has begun as a run. Only what is not there yet is written.

    Args:
        name: The study.
        to: The loggers, each as KIND or KIND=TARGET: `tensorboard=DIR`, `mlflow=URI`, `wandb=PROJECT`.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.
        follow: Whether to go on until the study has ended or was stopped.
        say: Called with a line for each logger that was written to.

    Raises:
        UserError: There is no such study or logger, or its packages are not installed.
        StudyStopped: A logger cannot be written to.
    """
    loggers: dict[str, Logger] = {}
    for one in to:
        with _naming_logger(one):
            loggers[one] = open_logger(one)
    store, study = open_study(name, storage=storage)
    if follow:
        store = store.retrying(for_s=OUTAGE_S)
    seen = None
    while True:
        study = store.studies.get(name)
        counts = store.trials.counts(study.study_id)
        is_over = not store.trials.num_left(study) or (study.stop is not None and "running" not in counts)
        state = (counts, store.trials.num_epochs(study))
        if state != seen:
            _write(store, study, loggers, say)
        if is_over or not follow:
            return
        seen = state
        time.sleep(FOLLOW_S)


def _write(store: Store, study: StudyRecord, loggers: Mapping[str, Logger], say: Callable[[str], None]) -> None:
    trials = store.trials.get_all(study)
    runs = make_runs(study, trials, find_best(study, trials))
    for to, logger in loggers.items():
        with _naming_logger(to):
            num_new = logger.write(runs)
        say(f"{to}: {plural(len(runs), 'run')}, {num_new} new or changed")


@contextmanager
def _naming_logger(to: str) -> Iterator[None]:
    """Turn what the packages of a logger raise, such as where a server does not answer, into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise StudyStopped(f"--to {to} cannot be written: {type(error).__name__}: {lines[0]}") from error
