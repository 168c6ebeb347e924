"""How figures look and what several of them share: what they are drawn of, states, axes, colours in light and dark.

Colours tell apart for every kind of colour vision (Okabe and Ito, 2008; viridis for learning rates), stand out from a
white and from a dark page, and never stand alone: each state has a symbol and a pattern of its own. A figure's traces
carry the light page's colours; text, grid and background come from a template, so that a page can exchange it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plotly.colors import sample_colorscale

from hpo.analysis.answer import Best, is_rate
from hpo.analysis.text import params_text, value_in_words
from hpo.study.records import StudyRecord, TrialRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
BLUE, GREEN, ORANGE, VERMILLION, PURPLE, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#808080"
NUM_COLOURS = 16  # that learning rates are told apart by in lines


@dataclass(frozen=True)
class Findings:
    """What a study has found, which figures are drawn of; `importances` of parameters are empty where unknown."""

    study: StudyRecord
    trials: Sequence[TrialRecord]  # of the search
    best: Best | None
    importances: Mapping[str, float]
    others: Sequence[TrialRecord] = ()  # those that confirm

    @property
    def all_trials(self) -> list[TrialRecord]:
        return [*self.trials, *self.others]

    @property
    def is_accuracy(self) -> bool:
        values = [trial.value for trial in self.trials if trial.value is not None]
        return self.study.spec.metric.endswith("accuracy") and all(0 <= value <= 1 for value in values)


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


def rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def short(value: float | None, digits: int = 4) -> float | None:
    """To so many significant digits, so that a thousand trials stay a small file; None is a gap."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def rate_of(trial: TrialRecord) -> float | None:
    """Its learning rate, where it has one: a loop of the user's may call anything `lr`."""
    rate: Any = trial.params.get("lr")
    return float(rate) if is_rate(rate) else None


def rate_axis(**settings: Any) -> dict[str, Any]:
    """A logarithmic axis of learning rates."""
    return {"type": "log", "title": {"text": "learning rate"}, "exponentformat": "power", "dtick": 1,
            "minor": {"ticks": "inside", "dtick": "D1", "ticklen": 3}, **settings}  # fmt: skip


def value_axis(findings: Findings, **settings: Any) -> dict[str, Any]:
    """An axis of what is searched for."""
    form = {"tickformat": ".0%"} if findings.is_accuracy else {"exponentformat": "e"}
    return {"title": {"text": escaped(findings.study.spec.metric)}, **form, **settings}


def escaped(text: object) -> str:
    """As Plotly shows it as it is: it reads a few tags, links among them, in any text."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def pointed_at(findings: Findings, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """Of a trace with a mark for each trial: what is shown where a pointer rests on it.

    The same text stands in several figures: a page may keep one of each trial, and `meta` says that it can.
    """
    return {
        "text": [label(findings, trial) for trial in trials],
        "customdata": [trial.number for trial in trials],
        "meta": {"labelled": True},
        "hovertemplate": "%{text}<extra></extra>",
    }


def label(findings: Findings, trial: TrialRecord) -> str:
    """What is shown of a trial where a pointer rests on it."""
    study = findings.study
    value = "" if trial.value is None else f"<br>{escaped(study.spec.metric)} {value_in_words(trial.value, study)}"
    epochs = f"{len(trial.epochs)} epoch{'s' * (len(trial.epochs) != 1)}"
    return f"trial {trial.number}, {trial.state}, {epochs}<br>{escaped(params_text(trial.params))}{value}"


def worst_shown(findings: Findings, values: Sequence[float]) -> tuple[float, float]:
    """Between which values the axis runs; what is beyond is shown at its end, or one exploded trial hides the others.

    The same rule as the response's: no worse than three times as far from the median as the best is.
    """
    import statistics

    from hpo.analysis.response import WORST

    low, high = min(values), max(values)
    middle = statistics.median(values)
    if findings.is_accuracy:
        low, high = max(0.0, low), min(1.0, high)
    elif findings.study.spec.direction == "minimize":
        high = min(high, middle + WORST * (middle - low) or high)
    else:
        low = max(low, middle - WORST * (high - middle) or low)
    if not (math.isfinite(low) and math.isfinite(high)):
        return min(values), max(values)
    return low, high


def shares(counts: Mapping[str, float]) -> str:
    """Parts of a whole in words, the largest first."""
    total = sum(counts.values()) or 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count / total:.0%}" for name, count in ranked if count)
