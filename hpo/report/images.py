"""A figure of a report as an image."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import UserError

if TYPE_CHECKING:
    pass
from hpo.report.output_file import PNG_TEXT, REPORT_MARK
from hpo.report.study_report import StudyReport

IMAGE_WIDTH = 900  # pixels; a PNG has twice as many


def render_png(report: StudyReport, figure: str) -> bytes:
    image = _draw_image(report, "png", figure)
    chunk = struct.pack(">I", len(PNG_TEXT) - 4) + PNG_TEXT + struct.pack(">I", zlib.crc32(PNG_TEXT))
    end = image.rindex(b"IEND") - 4
    return image[:end] + chunk + image[end:]


def render_svg(report: StudyReport, figure: str) -> bytes:
    return _draw_image(report, "svg", figure).rstrip() + f"\n{REPORT_MARK}\n".encode()


def _draw_image(report: StudyReport, form: str, name: str) -> bytes:
    """A figure on white, drawn by kaleido in a Chromium of this machine, which asks nothing of a network."""
    entry = next((entry for entry in report.drawn if entry.name == name), None)
    if entry is None:
        shown = ", ".join(drawn.name for drawn in report.drawn) or "none"
        raise UserError(f"--figure {name} has nothing to show in study {report.study.name!r}; there are: {shown}")
    try:
        import kaleido
    except ImportError:
        raise UserError(f"--format {form} needs the package kaleido: pip install 'hpo-studies[images]'") from None
    import plotly

    figure = entry.figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    options = {"format": form, "width": IMAGE_WIDTH, "height": figure.layout.height, "scale": 2 if form == "png" else 1}
    plotly_js = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    try:
        # MathJax would be fetched from a network.
        image = kaleido.calc_fig_sync(figure, opts=options, kopts={"mathjax": False, "plotlyjs": plotly_js})
    except Exception as error:  # of several packages; whatever it is, no image can be drawn on this machine
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--format {form} needs a Chrome or Chromium that starts on this machine: {said}") from None
    return bytes(image)
