"""The report: a page that a real browser draws from disk without a network, the other formats, and the dashboard."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import optuna_dashboard
import plotly.graph_objects as go
import pytest
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

from hpo.analysis.answer import find_best
from hpo.analysis.text import answer_lines
from hpo.api import exporting, reading, running, stores
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.report.images import IMAGE_WIDTH
from hpo.report.output_file import is_report, write_report_file
from hpo.report.publisher import Publisher, publish_report
from hpo.report.render import FORMATS, render_report
from hpo.report.study_report import StudyReport, make_report
from hpo.store.store import Store
from hpo.store.studies import Studies
from hpo.study.records import StudyRecord, TrialRecord
from hpo.workers.executors import InProcess
from scripts.bench.report import make_study as make_large
from tests.analysis.test_answer import complete, make_study, make_trials, numbered
from tests.report.test_figures import MINIMIZED, unusual

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MOST_BYTES = 6_000_000
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
LOOP = """
def train(trial):
    for epoch in range(1, trial.epochs + 1):
        if trial.report(epoch, val_accuracy=1 - abs(trial.params["lr"] - 0.3) - 0.1 / epoch, train_loss=1 / epoch):
            return
"""


def reported(study: StudyRecord, trials: list[TrialRecord]) -> StudyReport:
    return make_report(study, trials, find_best(study, trials), storage="sqlite:////somewhere/hpo.db")


@pytest.fixture(scope="module")
def small() -> StudyReport:
    return reported(*make_large(60, 10))


# --- in a browser ---


@contextmanager
def opened(browser: Browser, path: Path, *, width: int = 1280, **options: Any) -> Iterator[Page]:
    """The page, drawn; it must make no request, and nothing may be said on its console, at any time."""
    page = browser.new_page(viewport={"width": width, "height": 850}, **options)
    page.set_default_timeout(180_000)
    said: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready-ms]", timeout=180_000)
    yield page
    assert said == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    page.close()


@pytest.fixture(scope="module")
def page_file(small: StudyReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report_file(path, render_report(small, "html"))
    return path


MARKS = ".scatterlayer .point, .scatterlayer path.js-line, .barlayer .point path"


@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_drawn_and_fits_the_screen(
    browser: Browser, page_file: Path, small: StudyReport, width: int
) -> None:
    with opened(browser, page_file, width=width) as page:
        for drawn in small.figures:
            plot = page.locator(f"#plot-{drawn.name}")
            assert plot.locator(MARKS).count() > 0, drawn.name
            box = plot.locator("svg.main-svg").first.bounding_box()
            assert box is not None
            assert 0.7 * width < box["width"] + 64 <= width + 64 or width == 1280
            assert box["x"] + box["width"] <= width
            assert page.locator(f"#text-{drawn.name}").inner_text() == drawn.caption
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        points = page.locator("#plot-response .scatterlayer .point")
        assert points.count() >= len(small.trials)


def test_the_page_says_what_the_terminal_says_and_is_sorted_and_read_without_eyes(
    browser: Browser, page_file: Path, small: StudyReport
) -> None:
    with opened(browser, page_file) as page:
        check_words(page, small)
        check_what_who_does_not_see_the_figures_finds(page)
        check_that_a_press_on_a_columns_name_sorts_by_it_and_empty_cells_stay_last(page, small)


def check_words(page: Page, small: StudyReport) -> None:
    assert small.best is not None
    text = page.inner_text("main")
    first, *others = answer_lines(small.study, small.best)
    assert page.inner_text("h1") == first.capitalize()
    for line in others:
        assert line.removeprefix("warning: ") in text
    for what in ("seeds", "git revision", "versions", "machines"):
        assert what in page.inner_text("#made")
    assert "learning rate" in (page.locator("thead").text_content() or "")


def check_that_a_press_on_a_columns_name_sorts_by_it_and_empty_cells_stay_last(page: Page, small: StudyReport) -> None:
    values = sorted(trial.value for trial in small.trials if trial.value is not None)
    column = page.locator("#trials th", has_text="val_accuracy")
    index = column.evaluate("head => head.cellIndex")
    read = f"() => [...document.querySelectorAll('#trials tbody tr')].map(row => row.cells[{index}].textContent)"
    for order, expected in (("ascending", values), ("descending", values[::-1])):
        column.locator("button").press("Enter")
        assert column.get_attribute("aria-sort") == order
        assert page.locator("#trials th[aria-sort]").count() == 1
        cells = page.evaluate(read)
        assert cells[: len(expected)] == [f"{value:.2%}" for value in expected]
        assert set(cells[len(expected) :]) == {""}


def test_dark_is_dark_light_is_light_and_the_page_follows_a_change(
    browser: Browser, page_file: Path, wait_for: Callable[..., Any]
) -> None:
    ink = "document.querySelector('#plot-history .xtick text').style.fill"
    with opened(browser, page_file, color_scheme="dark") as page:
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(20, 23, 29)"
        dark = page.evaluate(ink)
        page.emulate_media(color_scheme="light")
        wait_for(lambda: page.evaluate(ink) != dark)  # not wait_for_function: the page's policy forbids it
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert (dark, page.evaluate(ink)) == ("rgb(230, 233, 239)", "rgb(29, 35, 48)")


def test_on_paper_it_is_light_and_every_figure_is_there(browser: Browser, page_file: Path, small: StudyReport) -> None:
    with opened(browser, page_file, color_scheme="dark") as page:
        page.evaluate("window.addEventListener('beforeprint', () => { window.printed = "
                      "[...document.querySelectorAll('.plot')].map(plot => [plot._fullLayout.font.color, "
                      "plot._fullLayout.width]) })")  # fmt: skip
        assert page.pdf(format="A4").startswith(b"%PDF")
        assert page.evaluate("window.printed") == [["#1d2330", 660]] * len(small.figures)


def check_what_who_does_not_see_the_figures_finds(page: Page) -> None:
    assert page.locator("main").count() == page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    for plot in page.locator(".plot").all():
        assert plot.get_attribute("role") == "img"
        assert page.locator(f"#{plot.get_attribute('aria-labelledby')}").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    for section in page.locator("main > section").all():
        assert page.locator(f"#{section.get_attribute('aria-labelledby')}").count() == 1


def evil_report() -> StudyReport:
    """Whatever a user or a store can choose is an attempt to have the page run something."""
    study = make_study(
        objective=MINIMIZED | {"metric": EVIL}, search={"space": {"lr": [0.1, 0.2], "kind": [EVIL, "b"]}}
    )
    trials = [
        replace(
            trial, params={"lr": lr, "kind": EVIL}, reason=EVIL, error=EVIL, epochs=[1], curves={EVIL: [0.5]},
            attributes={"host": EVIL, "device": EVIL, "git_revision": EVIL, "versions": {EVIL: EVIL}},
        )
        for trial, lr in zip(make_trials((1, 0.5), (1, 0.7), (1, "failed")), (0.1, 0.2, 0.1), strict=True)
    ]  # fmt: skip
    return reported(study, trials)


def test_what_comes_from_users_is_shown_and_never_run(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "evil.html"
    write_report_file(path, render_report(evil_report(), "html"))
    assert EVIL not in path.read_text()
    with opened(browser, path) as page:
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 3
        assert page.title() != "owned"
        assert EVIL in (page.locator("#trials details pre").first.text_content() or "")
        assert EVIL in (page.locator("#trials tbody").text_content() or "")


def test_the_policy_of_the_page_lets_no_script_but_its_own_run_and_nothing_be_fetched(
    browser: Browser, page_file: Path, tmp_path: Path
) -> None:
    changed = page_file.read_text().replace("</main>", "<script>document.title = 'owned'</script></main>")
    path = tmp_path / "changed.html"
    path.write_text(changed)
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready-ms]", timeout=180_000)
    assert page.title() != "owned"
    assert page.evaluate("fetch('https://example.org/').then(() => 'fetched', () => 'refused')") == "refused"
    page.close()


@pytest.mark.parametrize("name", ["no trial", "one", "all diverged", "a loss that explodes", "no learning rate"])
def test_a_study_with_little_to_show_has_a_page_too(browser: Browser, tmp_path: Path, name: str) -> None:
    made = reported(*unusual()[name])
    write_report_file(tmp_path / "report.html", render_report(made, "html"))
    with opened(browser, tmp_path / "report.html", width=390) as page:
        assert page.locator(".plot .main-svg").count() >= len(made.figures)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.inner_text("h1")


def test_a_thousand_trials_stay_a_small_file() -> None:
    content = render_report(reported(*make_large(1000, 20)), "html")
    assert len(content) < MOST_BYTES
    assert content.count(b"<tr") == 1001


# --- the other formats ---


@pytest.mark.parametrize("name", unusual())
@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_whatever_a_study_is_like_it_can_be_reported(name: str, form: str) -> None:
    made = reported(*unusual()[name])
    content = render_report(made, form)
    assert is_report(content)
    if form == "json":
        told = json.loads(content)
        assert told["answer"] == made.answer
        assert len(told["trials"]) == len(made.trials)


def test_json_has_the_answer_the_curves_of_the_responses_and_every_trial(small: StudyReport) -> None:
    told = json.loads(render_report(small, "json"))
    assert small.best is not None
    assert told["interval"] == list(small.best.interval or ())
    assert [len(response["mean"]) for response in told["responses"]] == [161] * 3
    assert [trial["number"] for trial in told["trials"]] == [trial.number for trial in small.trials]
    assert told["figures"] == {drawn.name: drawn.caption for drawn in small.figures}
    assert told["spec"]["name"] == small.study.name


def test_markdown_has_the_answer_a_text_for_each_figure_and_a_row_for_each_trial(small: StudyReport) -> None:
    text = render_report(small, "md").decode()
    assert f"**{small.answer[0]}**" in text
    assert text.count("\n| ") == 2 + len(small.trials)
    for drawn in small.figures:
        assert f"## {drawn.title}" in text
    evil = render_report(evil_report(), "md").decode()
    assert "<script" not in evil.replace("\\<script", "").partition("```toml")[0]


@pytest.mark.parametrize(("form", "start"), [("png", b"\x89PNG"), ("svg", b"<svg")])
def test_an_image_is_of_one_figure(small: StudyReport, form: str, start: bytes) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed (pip install 'hpo-studies[images]')")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    content = render_report(small, form, figure="history")
    assert content.startswith(start)
    assert is_report(content)
    if form == "png":
        assert struct.unpack(">II", content[16:24]) == (2 * IMAGE_WIDTH, 2 * 360)


def test_without_kaleido_an_image_is_refused_in_a_sentence(small: StudyReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    with pytest.raises(UserError, match=r"--format png needs the package kaleido: pip install 'hpo-studies\[images\]'"):
        render_report(small, "png")


def test_a_figure_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    plain = reported(make_study(), numbered(*complete()))
    with pytest.raises(UserError, match="--figure importance has nothing to show in study 's'; there are: response, "):
        render_report(plain, "svg", figure="importance")


# --- the file ---


def test_only_a_report_of_ours_is_written_over_and_all_of_it_or_nothing(small: StudyReport, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_report_file(path, render_report(small, "md"))
    path.chmod(0o640)
    write_report_file(path, render_report(small, "json"))
    assert json.loads(path.read_text())["study"] == small.study.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.md"]
    for foreign in (b"mine", b"", b"<!doctype html>\n<p>about hpo report</p>", b"# hpo report\n<!-- hpo report -->"):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match="exists and is no report of ours"):
            write_report_file(path, b"x")
        assert path.read_bytes() == foreign
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_report_file(tmp_path / "none" / "report.md", b"x")
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        write_report_file(tmp_path, b"x")


def test_a_store_that_a_report_was_published_in_is_no_report(trained: Store, tmp_path: Path) -> None:
    exporting.write_report("s", tmp_path / "s.html", storage=str(trained.url))
    database = Path(trained.url.database or "")
    before = database.read_bytes()
    for form in FORMATS.keys() - {"png", "svg"}:
        with pytest.raises(UserError, match="is no report of ours"):
            exporting.write_report("s", database, form=form, storage=str(trained.url))
    assert database.read_bytes() == before


# --- the command and the dashboard ---


@pytest.fixture
def trained(tmp_path: Path, make_spec: Callable[..., StudySpec]) -> Store:
    """A store with a study that has run, of seven learning rates."""
    (tmp_path / "loop.py").write_text(LOOP)
    url = f"sqlite:///{tmp_path}/hpo.db"
    spec = make_spec(*(lr / 10 for lr in range(1, 8)))
    running.run(spec, storage=url, executor=InProcess("cpu"), code_folder=tmp_path)
    return Store(url)


def shown(store: Store, name: str = "s") -> tuple[dict[str, Any], str]:
    """The figures and the note that optuna-dashboard shows with the study."""
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
    assert caplog.text.count("not renewed: attempt to write a readonly database") == 1


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


def test_the_command_writes_a_page_that_says_what_best_says(hpo: Any, trained: Store, tmp_path: Path) -> None:
    assert hpo.run("report", "s") == (0, "wrote s.html\n")
    page = (tmp_path / "s.html").read_text()
    for line in hpo.run("best", "s")[1].splitlines():
        assert line.removeprefix("warning: ")[1:] in page


def test_the_format_is_what_the_file_ends_in_or_as_said(trained: Store, tmp_path: Path) -> None:
    def written(name: str, **options: Any) -> bytes:
        return exporting.write_report("s", tmp_path / name, storage=str(trained.url), **options).read_bytes()

    assert json.loads(written("s.json"))["study"] == "s"
    assert written("s.txt", form="md").startswith(b"<!-- hpo report -->\n# Study s")
    for name, options, said in [
        ("s.gif", {}, r"--output must end in \.html, \.png, \.svg, \.md, \.json, got '.*s\.gif'"),
        ("s.md", {"form": "pdf"}, "--format must be one of html, json, md, png, svg; got 'pdf'"),
        ("s.svg", {"figure": "respones"}, r"--figure must be one of .* \(did you mean 'response'\?\)"),
    ]:
        with pytest.raises(UserError, match=said):
            written(name, **options)
        assert not (tmp_path / name).exists()


def test_a_store_that_can_only_be_read_is_reported_on(trained: Store, tmp_path: Path) -> None:
    url = f"sqlite:///file:{tmp_path}/hpo.db?mode=ro&uri=true"
    assert is_report(exporting.write_report("s", tmp_path / "s.md", storage=url).read_bytes())


def test_a_published_report_is_that_of_its_moment(trained: Store) -> None:
    study = trained.studies.get("s")
    publish_report(trained, make_report(study, [], None, storage=""))
    figures, note = shown(trained)
    assert all(figure["data"] == [] for figure in figures.values())
    assert note.startswith("**no complete trial to choose from")
