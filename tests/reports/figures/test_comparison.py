"""The figure of compared studies, and the file that has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hpo.analysis.answer import find_best
from hpo.analysis.comparison import Comparison, compare_answers
from hpo.errors import UserError
from hpo.reports.figure_page import check_figure_output, write_comparison
from hpo.reports.figures.comparison import draw_comparison
from tests.analysis.examples import SEARCHED, complete, hill, make_study, make_trials, numbered

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def compared() -> Comparison:
    first = make_study(**SEARCHED)
    studies = [
        (first, numbered(*complete())),
        (replace(first, name="other"), numbered(*complete(lambda lr: hill(lr, 1e-2)))),
        (replace(first, name=EVIL), make_trials((0.1, 0.5))),
    ]
    answers = [(study, trials, find_best(study, trials)) for study, trials in studies]
    return compare_answers([(study, trials, answer) for study, trials, answer in answers if answer is not None])


def test_each_study_has_a_row_with_its_best_rate_and_interval(compared: Comparison) -> None:
    figure = draw_comparison(compared)
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces["best learning rate"].x) == [study.lr for study in compared.studies[:2]]
    assert list(traces["best learning rate"].y) == [0, 1], "a study without a response has an empty row"
    (low, high), interval = compared.studies[0].interval or (0, 0), traces["90 % interval"]
    assert list(interval.x[:3]) == [low, high, None]
    assert len(figure.layout.yaxis.ticktext) == 3
    assert "<" not in figure.layout.yaxis.ticktext[2]


def test_the_page_has_the_figure_and_the_conclusions_and_no_other_file_is_written_over(
    compared: Comparison, tmp_path: Path
) -> None:
    for _ in range(2):
        write_comparison(compared, tmp_path / "compared.html")
    text = (tmp_path / "compared.html").read_text()
    assert "plotly" in text
    assert EVIL not in text
    assert "cannot be told apart" in text or "times" in text
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(UserError, match=r"mine.html"):
        write_comparison(compared, tmp_path / "mine.html")
    with pytest.raises(UserError, match=r"--output must end in .html or .png, got 'x.pdf'"):
        check_figure_output("x.pdf", suffixes=(".html", ".png"))
