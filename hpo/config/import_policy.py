"""Whose code a worker may import: a study that is read from a store names modules, and not everyone may choose them."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError


@dataclass(frozen=True)
class ImportAllowlist:
    """What this machine's user has allowed: modules by name, with what is inside them, and folders of modules."""

    modules: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    @classmethod
    def parse(cls, allow: Iterable[str]) -> ImportAllowlist:
        """From the values of --allow: the name of a module, or the path of a folder, which has a slash or a dot in it.

        Raises UserError for neither.
        """
        modules, folders = [], []
        for value in allow:
            if all(part.isidentifier() for part in value.split(".")):
                modules.append(value)
            elif value and Path(value).is_dir():
                folders.append(str(Path(value).resolve()))
            else:
                raise UserError(
                    f"--allow must be the name of a module or a folder that exists, such as ./models, got {value!r}"
                )
        return cls(tuple(modules), tuple(folders))

    def check(self, spec: StudySpec) -> None:
        """Raises UserError, naming the module, where the study names one that is not allowed; imports nothing."""
        for module, setting in spec.modules().items():
            if not self._is_allowed(module):
                raise UserError(
                    f"{setting} of study {spec.name!r} names the module {module!r}, which this worker may not import; "
                    f"allow it with --allow {module}, or its folder with --allow FOLDER"
                )

    def _is_allowed(self, module: str) -> bool:
        if any(module == allowed or module.startswith(f"{allowed}.") for allowed in self.modules):
            return True
        places = self._places(module)
        return bool(places) and all(
            any(Path(place).resolve().is_relative_to(folder) for folder in self.folders) for place in places
        )

    def _places(self, module: str) -> list[str]:
        """The files or folders that a module's top-level package would be loaded from; imports nothing."""
        with self.importable():
            try:
                found = importlib.util.find_spec(module.partition(".")[0])
            except (ImportError, ValueError):
                return []
        if found is None:
            return []
        return [found.origin] if found.has_location and found.origin else list(found.submodule_search_locations or ())

    def folder_of(self, module: str) -> Path | None:
        """The folder in which a module is looked for and found; None where it is installed, or nowhere."""
        sys.path.append(os.getcwd())  # as hpo.train.imports does
        try:
            places = self._places(module)
        finally:
            sys.path.remove(os.getcwd())
        if not places:
            return None
        place = Path(places[0]).resolve()
        folder = (place.parent if place.name == "__init__.py" else place).parent
        installed = {Path(path).resolve() for key, path in sysconfig.get_paths().items() if "lib" in key}
        return None if any(folder.is_relative_to(path) for path in installed) else folder

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Modules of the allowed folders can be imported inside, as they can in a worker process."""
        sys.path[:0] = self.folders
        importlib.invalidate_caches()
        try:
            yield
        finally:
            for folder in self.folders:
                sys.path.remove(folder)

    def python_path(self) -> Sequence[str]:
        """What a worker process looks for the modules in, first: the folders, and where this command was given."""
        return [*self.folders, *([os.getcwd()] if self.modules else [])]


def load_own_spec(spec: StudySpec | str | Path, *, folder: str | Path | None) -> tuple[StudySpec, ImportAllowlist]:
    """A study's spec, as given or read from a study file, and what its author allows: its modules, and a folder's.

    By default the folder is that of the study file, or of the running script for a StudySpec. Raises UserError for a
    study file that is none.
    """
    if not isinstance(spec, StudySpec):
        folder = folder or Path(spec).parent
        spec = StudySpec.from_toml(spec)
    folder = Path(folder or sys.path[0] or os.getcwd()).resolve()
    return spec, ImportAllowlist(tuple(spec.modules()), (str(folder),))
