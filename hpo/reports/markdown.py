"""A report as Markdown. Text from users and from the store is escaped, so that it shows as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hpo.analysis.answer_text import AnswerLine
from hpo.reports.output_file import REPORT_MARK
from hpo.reports.study_report import MAX_LISTED_TRIALS, StudyReport, provenance_rows, spec_toml, trial_table
from hpo.system.readable import one_line, visible

# What Markdown gives a meaning, also GitHub's and optuna-dashboard's; an underscore within a word has none.
SPECIAL = r"[\\`*\[\]<>|&~$#]|(?<!\w)_|_(?!\w)"


def render_markdown(report: StudyReport, _figure: str) -> bytes:
    """Return the report as Markdown, with a caption in place of each figure."""
    lines = [REPORT_MARK, f"# Study {escape_markdown(report.study.name)}", "", *markdown_answer(report), ""]
    for figure in report.figures:
        lines += [f"## {figure.title}", "", escape_markdown(figure.caption), ""]
    columns, rows, table_text = trial_table(report)
    if report.answer.details:
        lines += ["## In detail", "", *_markdown_list(report.answer.details), ""]
    lines += ["## Trials", "", escape_markdown(table_text), ""]
    if len(rows) > MAX_LISTED_TRIALS:
        lines += [f"The best {MAX_LISTED_TRIALS} of {len(rows)}:", ""]
    lines += [_markdown_row(columns), _markdown_row(["---"] * len(columns))]
    for row in rows[:MAX_LISTED_TRIALS]:
        number, *others = (cell.text for cell in row.cells)
        lines.append(_markdown_row([f"► {number}" if row.trial.number in report.marked else number, *others]))
    lines += ["", "## How it was made", ""]
    lines += [f"- {what}: {escape_markdown(how)}" for what, how in provenance_rows(report)]
    toml = visible(spec_toml(report.study)).strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", toml)), default=0))  # longer than any in the text
    lines += ["", f"{fence}toml", toml, fence, ""]
    return "\n".join(lines).encode()


def markdown_answer(report: StudyReport) -> list[str]:
    """Return the answer and its warnings as lines of Markdown, without the details."""
    warnings = [f"- warning: {escape_markdown(warning)}" for warning in report.answer.warnings]
    headline = f"**{escape_markdown(report.answer.headline)}**"
    return [headline, "", *_markdown_list(report.answer.lines), *warnings]


def _markdown_list(lines: Sequence[AnswerLine]) -> list[str]:
    return [f"- {escape_markdown(line.label)}: {escape_markdown(str(line))}" for line in lines]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape_markdown(cell) for cell in cells)} |"


def escape_markdown(text: str) -> str:
    """Return the text on one line, escaped so that Markdown shows it as it is."""
    return re.sub(SPECIAL, r"\\\g<0>", one_line(text))
