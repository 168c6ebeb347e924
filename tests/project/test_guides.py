"""The studies in the guide to own loops train as they stand there; `test_docs` runs its other examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hpo

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "own-loop.md").read_text()
FILES = {name: text for _, name, text in re.findall(r"```(python|toml)\n# ([\w.]+)\n(.*?)```", GUIDE, flags=re.DOTALL)}
STUDIES = [name for name in FILES if name.endswith(".toml")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the files of the guide, and return their folder."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_of_the_guide_trains(name: str, folder: Path) -> None:
    if "lightning =" in FILES[name]:
        pytest.importorskip("lightning", reason="Lightning is not installed (pip install lightning)")
    spec = hpo.StudySpec.from_toml(folder / name, overrides=["search.trials=2", "training.epochs=2"])
    result = hpo.run(spec, executor=hpo.InProcess("cpu"), code_folder=folder, storage=f"sqlite:///{folder}/hpo.db")
    assert {trial.state for trial in result.trials} <= {"complete", "pruned", "diverged"}
    assert "complete" in {trial.state for trial in result.trials}
    assert result.best.value > 0
