"""The report's figures and its answer in optuna-dashboard."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import plotly.graph_objects as go
import pytest
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

from hpo.analysis.answer_text import answer_lines
from hpo.api import reading, stores
from hpo.config.study_spec import StudySpec
from hpo.reports.publisher import Publisher, publish_report
from hpo.reports.study_report import make_report
from hpo.store.store import Store
from hpo.store.studies import Studies


def shown(store: Store, name: str = "s") -> tuple[dict[str, Any], str]:
    """Return the figures and the note that optuna-dashboard shows with the study."""
    attributes = store.storage.get_study_system_attrs(store.studies.get(name).study_id)
    note = optuna_dashboard.get_note(optuna.load_study(study_name=name, storage=store.storage))
    return {title: json.loads(text) for title, text in get_plotly_graph_objects(attributes).items()}, note


def test_a_study_that_has_run_is_in_the_dashboard_with_its_figures_and_its_answer(trained: Store) -> None:
    figures, note = shown(trained)
    assert figures.keys() == {"response", "curves", "history", "epochs", "timeline"}
    answer = reading.best("s", storage=str(trained.url))
    assert note.startswith(f"**{answer_lines(trained.studies.get('s'), answer)[0]}**")
    assert trained.problems(trained.studies.get("s")) == []
    assert trained.studies.shared_values(trained.studies.get("s")) == {}


def test_figures_are_replaced_by_later_ones_and_other_peoples_stay(trained: Store) -> None:
    study = trained.studies.get("s")
    theirs = optuna.load_study(study_name="s", storage=trained.storage)
    for title in ("response", "mine"):
        figure = go.Figure(layout={"title": "x" * 9000})
        optuna_dashboard.save_plotly_graph_object(theirs, figure, graph_object_id=title)
    optuna_dashboard.save_note(theirs, "y" * 9000)
    trained.studies.show(study, {"response": '{"data": [1]}', "curves": None, "importance": None}, note="short")
    figures, note = shown(trained)
    assert (figures["response"], note) == ({"data": [1]}, "short")
    assert figures["curves"] == {"data": [], "layout": {}}
    assert "importance" not in figures
    assert len(str(figures["mine"])) > 9000
    before = trained.storage.get_study_system_attrs(study.study_id)
    trained.studies.show(study, {"response": '{"data": [1]}'}, note="short")
    assert trained.storage.get_study_system_attrs(study.study_id) == before, "nothing new is not written"


def test_a_copy_of_a_study_keeps_what_is_shown_of_it(trained: Store, tmp_path: Path) -> None:
    target = stores.copy("s", to=f"sqlite:///{tmp_path}/other.db", storage=str(trained.url))
    assert shown(Store(target)) == shown(trained)


def test_several_may_publish_at_once(store: Store, make_spec: Callable[..., StudySpec]) -> None:
    study = store.studies.create(make_spec(0.1, 0.2), metadata={})
    url = store.url.render_as_string(hide_password=False)
    stores = [Store(url) for _ in range(4)]
    errors: list[Exception] = []

    def show(index: int) -> None:
        try:
            for _ in range(5):
                stores[index].studies.show(study, {"a": json.dumps(index), "b": json.dumps(index)}, note=str(index))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=show, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    figures, note = shown(store)
    assert figures == {"a": int(note), "b": int(note)}, "all of it is of the last one"


def test_what_keeps_the_dashboard_from_being_renewed_ends_no_study_and_is_said_once(
    trained: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(Studies, "show", fail)
    with Publisher(trained, trained.studies.get("s")) as publisher:
        publisher._next = 0.0
        publisher.publish_if_due()
    assert caplog.text.count("could not be updated: attempt to write a readonly database") == 1


def test_a_look_returns_at_once_and_publishes_rarely(trained: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    went_on = threading.Event()
    begun: list[int] = []

    def slow(*_: Any, **__: Any) -> None:
        begun.append(1)
        went_on.wait()

    monkeypatch.setattr(Studies, "show", slow)
    publisher = Publisher(trained, trained.studies.get("s"))
    publisher.publish_if_due()
    assert publisher._thread is None, "not before FIRST_S"
    publisher._next = 0.0
    for _ in range(100):
        publisher.publish_if_due()
    went_on.set()
    publisher._join()
    for _ in range(100):
        publisher.publish_if_due()
    assert len(begun) == 1


def test_a_published_report_is_that_of_its_moment(trained: Store) -> None:
    study = trained.studies.get("s")
    publish_report(trained, make_report(study, [], None, storage=""))
    figures, note = shown(trained)
    assert all(figure["data"] == [] for figure in figures.values())
    assert note.startswith("**no complete trial to choose from")
