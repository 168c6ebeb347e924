"""The page: a real browser draws it from disk without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpo.reports.output_file import write_report_file
from hpo.reports.render import render_report
from hpo.reports.study_report import StudyReport
from hpo.system.readable import one_line
from scripts.bench.report import make_study as make_large
from tests.analysis.examples import make_study, make_trials, numbered, trained
from tests.reports.examples import unusual

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
from tests.reports.examples import EVIL, MINIMIZED, evil_report, reported

MOST_BYTES = 6_000_000


@contextmanager
def opened(browser: Browser, path: Path, *, width: int = 1280, **options: Any) -> Iterator[Page]:
    """Open a page and wait until it is drawn; it must make no request and write nothing to its console."""
    page = browser.new_page(viewport={"width": width, "height": 850}, **options)
    page.set_default_timeout(500_000)
    said: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready-ms]", timeout=500_000)
    yield page
    assert said == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    page.close()


@pytest.fixture(scope="module")
def page_file(small: StudyReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report_file(path, render_report(small, "html"))
    return path


@pytest.fixture(scope="module")
def quickstart_like() -> StudyReport:
    """Return a report with all that widens a table: several kinds of trials, losses, times, and reasons in words."""
    ends = {"complete": "trained for 8 epochs", "diverged": "collapsed: every input gets the same output in epoch 2"}
    trials = [
        replace(
            trained(lr, 0.8, state=state),
            kind=kind,
            params={"lr": lr},
            started=0.0,
            ended=123.4,
            reason=ends[state],
            attributes={"host": "a-long-name-of-a-machine", "device": "cuda:0"},
        )
        for lr, state, kind in (
            (1.234e-5, "complete", "search"),
            (0.02345, "diverged", "search"),
            (1e-3, "complete", "confirm"),
        )
    ]
    losses = {"train_loss": [0.01234] * 8}
    return reported(make_study(), numbered(*(replace(t, curves={**t.curves, **losses}) for t in trials)))


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


@pytest.mark.parametrize(("width", "has_cards"), [(1400, False), (945, False), (390, True)])
def test_the_table_of_trials_is_whole_and_every_column_can_be_read_without_scrolling_in_it(
    browser: Browser, quickstart_like: StudyReport, tmp_path: Path, width: int, has_cards: bool
) -> None:
    write_report_file(tmp_path / "report.html", render_report(quickstart_like, "html"))
    with opened(browser, tmp_path / "report.html", width=width) as page:
        table = page.locator("#trials table")
        assert ("cards" in (table.get_attribute("class") or "")) == has_cards
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        has_scroller = "of => [of, ...of.querySelectorAll('*')].some(e => getComputedStyle(e).overflowY === 'auto')"
        assert not page.locator("#trials .whole").evaluate(has_scroller)
        for cell in [*table.locator("th").all(), *table.locator("td").all()]:
            box = cell.bounding_box()
            assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= width)  # None: an empty cell of a card
        rows = table.locator("tbody tr")
        assert rows.count() == len(quickstart_like.trials)
        if has_cards:
            label = "cell => getComputedStyle(cell, '::before').content"
            assert rows.first.locator("td").nth(1).evaluate(label) == '"state"'
        names = [(name.get_attribute("class") == "n", name.inner_text()) for name in table.locator("th").all()]
        assert {name for is_right, name in names if not is_right} == {"state", "kind", "why it ended"}


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
    answer = small.answer
    assert page.inner_text("h1") == answer.headline.capitalize()
    for line in answer.lines:
        assert line.fact in text
        assert line.note in text
    for shown in (*map(str, answer.details), *answer.warnings):
        assert shown in text
    assert small.marked_text in (page.locator("#trials caption").text_content() or "")
    marked = page.locator("#trials tr.best td:first-child").all_text_contents()
    assert set(map(int, marked)) == small.marked
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
        assert cells[: len(expected)] == [f"{100 * value:.2f} %" for value in expected]
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
        page.evaluate(
            "window.addEventListener('beforeprint', () => { window.printed = "
            "[...document.querySelectorAll('.plot')].map(plot => [plot._fullLayout.font.color, "
            "plot._fullLayout.width]) })"
        )
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


def test_plotly_obeys_no_text(browser: Browser, tmp_path: Path) -> None:
    traps = "%{x} $x^2$ <b>b</b> &lt; \x1b[31m \u202e"
    study = make_study(objective=MINIMIZED | {"metric": traps})
    trials = [replace(trial, epochs=[1], curves={traps: [0.5]}) for trial in make_trials((0.1, 0.5), (0.2, 0.7))]
    path = tmp_path / "traps.html"
    write_report_file(path, render_report(reported(study, trials), "html"))
    with opened(browser, path) as page:
        page.locator("#plot-curves .scatterlayer .point").first.hover(force=True)
        page.wait_for_selector(".hoverlayer text")
        for place in ("#plot-curves .ytitle", "#plot-curves .hoverlayer"):
            assert one_line(traps) in (page.locator(place).first.text_content() or "")


def test_the_policy_of_the_page_lets_no_script_but_its_own_run_and_nothing_be_fetched(
    browser: Browser, page_file: Path, tmp_path: Path
) -> None:
    changed = page_file.read_text().replace("</main>", "<script>document.title = 'owned'</script></main>")
    path = tmp_path / "changed.html"
    path.write_text(changed)
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready-ms]", timeout=500_000)
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
