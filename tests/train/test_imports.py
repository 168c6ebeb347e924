"""The one door to users' own code: what it lets in, whatever a store names, and that there is no other."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

import hpo
from hpo.config.sections import ObjectiveSpec
from hpo.errors import UserError
from hpo.train.config import DataConfig, ModelConfig, TrainingConfig
from hpo.train.data.augment import Augmentation
from hpo.train.data.datasets import open_dataset
from hpo.train.data.groups import group_numbers
from hpo.train.imports import ImportAllowlist, call_factory, import_loop, import_object
from hpo.train.losses import build_loss
from hpo.train.metrics import measure
from hpo.train.models import build_model
from hpo.train.optim import build_optimizer
from hpo.train.schedules import check_own_schedule, find_schedule
from hpo.workers.own_loop import import_named

PACKAGE = Path(hpo.__file__).parent

MODULE = """
import functools, subprocess
from pathlib import Path
from subprocess import Popen, check_output
from own_helpers import help_out
(Path(__file__).parent / "imported").touch()

def net(num_classes): ...
class Net: ...
@functools.wraps(net)
def wrapped(*arguments): ...
alias = subprocess.run
half = functools.partial(net, num_classes=2)
cached = functools.lru_cache(net)
method = Path(".").touch
number = 3
two = lambda one, other: None
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Write a module of the user's, which nothing allows, and return its folder."""
    (tmp_path / "own_door.py").write_text(MODULE)
    (tmp_path / "own_helpers.py").write_text("def help_out(num_classes): ...\n")
    yield tmp_path
    for name in ("own_door", "own_helpers"):
        sys.modules.pop(name, None)


def allowed(folder: Path, **lists: Any) -> ImportAllowlist:
    tuples: dict[str, Any] = {key: tuple(items) for key, items in lists.items()}
    return ImportAllowlist(path=(str(folder),), **tuples)


def build(name: str) -> object:
    return build_model(ModelConfig(name=name), channels=3, num_classes=10, image_size=32)


# Every import of a user's name in the package; `test_no_other_code_imports_what_a_name_says` finds a new one.
IMPORTS: dict[str, Callable[[str], object]] = {
    "import_loop": import_loop,
    "import_named": lambda name: import_named(ObjectiveSpec(lightning=name)),
    "_untrained_model": build,
    "_user_dataset": lambda name: open_dataset(DataConfig(name=name)),
    "_own": lambda name: Augmentation(DataConfig(augment=[name]), shape_CHW=(1, 8, 8)),
    "group_numbers": lambda name: group_numbers(open_dataset(DataConfig()).train, name),
    "_optimizer_class": lambda name: build_optimizer([], TrainingConfig(optimizer=name, lr=0.1), device_type="cpu"),
    "find_schedule": find_schedule,
    "check_own_schedule": check_own_schedule,
    "build_loss": lambda name: build_loss(TrainingConfig(loss=name), data=cast("Any", Mock(has_several_labels=False))),
    "_own_metric": lambda name: measure(name, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.parametrize("lists", [None, {"modules": ["own"]}, {"folders": ["elsewhere"]}, {"names": ["own_door:Net"]}])
def test_every_import_of_a_users_name_asks_the_process_list(
    name: str, lists: dict[str, list[str]] | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    context = nullcontext() if lists is None else allowed(folder, **lists).importable()
    refused = r"names the module 'own_door', which this worker may not import; .*--allow"
    with context, pytest.raises(UserError, match=refused):
        IMPORTS[name]("own_door:net")
    assert not (folder / "imported").exists()


def calls_of(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """Yield each call with the name of what is called and of the innermost function that it is in."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str, ast.Call]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).rpartition(".")[2], function, node
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(tree, "")


def test_no_other_code_imports_what_a_name_says() -> None:
    """Whoever imports by a name that is data, or runs data as code, must be the door or ask it."""
    builtin = {"__import__", "exec", "eval", "compile"}
    risky = {"import_module", "load_module", "exec_module", "run_path", "run_module", "loads", "unsafe_load"}
    harmless = {"json.loads", "tomllib.loads"}
    found: set[tuple[str, str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        for called, function, call in calls_of(ast.parse(path.read_text())):
            dotted = ast.unparse(call.func)
            unsafe_torch = dotted == "torch.load" and "weights_only=True" not in ast.unparse(call)
            if unsafe_torch or dotted in builtin or (called in risky and dotted not in harmless):
                found.add((str(path.relative_to(PACKAGE)), function, called))
    assert found == {
        ("__init__.py", "__getattr__", "import_module"),  # by a table of our own
        ("train/imports.py", "_import_module", "import_module"),
        ("train/engines/other_rank.py", "follow_rank_0", "loads"),  # from the process that started this one
        ("train/engines/ranks.py", "_receive", "loads"),  # from a process that this one has started
        ("train/optim.py", "_optimizer_class", "import_module"),  # by the table OPTIMIZERS
    }


def test_the_door_is_used_by_those_whose_names_are_tested() -> None:
    users = {
        function
        for path in PACKAGE.rglob("*.py")
        for called, function, _ in calls_of(ast.parse(path.read_text()))
        if called == "import_object"
    }
    assert users == IMPORTS.keys()


@pytest.mark.parametrize("name", ["net", "Net", "wrapped"])
def test_what_an_allowed_module_defines_may_be_named(name: str, folder: Path) -> None:
    for lists in ({"modules": ["own_door"]}, {"folders": [folder]}, {"names": [f"own_door:{name}"]}):
        with allowed(folder, **lists).importable():
            assert import_object(f"own_door:{name}", setting="model.name").__module__ == "own_door"


@pytest.mark.parametrize("name", ["Popen", "check_output", "alias", "help_out"])
def test_what_an_allowed_module_has_imported_may_not_be_named(name: str, folder: Path) -> None:
    with (
        allowed(folder, modules=["own_door"]).importable(),
        pytest.raises(UserError, match=rf"must name what an allowed module defines; {name} was imported there from"),
    ):
        import_object(f"own_door:{name}", setting="model.name")


def test_what_one_allowed_module_has_from_another_may_be_named(folder: Path) -> None:
    for lists in ({"modules": ["own_door", "own_helpers"]}, {"folders": [folder]}, {"names": ["own_door:help_out"]}):
        with allowed(folder, **lists).importable():
            assert import_object("own_door:help_out", setting="model.name").__module__ == "own_helpers"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("half", "partial"),
        ("cached", "_lru_cache_wrapper"),
        ("method", "method"),
        ("number", "int"),
    ],
)
def test_only_functions_and_classes_may_be_named(name: str, kind: str, folder: Path) -> None:
    for lists in ({"modules": ["own_door"]}, {"names": [f"own_door:{name}"]}):
        with (
            allowed(folder, **lists).importable(),
            pytest.raises(UserError, match=f"must name a function or a class, got {kind}"),
        ):
            import_object(f"own_door:{name}", setting="model.name")


def test_a_loop_must_take_the_trial(folder: Path) -> None:
    with allowed(folder, modules=["own_door"]).importable():
        assert import_loop("own_door:net").__name__ == "net"
        for name in ("Net", "two"):
            with pytest.raises(UserError, match=rf"'own_door:{name}' must take one argument, the trial: "):
                import_loop(f"own_door:{name}")


def test_a_factory_that_does_not_take_what_it_is_given_is_not_called() -> None:
    called = []

    def factory(path: str, mode: int, /, *, depth: int) -> None:
        called.append(path)

    for options in ({}, {"depth": 1}, {"path": ".", "mode": 1, "depth": 1}):
        with pytest.raises(UserError, match=r"^model.name = 'a:b' (cannot be called with|must)|is not an option of"):
            call_factory(factory, section="model", name="a:b", options=options, fixed={})
    assert called == []


@pytest.mark.parametrize("module", ["random", "torch", "numpy"])
def test_no_file_in_an_allowed_folder_shadows_a_library(module: str, folder: Path) -> None:
    (folder / f"{module}.py").write_text("raise RuntimeError('imported in place of the library')")
    with (
        allowed(folder, folders=[folder]).importable(),
        pytest.raises(UserError, match=f"names the module '{module}', which this worker may not import"),
    ):
        import_object(f"{module}:Random", setting="model.name")
    with (
        allowed(folder, names=[f"{module}:mine"]).importable(),
        pytest.raises(UserError, match=rf"{module}:mine' \(/.*{module}(/__init__)?.py\) must be one of"),
    ):
        import_object(f"{module}:mine", setting="model.name")


def test_the_path_follows_libraries_and_is_as_before_afterwards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = list(sys.path)
    monkeypatch.setattr(sys, "path", ["/a/script", *libraries])
    with allowed(folder, names=["own_door:net"]).importable():
        assert sys.path == [*libraries, str(folder), "/a/script"]
    assert sys.path == ["/a/script", *libraries]


def test_a_module_that_is_not_there_is_said_with_where_it_was_looked_for(folder: Path) -> None:
    places = {
        "no_such_module": rf"on Python's path or in {folder}; install it, or .* PYTHONPATH=FOLDER",
        "json.nets": r"in .*json",
    }
    for module, place in places.items():
        with (
            allowed(folder, names=[f"{module}:net"]).importable(),
            pytest.raises(UserError, match=rf"there is no module '{module}' {place}"),
        ):
            import_object(f"{module}:net", setting="model.name")


def test_each_study_gets_the_module_of_its_own_folder(tmp_path: Path) -> None:
    values = []
    for name in ("one", "two", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "own_module.py").write_text("import own_neighbour\ndef get(): return own_neighbour.NAME\n")
        (tmp_path / name / "own_neighbour.py").write_text(f"NAME = {name!r}\n")
        with ImportAllowlist(names=("own_module:get",), path=(str(tmp_path / name),)).importable():
            values.append(import_object("own_module:get", setting="model.name")())
    assert values == ["one", "two", "one"]
    assert not {"own_module", "own_neighbour"} & sys.modules.keys()


def test_a_script_keeps_its_own_module_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("script", "study"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_module.py").write_text(f"def get(): return {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "script")
    own = importlib.import_module("own_module")
    path = list(sys.path)
    with ImportAllowlist(folders=(str(tmp_path / "study"),), path=(str(tmp_path / "study"),)).importable():
        assert import_object("own_module:get", setting="model.name")() == "study"
    assert sys.path == path
    assert sys.modules["own_module"] is own
    assert importlib.import_module("own_module").get() == "script"


@pytest.mark.parametrize("where", ["script", "study"])
def test_a_library_in_the_folder_itself_is_never_forgotten(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch in a project's .venv: loaded a second time, it corrupts the memory of the process."""
    libraries = tmp_path / where / ".venv" / "site-packages"
    libraries.mkdir(parents=True)
    (tmp_path / "study").mkdir(exist_ok=True)
    (tmp_path / "study" / "own_user_of_it.py").write_text("import own_library\ndef get(): return own_library\n")
    (libraries / "own_library.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "script"), *sys.path[1:], str(libraries)])
    if where == "script":
        (tmp_path / "study" / "own_library.py").write_text("raise RuntimeError('in place of the library')")
        importlib.import_module("own_library")
    study = str(tmp_path / "study")
    try:
        with ImportAllowlist(folders=(study,), path=(study,)).importable():
            library = import_object("own_user_of_it:get", setting="model.name")()
        assert sys.modules["own_library"] is library
    finally:
        sys.modules.pop("own_library", None)


def test_a_factory_that_leaves_its_folder_takes_nobody_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call_factory(lambda: os.chdir("/"), section="model", name="net:make", options={}, fixed={})
    assert Path.cwd() == tmp_path


def test_a_name_that_is_not_there_is_said_with_those_that_may_be_named(folder: Path) -> None:
    with (
        allowed(folder, modules=["own_door"]).importable(),
        pytest.raises(UserError, match=rf"{folder}/own_door.py\) must be one of Net, net, two, wrapped; got 'nett'"),
    ):
        import_object("own_door:nett", setting="model.name")
