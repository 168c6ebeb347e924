"""Studies side by side: what differs, what follows from their best rates, what does not; and [[compare]]."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpo.analysis.answer import Best, find_best
from hpo.analysis.comparison import Comparison, changed_settings, compare_answers
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.study.records import StudyRecord, TrialRecord
from tests.analysis.confirmation_examples import again

if TYPE_CHECKING:
    from tests.conftest import Hpo

RATES = np.logspace(-5, 0, 26)
Answer = tuple[StudyRecord, list[TrialRecord], Best]


def answer(top: float | Callable[[dict[str, Any]], float], *, num: int = 26, **settings: Any) -> Answer:
    """Return a study whose value is highest at log10(lr) = top, with little noise."""
    space = settings.pop("space", {})
    lr = {"low": 1e-5, "high": 1.0, "log": True}
    spec = StudySpec.from_dict(
        {"name": "s", "search": {"sampler": "random", "trials": num, "space": {"lr": lr, **space}}, **settings}
    )
    random = np.random.default_rng(0)
    combinations: list[dict[str, Any]] = [{key: value} for key, values in space.items() for value in values] or [{}]
    trials: list[TrialRecord] = []
    for params in combinations:
        peak = top(params) if callable(top) else top
        for rate in RATES[:num]:
            value = 0.9 - 0.1 * (math.log10(rate) - peak) ** 2 + 0.005 * random.normal()
            number = len(trials)
            trials.append(
                TrialRecord(
                    number, "complete", {"lr": float(rate), **params}, value, 1, None, None, None, {}, None, None
                )
            )
    study = StudyRecord(1, spec.name, spec, {"num_val": 1000, "num_train": 1000}, None, None, 0.0)
    found = find_best(study, trials)
    assert found is not None
    return study, trials, found


def told(*answers: Answer) -> tuple[Comparison, str]:
    found = compare_answers(answers)
    return found, "\n".join([*found.conclusions, *found.caveats])


def test_best_rates_whose_ratio_is_not_1_are_told_apart() -> None:
    found, text = told(answer(-3.0), answer(-1.0, name="t", training={"optimizer": "sgd", "momentum": 0.9}))
    first, second = found.studies
    assert first.lr == pytest.approx(1e-3, rel=0.5)
    assert second.lr == pytest.approx(1e-1, rel=0.5)
    assert changed_settings(first, second) == {"training.optimizer": "sgd"}  # momentum and beta1 follow from it
    assert "t, with training.optimizer sgd instead of adam, has its best learning rate at" in text
    assert f"times the {first.lr:.2g} of s" in text
    low, high = found.studies[1].ratio or (0, 0)
    assert 10 < low < 100 < high < 1000
    assert "no learning rate is as good as the best in all of these 2" in text
    assert "it is not known which" not in text


def test_the_more_studies_are_compared_the_wider_are_their_intervals() -> None:
    second, others = answer(-3.0, name="t"), [answer(-3.0, name=f"t{index}", num=20) for index in range(4)]
    alone, among = (told(answer(-3.0), second, *more)[0].studies[1].ratio or (0, 0) for more in ([], others))
    assert among[0] < alone[0] < 1 < alone[1] < among[1]


def test_those_whose_ratio_may_be_1_are_not_and_the_factor_between_them_is_bounded() -> None:
    found, text = told(answer(-3.0), answer(-3.0, name="t", training={"batch_size": 64}))
    assert "cannot be told apart from" in text
    assert "cannot be told apart from the best in any of these 2 studies" in text
    low, high = found.studies[1].ratio or (0, 0)
    assert 0.3 < low < 1 < high < 3
    assert changed_settings(*found.studies) == {"training.batch_size": 64}


def test_two_changes_at_once_cannot_be_told_from_each_other() -> None:
    _, text = told(answer(-3.0), answer(-1.0, name="t", training={"batch_size": 64, "optimizer": "rmsprop"}))
    assert "the two differ in 2 settings, so it is not known which one matters" in text


def test_how_it_was_searched_is_no_difference() -> None:
    found, _ = told(
        answer(-3.0),
        answer(
            -3.0,
            name="t",
            pruner={"name": "median"},
            training={"seed": 4},
            confirm={"seeds": 2},
            data={"split_seed": 3, "train_samples": 1000, "validation_fraction": 0.2},
        ),
    )
    assert [side.factors for side in found.studies] == [{}, {}]


def test_the_combinations_of_a_list_are_sides_of_their_own() -> None:
    tops = {"adam": -3.0, "sgd": -1.0}
    found, text = told(answer(lambda params: tops[params["optimizer"]], space={"optimizer": ["adam", "sgd"]}))
    assert [side.factors["training.optimizer"] for side in found.studies] == ["adam", "sgd"]
    assert [side.num_trials for side in found.studies] == [26, 26]
    assert "s (optimizer sgd), with training.optimizer sgd instead of adam, has its best" in text


def test_the_rate_and_value_of_a_confirmed_study_are_the_confirmed_ones() -> None:
    study, searched, _ = answer(-3.0, confirm={"top": 2, "seeds": 2})
    best, other = ({"lr": float(rate)} for rate in (RATES[10], RATES[12]))
    trials = [*searched, *again(searched, [0.8, 0.8], [0.87, 0.89], params=[best, other])]
    found = find_best(study, trials)
    assert found is not None
    assert found.confirmation is not None
    assert found.response is not None
    comparison, text = told((study, trials, found), answer(-1.0, name="t"))
    first, second = comparison.studies
    assert first.lr == first.confirmed == found.lr == other["lr"] != found.response.best
    assert first.value == found.confirmation.value == pytest.approx(0.88, abs=1e-3)
    assert second.lr is not None
    assert second.confirmed is None
    assert f"times the {other['lr']:.2g} of s" in text


def test_what_cannot_be_said_is_said() -> None:
    few = answer(-3.0, num=3, name="few")
    edge = answer(0.5, name="edge")
    found, text = told(answer(-3.0), few, edge)
    assert found.studies[1].interval is None
    assert "few cannot be compared: too few of its learning rates or of s's have a value" in text
    assert "edge: the best rate may lie outside the searched range, so its interval is only a bound" in text
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain.keys() == {"sides", "conclusions", "caveats"}
    assert plain["sides"][2]["study"] == "edge"
    assert "edge" in plain["sides"][2]
    assert "divergence_lr" not in plain["sides"][2]


# The study file

FILE = """
name = "f"
[search]
sampler = "grid"
space.lr = [0.01, 0.1, 0.3]
[model]
width = 0.5
[data]
train_samples = 100
[training]
epochs = 1
[[compare]]
name = "sgd"
training.optimizer = "sgd"
search.space.lr = { low = 0.1, high = 1.0, log = true, points = 2 }
[[compare]]
name = "own"
model.name = "own:network"
"""


def write(folder: Path, text: str) -> Path:
    (path := folder / "study.toml").write_text(text)
    return path


def test_each_table_of_compare_is_the_study_with_its_settings(tmp_path: Path) -> None:
    base, sgd, own = StudySpec.all_from_toml(write(tmp_path, FILE), overrides=["training.batch_size=32"])
    assert [spec.name for spec in (base, sgd, own)] == ["f", "f-sgd", "f-own"]
    assert sgd.search.space == {"lr": {"low": 0.1, "high": 1.0, "log": True, "points": 2}}
    assert (sgd.training.optimizer, sgd.model.options) == ("sgd", {"width": 0.5})
    assert own.model.options == {}
    assert {spec.training.batch_size for spec in (base, sgd, own)} == {32}
    with pytest.raises(UserError, match=r"holds 3 studies, by its \[\[compare\]\]"):
        StudySpec.from_toml(tmp_path / "study.toml")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("compare = 3", r"compare must be a list of tables, \[\[compare\]\], got 3"),
        ("[[compare]]\ntraining.epochs = 2", "compare.name must be letters, digits"),
        ("[[compare]]\nname = 'a'", "must be a name of its own, with settings next to it"),
        ("[[compare]]\nname = 'a/b'\ntraining.epochs = 2", "compare.name must be letters"),
        ("[[compare]]\nname = 'a'\ntraining.epoch = 2", r"training.epoch.*\[\[compare\]\] for f-a"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, table: str, message: str) -> None:
    base = "name = 'f'\n"
    rest = "[search]\nspace.lr = [0.1, 0.2]\n"
    text = base + table + "\n" + rest if "=" in table.split("\n", maxsplit=1)[0] else base + rest + table
    with pytest.raises(UserError, match=message):
        StudySpec.all_from_toml(write(tmp_path, text))


LOOP = """
import os

def train(trial):
    if trial.epochs == 3:
        raise RuntimeError("three is too many")
    trial.report(1, val_accuracy=1 - abs(trial.params["lr"] - 0.1))
"""

LOOPS = """
name = "l"
[search]
sampler = "grid"
retries = 0
space.lr = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
[objective]
function = "loop:train"
[training]
epochs = 1
[[compare]]
name = "seed"
training.seed = 3
"""


def test_hpo_run_runs_them_all_and_compares_them(hpo: Hpo) -> None:
    (hpo.folder / "loop.py").write_text(LOOP)
    write(hpo.folder, LOOPS)
    exit_code, output = hpo.here("run", "study.toml", "--devices", "cpu", "--in-process")
    assert exit_code == 0, output
    assert "l-seed has its best learning rate at" in output
    exit_code, again = hpo.here("compare", "l", "l-seed")
    assert exit_code == 0
    assert again.splitlines()[-3:] == output.splitlines()[-3:]
    assert len(json.loads(hpo.here("compare", "l", "l-seed", "--json")[1])["sides"]) == 2
    assert hpo.here("compare", "l", "m") == (2, f"hpo: there is no study 'm' in {hpo.url}; there are: l, l-seed\n")


def test_what_is_wrong_with_a_later_study_is_said_before_the_first_is_trained(hpo: Hpo) -> None:
    (hpo.folder / "loop.py").write_text(LOOP)
    write(hpo.folder, LOOPS.replace("training.seed = 3", 'objective.function = "loop:trian"'))
    exit_code, output = hpo.here("run", "study.toml", "--devices", "cpu")
    assert exit_code == 2
    assert "trian" in output
    assert not (hpo.folder / "hpo.db").exists()


@pytest.mark.slow
def test_a_study_without_an_answer_does_not_keep_the_others_from_theirs(hpo: Hpo) -> None:
    (hpo.folder / "loop.py").write_text(LOOP)
    more = '[[compare]]\nname = "broken"\ntraining.epochs = 3\n[[compare]]\nname = "last"\ntraining.seed = 4\n'
    write(hpo.folder, LOOPS + more)
    exit_code, output = hpo.here("run", "study.toml", "--devices", "cpu", "--in-process")
    assert exit_code == 1
    assert "three is too many" in output
    assert "l-last has its best learning rate at" in output
    assert hpo.here("best", "l-last")[0] == 0
