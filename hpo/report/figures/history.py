"""The figures of the search: its history, what the parameters matter, how they act together, and who trained when."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.analysis.text import counts_in_words, number_in_words, params_text, value_in_words
from hpo.report.figures.style import (
    BLUE,
    GREEN,
    STATE_STYLES,
    VERMILLION,
    Findings,
    escaped,
    lay_out,
    pointed_at,
    rate_axis,
    shares,
    short,
    value_axis,
    worst_shown,
)  # fmt: skip
from hpo.search.space import Conditional, Range
from hpo.study.records import Attempt, TrialRecord

MOST_INTERACTIONS = 4  # parameters beside the first
MOST_MARKS = 500  # in each panel of interactions; of more trials, the latest
MOST_BARS = 3000  # attempts in the timeline; of more, the latest
UNITS = ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))


# The history


def history(findings: Findings) -> go.Figure | None:
    """The value of each trial in the order of their numbers, and the best so far."""
    valued = [trial for trial in findings.trials if trial.value is not None]
    if not valued:
        return None
    figure = go.Figure()
    low, high = worst_shown(findings, [trial.value for trial in valued if trial.value is not None])
    for state, look in STATE_STYLES.items():
        some = [trial for trial in valued if trial.state == state]
        if some:
            figure.add_scatter(
                x=[trial.number for trial in some],
                y=[short(min(max(trial.value or 0.0, low), high)) for trial in some],
                mode="markers", name=state, **pointed_at(findings, some),
                marker={"symbol": look.symbol, "size": 8, "color": look.colour, "opacity": 0.85},
            )  # fmt: skip
    without = [trial for trial in findings.trials if trial.state == "diverged"]
    if without:
        end = high if findings.study.spec.direction == "minimize" else low
        figure.add_scatter(
            x=[trial.number for trial in without], y=[end] * len(without), mode="markers", name="diverged, no value",
            marker={"symbol": "x", "size": 8, "color": VERMILLION},
            **pointed_at(findings, without),
        )  # fmt: skip
    best = _best_so_far(findings)
    if best:
        figure.add_scatter(
            x=[number for number, _ in best], y=[short(value) for _, value in best], mode="lines", name="best so far",
            line={"color": GREEN, "width": 2, "shape": "hv"}, hovertemplate="best so far %{y}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title={"text": "trial"}, rangemode="tozero")
    figure.update_yaxes(**value_axis(findings))
    return lay_out(figure, height=360)


def tell_history(findings: Findings) -> str:
    told = f"{len(findings.trials)} trials: {counts_in_words(findings.trials)}"
    so_far = _best_so_far(findings)
    if so_far:
        best = so_far[-1][1]
        number = next(number for number, value in so_far if value == best)
        told += f"; the best value, {value_in_words(best, findings.study)}, came with trial {number}"
    return f"{told}."


def _best_so_far(findings: Findings) -> list[tuple[int, float]]:
    """(number, the best value of complete trials up to it), from the first complete one on."""
    better = min if findings.study.spec.direction == "minimize" else max
    so_far: list[tuple[int, float]] = []
    for trial in findings.trials:
        if trial.state == "complete" and trial.value is not None:
            best = better(so_far[-1][1], trial.value) if so_far else trial.value
            so_far.append((trial.number, best))
    if so_far:
        so_far.append((max(trial.number for trial in findings.trials), so_far[-1][1]))
    return so_far


# Several parameters


def importance(findings: Findings) -> go.Figure | None:
    """What share of the differences between good trials and all of them each parameter explains."""
    if not findings.importances:
        return None
    ranked = sorted(findings.importances.items(), key=lambda item: item[1])
    figure = go.Figure()
    figure.add_bar(
        y=[escaped(name) for name, _ in ranked], x=[short(share) for _, share in ranked], orientation="h",
        marker={"color": BLUE}, text=[f"{share:.0%}" for _, share in ranked], textposition="auto",
        hovertemplate="%{y}: %{x:.0%}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", title={"text": "importance"})
    figure.update_yaxes(type="category")
    return lay_out(figure, height=110 + 34 * len(ranked), margin={"l": 8, "r": 8, "t": 8, "b": 8})


def tell_importance(findings: Findings) -> str:
    return (
        f"Importance for being among the best quarter of trials (PED-ANOVA): {shares(findings.importances)}. Pruned "
        "trials count with their last report, diverged ones with the worst value. It is rough: of a hundred trials, a "
        "parameter that does nothing may get a fifth."
    )


def interactions(findings: Findings) -> go.Figure | None:
    """The first parameter, the learning rate where there is one, against each other one, coloured by the value."""
    first, others = _axes_of(findings)
    valued = [trial for trial in findings.trials if trial.value is not None]
    if not others or not valued:
        return None
    others = others[:MOST_INTERACTIONS]
    low, high = worst_shown(findings, [trial.value for trial in valued if trial.value is not None])
    figure = make_subplots(rows=len(others), shared_xaxes=True, vertical_spacing=0.2 / len(others) ** 1.5)
    latest = findings.trials[-MOST_MARKS:]
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
                shown = [short(min(max(trial.value or 0.0, low), high)) for trial in some]
                colour = {"color": shown, "coloraxis": "coloraxis"}
            figure.add_scatter(
                x=[_shown(trial.params[first]) for trial in some], y=[_shown(trial.params[name]) for trial in some],
                mode="markers", name=state, legendgroup=state, showlegend=False,
                marker={"symbol": STATE_STYLES[state].symbol, "size": 9, **colour},
                **pointed_at(findings, some),
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
    bar = {"title": {"text": escaped(findings.study.spec.metric), "side": "right"}, **form}
    figure.update_layout(coloraxis={"cmin": low, "cmax": high, "colorbar": bar})
    return lay_out(figure, height=110 + 230 * len(others))


def tell_interactions(findings: Findings) -> str:
    first, others = _axes_of(findings)
    told = f"{_axis_name(first)} against {', '.join(others[:MOST_INTERACTIONS])}"
    if found := findings.best:
        told += f"; the best trial has {params_text(found.params)}"
    if len(others) > MOST_INTERACTIONS:
        told += f"; {len(others) - MOST_INTERACTIONS} more parameters are not drawn"
    if len(findings.trials) > MOST_MARKS:
        told += f"; the latest {MOST_MARKS} trials are drawn"
    return f"{told}."


def _axes_of(findings: Findings) -> tuple[str, list[str]]:
    names = [name for name in findings.study.spec.search.parameters if name != "seed"]
    if "lr" in names:
        names.remove("lr")
        return "lr", sorted(names, key=lambda name: -findings.importances.get(name, 0.0))
    return (names[0] if names else ""), names[1:]


def _axis_name(name: str) -> str:
    return "learning rate" if name == "lr" else escaped(name)


def _shown(value: Any) -> Any:
    """A number as it is, anything else as the name of a category."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return short(value) if is_number else escaped(value)


def _parameter_axis(findings: Findings, name: str) -> dict[str, Any]:
    parameter = findings.study.spec.search.parameters[name]
    ranges = list(parameter.cases.values()) if isinstance(parameter, Conditional) else [parameter]
    numbers = [trial.params[name] for trial in findings.trials if name in trial.params]
    if not all(isinstance(_shown(number), float) for number in numbers):
        return {"type": "category", "title": {"text": _axis_name(name)}}
    is_log = any(isinstance(some, Range) and some.log for some in ranges) or name == "lr"
    if is_log and all(number > 0 for number in numbers):
        return rate_axis(title={"text": _axis_name(name)})
    return {"title": {"text": _axis_name(name)}}


# Workers and devices


def timeline(findings: Findings) -> go.Figure | None:
    """Every attempt at a trial, from its beginning to its end, on a row of its machine's device."""
    attempts = _attempts(findings)
    if not attempts:
        return None
    start = min(attempt.began for _, attempt in attempts)
    until = max(_ended(attempt, findings) for _, attempt in attempts)
    seconds, unit = next((seconds, unit) for least, seconds, unit in UNITS if until - start >= least)
    rows, names = _rows(attempts, findings)
    figure = go.Figure()
    for outcome, look in STATE_STYLES.items():
        some = [(trial, attempt, row) for (trial, attempt), row in zip(attempts, rows, strict=True)
                if _outcome(attempt) == outcome]  # fmt: skip
        if some:
            figure.add_bar(
                y=[row for _, _, row in some], orientation="h", name=outcome, width=0.8,
                base=[short((attempt.began - start) / seconds, 6) for _, attempt, _ in some],
                x=[short((_ended(attempt, findings) - attempt.began) / seconds, 6) for _, attempt, _ in some],
                marker={"color": look.colour, "line": {"width": 0.5, "color": "white"},
                        "pattern": {"shape": look.pattern, "size": 6, "solidity": 0.25}},
                text=[_attempt_label(trial, attempt) for trial, attempt, _ in some], textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title={"text": unit}, rangemode="tozero")
    ticks = {row: name for name, row in names.items()}
    figure.update_yaxes(tickvals=list(ticks), ticktext=[escaped(name) for name in ticks.values()],
                        range=[max(rows) + 0.6, -0.6], showgrid=False)  # fmt: skip
    return lay_out(figure, height=min(150 + 26 * (max(rows) + 1), 720), barmode="overlay")


def tell_timeline(findings: Findings) -> str:
    attempts = _attempts(findings)
    names = _rows(attempts, findings)[1]
    start = min(attempt.began for _, attempt in attempts)
    took = max(_ended(attempt, findings) for _, attempt in attempts) - start
    busy = sum(_ended(attempt, findings) - attempt.began for _, attempt in attempts)
    told = f"{len(attempts)} attempts in {took:.0f} s on {', '.join(names)}; {busy / (took or 1):.1f} trials at a time"
    if (again := len(attempts) - len({trial.number for trial, _ in attempts})) > 0:
        told += f"; {again} were further attempts at a trial"
    if (left := sum(len(trial.attempts) for trial in findings.all_trials) - len(attempts)) > 0:
        told += f"; {left} earlier ones are not drawn"
    return f"{told}."


def _attempts(findings: Findings) -> list[tuple[TrialRecord, Attempt]]:
    found = [(trial, attempt) for trial in findings.all_trials for attempt in trial.attempts]
    return sorted(found, key=lambda pair: pair[1].began)[-MOST_BARS:]


def _ended(attempt: Attempt, findings: Findings) -> float:
    """When it ended; one that goes on has come as far as the latest that is known of any."""
    if attempt.ended is not None:
        return max(attempt.ended, attempt.began)
    times = [time for trial in findings.all_trials for one in trial.attempts for time in (one.began, one.ended or 0.0)]
    return max(times)


def _outcome(attempt: Attempt) -> str:
    return "running" if attempt.outcome is None else attempt.outcome if attempt.outcome in STATE_STYLES else "other"


def _rows(attempts: Sequence[tuple[TrialRecord, Attempt]], findings: Findings) -> tuple[list[int], Mapping[str, int]]:
    """The row of each attempt, and the first row of each device, which has as many as it trained trials at once."""
    places: dict[str, list[int]] = {}
    for index, (_, attempt) in enumerate(attempts):
        places.setdefault(f"{attempt.host or 'unknown'} {attempt.device or ''}".strip(), []).append(index)
    rows, names, first = [0] * len(attempts), {}, 0
    for name, indexes in sorted(places.items()):
        names[name], free, in_use, num_rows = first, list[int](), list[tuple[float, int]](), 0
        for index in indexes:
            attempt = attempts[index][1]
            while in_use and in_use[0][0] <= attempt.began + 1e-3:
                heapq.heappush(free, heapq.heappop(in_use)[1])
            if not free:
                heapq.heappush(free, num_rows)
                num_rows += 1
            row = heapq.heappop(free)
            heapq.heappush(in_use, (_ended(attempt, findings), row))
            rows[index] = first + row
        first += num_rows
    return rows, names


def _attempt_label(trial: TrialRecord, attempt: Attempt) -> str:
    took = "" if attempt.ended is None else f", {number_in_words(float(attempt.ended - attempt.began))} s"
    return (
        f"trial {trial.number}, attempt {attempt.attempt}{took}<br>{escaped(params_text(trial.params))}"
        f"<br>worker {escaped(attempt.worker_id)}: {escaped(attempt.outcome or 'running')}"
    )
