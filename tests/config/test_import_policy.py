"""Whose code a worker imports: what a store names is refused unless this machine's user has allowed it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpo.config import import_policy
from hpo.config.import_policy import allowed_for, load_own_spec, parse_allow
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.train.imports import ImportAllowlist, code_path

if TYPE_CHECKING:
    from tests.conftest import Hpo

MakeSpec = Callable[..., StudySpec]


def naming(setting: str, value: object) -> StudySpec:
    settings = {"name": "s", "search": {"space": {"lr": [0.1, 0.2]}}, "model": {}, "data": {}}
    if setting == "objective.function":
        settings = {"name": "s", "search": {"space": {"x": [0.1, 0.2]}}, "objective": {"function": value}}
    elif setting.startswith("search.space."):
        settings["search"] = {"space": {"lr": [0.1, 0.2], setting.removeprefix("search.space."): value}}
    else:
        section, _, key = setting.partition(".")
        settings[section] = {key: value}
    return StudySpec.from_dict(settings)


@pytest.mark.parametrize(
    ("setting", "value", "module"),
    [
        ("objective.function", "os:system", "os"),
        ("model.name", "os:system", "os"),
        ("data.name", "shutil:rmtree", "shutil"),
        ("search.space.model.name", ["article_cnn", "subprocess:run"], "subprocess"),
        ("search.space.data.name", ["digits", "a.b.c:f"], "a.b.c"),
    ],
)
def test_a_module_that_is_not_allowed_is_refused_by_name(setting: str, value: object, module: str) -> None:
    with pytest.raises(UserError, match=rf"{setting} of study 's' names the module '{module}'.*--allow {module}"):
        allowed_for(naming(setting, value), parse_allow(["own", "."]))


@pytest.mark.parametrize(
    ("allowed", "module", "passes"),
    [
        ("own", "own", True),
        ("own", "own.models", True),
        ("own.models", "own", False),
        ("own", "owner", False),
        ("own", "other", False),
    ],
)
def test_a_module_is_allowed_with_what_is_inside_it(allowed: str, module: str, passes: bool) -> None:
    spec = naming("model.name", f"{module}:net")
    if passes:
        allowed_for(spec, parse_allow([allowed]))
    else:
        with pytest.raises(UserError, match="may not import"):
            allowed_for(spec, parse_allow([allowed]))


def test_a_folder_allows_the_modules_that_are_found_in_it_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('it was imported')")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inside.py").touch()
    (tmp_path / "os.py").touch()  # shadows nothing: the real one is what an import would give
    allowed = parse_allow([str(tmp_path)])
    allowed_for(naming("model.name", "mine:net"), allowed)
    allowed_for(naming("model.name", "package.inside:net"), allowed)
    for module in ("os", "json", "no_such_module"):
        with pytest.raises(UserError, match="may not import"):
            allowed_for(naming("model.name", f"{module}:net"), allowed)


def test_a_study_that_names_no_code_needs_no_folder_on_the_path(tmp_path: Path) -> None:
    for allowed in (parse_allow(["own", str(tmp_path)]), load_own_spec(naming("model.name", "a:b"), folder=".")[1]):
        needed = allowed_for(naming("model.name", "article_cnn"), allowed)
        assert needed == ImportAllowlist(path=allowed.path)
        before = list(sys.path)
        with needed.importable():
            assert sys.path == before
            assert code_path() == allowed.path  # where data is looked for
        assert code_path() == ()


def test_an_author_allows_what_the_study_names_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    spec, allowed = load_own_spec(naming("model.name", "mine:net"), folder=tmp_path)
    assert allowed_for(spec, allowed) == allowed
    for other in ("mine:other", "beside:net", "os:system"):
        with pytest.raises(UserError, match="may not import"):
            allowed_for(naming("model.name", other), allowed)


def test_networks_of_torchvision_and_ours_need_no_permission() -> None:
    for name in ("article_cnn", "torchvision:resnet18"):
        allowed_for(naming("model.name", name), ImportAllowlist())


@pytest.mark.parametrize("value", ["no/such/folder", "a-b", "", "x:y"])
def test_what_is_neither_a_module_nor_a_folder_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="--allow must be the name of a module or a folder that exists"):
        parse_allow([value])


def test_a_command_that_reads_a_study_from_the_store_imports_only_what_it_is_told_to(
    hpo: Hpo, make_spec: MakeSpec
) -> None:
    hpo.write(make_spec(0.1), "open('imported', 'w')\ndef train(trial):\n    trial.report(1, val_accuracy=1)\n")
    Store(hpo.url, create=True).studies.create(make_spec(0.1), metadata={})
    for command in ("worker", "resume"):
        exit_code, output = hpo.here(command, "s", "--devices", "cpu")
        assert (exit_code, output.strip()) == (
            2,
            "hpo: objective.function of study 's' names the module 'loop', which this worker may not import; "
            "if you trust it, add --allow loop, or --allow FOLDER with the folder that holds it",
        )
    assert not (hpo.folder / "imported").exists()
    exit_code, output = hpo.here("worker", "s", "--devices", "cpu", "--allow", ".")
    assert exit_code == 0, output
    assert (hpo.folder / "imported").exists()


def test_the_folder_of_code_that_comes_with_hpo_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "its examples"
    folder.mkdir()
    (folder / "own_model.py").touch()
    monkeypatch.setattr(import_policy, "examples_folder", lambda: folder)
    spec = naming("model.name", "own_model:net")
    with pytest.raises(UserError, match=re.escape(f"add --allow '{folder}'")):
        allowed_for(spec, parse_allow([]))
    allowed_for(spec, parse_allow([str(folder)]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_model.py").touch()
    with pytest.raises(UserError, match="add --allow own_model, or "):
        allowed_for(spec, parse_allow([]))


def test_what_was_checked_is_what_is_imported(hpo: Hpo, make_spec: MakeSpec) -> None:
    """A module of the same name in the working directory is not the allowed one."""
    hpo.write(make_spec(0.1), "def train(trial):\n    open('wrong', 'w')\n    trial.report(1, val_accuracy=1)\n")
    (hpo.folder / "trusted").mkdir()
    (hpo.folder / "trusted" / "loop.py").write_text("def train(trial):\n    trial.report(1, val_accuracy=1)\n")
    Store(hpo.url, create=True).studies.create(make_spec(0.1), metadata={})
    exit_code, output = hpo.here("worker", "s", "--devices", "cpu", "--allow", "./trusted")
    assert exit_code == 0, output
    assert not (hpo.folder / "wrong").exists()


def test_a_uid_from_a_store_cannot_name_a_folder_elsewhere(store: Store, make_spec: MakeSpec) -> None:
    study = store.studies.create(make_spec(0.1), metadata={})
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql('UPDATE hpo_studies SET facts = \'{"uid": "../../x"}\'')
    with pytest.raises(UserError, match=rf"study '{study.name}' in .* is damaged: .* got '../../x'"):
        store.studies.get("s")
