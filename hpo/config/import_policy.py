"""Which modules a worker may import: a study from a store names modules, and not everyone may choose them."""

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
    """What this machine's user allows: modules by name, with everything inside them, and folders of modules."""

    modules: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    @classmethod
    def parse(cls, allow: Iterable[str]) -> ImportAllowlist:
        """Read the values of --allow: names of modules, and paths of folders, which have a slash or a dot in them.

        Raises UserError for a value that is neither.
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
        """Raise UserError, naming the module, where the study names one that is not allowed; import nothing."""
        for module, setting in spec.modules().items():
            if not self._is_allowed(module):
                raise UserError(
                    f"{setting} of study {spec.name!r} names the module {module!r}, which this worker may not import; "
                    f"allow it with --allow {module}, or its folder with --allow FOLDER"
                )

    def _is_allowed(self, module: str) -> bool:
        if any(module == allowed or module.startswith(f"{allowed}.") for allowed in self.modules):
            return True
        locations = self._locations(module)
        return bool(locations) and all(
            any(Path(location).resolve().is_relative_to(folder) for folder in self.folders) for location in locations
        )

    def _locations(self, module: str) -> list[str]:
        """Return the files or folders that a module's top-level package would be loaded from; import nothing."""
        with self.importable():
            try:
                spec = importlib.util.find_spec(module.partition(".")[0])
            except (ImportError, ValueError):
                return []
        if spec is None:
            return []
        return [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())

    def folder_of(self, module: str) -> Path | None:
        """Return the folder in which a module is found; None where it is installed, or found nowhere."""
        sys.path.append(os.getcwd())  # as hpo.train.imports does
        try:
            locations = self._locations(module)
        finally:
            sys.path.remove(os.getcwd())
        if not locations:
            return None
        location = Path(locations[0]).resolve()
        folder = (location.parent if location.name == "__init__.py" else location).parent
        installed = {Path(path).resolve() for key, path in sysconfig.get_paths().items() if "lib" in key}
        return None if any(folder.is_relative_to(path) for path in installed) else folder

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Make modules of the allowed folders importable for a while, as they are in a worker process."""
        sys.path[:0] = self.folders
        importlib.invalidate_caches()
        try:
            yield
        finally:
            for folder in self.folders:
                sys.path.remove(folder)

    def python_path(self) -> Sequence[str]:
        """Return where a worker process looks for modules first: the folders, and where this command was given."""
        return [*self.folders, *([os.getcwd()] if self.modules else [])]


def load_own_spec(spec: StudySpec | str | Path, *, folder: str | Path | None) -> tuple[StudySpec, ImportAllowlist]:
    """Return a study's spec and what its author allows: the modules that it names, and those of a folder.

    The spec is given, or read from a study file. By default the folder is that of the study file or, for a StudySpec,
    that of the running script. Raises UserError for a study file that is none.
    """
    if not isinstance(spec, StudySpec):
        folder = folder or Path(spec).parent
        spec = StudySpec.from_toml(spec)
    folder = Path(folder or sys.path[0] or os.getcwd()).resolve()
    return spec, ImportAllowlist(tuple(spec.modules()), (str(folder),))
