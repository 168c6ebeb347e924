"""The store: a database of studies, their trials and their workers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState
from sqlalchemy.engine import URL

from hpo.store.copying import read_rows
from hpo.store.damage import check_rows
from hpo.store.database import CONNECTIONS_PER_WORKER, Database, JoinedStorage, open_storage
from hpo.store.reading import study_names
from hpo.store.retry import RetryPolicy
from hpo.store.schema import schema_version, slots_table
from hpo.store.searches import Searches
from hpo.store.studies import Studies
from hpo.store.trials import Trials
from hpo.store.urls import database_path, parse_url
from hpo.store.workers import Workers
from hpo.study.records import StudyRecord


class Store:
    """A database of studies. Any thread and any process may use it.

    Attributes:
        studies: Creating, reading, stopping and copying studies.
        searches: How far the search of a study is, and its early end.
        trials: Claiming trials, reporting on them, ending and reading them.
        workers: Registering workers, renewing their leases, and freeing the trials of those that died.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        """Open the database at `url`. `create` makes it where there is none; else its absence raises UserError."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # what it would say of a study, we say
        # What we use of it is pinned to one major version, and "experimental" means nothing to whoever runs a study.
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        parsed = parse_url(url)
        self._use(Database(parsed, open_storage(parsed, create=create), RetryPolicy()))

    def _use(self, database: Database) -> Self:
        self.database = database
        self.studies = Studies(database)
        self.searches = Searches(database)
        self.trials = Trials(database)
        self.workers = Workers(database)
        return self

    def retrying(self, *, for_s: float | None = None, until: Callable[[], bool] | None = None) -> Store:
        """Return a store on the same database that waits in another way while the database does not answer.

        Args:
            for_s: The seconds that each call is retried for; by default as this store does, which is 0 at first.
            until: Ends the waiting early where it returns true; by default as this store does, which is never at first.
        """
        policy = self.database.retry
        policy = RetryPolicy(policy.for_s if for_s is None else for_s, policy.until if until is None else until)
        return Store.__new__(Store)._use(replace(self.database, retry=policy))

    @property
    def url(self) -> URL:
        """The URL of the database, with its password."""
        return self.database.url

    @property
    def storage(self) -> JoinedStorage:
        """The Optuna storage, for Optuna's own tools."""
        return self.database.storage

    def folder(self, study: StudyRecord) -> Path:
        """Return where on this machine a study's logs and its trials' own files go.

        The folder is next to an SQLite database; for a server it is in HPO_FILES, or else in hpo_files in the working
        directory. No other study has it, not even one of the same name in another database or made after this one was
        deleted: a user's loop must never resume from another study's checkpoint.
        """
        path = database_path(self.url)
        root = path.parent / "hpo_files" if path else Path(os.environ.get("HPO_FILES") or "hpo_files").absolute()
        return root / study.key

    def checkpoints_url(self, study: StudyRecord) -> str:
        """Return the folder, or its URL, with a folder for each trial's checkpoints."""
        root = study.spec.checkpoints.url
        if root is None:
            return str(self.folder(study) / "checkpoints")
        return f"{root if '://' in root else Path(root).expanduser()}/{study.key}"

    def describe(self) -> list[str]:
        """Return a few lines on what the store is."""
        with self.database.connect() as connection:
            version = schema_version(connection)
        lines = [
            f"{self.url}: {self.storage.engine.dialect.name}, schema version {version}, "
            f"Optuna's {self.storage.get_current_version()}",
            f"{len(self.studies.get_all())} studies",
        ]
        if database_path(self.url) is None:
            lines.append(f"a worker process has up to {CONNECTIONS_PER_WORKER} connections open")
        return lines

    def check(self) -> list[str]:
        """Return what is wrong in this store: damaged rows, and studies whose rows do not agree with each other."""
        with self.database.snapshot() as connection:
            studies = study_names(self.database, connection)
            damaged = check_rows(connection, studies)
        problems = [problem for found in damaged.values() for problem in found]
        hurt = {studies[study_id] for study_id in damaged if study_id is not None}
        studies_read, damages = self.studies.load_all()
        problems += [problem for name, problem in damages.items() if name not in hurt]
        sound = [study for study in studies_read if study.name not in hurt]
        return problems + [problem for study in sound for problem in self.problems(study)]

    def problems(self, study: StudyRecord) -> list[str]:
        """Return where the ledger and Optuna's tables disagree about a study: they do if others changed them."""
        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, "waiting": TrialState.RUNNING}
        states |= {"running": TrialState.RUNNING, "pruned": TrialState.PRUNED, "diverged": TrialState.PRUNED}
        with self.database.snapshot() as connection:
            theirs = {trial._trial_id: trial for trial in self.storage.get_all_trials(study.study_id, deepcopy=False)}
            rows = read_rows(connection, slots_table, study.study_id)
        claimed = [row for row in rows if row["trial_id"] is not None]
        problems = []
        for row in claimed:
            trial = theirs.pop(row["trial_id"], None)
            name = f"trial {row['number']} of study {study.name!r}"
            if trial is None:
                problems.append(f"{name} is not among Optuna's trials")
            elif row["attempt"] == 0 and trial.state is TrialState.WAITING and row["state"] == "waiting":
                continue  # it was enqueued with Optuna
            elif trial.number != row["number"] or trial.state is not states[row["state"]]:
                problems.append(f"{name} is {row['state']}, and to Optuna trial {trial.number}, {trial.state.name}")
        return problems + [
            f"Optuna's trial {t.number} of study {study.name!r} has no slot: the answer does not count it"
            for t in theirs.values()
            if t.state is not TrialState.WAITING  # else it will be trained
        ]
