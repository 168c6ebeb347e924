"""A report as Markdown."""

from __future__ import annotations

from dataclasses import replace

from hpo.reports.markdown import escape_markdown
from hpo.reports.render import render_report
from hpo.reports.study_report import StudyReport
from tests.analysis.examples import make_study, make_trials
from tests.reports.examples import MINIMIZED, evil_report, reported


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


def test_columns_without_text_and_those_in_which_trials_are_alike_are_left_out_of_the_table() -> None:
    trials = make_trials((0.1, 0.5), (0.2, 0.7))
    text = render_report(reported(make_study(), trials), "md").decode()
    assert "| trial | state | lr | val_accuracy | epochs |\n" in text
    assert (
        "2 complete; marked: 1 trial with the recommended learning rate, 0.2; all have kind search, attempt 1." in text
    )
    again = [replace(trials[0], number=2, kind="confirm", replicate=0, attempt=2)]
    assert (
        "| trial | state | kind | lr | val_accuracy | epochs | attempt |\n"
        in render_report(reported(make_study(), [*trials, *again]), "md").decode()
    )
