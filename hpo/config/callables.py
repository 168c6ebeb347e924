"""Functions and classes in the settings of a study that a script gives: their import paths, or else the objects.

A store keeps names. A worker process imports what a module defines by its name; everything else, such as a lambda or
what a notebook defines, is there for the calling process alone.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hpo.errors import UserError
from hpo.train.imports import CALLER, ImportAllowlist


@dataclass(frozen=True)
class NamedCallables:
    """Settings with a name in place of each callable.

    Attributes:
        settings: The settings, as a study file has them.
        objects: What no other process can import, by the name that it has in the settings.
        folders: Where the modules are found that the other names are imported from.
    """

    settings: dict[str, Any]
    objects: dict[str, Callable[..., Any]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)


def name_callables(settings: Mapping[str, Any]) -> NamedCallables:
    """Name each function and class in the settings of a study, wherever it stands.

    Raises:
        UserError: An object of another kind can be called, such as a network that is built already.
    """
    named = NamedCallables({})

    def name(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {inner: name(item, f"{key}.{inner}" if key else str(inner)) for inner, item in value.items()}
        if isinstance(value, list | tuple):
            return [name(item, key) for item in value]
        return _name_of(value, key, named) if callable(value) else value

    named.settings.update(name(settings, ""))
    return named


def _name_of(value: Any, key: str, named: NamedCallables) -> str:
    """Return the name of a callable, and note in `named` what is needed to find it."""
    if not (inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, partial)):
        raise UserError(
            f"{key} must be a function or a class, which each trial calls anew; got an object of the class "
            f"{type(value).__name__}"
        )
    name = getattr(value, "__name__", "")
    module = getattr(value, "__module__", None) or CALLER
    if _is_importable(module, name, value):
        folder = ImportAllowlist().folder_of(module)
        named.folders.extend([] if folder is None else [str(folder)])
        return f"{module}:{name}"
    # A lambda has no name, nor has a partial of a function: they are called as the setting that they stand for.
    stem = path = f"{CALLER}:{name if name.isidentifier() else key.replace('.', '_')}"
    number = 1
    while named.objects.setdefault(path, value) is not value:
        number += 1
        path = f"{stem}_{number}"
    return path


def _is_importable(module: str, name: str, value: Any) -> bool:
    """Return whether another process finds a function or class under this name when it imports this module."""
    is_defined_there = (inspect.isfunction(value) or inspect.isclass(value)) and module != CALLER
    found = sys.modules.get(module)
    return is_defined_there and getattr(found, name, None) is value and getattr(found, "__spec__", None) is not None
