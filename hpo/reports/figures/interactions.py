"""The interactions of parameters: the first one, the learning rate if there is one, against each other one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.analysis.text import params_text
from hpo.reports.figures.data import FigureData, hover_settings, shown_bounds
from hpo.reports.figures.style import BELOW, STATE_STYLES, VERMILLION, escape_plotly, lay_out, rate_axis, round_digits
from hpo.search.space import Conditional, Range
from hpo.study.records import TrialRecord

MAX_INTERACTIONS = 4  # parameters that are drawn against the first one
MAX_INTERACTION_MARKS = 500  # in each panel; of more trials, the latest


def draw_interactions(data: FigureData) -> go.Figure | None:
    """Draw a panel for each other parameter, with a mark for each trial that is coloured by its value."""
    first, others = _ranked_parameters(data)
    values = [trial.value for trial in data.trials if trial.value is not None]
    if not others or not values:
        return None
    others = others[:MAX_INTERACTIONS]
    bounds = shown_bounds(data, values)
    figure = make_subplots(rows=len(others), shared_xaxes=True, vertical_spacing=0.2 / len(others) ** 1.5)
    latest = data.trials[-MAX_INTERACTION_MARKS:]
    for row, name in enumerate(others, start=1):
        both = [trial for trial in latest if first in trial.params and name in trial.params]
        for state in ("diverged", "pruned", "complete"):
            in_state = [trial for trial in both if trial.state == state]
            if in_state:
                marker = {"symbol": STATE_STYLES[state].symbol, "size": 9, **_mark_colour(state, in_state, bounds)}
                figure.add_scatter(
                    x=[_axis_value(trial.params[first]) for trial in in_state],
                    y=[_axis_value(trial.params[name]) for trial in in_state],
                    mode="markers",
                    name=state,
                    legendgroup=state,
                    showlegend=False,
                    marker=marker,
                    **hover_settings(data, in_state),
                    row=row,
                    col=1,
                )
        figure.update_yaxes(**_parameter_axis(data, name), row=row)
    _add_legend(figure, {trace.name for trace in figure.data})
    figure.update_xaxes(**_parameter_axis(data, first) | {"title": None})
    figure.update_xaxes(title={"text": _axis_name(first)}, row=len(others))
    form = {"tickformat": "~%"} if data.is_accuracy else {}
    bar = {"title": {"text": escape_plotly(data.study.spec.metric), "side": "right"}, **form}
    low, high = bounds
    figure.update_layout(coloraxis={"cmin": low, "cmax": high, "colorbar": bar})
    # Below, as above the axes a narrow page has the colour bar.
    return lay_out(figure, height=110 + 230 * len(others), legend=BELOW)


def _mark_colour(state: str, trials: Sequence[TrialRecord], bounds: tuple[float, float]) -> dict[str, Any]:
    if state == "diverged":
        return {"color": VERMILLION, "opacity": 0.7}
    low, high = bounds
    values = [round_digits(min(max(trial.value or 0.0, low), high)) for trial in trials]
    return {"color": values, "coloraxis": "coloraxis"}


def _add_legend(figure: go.Figure, drawn: Collection[str]) -> None:
    """Add a legend entry for each state that is drawn; a mark whose colour is its value has none of its own."""
    for state in (state for state in ("complete", "pruned", "diverged") if state in drawn):
        colour = VERMILLION if state == "diverged" else STATE_STYLES["failed"].colour
        marker = {"symbol": STATE_STYLES[state].symbol, "size": 9, "color": colour}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=state, legendgroup=state, marker=marker)


def interactions_caption(data: FigureData) -> str:
    """Return which parameters are drawn, and the values of the best trial."""
    first, others = _ranked_parameters(data)
    subject = "Learning rate" if first == "lr" else first
    caption = f"{subject} against {', '.join(others[:MAX_INTERACTIONS])}"
    if data.best is not None:
        caption += f"; the best trial has {params_text(data.best.params)}"
    if len(others) > MAX_INTERACTIONS:
        caption += f"; {len(others) - MAX_INTERACTIONS} more parameters are not drawn"
    if len(data.trials) > MAX_INTERACTION_MARKS:
        caption += f"; the latest {MAX_INTERACTION_MARKS} trials are drawn"
    return f"{caption}."


def _ranked_parameters(data: FigureData) -> tuple[str, list[str]]:
    """Return the first parameter and the others; if the first is the learning rate, by their importance."""
    names = [name for name in data.study.spec.search.parameters if name != "seed"]
    if "lr" in names:
        names.remove("lr")
        return "lr", sorted(names, key=lambda name: -data.importances.get(name, 0.0))
    return (names[0] if names else ""), names[1:]


def _axis_name(parameter: str) -> str:
    return "learning rate" if parameter == "lr" else escape_plotly(parameter)


def _axis_value(value: Any) -> Any:
    """Return a number for an axis of numbers, and anything else as the name of a category."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return round_digits(value) if is_number else escape_plotly(value)


def _parameter_axis(data: FigureData, name: str) -> dict[str, Any]:
    parameter = data.study.spec.search.parameters[name]
    cases = list(parameter.cases.values()) if isinstance(parameter, Conditional) else [parameter]
    values = [trial.params[name] for trial in data.trials if name in trial.params]
    title = {"text": _axis_name(name)}
    if not all(isinstance(_axis_value(value), float) for value in values):
        return {"type": "category", "title": title}
    is_log = name == "lr" or any(isinstance(case, Range) and case.log for case in cases)
    if is_log and all(value > 0 for value in values):
        return rate_axis(title=title)
    return {"title": title}
