"""A study file as nested dictionaries: read, changed by `--set`, and expanded by the tables of [[compare]]."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpo.errors import UserError, did_you_mean
from hpo.system.files import read_text
from hpo.system.readable import one_line
from hpo.train.config import is_weights_file

MAX_DEPTH = 64  # of tables and lists within each other
PACKAGE = Path(__file__).parents[1]


def examples_folder() -> Path:
    """Return the folder of the studies that come with hpo: in the package, or in the repository beside it."""
    packaged = PACKAGE / "examples"  # by force-include of pyproject.toml
    return packaged if packaged.is_dir() else PACKAGE.parent / "studies"


def find_study_file(name: str | Path) -> Path:
    """Return the study file that `name` means: the file itself, or of a plain NAME, NAME.toml here or among ours."""
    path = Path(name)
    if path.is_file() or path.suffix or path.name != str(name):
        return path
    found = (folder / f"{name}.toml" for folder in (Path(), examples_folder()))
    return next((path for path in found if path.is_file()), path)


def read(path: str | Path, *, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read the settings of a study file; `overrides` are `section.key=value` with the value written as in TOML."""
    try:
        settings = tomllib.loads(read_text(path))
    except OSError as error:
        ours = sorted(file.stem for file in examples_folder().glob("*.toml"))
        reason = error.strerror or error
        if isinstance(error, FileNotFoundError) and str(path).isidentifier():
            reason = f"it is neither here nor among those that come with hpo ({', '.join(ours)})"
        meant = did_you_mean(Path(path).stem, ours)
        raise UserError(f"the study file {path} cannot be read: {reason}{meant}") from None
    except ValueError as error:  # no TOML, no UTF-8, or an integer of thousands of digits
        raise UserError(f"the study file {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"the study file {path} is nested too deeply") from None
    for override in overrides:
        apply_override(settings, override)
    _check_values(settings, source=str(path))
    return settings


def _check_values(value: Any, *, source: str, key: str = "", depth: int = 0) -> None:
    """Refuse what no setting can be and all code would have to expect: deep nesting, integers beyond 64 bits."""
    if depth > MAX_DEPTH:
        raise UserError(one_line(f"{key} is nested more than {MAX_DEPTH} levels deep ({source})"))
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise UserError(one_line(f"{key} must be an integer of at most 64 bits ({source})"))
    for name, inner in value.items() if isinstance(value, dict) else ():
        _check_values(inner, source=source, key=f"{key}.{name}" if key else name, depth=depth + 1)
    for inner in value if isinstance(value, list) else ():
        _check_values(inner, source=source, key=key, depth=depth + 1)


def expand_compare(settings: Mapping[str, Any], *, source: str) -> list[dict[str, Any]]:
    """Return the settings without [[compare]] and, for each table of [[compare]], the settings with its changes.

    A variant is named NAME-VARIANT by the `name` in its table. A table within a table is merged with what it changes.
    Two kinds of table replace it instead: a parameter of [search.space], and a [model] with a name, as the options of
    another model would not fit.
    """
    base = {key: value for key, value in settings.items() if key != "compare"}
    tables = settings.get("compare", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"compare must be a list of tables, [[compare]], got {tables!r} ({source})")
    studies, names = [base], set()
    for table in tables:
        name = table.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise UserError(f"compare.name must be letters, digits, '.', '_' and '-', got {name!r} ({source})")
        if name in names or len(table) < 2:
            raise UserError(f"compare.name = {name!r} must be a name of its own, with settings next to it ({source})")
        names.add(name)
        changes = {key: value for key, value in table.items() if key != "name"}
        studies.append(_merged(base, changes) | {"name": f"{base.get('name')}-{name}"})
    return studies


def anchor_weights(settings: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """Return the settings with the files of model.weights, one or a list to search, made absolute from a folder."""
    anchored = copy.deepcopy(dict(settings))

    def absolute(value: Any) -> Any:
        if isinstance(value, str) and is_weights_file(value):
            return str((folder / Path(value).expanduser()).absolute())
        return [absolute(item) for item in value] if isinstance(value, list) else value

    search = anchored.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    of_models = [anchored.get("model"), space.get("model") if isinstance(space, dict) else None]
    tables = [(table, "weights") for table in of_models] + [(space, "model.weights")]
    for table, key in tables:
        if isinstance(table, dict) and key in table:
            table[key] = absolute(table[key])
    return anchored


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting as `section.key` with its value."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    merged = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        old = merged.get(key)
        is_parameter = prefix == "search.space."
        is_other_model = prefix + key == "model" and isinstance(value, dict) and "name" in value
        if isinstance(old, dict) and isinstance(value, dict) and not is_parameter and not is_other_model:
            merged[key] = _merged(old, value, prefix=f"{prefix}{key}.")
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set the value of a `section.key=value` in the settings."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set must be written section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # a bare word is a text: --set training.optimizer=sgd
        value = text.strip()
    for key in keys[:-1]:
        settings = settings.setdefault(key, {})
        if not isinstance(settings, dict):
            raise UserError(one_line(f"--set {override}: {key} is not a section"))
    settings[keys[-1]] = value
