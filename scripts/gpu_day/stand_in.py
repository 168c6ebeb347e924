"""A stand-in for `annotated_types` on a machine with torch alone.

`hpo.train.config` marks the bounds of its fields with that package. Only the reader of study files looks at them;
training never does. So the stand-in has the names and keeps what it is given, and checks nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

NAME = "annotated_types"


@dataclass(frozen=True)
class Marker:
    """A marker of a field, which nobody reads here."""

    bound: Any


def is_here(module: str) -> bool:
    """Return whether a module can be imported; a stand-in for it does not count."""
    return PathFinder.find_spec(module) is not None


def provide_annotated_types() -> None:
    """Register the stand-in under the package's name, or take it away where the package itself is here by now."""
    if is_here(NAME):
        loaded = sys.modules.get(NAME)
        if loaded is not None and loaded.__spec__ is None:  # which a stand-in has not
            del sys.modules[NAME]
        return
    module = ModuleType(NAME, __doc__)
    for marker in ("Ge", "Gt", "Le", "Lt", "Predicate"):
        setattr(module, marker, type(marker, (Marker,), {}))
    sys.modules[NAME] = module
