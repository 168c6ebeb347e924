"""Where a study file is looked for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import hpo
from hpo.config import study_file
from hpo.config.study_file import find_study_file

ROOT = Path(__file__).parents[2]


def test_a_name_is_a_file_or_a_study_here_or_one_that_comes_with_hpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("file", "mine.toml"):
        Path(name).touch()
    Path("quickstart").mkdir()
    assert [str(find_study_file(name)) for name in ("file", "mine.toml", "mine", "absent", "no/quickstart")] == [
        "file",
        "mine.toml",
        "mine.toml",
        "absent",
        "no/quickstart",
    ]
    assert find_study_file("quickstart").samefile(ROOT / "studies" / "quickstart.toml")
    Path("quickstart.toml").touch()
    assert find_study_file("quickstart") == Path("quickstart.toml")


def test_a_wheel_has_the_studies_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (source, target), *others = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items()
    assert (source, others) == ("studies", [])
    package = tmp_path / Path(hpo.__file__).parent.name
    (tmp_path / target).mkdir(parents=True)
    (tmp_path / target / "quickstart.toml").write_text((ROOT / source / "quickstart.toml").read_text())
    monkeypatch.setattr(study_file, "PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    assert hpo.StudySpec.from_toml("quickstart").name == "quickstart"
    assert find_study_file("quickstart").is_relative_to(package)
