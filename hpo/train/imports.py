"""The one door to users' own code: imports and calls of what a study names as `package.module:name`.

A study may come from a store, and whoever can write to it chooses the names. So a process imports a name only while an
`ImportAllowlist` of its own, which never comes from a store, is open and allows it. Each failure is one sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from hpo.errors import OWN_CODE, UserError, did_you_mean, unknown_name

CALLER = "__main__"  # the module in whose name a study has what only the process that created it can call


@dataclass(frozen=True)
class ImportAllowlist:
    """What a process may import and call because a study names it; by default nothing.

    Attributes:
        modules: Modules; whatever they and the modules inside them define may be named.
        folders: Folders; whatever the modules in them define may be named.
        names: `package.module:name`, each exactly as a study file of this process's user has it.
        path: Folders where modules are found. They follow Python's own path, so that no file there shadows a library.
        objects: What no other process can import, by the name that a study has for it.
    """

    modules: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    objects: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[str]]) -> ImportAllowlist:
        """Return the list, which is without objects, that `dataclasses.asdict` has turned into plain data."""
        modules, folders, names, path = (tuple(values[key]) for key in ("modules", "folders", "names", "path"))
        return cls(modules, folders, names, path)

    def allows(self, name: str) -> bool:
        """Return whether a study may name this `package.module:name`; import nothing."""
        return name in self.names or self.allows_module(name.partition(":")[0])

    def allows_module(self, module: str) -> bool:
        """Return whether a study may name whatever this module defines; import nothing."""
        if module == CALLER:  # another process has another one
            return False
        if any(module == allowed or module.startswith(f"{allowed}.") for allowed in self.modules):
            return True
        locations = self._locations(module) if self.folders else []
        return bool(locations) and all(
            any(Path(location).resolve().is_relative_to(folder) for folder in self.folders) for location in locations
        )

    def folder_of(self, module: str) -> Path | None:
        """Return the folder in which a module is found; None where it is installed, or found nowhere."""
        locations = self._locations(module)
        if not locations:
            return None
        location = Path(locations[0]).resolve()
        folder = (location.parent if location.name == "__init__.py" else location).parent
        return None if _is_installed(folder) else folder

    def files_of(self, module: str) -> list[Path]:
        """Return the file of a module and those beside it that it imports, directly or not; import nothing.

        The list is empty where the module is installed, or found nowhere.
        """
        folder = self.folder_of(module)
        if folder is None:
            return []
        finder = ModuleFinder(path=[str(folder)])
        with suppress(Exception):  # of code that cannot be read: what was found before it counts
            finder.import_hook(module)
        files = [
            getattr(one, "__file__", None) for one in finder.modules.values()
        ]  # None: a folder without __init__.py
        return sorted(Path(file) for file in files if file)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Let this process import what is allowed, for a while, and this thread look there for data."""
        has_code = bool(self.modules or self.folders or self.names)
        with self._on_python_path() if has_code else nullcontext():
            _open_lists.append(self)
            token = _code_path.set(self.path)
            try:
                yield
            finally:
                _code_path.reset(token)
                _open_lists.remove(self)

    def _locations(self, module: str) -> list[str]:
        """Return the files or folders that a module's top-level package would be loaded from; import nothing."""
        with self._on_python_path():
            try:
                spec = importlib.util.find_spec(module.partition(".")[0])
            except (ImportError, ValueError):
                return []
        if spec is None:
            return []
        return [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())

    @contextmanager
    def _on_python_path(self) -> Iterator[None]:
        """Have modules found in the folders, for a while: after libraries, and before those of the running script.

        Modules of the script that have the names of theirs are set aside meanwhile. What was imported from the folders
        is forgotten then: another study's may have the same names.
        """
        added = [folder for folder in dict.fromkeys(self.path) if folder not in sys.path]
        script = [sys.path.pop(0)] if added and not _is_installed(Path(sys.path[0]).resolve()) else []
        libraries = [Path(folder).resolve() for folder in sys.path]
        sys.path.extend([*added, *script])
        named = _modules_of(script, named_as_in=added, libraries=libraries)
        set_aside = {name: sys.modules.pop(name) for name in named}
        known = set(sys.modules)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            for folder in [*added, *script]:
                sys.path.remove(folder)
            sys.path[:0] = script
            for name in sys.modules.keys() - known:
                if _is_of(sys.modules[name], added, libraries=libraries):
                    del sys.modules[name]
            sys.modules.update(set_aside)


def _modules_of(script: Sequence[str], *, named_as_in: Sequence[str], libraries: Sequence[Path]) -> list[str]:
    """Return the names of the modules that were imported from a script's folder and that other folders have, too."""
    names = {path.stem for folder in named_as_in for path in Path(folder).glob("*.py")}
    names |= {path.parent.name for folder in named_as_in for path in Path(folder).glob("*/__init__.py")}
    names.discard("__main__")
    return [
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in names and _is_of(module, script, libraries=libraries)
    ]


def _is_of(module: Any, folders: Sequence[str], *, libraries: Sequence[Path]) -> bool:
    """Return whether a module lies in one of the folders, and in no folder of libraries inside it, such as `.venv`.

    A library must not be forgotten: torch, loaded twice, corrupts the memory of the process.
    """
    file = Path(getattr(module, "__file__", None) or sysconfig.get_path("stdlib"))
    holding = [folder for folder in map(Path.resolve, map(Path, folders)) if file.is_relative_to(folder)]
    inside = [library for library in libraries if file.is_relative_to(library)]
    return any(not any(library.is_relative_to(folder) for library in inside) for folder in holding)


def _is_installed(path: Path) -> bool:
    """Return whether a path is one of a library, or of Python's own modules."""
    installed = {Path(folder).resolve() for key, folder in sysconfig.get_paths().items() if "lib" in key}
    return any(path.is_relative_to(folder) for folder in installed)


_open_lists: list[ImportAllowlist] = []  # of this process; there are several where threads run studies side by side
_code_path: ContextVar[tuple[str, ...]] = ContextVar("code_path", default=())  # of the study that this thread runs


def code_path() -> tuple[str, ...]:
    """Return the folders where modules of this thread's study are found; `data.root` is looked for there, too."""
    return _code_path.get()


def open_allowlists() -> list[ImportAllowlist]:
    """Return the lists that are open in this process, for a child process that does part of its work."""
    return list(_open_lists)


def not_allowed(what: str, module: str, *, folder: Path | None = None) -> UserError:
    """Return the error for a module that this process may not import.

    Args:
        what: What names it.
        module: The module.
        folder: The folder that has it, where it is known and modules are not looked for there by themselves.
    """
    if module == CALLER:
        return UserError(
            f"{what} was given as an object, which only the process that created the study has: "
            "call hpo.run there again"
        )
    options = f"--allow {module}, or --allow FOLDER with the folder that holds it"
    if folder is not None:
        options = f"--allow {shlex.quote(str(folder))}"
    return UserError(
        f"{what} names the module {module!r}, which this worker may not import; if you trust it, add {options}"
    )


def is_import_path(name: str) -> bool:
    """Return whether a name has the form `package.module:name`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), attribute])


def import_object(path: str, *, setting: str) -> Callable[..., Any]:
    """Return the function or class that `package.module:name` names. No other code imports what a study names.

    Raises:
        UserError: No open allowlist allows the name, or what it names is defined in a module that is not allowed; the
            module cannot be imported, or has no such function or class. The message names `setting`.
    """
    if not is_import_path(path):
        raise UserError(
            f"{setting} must have the form 'package.module:name', got {path!r}{did_you_mean(path, [OWN_CODE])}"
        )
    module_name, _, attribute = path.partition(":")
    allowed = next((allowlist for allowlist in _open_lists if allowlist.allows(path)), None)
    if allowed is None:
        raise not_allowed(f"{setting} = {path!r}", module_name)
    if path in allowed.objects:
        return allowed.objects[path]
    module = _import_module(path, setting=setting, allowed=allowed)
    if not hasattr(module, attribute):
        kinds = inspect.getmembers(module, inspect.isfunction) + inspect.getmembers(module, inspect.isclass)
        names = [name for name, value in kinds if value.__module__ == module_name and not name.startswith("_")]
        origin = getattr(module, "__file__", None) or "built into Python"
        raise unknown_name(
            f"the name after ':' in {setting} = {path!r} ({origin})", attribute, names or ["what it defines"]
        )
    named = getattr(module, attribute)
    if not inspect.isfunction(named) and not inspect.isclass(named):
        raise UserError(f"{setting} = {path!r} must name a function or a class, got {type(named).__name__}")
    # An allowed module may have imported anything, such as `from subprocess import run`.
    if path not in allowed.names and not allowed.allows_module(str(named.__module__)):
        raise UserError(
            f"{setting} = {path!r} must name what an allowed module defines; {attribute} was imported there from "
            f"{named.__module__}, which this worker may not import"
        )
    return named


def _import_module(path: str, *, setting: str, allowed: ImportAllowlist) -> Any:
    module = path.partition(":")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{setting} = {path!r} cannot be imported: {describe_error(error)}") from error
        package = sys.modules.get(error.name.rpartition(".")[0])
        places = f"on Python's path or in {' or '.join(dict.fromkeys(allowed.path))}; "
        if allowed.modules or allowed.folders:
            places += "add --allow FOLDER with the folder that holds it"
        else:
            places += "install it, or put its folder on Python's path with PYTHONPATH=FOLDER"
        if package is not None:  # often another one of that name than the user means, such as Python's own
            places = f"in {getattr(package, '__file__', None) or next(iter(package.__path__), 'Python')}"
        raise UserError(
            f"{setting} = {path!r} must name a module that can be imported; there is no module {error.name!r} {places}"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises when it is imported
        raise UserError(f"{setting} = {path!r} cannot be imported: {describe_error(error)}") from error


def import_loop(path: str) -> Callable[[Any], Any]:
    """Return the training loop of the user's own that objective.function names. Raises UserError as `import_object`."""
    setting = "objective.function"
    loop = import_object(path, setting=setting)
    try:
        inspect.signature(loop).bind("trial")
    except (TypeError, ValueError) as error:
        raise UserError(f"{setting} = {path!r} must take one argument, the trial: {error}") from None
    return loop


def describe_error(error: BaseException) -> str:
    """Return an exception of the user's code in one line: its type, its message and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{where}"


def as_finite(returned: Any) -> float | None:
    """Return what a user's function returned as a number; None where it is no finite one."""
    try:
        number = float(returned)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def import_timm(setting: str) -> Any:
    """Return the module timm, which is an extra. Raises UserError, naming the setting, where it is not installed."""
    try:
        import timm.optim
    except ImportError as error:
        raise UserError(f"{setting} needs timm: pip install 'hpo-studies[timm]' ({error})") from None
    return timm


def call_factory(
    factory: Callable[..., Any], *, section: str, name: str, options: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Any:
    """Call a user's factory and return its result.

    Args:
        factory: What `section`.name names.
        section: The section of the study file, for messages.
        name: The value of `section`.name, for messages.
        options: The options in that section; all are passed.
        fixed: Arguments that the product gives; those are passed that the factory accepts.

    Raises:
        UserError: The factory does not take what it is given, or raised something other than running out of memory.
    """
    setting = f"{section}.name = {name!r}"
    try:
        signature = inspect.signature(factory)
    except ValueError:
        raise UserError(f"{setting} must name a function whose arguments Python can tell") from None
    parameters = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [key for key, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    for key in options:
        if not takes_any and key not in known:
            valid = ", ".join(sorted(set(known) - fixed.keys())) or "no options"
            raise UserError(f"{section}.{key} is not an option of {setting}, which takes {valid}")
    arguments = {key: value for key, value in fixed.items() if takes_any or key in known} | dict(options)
    return call_own(factory, arguments, setting=setting)


def call_own(function: Callable[..., Any], arguments: Mapping[str, Any], *, setting: str) -> Any:
    """Call a user's function, or the class that `setting` names, with these arguments.

    Raises:
        UserError: It does not take them, or raised something other than running out of memory.
    """
    import torch

    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{setting} cannot be called with {given}: {error}") from None
    try:
        with chdir(os.curdir):  # back again where the factory leaves: other paths may be relative
            return function(**arguments)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # whatever the user's factory raises
        raise UserError(f"{setting} failed when called with {given}: {describe_error(error)}") from error
