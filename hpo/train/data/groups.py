"""Groups of images that a split must not part: which image is of which group, by its path, a table or a function.

Shapes: N images.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.system.files import read_text
from hpo.train.data.images import FileImages, LabeledImages
from hpo.train.imports import code_path, describe_error, import_object, is_import_path
from hpo.train.seeding import generators_kept

TABLE_ENDING = ".csv"  # of data.groups where it is no pattern but a file


def group_numbers(images: LabeledImages, groups: str) -> Tensor:
    """Return the number of each image's group (N,), int64.

    Args:
        images: The images that will be split.
        groups: A regular expression that is searched for in the path of each image below train/. Its groups, or else
            all that it matches, name the image's group. Or `package.module:function`, which is called with that path,
            or with an image's index where images are no files, and returns the name of its group. Or a CSV file with
            the columns `path` (or `index`) and `group`.

    Raises:
        UserError: `groups` leaves an image without a group, or cannot be used for these images.
    """
    keys: Sequence[str | int] = range(len(images.labels_N))
    column = "index"
    if isinstance(images, FileImages):
        column = "path"
        keys = [path.relative_to(images.folder).as_posix() for path in images.paths]
    if is_import_path(groups):
        with generators_kept():
            name_of = _named_by(import_object(groups, setting="data.groups"), groups)
    elif groups.endswith(TABLE_ENDING):
        name_of = _listed_in(groups, column)
    elif isinstance(images, FileImages):
        name_of = _matched_by(groups)
    else:
        raise UserError(
            f"data.groups must be package.module:function or a CSV file for images that are not files, got {groups!r}"
        )
    numbers = dict[Any, int]()
    return torch.tensor([numbers.setdefault(name_of(key), len(numbers)) for key in keys], dtype=torch.int64)


def groups_digest(groups: str | None) -> str | None:
    """Return a digest of the table that `data.groups` names, or None where it names none. Raises as `group_numbers`."""
    if groups is None or not groups.endswith(TABLE_ENDING) or is_import_path(groups):
        return None
    return hashlib.blake2b(_read_table(groups).encode(), digest_size=8).hexdigest()


def _read_table(groups: str) -> str:
    """Return the text of a table, which is looked for where `data.root` is."""
    tried = [Path(folder) / Path(groups).expanduser() for folder in dict.fromkeys((*code_path(), os.getcwd()))]
    path = next((path for path in tried if path.exists()), tried[0])
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"data.groups = {groups!r} cannot be read as {path.absolute()}: {reason}") from None


def _listed_in(groups: str, column: str) -> Callable[[Any], Any]:
    rows = csv.DictReader(_read_table(groups).splitlines())
    columns = rows.fieldnames or []
    if not {column, "group"} <= set(columns):
        raise UserError(f"data.groups = {groups!r} must have the columns {column} and group, got {', '.join(columns)}")
    listed = {row[column]: row["group"] for row in rows}

    def name_of(key: str | int) -> Any:
        if not listed.get(str(key)):
            raise UserError(f"data.groups = {groups!r} must have a group for every image, and has none for {key}")
        return listed[str(key)]

    return name_of


def _matched_by(pattern: str) -> Callable[[Any], Any]:
    compiled = re.compile(pattern)

    def name_of(path: str) -> Any:
        match = compiled.search(path)
        if match is None:
            raise UserError(f"data.groups must match the path of every image below train/, got {pattern!r} for {path}")
        return match.groups() or match[0]

    return name_of


def _named_by(function: Callable[..., Any], groups: str) -> Callable[[Any], Any]:
    def name_of(key: str | int) -> Any:
        try:
            name = function(key)
            hash(name)
        except Exception as error:  # whatever the user's function raises
            raise UserError(
                f"data.groups = {groups!r} cannot name the group of {key!r}: {describe_error(error)}"
            ) from error
        if name is None:
            raise UserError(f"data.groups = {groups!r} must name a group for every image, got None for {key!r}")
        return name

    return name_of
