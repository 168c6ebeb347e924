"""What the public functions tell of a study, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.api import reading, running
from hpo.config.study_spec import StudySpec
from hpo.workers.executors import InProcess

MakeSpec = Callable[..., StudySpec]

LOOP = """
def train(trial):
    for epoch in (1, 2):
        trial.report(epoch, val_accuracy=epoch / 4, kind=epoch, host=10 * epoch, versions=0.5, curves=1.0, mine=2.0)
"""


def test_the_curves_of_a_trial_have_a_key_of_their_own_whatever_a_loop_calls_them(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    storage = f"sqlite:///{tmp_path}/hpo.db"
    running.run(make_spec(0.1, epochs=2), executor=InProcess("cpu"), storage=storage, code_folder=tmp_path)
    (trial,) = reading.trials("s", storage=storage)
    assert trial["curves"] == {
        "val_accuracy": [0.25, 0.5],
        "kind": [1, 2],
        "host": [10, 20],
        "versions": [0.5, 0.5],
        "curves": [1.0, 1.0],
        "mine": [2.0, 2.0],
    }
    assert (trial["val_accuracy"], trial["train_loss"], trial["mine"]) == ([0.25, 0.5], [], [2.0, 2.0])
    assert trial["kind"] == "search", "keys of the trial's own keep their meaning"
    assert isinstance(trial["host"], str)
    assert isinstance(trial["versions"], dict)


def test_a_result_is_short_in_a_terminal_a_table_in_a_notebook_and_open_to_optuna(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    storage = f"sqlite:///{tmp_path}/hpo.db"
    spec = make_spec(0.1, 0.2, 0.3, epochs=2)
    result = running.run(spec, executor=InProcess("cpu"), storage=storage, code_folder=tmp_path)
    assert repr(result) == f"Result('s', {result.best!r}, 3 complete)"
    assert repr(result.best).startswith("Best(lr=0.1")
    assert len(repr(result)) < 200
    assert repr(result.trials[1]) == "TrialRecord(1, search complete, lr=0.2, value 0.5, epoch 2)"
    html = result._repr_html_()
    assert "best learning rate: 0.1" in html
    assert html.count("<tr>") >= 4
    pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert list(frame["params_lr"]) == [0.1, 0.2, 0.3]
    assert list(frame["state"]) == ["complete"] * 3
    assert [trial.value for trial in result.optuna_study.trials] == [0.5] * 3
    compared = reading.compare(["s"], storage=storage)
    assert repr(compared).startswith("Comparison(s: lr=")
    assert "<table>" in compared._repr_html_()
