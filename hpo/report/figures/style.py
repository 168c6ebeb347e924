"""How figures look and what several of them share: what they are drawn of, states, axes, colours in light and dark.

Colours tell apart for every kind of colour vision (Okabe and Ito, 2008; viridis for learning rates), stand out from a
white and from a dark page, and never stand alone: each state has a symbol and a pattern of its own. A figure's traces
carry the light page's colours; text, grid and background come from a template, so that a page can exchange it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plotly.colors import sample_colorscale

if TYPE_CHECKING:
    import plotly.graph_objects as go


FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
BLUE, GREEN, ORANGE, VERMILLION, PURPLE, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#808080"
NUM_COLOURS = 16  # that learning rates are told apart by in lines


@dataclass(frozen=True)
class StateStyle:
    """Of trials in a state, or of attempts with an outcome."""

    colour: str
    symbol: str
    pattern: str


STATE_STYLES = {
    "complete": StateStyle(BLUE, "circle", ""),
    "pruned": StateStyle(ORANGE, "triangle-down", "/"),
    "diverged": StateStyle(VERMILLION, "x", "x"),
    "failed": StateStyle(GREY, "square", "+"),
    "running": StateStyle(PURPLE, "diamond", "."),
    "other": StateStyle(GREY, "square-open", "-"),  # attempts that were lost, let go, or ended by an exception
}
# For each theme: what a page of it is drawn with; the colours of rates are viridis, less what the page would swallow.
THEMES: dict[str, dict[str, Any]] = {
    name: {
        "font": {"family": FONT, "size": 13, "color": ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": page, "bordercolor": grid, "font": {"family": FONT, "color": ink}},
        "xaxis": {"gridcolor": grid, "linecolor": axis, "tickcolor": axis, "zeroline": False, "automargin": True},
        "yaxis": {"gridcolor": grid, "linecolor": axis, "tickcolor": axis, "zeroline": False, "automargin": True},
        "coloraxis": {
            "colorscale": [[step / 8, colour] for step, colour in enumerate(
                sample_colorscale("Viridis", [first + (last - first) * step / 8 for step in range(9)])
            )],
            "colorbar": {"outlinewidth": 0, "thickness": 12},
        },
    }
    for name, ink, page, grid, axis, first, last in (
        ("light", "#1d2330", "#ffffff", "#e4e7ec", "#98a1b0", 0.0, 0.85),
        ("dark", "#e6e9ef", "#1a1e26", "#2d3440", "#6b7587", 0.3, 1.0),
    )
}  # fmt: skip


def line_colours(theme: str) -> list[str]:
    """NUM_COLOURS from the lowest learning rate to the highest."""
    scale = THEMES[theme]["coloraxis"]["colorscale"]
    colours: list[str] = sample_colorscale(scale, [index / (NUM_COLOURS - 1) for index in range(NUM_COLOURS)])
    return colours


def lay_out(figure: go.Figure, *, height: int, **settings: Any) -> go.Figure:
    """What all figures have in common: the light theme, which a page may exchange, and room for a narrow screen."""
    figure.update_layout(
        template={"layout": THEMES["light"]},
        height=height,
        margin={"l": 8, "r": 8, "t": 36, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left"},
        hovermode="closest",
    )
    figure.update_layout(**settings)
    return figure


def legend_above(height: int) -> dict[str, Any]:
    return {"orientation": "h", "x": 0, "y": 1 + 8 / height, "yanchor": "bottom", "xanchor": "left"}


def with_opacity(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def round_digits(value: float | None, digits: int = 4) -> float | None:
    """To so many significant digits, so that a thousand trials stay a small file; None is a gap."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def rate_axis(**settings: Any) -> dict[str, Any]:
    """A logarithmic axis of learning rates."""
    return {"type": "log", "title": {"text": "learning rate"}, "exponentformat": "power", "dtick": 1,
            "minor": {"ticks": "inside", "dtick": "D1", "ticklen": 3}, **settings}  # fmt: skip


def escape_plotly(text: object) -> str:
    """As Plotly shows it as it is: it reads a few tags, links among them, in any text."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shares_text(counts: Mapping[str, float]) -> str:
    """Parts of a whole in words, the largest first."""
    total = sum(counts.values()) or 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count / total:.0%}" for name, count in ranked if count)
