"""The public functions for stores: find one, copy a study into another one, upgrade a store, check it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from hpo.errors import UserError
from hpo.store import database
from hpo.store.copying import copy_study
from hpo.store.retry import STORE_ERRORS
from hpo.store.schema import deleted_study_ids
from hpo.store.store import Store
from hpo.store.urls import parse_url
from hpo.study.records import StudyRecord

DEFAULT_STORAGE = "sqlite:///hpo.db"


def storage_url(storage: str | None) -> str:
    """Return the URL of the store: `storage`, else HPO_STORAGE, else hpo.db in the working directory."""
    return storage or os.environ.get("HPO_STORAGE") or DEFAULT_STORAGE


def open_study(name: str, *, storage: str | None) -> tuple[Store, StudyRecord]:
    """Return the store and its study of this name.

    Args:
        name: The study.
        storage: URL of the store, as in `storage_url`.

    Raises:
        UserError: There is no such store, or no such study in it.
    """
    store = Store(storage_url(storage))
    return store, store.studies.get(name)


def copy(
    name: str, *, to: str, storage: str | None = None, progress: Callable[[int, int], None] = lambda done, of: None
) -> str:
    """Copy a study into another store, where it can be resumed.

    The copy has the trials, the curves, the attempts and those checkpoints that this machine can read. The original
    does not change.

    Args:
        name: The study.
        to: URL of the other store, which is made where there is none.
        storage: URL of the study's store. Default: HPO_STORAGE, else sqlite:///hpo.db.
        progress: Called with the number of trials copied, and of all.

    Returns:
        The URL of the other store, without its password.

    Raises:
        UserError: Trials of the study are in training, or the other store has a study of that name.
    """
    source, study = open_study(name, storage=storage)
    with suppress(*STORE_ERRORS):  # from a store that can only be read, too
        source.workers.reap(study)
    if running := source.trials.counts(study.study_id).get("running", 0):
        raise UserError(f"study {name!r} has {running} trials in training; end them with: hpo stop {name}")
    try:
        target = Store(to, create=True)
    except UserError as error:
        raise type(error)(str(error).replace("--storage", "--to")) from None
    target.studies.check_absent(name)
    # Files first: a study in a store has its files, whenever the copy is interrupted.
    copied = replace(study, metadata={**study.metadata, "uid": uuid.uuid4().hex[:8], "origin": study.origin})
    _copy_files(source.checkpoints_url(study), target.checkpoints_url(copied))
    _copy_files(str(source.folder(study) / "trials"), str(target.folder(copied) / "trials"))
    copy_study(source.database, target.database, study, metadata=copied.metadata, progress=progress)
    return str(target.url)


def delete(name: str, *, storage: str | None = None) -> None:
    """Delete a study from its store, with its trials, and its logs and checkpoints as far as this machine has them.

    Args:
        name: The study, which may be damaged.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Raises:
        UserError: There is no such study, or trials of it are in training.
    """
    from fsspec.core import url_to_fs

    store = Store(storage_url(storage))
    folders = []
    with suppress(UserError):  # a damaged study is deleted without its files, which its row no longer names
        study = store.studies.get(name)
        store.workers.reap(study)
        folders = [str(store.folder(study)), store.checkpoints_url(study)]
    store.studies.delete(name)
    for folder in folders:
        files, path = url_to_fs(folder)
        if files.exists(path):
            files.rm(path, recursive=True)


def _copy_files(source: str, target: str) -> None:
    """Copy the files that there are in a folder, wherever the two URLs or paths lead; no pipes, sockets or devices."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(source)
    target_files, target_path = url_to_fs(target)
    for name, info in files.find(path, detail=True).items():
        if info["type"] == "file" or files.isfile(name):  # which also a link to one is
            copied = f"{target_path}{name.removeprefix(path)}"
            target_files.makedirs(target_files._parent(copied), exist_ok=True)
            with files.open(name, "rb") as reading, target_files.open(copied, "wb") as writing:
                shutil.copyfileobj(reading, writing)


def upgrade_storage(*, storage: str | None = None) -> list[str]:
    """Upgrade a store of an older version to this one, or make the tables of an empty database.

    Args:
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        What was done, a line each.

    Raises:
        UserError: There is no such store, or its version is newer.
    """
    return database.upgrade(parse_url(storage_url(storage)))


def check_storage(*, storage: str | None = None) -> tuple[list[str], list[str]]:
    """Check that a store holds nothing damaged, and that everything in it agrees, such as slots with Optuna's trials.

    Args:
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        The lines that describe the store, and the problems in it.

    Raises:
        UserError: There is no such store.
    """
    store = Store(storage_url(storage))
    problems = store.check()
    with store.database.connect() as connection:
        if deleted := deleted_study_ids(connection):
            problems.append(
                f"rows are left of studies that were deleted with Optuna: {len(deleted)}; remove them with: "
                "hpo storage upgrade"
            )
    return store.describe(), problems
