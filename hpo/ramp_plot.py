"""A range test drawn: in a terminal, and as one self-contained HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.errors import UserError

WIDTH, HEIGHT = 64, 10  # characters
BLOCKS = " ▁▂▃▄▅▆▇█"
SHOWN = 1.5  # times the loss at the start: what is above is drawn there


def chart(found: Mapping[str, Any]) -> list[str]:
    """The smoothed loss over the learning rate in columns of a terminal, with the range to search underneath.

    `found` is a range test as plain data; columns where the loss was not finite reach to the top.
    """
    lrs, losses = found["lrs"], _shown(found["losses"])
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
    import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]

    figure = go.Figure()
    for found in tested:
        name = ", ".join(f"{key} {value}" for key, value in found["params"].items()) or "loss"
        figure.add_scatter(x=found["lrs"], y=_shown(found["losses"]), mode="lines", name=name)
        for what in ("falls", "lowest", "breaks", "leaps"):
            if found[what] is not None:
                figure.add_vline(x=found[what], line_dash="dot", annotation_text=f"{what} {found[what]:.2g}")
        if found["low"] is not None:
            figure.add_vrect(x0=found["low"], x1=found["high"], opacity=0.1, line_width=0, fillcolor="green")
    figure.update_layout(title=title, xaxis_title="learning rate", yaxis_title="loss, smoothed", xaxis_type="log")
    try:
        figure.write_html(str(output), include_plotlyjs=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None


def _shown(losses: Sequence[float | None]) -> list[float]:
    """The losses as far as they are worth showing: a broken one would hide the rest."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not finite:
        return []
    top = SHOWN * max(finite[0], min(finite))
    return [top if loss is None or not math.isfinite(loss) else min(loss, top) for loss in losses]
