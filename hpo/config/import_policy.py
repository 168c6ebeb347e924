"""Whose code a study may name: that of the user's own study file, or what --allow gives to studies from a store."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.config.callables import name_callables
from hpo.config.study_file import examples_folder, find_study_file
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.train.imports import ImportAllowlist, not_allowed

# A study as a script gives it: the settings that a study file would have, a study file, or a spec.
GivenStudy = StudySpec | Mapping[str, Any] | str | Path


def parse_allow(values: Iterable[str]) -> ImportAllowlist:
    """Read the values of --allow: names of modules, and paths of folders, which have a slash or a dot in them.

    Raises UserError for a value that is neither.
    """
    modules, folders = [], []
    for value in values:
        if all(part.isidentifier() for part in value.split(".")):
            modules.append(value)
        elif value and Path(value).is_dir():
            folders.append(str(Path(value).resolve()))
        else:
            raise UserError(
                f"--allow must be the name of a module or a folder that exists, such as ./models, got {value!r}"
            )
    return ImportAllowlist(tuple(modules), tuple(folders), path=(*folders, os.getcwd()))


def allowed_for(spec: StudySpec, allowed: ImportAllowlist) -> ImportAllowlist:
    """Return what a process that trains this study needs to import: of `allowed`, or nothing where it names no code.

    Its data is looked for in the folders of `allowed` all the same.

    Raises UserError, naming the module, where the study names code that is not allowed; import nothing.
    """
    names = spec.names_of_code()
    for name, setting in names.items():
        if not allowed.allows(name):
            module = name.partition(":")[0]
            raise not_allowed(
                f"{setting} of study {spec.name!r}", module, folder=_folder_of_example(module, given=allowed.path)
            )
    return allowed if names else ImportAllowlist(path=allowed.path)


def _folder_of_example(module: str, *, given: Sequence[str]) -> Path | None:
    """Return the folder of the code that comes with hpo if it has this module and none of the given folders does."""
    file = f"{module.partition('.')[0]}.py"
    if any(Path(folder, file).is_file() for folder in given) or not (examples_folder() / file).is_file():
        return None
    return examples_folder()


def code_digests(spec: StudySpec, allowed: ImportAllowlist) -> dict[str, str]:
    """Return a digest of each file of users' own code that a study names or that is imported there; import nothing."""
    modules = dict.fromkeys(name.partition(":")[0] for name in spec.names_of_code())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for module in modules
        if (folder := allowed.folder_of(module)) is not None
        for path in allowed.files_of(module)
    }


def load_own_spec(study: GivenStudy, *, folder: str | Path | None) -> tuple[StudySpec, ImportAllowlist]:
    """Return a study's spec and what its author allows: the code that it names, looked for in a folder.

    By default the folder is that of the study file or, without one, that of the running script. Modules whose functions
    stand in the settings are also looked for where they were imported from. Raises UserError for a study that is none.
    """
    objects, folders = {}, []
    if isinstance(study, Mapping):
        named = name_callables(study)
        objects, folders = named.objects, named.folders
        study = StudySpec.from_dict(named.settings)
    elif not isinstance(study, StudySpec):
        path = find_study_file(study)
        folder, study = folder or path.parent, StudySpec.from_toml(path)
    folder = str(Path(folder or sys.path[0] or os.getcwd()).resolve())
    searched = dict.fromkeys([folder, *folders, os.getcwd()])
    return study, ImportAllowlist(names=tuple(study.names_of_code()), path=tuple(searched), objects=objects)
