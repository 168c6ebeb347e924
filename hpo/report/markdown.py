"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from hpo.report.output_file import REPORT_MARK
from hpo.report.study_report import MAX_LISTED_TRIALS, StudyReport, provenance_rows, spec_toml, trial_table


def render_markdown(report: StudyReport, _figure: str) -> bytes:
    lines = [REPORT_MARK, f"# Study {escape_markdown(report.study.name)}", "", *markdown_answer(report), ""]
    for entry in report.drawn:
        lines += [f"## {entry.title}", "", escape_markdown(entry.text), ""]
    columns, rows = trial_table(report)
    lines += ["## Trials", "", f"{report.counts}.", ""]
    if len(rows) > MAX_LISTED_TRIALS:
        lines += [f"The best {MAX_LISTED_TRIALS} of {len(rows)}:", ""]
    lines += [_markdown_row(columns), _markdown_row(["---"] * len(columns))]
    lines += [_markdown_row([shown for shown, _ in cells]) for _, cells in rows[:MAX_LISTED_TRIALS]]
    lines += [
        "",
        "## How it was made",
        "",
        *(f"- {what}: {escape_markdown(how)}" for what, how in provenance_rows(report)),
        "",
    ]
    lines += ["```toml", spec_toml(report.study).strip().replace("```", "'''"), "```", ""]
    return "\n".join(lines).encode()


def markdown_answer(report: StudyReport) -> list[str]:
    """The answer and its warnings as lines of Markdown."""
    first, *others = map(escape_markdown, report.answer)
    return [
        f"**{first}**",
        "",
        *(f"- {line}" for line in others),
        *(f"- beware: {escape_markdown(w)}" for w in report.warnings),
    ]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape_markdown(cell) for cell in cells)} |"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = " ".join(text.split())
    for character in "\\`*[]<>|":
        text = text.replace(character, f"\\{character}")
    return text
