"""One figure of a report as a PNG or SVG image, drawn by kaleido in a Chromium of this machine without a network."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import UserError
from hpo.reports.figures.table import DrawnFigure
from hpo.reports.output_file import PNG_TEXT, REPORT_MARK
from hpo.reports.study_report import StudyReport

if TYPE_CHECKING:
    import plotly.graph_objects as go

IMAGE_WIDTH = 900  # pixels; a PNG has twice as many


def render_png(report: StudyReport, figure: str) -> bytes:
    """Return a figure as PNG."""
    return draw_image(_figure_named(report, figure).figure, "png")


def render_svg(report: StudyReport, figure: str) -> bytes:
    """Return a figure as SVG."""
    return draw_image(_figure_named(report, figure).figure, "svg")


def draw_image(figure: go.Figure, form: str) -> bytes:
    """Return a figure on white as "png", with a text chunk that marks it as ours, or as "svg", with a comment."""
    image = _drawn(figure, form)
    if form == "svg":
        return image.rstrip() + f"\n{REPORT_MARK}\n".encode()
    chunk = struct.pack(">I", len(PNG_TEXT) - 4) + PNG_TEXT + struct.pack(">I", zlib.crc32(PNG_TEXT))
    end = image.rindex(b"IEND") - 4
    return image[:end] + chunk + image[end:]


def _figure_named(report: StudyReport, name: str) -> DrawnFigure:
    for figure in report.figures:
        if figure.name == name:
            return figure
    shown = ", ".join(figure.name for figure in report.figures) or "none"
    raise UserError(f"--figure {name} has nothing to show in study {report.study.name!r}; there are: {shown}")


def _drawn(figure: go.Figure, form: str) -> bytes:
    try:
        import kaleido
    except ImportError:
        raise UserError(f"--format {form} needs the package kaleido: pip install 'hpo-studies[images]'") from None
    import plotly

    figure = figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    options = {"format": form, "width": IMAGE_WIDTH, "height": figure.layout.height, "scale": 2 if form == "png" else 1}
    plotly_js = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    try:
        # MathJax would be fetched from a network.
        image = kaleido.calc_fig_sync(figure, opts=options, kopts={"mathjax": False, "plotlyjs": plotly_js})
    except Exception as error:  # of several packages; whatever it is, this machine cannot draw images
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--format {form} needs a Chrome or Chromium that starts on this machine: {reason}") from None
    return bytes(image)
