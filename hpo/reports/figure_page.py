"""One figure as a file: an HTML page that needs no network, or an image. Range tests and comparisons are shown so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError
from hpo.system.html import html_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from hpo.analysis.comparison import Comparison

PAGE = """<!doctype html>
<!-- hpo report -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color: #1d2330; background: #ffffff; font: 1rem/1.5 system-ui, sans-serif }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }}
h1 {{ line-height: 1.2 }}
table {{ border-spacing: 0 .5rem; margin-left: -.5rem }}
th, td {{ padding: 0 .5rem; vertical-align: top; overflow-wrap: break-word }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ color: #e6e9ef; background: #14171d }} }}
@media (max-width: 40rem) {{
  thead, td:empty {{ display: none }}
  table, tbody, tr, td {{ display: block }}
  tr {{ margin-bottom: 1rem }}
  td::before {{ content: attr(data-column) ": "; opacity: .7 }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
{figure}
{text}
</body>
</html>
"""


# `{plot_id}` is Plotly's.
PAINT = """
const dark = window.matchMedia("screen and (prefers-color-scheme: dark)"), themes = THEMES;
const paint = () => Plotly.relayout("{plot_id}", {template: {layout: themes[dark.matches ? "dark" : "light"]}});
dark.addEventListener("change", paint);
paint();
"""


def check_figure_output(output: str | Path, *, suffixes: Sequence[str] = (".html",)) -> None:
    """Raise UserError if no figure can be written there."""
    path = Path(output)
    if path.suffix not in suffixes:
        raise UserError(f"--output must end in {' or '.join(suffixes)}, got {str(output)!r}")
    if not path.parent.is_dir():
        raise UserError(f"--output must be in a folder that exists, got {str(output)!r}")


def write_ramp_page(tests: Sequence[Mapping[str, Any]], output: str | Path, *, title: str) -> None:
    """Write the ramps of range tests, given as plain data, to an HTML file.

    Raises:
        UserError: The file cannot be written.
    """
    from hpo.reports.figures.range_test import draw_ramps

    try:
        Path(output).write_bytes(_page(draw_ramps(tests), title=title).encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None


def write_comparison(found: Comparison, output: str | Path) -> None:
    """Write studies side by side to an HTML file with all that follows from them, or to an image (.png, .svg).

    Raises:
        UserError: The file cannot be written, or kaleido is not installed.
    """
    from hpo.reports.figures.comparison import draw_comparison
    from hpo.reports.images import draw_image
    from hpo.reports.output_file import write_report_file

    figure, path = draw_comparison(found), Path(output)
    if path.suffix != ".html":
        write_report_file(path, draw_image(figure, path.suffix[1:]))
        return
    names = " and ".join(dict.fromkeys(study.study for study in found.studies))
    page = _page(figure, title=f"Best learning rates of {names}", text=found._repr_html_())
    write_report_file(path, page.encode(errors="backslashreplace"))


def _page(figure: go.Figure, *, title: str, text: str = "") -> str:
    from hpo.reports.figures.style import THEMES

    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        config={"displaylogo": False, "responsive": True},
        post_script=PAINT.replace("THEMES", json.dumps(THEMES)),
    )
    return PAGE.format(title=html_text(title), figure=drawn, text=text)
