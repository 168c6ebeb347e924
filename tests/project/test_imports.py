"""What loads what: the package and its command line start without torch and Optuna, and training knows no Optuna."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hpo

PACKAGE = Path(hpo.__file__).parent
HEAVY = {"torch", "optuna", "plotly", "sklearn"}
LOADED = f"; import sys; print(sorted({{name.partition('.')[0] for name in sys.modules}} & {HEAVY}))"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import hpo", []),
        ("import hpo.cli.app", []),
        ("from hpo.cli.app import main; main(['--help'], standalone_mode=False)", []),
        ("import hpo; hpo.StudySpec", []),
        ("from hpo.system.devices import choose_devices; choose_devices('cpu')", []),
        ("import hpo; hpo.best", ["optuna"]),
        ("import hpo.train.engines.plain", ["torch"]),
    ],
)
def test_a_module_loads_only_what_it_needs(statement: str, expected: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", statement + LOADED], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == str(expected)


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hpo", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds) < 0.5


def imports(path: Path) -> list[str]:
    """The modules that a file imports when it runs, wherever in it."""
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("path", sorted((PACKAGE / "train").glob("*.py")), ids=lambda path: path.stem)
def test_training_imports_no_optuna_and_nothing_of_the_search(path: Path) -> None:
    for name in imports(path):
        assert name.partition(".")[0] not in ("optuna", "pydantic", "sqlalchemy", "rich", "click")
        assert name.partition(".")[0] != "hpo" or name.startswith(("hpo.errors", "hpo.train"))


def test_only_the_store_touches_optunas_storages() -> None:
    touching = {path.name for path in PACKAGE.rglob("*.py") for name in imports(path) if "optuna.storages" in name}
    assert touching == {"database.py", "ledger.py", "schema.py"}


def test_the_public_surface_is_what_is_listed_and_all_of_it_exists() -> None:
    assert hpo.__all__ == sorted(hpo.__all__)
    assert hpo.__all__ == [
        "Best", "InProcess", "Local", "Ray", "Result", "StudySpec", "StudyStopped", "Trial", "UserError",
        "best", "export", "join", "range_test", "resume", "run", "status", "stop", "studies", "submit",
        "trials",
    ]  # fmt: skip
    for name in hpo.__all__:
        assert getattr(hpo, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hpo.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_no_module_is_longer_than_can_be_read_in_a_sitting() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path
