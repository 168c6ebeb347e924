"""A search that ends once its answer is sure enough, or has trained for long enough, whoever would claim next."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import hpo as api
from hpo.analysis import answer
from hpo.analysis.text import budget_text, growth_text
from hpo.api import reading, running
from hpo.cli.app import main
from hpo.config.study_spec import StudySpec
from hpo.reports.study_report import StudyReport
from hpo.store import schema
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.workers import search_limits
from hpo.workers.search_limits import SearchLimits
from hpo.workers.stages import add_due_trials
from tests.store.helpers import only_sqlite

MakeSpec = Callable[..., StudySpec]

SPACE = {"lr": {"low": 1e-4, "high": 1.0, "log": True}}
MAX_TRIALS = 30
NOW = datetime.now(UTC)


def hill(lr: float) -> float:
    return 0.9 - 0.3 * math.log10(lr / 1e-2) ** 2


def search(**limits: Any) -> dict[str, Any]:
    return {"sampler": "qmc", "trials": MAX_TRIALS, "space": SPACE, **limits}


def train(store: Store, study: StudyRecord, *limits: SearchLimits) -> int:
    """Train until nothing is left, with one worker after the other, and return how many trials that took."""
    workers = [store.workers.add(study.study_id, device="cpu") for _ in limits]
    num_trained = 0
    while add_due_trials(store, study):
        index = num_trained % len(limits)
        limits[index].check()
        held = store.trials.claim(study, workers[index])
        if held is not None:
            values = store.trials.suggest(held, study.spec, attributes=lambda _: {})
            value = hill(values["lr"])
            store.trials.report(held, study.spec, epoch=1, metrics={"val_accuracy": value}, value=value)
            store.trials.finish(held, "complete", reason="")
            num_trained += 1
    return num_trained


@pytest.fixture
def num_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often the answer is asked for."""
    asked: list[int] = []

    def find(study: StudyRecord, trials: Any) -> answer.Best | None:
        asked.append(len(trials))
        return answer.find_best(study, trials)

    monkeypatch.setattr(search_limits, "find_best", find)
    return asked


@only_sqlite
@pytest.mark.parametrize(
    ("until", "finding", "num_workers"),
    [("1 decade", "the 90 % interval is 0.", 3), ("2 points", "the recommended rate is expected to be ", 1)],
)
def test_a_search_ends_once_its_answer_is_sure_enough(
    store: Store, make_spec: MakeSpec, num_asked: list[int], until: str, finding: str, num_workers: int
) -> None:
    study = store.studies.create(make_spec(epochs=1, search=search(until=until)), metadata={})
    num_trained = train(store, study, *(SearchLimits(store, study) for _ in range(num_workers)))
    study = store.studies.get("s")
    trials = store.trials.get_all(study)
    assert 5 <= num_trained == len(trials) < MAX_TRIALS
    assert len(num_asked) <= num_trained  # not more often than trials end
    assert study.search_end is not None
    assert study.search_end.startswith(finding)
    found = answer.find_best(study, trials)
    assert found is not None
    assert found.response is not None
    low, high = found.response.interval
    assert math.log10(high / low) <= 1 if "decade" in until else found.response.shortfall <= 0.02
    assert (
        found.search_end == f"the search ended after {num_trained} of at most {MAX_TRIALS} trials: {study.search_end}"
    )
    assert store.problems(study) == []


@only_sqlite
def test_whoever_comes_after_a_killed_worker_ends_the_search_too(store: Store, make_spec: MakeSpec) -> None:
    study = store.studies.create(make_spec(epochs=1, search=search(until="1 decade")), metadata={})
    numbers: list[int] = []
    while len(numbers) < MAX_TRIALS:  # each worker is killed after its trial, before it would claim another one
        SearchLimits(store, study).check()
        worker = store.workers.add(study.study_id, device="cpu")
        held = store.trials.claim(study, worker)
        if held is None:
            break
        value = hill(store.trials.suggest(held, study.spec, attributes=lambda _: {})["lr"])
        store.trials.report(held, study.spec, epoch=1, metrics={"val_accuracy": value}, value=value)
        store.trials.finish(held, "complete", reason="")
        numbers.append(held.number)
    assert numbers == list(range(len(numbers)))
    assert len(numbers) < MAX_TRIALS
    assert store.trials.num_left(study) == 0


@only_sqlite
def test_no_trial_is_begun_after_the_hours_and_what_follows_the_search_is(store: Store, make_spec: MakeSpec) -> None:
    spec = make_spec(epochs=1, search=search(hours=2), confirm={"top": 1, "seeds": 2})
    study = store.studies.create(spec, metadata={})
    limits, worker = SearchLimits(store, study), store.workers.add(study.study_id, device="cpu")
    for _ in range(2):
        limits.check()
        held = store.trials.claim(study, worker)
        assert held is not None
        store.trials.suggest(held, study.spec, attributes=lambda _: {})
        store.trials.report(held, study.spec, epoch=1, metrics={"val_accuracy": 0.5}, value=0.5)
        store.trials.finish(held, "complete", reason="")
    began = schema.attempts_table.c.began_at
    with store.storage.engine.begin() as connection:
        connection.execute(schema.attempts_table.update().values(began_at=began - 2 * 3600))
    assert train(store, study, limits) == 2  # those that confirm
    study = store.studies.get("s")
    assert [trial.kind for trial in store.trials.get_all(study)] == ["search"] * 2 + ["confirm"] * 2
    assert study.search_end == "it has trained for 2 h"


LOOP = """
import math
def train(trial):
    trial.report(1, val_accuracy=0.9 - 0.3 * math.log10(trial.params["lr"] / 1e-2) ** 2)
"""


@only_sqlite
def test_what_a_user_sees_of_an_ended_search_and_how_it_goes_on(
    store: Store, make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "loop_that_ends.py").write_text(LOOP)
    objective = {"function": "loop_that_ends:train"}
    spec = make_spec(epochs=1, search=search(until="1 decade"), objective=objective)
    url = store.url.render_as_string(hide_password=False)
    here = {"storage": url, "executor": api.InProcess("cpu")}
    result = running.run(spec, code_folder=tmp_path, **here)  # type: ignore[arg-type]
    num_trained = len(result.trials)
    assert num_trained < MAX_TRIALS
    ended = f"the search ended after {num_trained} of at most {MAX_TRIALS} trials: the 90 % interval is 0."
    assert str(reading.status("s", storage=url)["search_end"]).startswith(ended)
    assert json.loads(json.dumps(reading.best("s", storage=url).as_dict()))["search_end"].startswith(ended)
    for command in ("status", "best"):
        output = CliRunner().invoke(main, [command, "s", "--storage", url]).output
        assert ended in output, command
    assert ended in StudyReport(store.studies.get("s"), result.trials, result.best, url, NOW, []).counts
    assert budget_text(store.studies.get("s")) == f"at most {MAX_TRIALS} trials, until 1 decade"
    # By the same file nothing is trained; by another goal, or a number of trials, there is more.
    assert len(running.run(spec, code_folder=tmp_path, **here).trials) == num_trained  # type: ignore[arg-type]
    allow = ["loop_that_ends"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        more = running.resume("s", until="0.2 decades", allow=allow, **here)  # type: ignore[arg-type]
        assert num_trained < len(more.trials) < MAX_TRIALS
        every = running.resume("s", trials=len(more.trials) + 2, allow=allow, **here)  # type: ignore[arg-type]
        # A wider range keeps all trials, and is searched as densely.
        wider = running.resume("s", widen=["lr=1e-5:1"], allow=allow, **here)  # type: ignore[arg-type]
    assert len(every.trials) == len(more.trials) + 2
    assert wider.trials[: len(every.trials)] == every.trials
    assert len(wider.trials) == len(every.trials) + math.ceil(len(every.trials) / 4)
    assert any(trial.params["lr"] < 1e-4 for trial in wider.trials)
    assert wider.best.response is not None
    assert wider.best.response.lrs[0] == pytest.approx(1e-5)
    assert reading.status("s", storage=url)["search_end"] is None
    # The file that it was made from has the former range, and is the same study still.
    assert running.run(spec, code_folder=tmp_path, **here).trials == wider.trials  # type: ignore[arg-type]


RISING = """
import math
def train(trial):
    lr = trial.params["lr"]
    trial.report(1, val_accuracy=DIVERGES if lr > 0.5 else 0.5 + 0.1 * math.log10(lr / 1e-4))
"""


@only_sqlite
@pytest.mark.parametrize("beyond", ["0.2", "math.nan"])
def test_a_range_grows_where_the_best_rates_touch_an_end_and_not_past_what_diverges(
    store: Store, make_spec: MakeSpec, tmp_path: Path, beyond: str
) -> None:
    name = f"loop_that_grows_{len(beyond)}"
    (tmp_path / f"{name}.py").write_text(RISING.replace("DIVERGES", beyond))
    space = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    settings = {"sampler": "qmc", "trials": 7, "grow": True, "space": space}
    confirm = {"top": 1, "seeds": 2}
    spec = make_spec(epochs=1, search=settings, objective={"function": f"{name}:train"}, confirm=confirm)
    url = store.url.render_as_string(hide_password=False)
    result = running.run(spec, code_folder=tmp_path, storage=url, executor=api.InProcess("cpu"))
    study = store.studies.get("s")
    assert study.num_growths >= 1
    assert study.spec.search.space["lr"]["low"] == 1e-3
    assert study.spec.search.space["lr"]["high"] >= 1.0
    searched = [trial for trial in result.trials if trial.kind == "search"]
    assert len(searched) == study.spec.num_trials > 7
    assert all(trial.params["lr"] <= 0.1 for trial in searched[:6])
    assert any(trial.params["lr"] > 0.1 for trial in searched)
    assert str(growth_text(study)).startswith("the range grew to 0.001 to ")
    assert 0.1 < result.best.params["lr"] <= 0.5
    if beyond == "math.nan":
        assert study.spec.search.space["lr"]["high"] == 1.0
    assert len(running.run(spec, code_folder=tmp_path, storage=url).trials) == len(result.trials)
    assert store.problems(study) == []
