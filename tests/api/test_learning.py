"""What a study learns from earlier ones: the points that it tries first, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpo.api import running
from hpo.api.reading import Result
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.workers.executors import InProcess

LOOP = "def train(trial):\n    trial.report(1, val_accuracy=1 - abs(trial.params['lr'] - 0.02))\n"
SPACE = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}}
BY_OPTIMIZER = {"optimizer": ["adam", "sgd"], "lr": {"by": {"optimizer": {"adam": SPACE["lr"], "sgd": SPACE["lr"]}}}}

BY_WIDTH = {"width": [8, 16], "lr": {"by": {"width": {"8": SPACE["lr"], "16": SPACE["lr"]}}}}


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """Run a study in one process, whose best learning rate is 0.02."""
    (tmp_path / "loop.py").write_text(LOOP)

    def train(name: str, **search: Any) -> Result:
        settings = {"space": SPACE, "sampler": "random", "trials": 3, **search}
        spec = StudySpec.from_dict({"name": name, "objective": {"function": "loop:train"}, "search": settings})
        return running.run(
            spec, executor=InProcess("cpu"), storage=f"sqlite:///{tmp_path}/hpo.db", code_folder=tmp_path
        )

    return train


def test_a_study_begins_at_what_earlier_ones_recommend_and_their_trials_are_no_evidence(train: Any) -> None:
    train("first", space={"lr": [0.02, 0.05]}, sampler="grid", trials=None)
    second = train("second", try_first=[{"lr": 0.03}])
    third = train("third", try_first=[{"lr": 0.05}], learn_from=["first", "second"])
    assert [trial.params["lr"] for trial in third.trials] == [0.05, 0.02, second.best.lr]
    assert train("second", try_first=[{"lr": 0.03}], trials=12).best.lr != second.best.lr
    assert train("third", try_first=[{"lr": 0.05}], learn_from=["first", "second"]) == third, "it keeps what it learned"


def test_a_rate_by_optimizer_is_learned_with_the_optimizer(train: Any) -> None:
    train("first", trials=1, try_first=[{"lr": 0.02, "optimizer": "sgd"}], space=BY_OPTIMIZER)
    found = train("second", learn_from=["first"], space=BY_OPTIMIZER)
    assert found.trials[0].params == {"optimizer": "sgd", "lr": 0.02}


def test_a_store_that_is_not_there_is_no_study_to_learn_from(train: Any) -> None:
    with pytest.raises(UserError, match=r"names 'first', which must be in the store of this study, and there is no"):
        train("second", learn_from=["first"])


def test_what_cannot_be_learned_is_one_sentence(train: Any) -> None:
    train("first", space={"lr": [0.02]}, sampler="grid", trials=None)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"learn_from": ["absent"]}, "no study 'absent'"),
        ({"learn_from": ["s"]}, "'s', which is this study"),
        ({"learn_from": ["first", "first"]}, "must name each study once"),
        ({"learn_from": ["first"], "sampler": "grid", "space": {"lr": [0.1]}, "trials": None}, "other than 'grid'"),
        ({"learn_from": ["first"], "space": {"weight_decay": {"low": 0.0, "high": 1.0}}}, "needs a range of learning"),
        (
            {"learn_from": ["first"], "space": {"lr": {"low": 0.1, "high": 1.0, "log": True}}},
            "names 'first', which recommends lr = 0.02; this cannot be tried first: .* from 0.1 to 1.0, got 0.02",
        ),
        (
            {"learn_from": ["first"], "space": BY_WIDTH},
            "names 'first', which does not say for which width it recommends its learning rate",
        ),
        ({"learn_from": ["first"], "try_first": [{"lr": 0.03}], "trials": 1}, "at most search.trials = 1"),
    ]
    for search, text in wrong:
        with pytest.raises(UserError, match=text):
            train("s", **search)
