"""The commands for stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpo.api import stores
from hpo.cli.app import main
from hpo.config.study_spec import StudySpec
from hpo.store.store import Store


def test_delete_removes_a_study_with_its_files_and_leaves_the_others(
    make_spec: Callable[..., StudySpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path}/hpo.db")
    store = Store(f"sqlite:///{tmp_path}/hpo.db", create=True)
    studies = [store.studies.create(make_spec(0.1, name=name), metadata={}) for name in ("one", "two")]
    for study in studies:
        (store.folder(study) / "checkpoints" / "000000").mkdir(parents=True)
    for arguments, message in (
        (["one"], "hpo delete needs --yes where nobody can be asked"),
        (["three", "--yes"], "there is no study 'three'"),
        (["one", "--yes"], "deleted study one"),
    ):
        result = CliRunner().invoke(main, ["delete", *arguments], prog_name="hpo")
        assert message in result.output
    assert [study.name for study in store.studies.get_all()] == ["two"]
    assert [store.folder(study).exists() for study in studies] == [False, True]


def test_a_damaged_study_can_be_deleted(make_spec: Callable[..., StudySpec], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    store = Store(url, create=True)
    store.studies.create(make_spec(0.1), metadata={})
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo_studies SET spec = '{broken'")
    assert store.studies.load_all()[1]
    stores.delete("s", storage=url)
    assert stores.check_storage(storage=url)[1] == []
