"""Imports and calls of what a study file names as `package.module:name`; each failure is one sentence to the user."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from hpo.errors import UserError, unknown_name


def is_import_path(name: str) -> bool:
    """Return whether a name has the form `package.module:name`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), attribute])


def import_object(path: str, *, setting: str) -> Callable[..., Any]:
    """Return the callable that `package.module:name` names, from Python's path or, failing that, the working directory.

    Raises UserError, naming `setting`, where the module or the name does not exist or the module cannot be imported.
    """
    if not is_import_path(path):
        raise UserError(f"{setting} must have the form 'package.module:name', got {path!r}")
    module_name, _, attribute = path.partition(":")
    # The installed `hpo` command, unlike `python -m`, leaves the working directory off the path. It stays on the path,
    # because the user's code may import its neighbours later.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"{setting} = {path!r} cannot be imported: {describe_error(error)}") from error
        raise UserError(
            f"{setting} = {path!r} must name a module that can be imported; there is no module {error.name!r} "
            f"on Python's path or in {os.getcwd()}"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises when it is imported
        raise UserError(f"{setting} = {path!r} cannot be imported: {describe_error(error)}") from error
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown_name(f"the name after ':' in {setting} = {path!r}", attribute, names)
    named = getattr(module, attribute)
    if not callable(named):
        raise UserError(f"{setting} = {path!r} must name a function or a class, got {type(named).__name__}")
    return named  # type: ignore[no-any-return]


def describe_error(error: BaseException) -> str:
    """Return an exception of the user's code in one line: its type, its message and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{where}"


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
        UserError: The factory does not take an option, or it raised something other than running out of memory.
    """
    import torch

    setting = f"{section}.name = {name!r}"
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:
        raise UserError(f"{setting} must name a function whose arguments Python can tell") from None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [key for key, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    for key in options:
        if not takes_any and key not in known:
            valid = ", ".join(sorted(set(known) - fixed.keys())) or "no options"
            raise UserError(f"{section}.{key} is not an option of {setting}, which takes {valid}")
    arguments = {key: value for key, value in fixed.items() if takes_any or key in known} | dict(options)
    try:
        return factory(**arguments)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # whatever the user's factory raises
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise UserError(f"{setting} failed when called with {given}: {describe_error(error)}") from error
