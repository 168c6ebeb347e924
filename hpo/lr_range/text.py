"""A range test drawn: in a terminal, and as one self-contained HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hpo.errors import UserError

WIDTH, HEIGHT = 64, 10  # characters
BLOCKS = " ▁▂▃▄▅▆▇█"
TOP = 1.5  # times the loss at the start: what is above is drawn there, or a broken loss would hide the rest


def chart(found: Mapping[str, Any]) -> list[str]:
    """The smoothed loss over the learning rate in columns of a terminal, with the range to search underneath.

    `found` is a range test as plain data; columns where the loss was not finite reach to the top.
    """
    lrs, losses = found["lrs"], worth_showing(found["losses"])
    if not losses or lrs[0] >= lrs[-1]:
        return []
    left, right = math.log10(lrs[0]), math.log10(lrs[-1])

    def column(lr: float) -> int:
        return min(WIDTH - 1, max(0, int((math.log10(lr) - left) / (right - left) * WIDTH)))

    heights = [math.nan] * WIDTH
    for lr, loss in zip(lrs, losses, strict=True):
        at = column(lr)
        heights[at] = loss if math.isnan(heights[at]) else max(heights[at], loss)
    for at in range(1, WIDTH):  # a ramp of few steps leaves columns out
        heights[at] = heights[at - 1] if math.isnan(heights[at]) else heights[at]
    low, high = min(losses), max(losses)
    low -= 0.1 * (high - low) or 0.1
    eighths = [round((height - low) / (high - low or 1) * HEIGHT * 8) for height in heights]
    lines = []
    for row in reversed(range(HEIGHT)):
        label = f"{high:8.3g} " if row == HEIGHT - 1 else f"{low:8.3g} " if row == 0 else " " * 9
        lines.append(label + "│" + "".join(BLOCKS[min(8, max(0, eighth - 8 * row))] for eighth in eighths))
    lines.append(" " * 9 + "└" + "─" * WIDTH)
    if found["low"] is not None:
        first, last = column(found["low"]), column(found["high"])
        lines.append(" " * 10 + " " * first + "━" * (last - first + 1))
    ends = f"{lrs[0]:.2g}", f"{lrs[-1]:.2g}"
    lines.append(" " * 10 + ends[0] + ends[1].rjust(WIDTH - len(ends[0])))
    return lines


def check_output(output: str | Path) -> None:
    """Raises UserError where no plot can be written there."""
    path = Path(output)
    if path.suffix != ".html":
        raise UserError(f"--output must end in .html, got {str(output)!r}")
    if not path.parent.is_dir():
        raise UserError(f"--output must be in a folder that exists, got {str(output)!r}")


def write_html(tested: Sequence[Mapping[str, Any]], output: str | Path, *, title: str) -> None:
    """Writes the ramps as one HTML file that needs no network. Raises UserError where it cannot be written."""
    from hpo.report.figures.confirmation import ramps

    figure = ramps(tested).update_layout(title={"text": escape(title)}, paper_bgcolor="white", plot_bgcolor="white")
    try:
        figure.write_html(str(output), include_plotlyjs=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None


def worth_showing(losses: Sequence[float | None]) -> list[float]:
    """The losses of a ramp as far as they are."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not finite:
        return []
    top = TOP * max(finite[0], min(finite))
    return [top if loss is None or not math.isfinite(loss) else min(loss, top) for loss in losses]
