"""The public surface is documented in Google's sections, each parameter by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import hpo


def public_callables() -> dict[str, Callable[..., Any]]:
    """Return every public function, and the public methods of every public class, by its dotted name."""
    found: dict[str, Callable[..., Any]] = {}
    for name in hpo.__all__:
        public = getattr(hpo, name)
        if inspect.isclass(public):
            own = {key: value for key, value in vars(public).items() if not key.startswith("_")}
            for key, value in own.items():
                function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                if inspect.isfunction(function):
                    found[f"{name}.{key}"] = function
        elif inspect.isfunction(public):
            found[name] = public
    return found


CALLABLES = public_callables()


def test_there_is_a_public_surface() -> None:
    assert {"run", "best", "range_test", "StudySpec.from_toml", "Trial.report"} <= set(CALLABLES)


@pytest.mark.parametrize("name", CALLABLES)
def test_each_parameter_and_result_is_documented(name: str) -> None:
    function = CALLABLES[name]
    docstring = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    parameters = [key for key in signature.parameters if key not in ("self", "cls")]
    if parameters:
        arguments = re.search(r"^Args:\n((?: +.*\n?|\n)+)", docstring, flags=re.MULTILINE)
        assert arguments, f"{name} has no section Args"
        documented = re.findall(r"^    \*{0,2}(\w+)(?: \([^)]*\))?:", arguments[1], flags=re.MULTILINE)
        assert documented == parameters, name
    # Google's guide lets a first sentence that begins with "Return" stand for the section.
    is_plain = not parameters and docstring.startswith("Return ")
    if signature.return_annotation not in (None, "None", inspect.Signature.empty) and not is_plain:
        assert re.search(r"^(Returns|Yields):$", docstring, flags=re.MULTILINE), f"{name} has no section Returns"
