"""What each import loads, and what the package shows of itself.

Which room may import which one is held by the contracts in pyproject.toml (`lint-imports`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hpo
from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from tests.store.helpers import begin, claim, report

PACKAGE = Path(hpo.__file__).parent
# Each of these takes a quarter of a second or more to load.
HEAVY = {"torch", "optuna", "plotly", "sklearn", "scipy", "sqlalchemy", "pydantic"}
# A study whose loop needs no torch: the command that trains it must not wait for it either.
PREFLIGHT = """
from hpo.config.study_spec import StudySpec
from hpo.train.imports import ImportAllowlist
from hpo.workers.preflight import run_preflight
search = {"sampler": "grid", "space": {"lr": [0.1]}}
spec = StudySpec.from_dict({"name": "s", "search": search, "objective": {"function": "textwrap:dedent"}})
with ImportAllowlist(("textwrap",), ()).importable():
    run_preflight(spec, ["cpu"])
"""
TRAINING = """
import hpo.train.engines.plain
from hpo.train.config import DataConfig
from hpo.train.data.datasets import open_dataset
open_dataset(DataConfig(name="digits"))
"""
# What those who only read a store need not wait for.
ONLY_FOR_OTHERS = [*sorted(HEAVY - {"optuna", "pydantic", "sqlalchemy"}), "alembic", "fsspec", "pandas"]
LOADED = f"\nimport sys; print(sorted({{name.partition('.')[0] for name in sys.modules}} & {HEAVY}))"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import hpo", []),
        ("import hpo.cli.app", []),
        ("from hpo.cli.app import main; main(['--help'], standalone_mode=False)", []),  # so it answers at once
        ("import hpo; hpo.StudySpec", ["pydantic"]),
        ("from hpo.system.devices import choose_devices; choose_devices('cpu')", []),
        ("import hpo; hpo.best", ["optuna", "pydantic", "sqlalchemy"]),
        pytest.param(TRAINING, ["torch"], id="the plain engine and the digits"),
        ("import hpo.train.optim", []),
        pytest.param(PREFLIGHT, ["optuna", "pydantic", "sqlalchemy"], id="preflight"),
        ("import hpo.reports.publisher", ["optuna", "pydantic", "sqlalchemy"]),
    ],
)
def test_a_module_loads_only_what_it_needs(statement: str, expected: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", statement + LOADED], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == str(expected)


@pytest.mark.parametrize("command", [["list"], ["status", "s"], ["trials", "s"], ["best", "s"]], ids=" ".join)
def test_a_command_that_reads_loads_only_what_it_shows(tmp_path: Path, command: list[str]) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    store = Store(url, create=True)
    spec = {"name": "s", "search": {"space": {"lr": [0.1, 0.2]}}, "objective": {"function": "loop:train"}}
    study, worker = begin(store, StudySpec.from_dict(spec))
    held = claim(store, study, worker)
    report(store, held, 0.5)
    store.trials.finish(held, "complete", reason="trained")
    statement = (
        f"from hpo.cli.app import main; main({[*command, '--storage', url]}, standalone_mode=False)\n"
        f"import sys; print([name for name in {ONLY_FOR_OTHERS} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_only_the_store_and_the_dashboard_touch_optunas_storages() -> None:
    """The contracts name whole distributions, so this one, of a part of Optuna, is held here."""
    rooms = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if "optuna.storages import" in path.read_text()
    }
    assert rooms == {"store", "dashboard"}  # the dashboard names the type that it is given


def test_the_public_surface_is_what_is_listed_and_all_of_it_exists() -> None:
    names = """
        Best Comparison InProcess Local Ray Result StudySpec StudyStopped Trial TrialRecord UserError
        best compare export join load_model range_test report resume run status stop studies submit trials
    """
    assert hpo.__all__ == names.split()
    for name in hpo.__all__:
        assert getattr(hpo, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hpo.nothing  # noqa: B018
