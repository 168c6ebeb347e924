"""Groups of images that a split must not part: which image is of which group, by its path or by a user's function.

Shapes: N images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.data.images import FileImages, LabeledImages
from hpo.train.imports import describe_error, import_object, is_import_path
from hpo.train.seeding import generators_kept


def group_numbers(images: LabeledImages, groups: str) -> Tensor:
    """Return the number of each image's group (N,), int64.

    Args:
        images: The images that will be split.
        groups: A regular expression that is searched for in the path of each image below train/. Its groups, or else
            all that it matches, name the image's group. Or `package.module:function`, which is called with that path,
            or with an image's index where images are no files, and returns the name of its group.

    Raises:
        UserError: `groups` leaves an image without a group, or cannot be used for these images.
    """
    keys: Sequence[str | int] = range(len(images.labels_N))
    if isinstance(images, FileImages):
        keys = [path.relative_to(images.folder).as_posix() for path in images.paths]
    if is_import_path(groups):
        with generators_kept():
            name_of = _named_by(import_object(groups, setting="data.groups"), groups)
    elif isinstance(images, FileImages):
        name_of = _matched_by(groups)
    else:
        raise UserError(f"data.groups must be package.module:function where images are no files, got {groups!r}")
    numbers = dict[Any, int]()
    return torch.tensor([numbers.setdefault(name_of(key), len(numbers)) for key in keys], dtype=torch.int64)


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
