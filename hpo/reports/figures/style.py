"""How figures look: states, axes, and colours in light and dark.

Every kind of colour vision can tell the colours apart (Okabe and Ito, 2008; viridis for learning rates). They stand out
from a white and from a dark page, and never stand alone: each state has a symbol and a pattern of its own. The traces
of a figure have the light page's colours. Text, grid and background come from a template that a page can exchange.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plotly.colors import sample_colorscale

from hpo.system.readable import one_line

if TYPE_CHECKING:
    import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
BLUE, GREEN, ORANGE, VERMILLION, PURPLE, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#808080"
CARD_PIXELS = 450  # high, in optuna-dashboard; of a higher figure it shows only the top
MAX_COUNTED_TICKS = 10  # of an axis that counts, each with its number; Plotly would put halves between few of them
NUM_COLOURS = 16  # by which lines tell learning rates apart
PLOTLY_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "%": "&#37;"})


@dataclass(frozen=True)
class StateStyle:
    """How trials in a state, or attempts with an outcome, are drawn."""

    colour: str
    symbol: str
    pattern: str


STATE_STYLES = {
    "complete": StateStyle(BLUE, "circle", ""),
    "pruned": StateStyle(ORANGE, "triangle-down", "/"),
    "diverged": StateStyle(VERMILLION, "x", "x"),
    "failed": StateStyle(GREY, "square", "+"),
    "running": StateStyle(PURPLE, "diamond", "."),
    "other": StateStyle(GREY, "square-open", "-"),  # attempts that were lost, released, or ended by an exception
}


def _theme(*, ink: str, page: str, grid: str, axis: str, colours: tuple[float, float]) -> dict[str, Any]:
    """Return the layout of a theme; `colours` is the part of viridis that stands out from its page."""
    first, last = colours
    scale = sample_colorscale("Viridis", [first + (last - first) * step / 8 for step in range(9)])
    axes = {"gridcolor": grid, "linecolor": axis, "tickcolor": axis, "zeroline": False, "automargin": True}
    return {
        "font": {"family": FONT, "size": 13, "color": ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": page, "bordercolor": grid, "font": {"family": FONT, "color": ink}},
        "xaxis": axes,
        "yaxis": axes | {"title": {"standoff": 8}, "ticklabelstandoff": 2},  # clear of long names of categories
        "coloraxis": {
            "colorscale": [[step / 8, colour] for step, colour in enumerate(scale)],
            "colorbar": {"outlinewidth": 0, "thickness": 12},
        },
    }


THEMES: dict[str, dict[str, Any]] = {
    "light": _theme(ink="#1d2330", page="#ffffff", grid="#e4e7ec", axis="#98a1b0", colours=(0.0, 0.85)),
    "dark": _theme(ink="#e6e9ef", page="#1a1e26", grid="#2d3440", axis="#6b7587", colours=(0.3, 1.0)),
}
# For a page that may be either: a grey with a contrast of 4 to white and to optuna-dashboard's dark page.
EITHER_THEME = _theme(ink="#7e7e7e", page="#ffffff", grid="rgba(128,128,128,0.25)", axis=GREY, colours=(0.2, 0.85))


def line_colours(theme: Mapping[str, Any]) -> list[str]:
    """Return NUM_COLOURS colours, from the lowest learning rate to the highest."""
    scale = theme["coloraxis"]["colorscale"]
    colours: list[str] = sample_colorscale(scale, [index / (NUM_COLOURS - 1) for index in range(NUM_COLOURS)])
    return colours


def lay_out(figure: go.Figure, *, height: int, **settings: Any) -> go.Figure:
    """Give a figure the layout of all figures: the light theme, and room for a narrow screen."""
    figure.update_layout(
        template={"layout": THEMES["light"]},
        height=height,
        margin={"l": 8, "r": 8, "t": 36, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left"},
        hovermode="closest",
    )
    figure.update_layout(**settings)
    return figure


BELOW = {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"}


def fit_card(figure: go.Figure, title: str) -> None:
    """Change a figure to stand alone on a card that is CARD_PIXELS high and light or dark: with a title of its own.

    The legend goes to the bottom, where its lines push the axes up; above the axes, its second line would be printed
    over the title.
    """
    colours = line_colours(EITHER_THEME)
    figure.for_each_trace(
        lambda trace: trace.update(line={"color": colours[trace.meta["colour"]]}),
        selector=lambda trace: "colour" in (getattr(trace, "meta", None) or {}),
    )
    title = _clear_value_titles(figure, title)
    figure.update_layout(
        template={"layout": EITHER_THEME},
        title={
            "text": title,
            "x": 0,
            "y": 1,
            "yanchor": "top",
            "pad": {"l": 8, "t": 20 if "<br>" in title else 12},
            "font": {"size": 15},
        },
        height=min(figure.layout.height, CARD_PIXELS),
        margin={"t": 64},
        legend={**BELOW, "font": {"size": 11}},
    )


def _clear_value_titles(figure: go.Figure, title: str) -> str:
    """Move the titles of y axes that stand above each other, where a long one would run into the next panel's.

    What all panels show is a second line of the figure's title, which is returned; other titles go above their panels.
    """
    axes = [axis for axis in figure.select_yaxes() if axis.title.text]
    if len(axes) < 2 or len({axis.domain for axis in figure.select_xaxes()}) > 1:
        return title
    texts = [axis.title.text for axis in axes]
    for axis in axes:
        if len(set(texts)) > 1:
            figure.add_annotation(
                text=axis.title.text,
                font={"size": 12},
                showarrow=False,
                x=0,
                xref="paper",
                xanchor="left",
                y=1,
                yref=f"{axis.plotly_name.replace('axis', '')} domain",
                yanchor="bottom",
            )
        axis.title.text = None
    return title if len(set(texts)) > 1 else f'{title}<br><span style="font-size:12px">{texts[0]}</span>'


def with_opacity(colour: str, opacity: float) -> str:
    """Return "#rrggbb" as "rgba(...)"."""
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def round_digits(value: float | None, digits: int = 4) -> float | None:
    """Round to so many significant digits, so that a thousand trials stay a small file; not finite is None, a gap."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def rate_axis(**settings: Any) -> dict[str, Any]:
    """Return a logarithmic axis of learning rates."""
    return {
        "type": "log",
        "title": {"text": "learning rate"},
        "exponentformat": "power",
        "dtick": 1,
        "minor": {"ticks": "inside", "dtick": "D1", "ticklen": 3},
        **settings,
    }


def count_axis(first: int, last: int) -> dict[str, Any]:
    """Return an axis of whole numbers, with room for a mark or a bar at each of its ends."""
    return {"range": [first - 0.5, last + 0.5], **({"dtick": 1} if last - first <= MAX_COUNTED_TICKS else {})}


def escape_plotly(text: object) -> str:
    """Return the text so that Plotly shows it as it is.

    In any text Plotly reads a few tags, links among them, and formulas; in the texts under the pointer variables, too.
    """
    return one_line(str(text)).translate(PLOTLY_ENTITIES)


def shares_text(counts: Mapping[str, float]) -> str:
    """Return the parts of a whole in percent, the largest first."""
    total = sum(counts.values()) or 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in ranked if count)
