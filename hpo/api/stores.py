"""The public functions that look after stores: copy a study into another one, upgrade a store, check it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import fsspec
import fsspec.generic

from hpo.api.running import storage_url
from hpo.errors import UserError
from hpo.store import database
from hpo.store.database import parse_url
from hpo.store.retry import STORE_ERRORS
from hpo.store.studies import Store


def copy(
    name: str, *, to: str, storage: str | None = None, progress: Callable[[int, int], None] = lambda done, of: None
) -> str:
    """Copies a study into another store, where it can go on; returns that store's URL, without its password.

    Trials, curves, attempts and, where they can be read from here, checkpoints are copied; the study stays as it was.
    Raises UserError where trials of it are in training, and where the other store has a study of that name.
    """
    source = Store(storage_url(storage))
    study = source.study(name)
    with suppress(*STORE_ERRORS):  # from a store that can only be read, too
        source.reap(study)
    if running := source.counts(study.study_id).get("running", 0):
        raise UserError(f"study {name!r} has {running} trials in training; end them with: hpo stop {name}")
    try:
        target = Store(to, create=True)
    except UserError as error:
        raise type(error)(str(error).replace("--storage", "--to")) from None
    target.check_absent(name)
    # Files first: a study that is there has its files, whenever this is interrupted.
    copied = replace(study, facts={**study.facts, "uid": uuid.uuid4().hex[:8], "origin": study.origin})
    places = [(source.checkpoints_url(study), target.checkpoints_url(copied))]
    places += [(str(source.folder(study) / "trials"), str(target.folder(copied) / "trials"))]
    for old, new in places:
        files, path = fsspec.core.url_to_fs(old)
        if files.exists(path):
            fsspec.generic.rsync(files.unstrip_protocol(path), fsspec.core.url_to_fs(new)[0].unstrip_protocol(new))
    target.copy_from(source, study, facts=copied.facts, progress=progress)
    return str(target.url)


def upgrade_storage(*, storage: str | None = None) -> list[str]:
    """Brings a store of an older version to this one, or makes the tables of an empty one; says what was done."""
    return database.upgrade(parse_url(storage_url(storage)))


def check_storage(*, storage: str | None = None) -> tuple[list[str], list[str]]:
    """What there is to say of a store, and what is wrong with it: slots and Optuna's trials that do not agree."""
    store = Store(storage_url(storage))
    problems = [problem for study in store.studies() for problem in store.problems(study)]
    return store.describe(), store.damages() + problems
