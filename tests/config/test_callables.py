"""Functions and classes in a study that a script gives: which other processes can import, and what is refused."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.config.callables import name_callables
from hpo.config.import_policy import load_own_spec
from hpo.errors import UserError
from hpo.train.imports import import_object

SPACE = {"sampler": "grid", "space": {"lr": [0.1]}}


def test_what_a_module_defines_is_named_by_its_import_path() -> None:
    settings = {"model": {"name": json.JSONEncoder}, "data": {"augment": [{"name": json.dumps, "indent": 2}, "CutOut"]}}
    named = name_callables(settings)
    augment = [{"name": "json:dumps", "indent": 2}, "CutOut"]
    assert named.settings == {"model": {"name": "json.encoder:JSONEncoder"}, "data": {"augment": augment}}
    assert (named.objects, named.folders) == ({}, [])


def nested() -> Callable[..., Any]:
    def local(trial: Any) -> None: ...

    return local


def test_what_no_other_process_can_import_stays_an_object_with_a_name_of_its_own() -> None:
    unsaved = types.ModuleType("unsaved")  # has no file, as a module of a notebook's has none
    exec("def train(trial): ...", vars(unsaved))
    given = {
        "objective": {"function": lambda trial: None},
        "loss": nested(),
        "other": nested(),
        "half": functools.partial(json.dumps, indent=2),
        "built": print,
        "again": print,
        "unsaved": unsaved.train,
    }
    named = name_callables(given)
    assert named.settings == {
        "objective": {"function": "__main__:objective_function"},
        "loss": "__main__:local",
        "other": "__main__:local_2",
        "half": "__main__:half",
        "built": "__main__:print",
        "again": "__main__:print",
        "unsaved": "__main__:train",
    }
    assert named.objects["__main__:local_2"] is given["other"]


def test_an_object_that_was_built_already_is_refused() -> None:
    expected = r"^model\.name must be a function or a class, .* got an object of the class Linear$"
    with pytest.raises(UserError, match=expected):
        name_callables({"model": {"name": torch.nn.Linear(2, 2)}})


def test_a_spec_from_callables_allows_them_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib" / "own_package").mkdir(parents=True)
    (tmp_path / "lib" / "own_package" / "__init__.py").touch()
    (tmp_path / "lib" / "own_package" / "loops.py").write_text("def train(trial): ...\n")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    import own_package.loops  # type: ignore[import-not-found]

    settings = {"name": "s", "search": SPACE, "objective": {"function": own_package.loops.train}}
    spec, allowed = load_own_spec(settings, folder=None)
    assert spec.objective is not None
    assert spec.objective.function == "own_package.loops:train"
    assert str(tmp_path / "lib") in allowed.path

    loop = nested()
    spec, allowed = load_own_spec(settings | {"objective": {"function": loop}}, folder=None)
    with allowed.importable():
        assert import_object("__main__:local", setting="objective.function") is loop
        with pytest.raises(UserError, match=r"was given as an object, which only the process that created the study"):
            import_object("__main__:other", setting="objective.function")
