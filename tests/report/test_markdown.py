"""A report as Markdown."""

from __future__ import annotations

from hpo.report.markdown import escape_markdown
from hpo.report.render import render_report
from hpo.report.study_report import StudyReport
from tests.analysis.examples import make_study
from tests.report.examples import MINIMIZED, evil_report, reported


def test_markdown_has_the_answer_a_text_for_each_figure_and_a_row_for_each_trial(small: StudyReport) -> None:
    text = render_report(small, "md").decode()
    assert f"**{small.answer.headline}**" in text
    assert text.count("\n| ") == 2 + len(small.trials)
    for drawn in small.figures:
        assert f"## {drawn.title}" in text
    evil = render_report(evil_report(), "md").decode()
    assert "<script" not in evil.replace("\\<script", "").partition("```toml")[0]


def test_markdown_shows_a_text_as_it_is() -> None:
    assert escape_markdown("train_loss _a_ a_b *c* ~~d~~ `e` <f> &amp; $g$ [h](i) j|k \\ # \x1b\n") == (
        r"train_loss \_a\_ a_b \*c\* \~\~d\~\~ \`e\` \<f\> \&amp; \$g\$ \[h\](i) j\|k \\ \# \\x1b\\n"
    )


def test_a_study_file_ends_its_block_of_code_itself() -> None:
    report = reported(make_study(objective=MINIMIZED, search={"space": {"lr": [0.1], "k": ["````"]}}), [])
    text = render_report(report, "md").decode()
    assert text.count("`````") == 2
    assert '"````"' in text
