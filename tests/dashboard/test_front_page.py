"""What is added to optuna-dashboard's page: the answer and our figures first, and no buttons that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any

import optuna
import optuna_dashboard
import pytest

from hpo.config.study_spec import StudySpec
from hpo.dashboard.front_page import ADDED, FILES, FrontPage, note_of
from hpo.reports.figures.table import FIGURES
from hpo.store.store import Store
from tests.dashboard.examples import application, call

PAGE = b"<html><head><title>t</title></head><body></body></html>"


def page(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Answer as a server of files does: with 304 whoever has the page."""
    if "HTTP_IF_MODIFIED_SINCE" in environ:
        start_response("304 Not Modified", [])
        return [b""]
    start_response("200 OK", [("Content-Length", str(len(PAGE))), ("Last-Modified", "then"), ("X-Kept", "1")])
    return [PAGE]


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/", "/dashboard/studies/1", "/dashboard/studies/1/note"])
def test_the_page_gets_our_style_and_script_also_where_the_browser_has_kept_it(path: str) -> None:
    answered: list[Any] = []
    environ = {"PATH_INFO": path, "REQUEST_METHOD": "GET", "HTTP_IF_MODIFIED_SINCE": "then"}
    app = FrontPage(page, str)
    body = b"".join(app(environ, lambda *answer: answered.extend(answer)))  # type: ignore[arg-type]
    assert body == PAGE.replace(b"</head>", ADDED)
    assert answered == ["200 OK", [("X-Kept", "1"), ("Content-Length", str(len(body)))]]


@pytest.mark.parametrize("path", ["/", "/dashboards", "/api/studies", "/api/studies/1", "/static/bundle.js", "/csv/1"])
def test_everything_else_passes(path: str) -> None:
    assert call(FrontPage(application, str), path) == (200, "through")


def test_what_the_page_asks_for_is_served() -> None:
    app = FrontPage(application, {1: "the note"}.__getitem__)
    assert call(app, "/api/studies/1/note") == (200, "the note")
    for path, (name, _) in FILES.items():
        assert path.encode() in ADDED
        assert call(app, path) == (200, (files("hpo.dashboard") / "static" / name).read_text(encoding="utf-8"))


def test_every_figure_has_its_place_in_the_order_of_the_report() -> None:
    style = (files("hpo.dashboard") / "static" / "dashboard.css").read_text(encoding="utf-8")
    orders = {name: int(order) for name, order in re.findall(r'user-defined-plot:(\w+)"\]\) { order: (-\d+)', style)}
    assert sorted(orders, key=lambda name: orders[name]) == list(FIGURES)


def test_the_note_is_read_as_optuna_dashboard_reads_it(store: Store, make_spec: Callable[..., StudySpec]) -> None:
    record = store.studies.create(make_spec(0.1), metadata={})
    study = optuna.load_study(study_name=record.name, storage=store.storage)
    assert note_of(store.storage.get_study_system_attrs(record.study_id)) == optuna_dashboard.get_note(study) == ""
    long = "".join(map(str, range(9000)))
    optuna_dashboard.save_note(study, long)  # in a dozen pieces
    assert note_of(store.storage.get_study_system_attrs(record.study_id)) == optuna_dashboard.get_note(study) == long
    store.studies.show(record, {}, note="short")
    assert note_of(store.storage.get_study_system_attrs(record.study_id)) == optuna_dashboard.get_note(study) == "short"
