"""A report as Markdown."""

from __future__ import annotations

from hpo.report.render import render_report
from hpo.report.study_report import StudyReport
from tests.report.examples import evil_report


def test_markdown_has_the_answer_a_text_for_each_figure_and_a_row_for_each_trial(small: StudyReport) -> None:
    text = render_report(small, "md").decode()
    assert f"**{small.answer[0]}**" in text
    assert text.count("\n| ") == 2 + len(small.trials)
    for drawn in small.figures:
        assert f"## {drawn.title}" in text
    evil = render_report(evil_report(), "md").decode()
    assert "<script" not in evil.replace("\\<script", "").partition("```toml")[0]
