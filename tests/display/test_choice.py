"""Which display a study has that is run from Python."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from hpo.api import running
from hpo.config.study_spec import StudySpec
from hpo.display.choice import shown_progress
from hpo.workers.executors import InProcess

LOOP = """
def train(trial):
    for epoch in range(1, trial.epochs + 1):
        if trial.report(epoch, val_accuracy=trial.params["lr"]):
            return
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown_html(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Be in a notebook; return what its display showed, as a list that grows."""
    shown: list[str] = []

    class ZMQInteractiveShell:
        pass

    def display(html: str, *, display_id: bool) -> SimpleNamespace:
        shown.append(html)
        return SimpleNamespace(update=shown.append)

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = ZMQInteractiveShell  # type: ignore[attr-defined]
    module.HTML, module.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_a_notebook_shows_a_study_in_a_table_that_ends_with_all_of_it(
    shown_html: list[str], make_spec: Callable[..., StudySpec], tmp_path: Path
) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    storage = f"sqlite:///{tmp_path}/hpo.db"
    for _ in range(2):
        running.run(make_spec(0.1, 0.2), executor=InProcess("cpu"), storage=storage, code_folder=tmp_path)
    assert "checking devices" in shown_html[0]
    assert "2 of 2 trials (2 complete)" in shown_html[-1]
    assert sum("checking devices" in html for html in shown_html) == 1, "the second time nothing is trained"


@pytest.mark.parametrize(
    ("wanted", "output", "is_shown"),
    [
        (None, io.StringIO, False),
        (None, Terminal, True),
        (True, io.StringIO, True),
        (False, Terminal, False),
    ],
)
def test_a_terminal_shows_progress_and_a_file_only_what_is_asked_for(
    wanted: bool | None, output: type[io.StringIO], is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", output())
    with shown_progress(wanted) as watcher:
        assert (watcher is not None) == is_shown
