"""How the parameters act together."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.analysis.text import params_text
from hpo.report.figures.data import FigureData, hover_settings, shown_bounds
from hpo.report.figures.style import (
    STATE_STYLES,
    VERMILLION,
    escape_plotly,
    lay_out,
    rate_axis,
    round_digits,
)
from hpo.search.space import Conditional, Range

MAX_INTERACTIONS = 4  # parameters beside the first
MAX_INTERACTION_MARKS = 500  # in each panel of interactions; of more trials, the latest


def draw_interactions(findings: FigureData) -> go.Figure | None:
    """The first parameter, the learning rate where there is one, against each other one, coloured by the value."""
    first, others = _axes_of(findings)
    valued = [trial for trial in findings.trials if trial.value is not None]
    if not others or not valued:
        return None
    others = others[:MAX_INTERACTIONS]
    low, high = shown_bounds(findings, [trial.value for trial in valued if trial.value is not None])
    figure = make_subplots(rows=len(others), shared_xaxes=True, vertical_spacing=0.2 / len(others) ** 1.5)
    latest = findings.trials[-MAX_INTERACTION_MARKS:]
    for row, name in enumerate(others, start=1):
        for state in ("diverged", "pruned", "complete"):
            some = [
                trial for trial in latest
                if trial.state == state and first in trial.params and name in trial.params
            ]  # fmt: skip
            if not some:
                continue
            colour: dict[str, Any] = {"color": VERMILLION, "opacity": 0.7}
            if state != "diverged":
                shown = [round_digits(min(max(trial.value or 0.0, low), high)) for trial in some]
                colour = {"color": shown, "coloraxis": "coloraxis"}
            figure.add_scatter(
                x=[_axis_value(trial.params[first]) for trial in some], y=[_axis_value(trial.params[name]) for trial in some],
                mode="markers", name=state, legendgroup=state, showlegend=False,
                marker={"symbol": STATE_STYLES[state].symbol, "size": 9, **colour},
                **hover_settings(findings, some),
                row=row, col=1,
            )  # fmt: skip
        figure.update_yaxes(**_parameter_axis(findings, name), row=row)
    for state in ("complete", "pruned", "diverged"):  # a mark whose colour is its value has none for the legend
        colour = {"color": VERMILLION if state == "diverged" else STATE_STYLES["failed"].colour}
        marker = {"symbol": STATE_STYLES[state].symbol, "size": 9, **colour}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=state, legendgroup=state, marker=marker)
    figure.update_xaxes(**_parameter_axis(findings, first) | {"title": None})
    figure.update_xaxes(title={"text": _axis_name(first)}, row=len(others))
    form = {"tickformat": ".0%"} if findings.is_accuracy else {}
    bar = {"title": {"text": escape_plotly(findings.study.spec.metric), "side": "right"}, **form}
    figure.update_layout(coloraxis={"cmin": low, "cmax": high, "colorbar": bar})
    return lay_out(figure, height=110 + 230 * len(others))


def interactions_caption(findings: FigureData) -> str:
    first, others = _axes_of(findings)
    told = f"{_axis_name(first)} against {', '.join(others[:MAX_INTERACTIONS])}"
    if found := findings.best:
        told += f"; the best trial has {params_text(found.params)}"
    if len(others) > MAX_INTERACTIONS:
        told += f"; {len(others) - MAX_INTERACTIONS} more parameters are not drawn"
    if len(findings.trials) > MAX_INTERACTION_MARKS:
        told += f"; the latest {MAX_INTERACTION_MARKS} trials are drawn"
    return f"{told}."


def _axes_of(findings: FigureData) -> tuple[str, list[str]]:
    names = [name for name in findings.study.spec.search.parameters if name != "seed"]
    if "lr" in names:
        names.remove("lr")
        return "lr", sorted(names, key=lambda name: -findings.importances.get(name, 0.0))
    return (names[0] if names else ""), names[1:]


def _axis_name(name: str) -> str:
    return "learning rate" if name == "lr" else escape_plotly(name)


def _axis_value(value: Any) -> Any:
    """A number as it is, anything else as the name of a category."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return round_digits(value) if is_number else escape_plotly(value)


def _parameter_axis(findings: FigureData, name: str) -> dict[str, Any]:
    parameter = findings.study.spec.search.parameters[name]
    ranges = list(parameter.cases.values()) if isinstance(parameter, Conditional) else [parameter]
    numbers = [trial.params[name] for trial in findings.trials if name in trial.params]
    if not all(isinstance(_axis_value(number), float) for number in numbers):
        return {"type": "category", "title": {"text": _axis_name(name)}}
    is_log = any(isinstance(some, Range) and some.log for some in ranges) or name == "lr"
    if is_log and all(number > 0 for number in numbers):
        return rate_axis(title={"text": _axis_name(name)})
    return {"title": {"text": _axis_name(name)}}
