"""Range tests as one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.errors import UserError


def check_ramp_output(output: str | Path) -> None:
    """Raise UserError if no plot can be written there."""
    path = Path(output)
    if path.suffix != ".html":
        raise UserError(f"--output must end in .html, got {str(output)!r}")
    if not path.parent.is_dir():
        raise UserError(f"--output must be in a folder that exists, got {str(output)!r}")


def write_ramp_page(tests: Sequence[Mapping[str, Any]], output: str | Path, *, title: str) -> None:
    """Write the ramps of range tests, given as plain data, to an HTML file.

    Raises:
        UserError: The file cannot be written.
    """
    from hpo.reports.figures.range_test import draw_ramps
    from hpo.reports.figures.style import escape_plotly

    figure = draw_ramps(tests)
    figure.update_layout(title={"text": escape_plotly(title)}, paper_bgcolor="white", plot_bgcolor="white")
    try:
        figure.write_html(str(output), include_plotlyjs=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
