"""Who trained when."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from hpo.analysis.text import number_text, params_text
from hpo.report.figures.data import FigureData
from hpo.report.figures.style import (
    STATE_STYLES,
    escape_plotly,
    lay_out,
    round_digits,
)
from hpo.study.records import Attempt, TrialRecord

MAX_BARS = 3000  # attempts in the timeline; of more, the latest
TIME_UNITS = ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))


def draw_timeline(findings: FigureData) -> go.Figure | None:
    """Every attempt at a trial, from its beginning to its end, on a row of its machine's device."""
    attempts = _drawn_attempts(findings)
    if not attempts:
        return None
    start = min(attempt.began for _, attempt in attempts)
    until = max(_end_time(attempt, findings) for _, attempt in attempts)
    seconds, unit = next((seconds, unit) for least, seconds, unit in TIME_UNITS if until - start >= least)
    rows, names = _device_rows(attempts, findings)
    figure = go.Figure()
    for outcome, look in STATE_STYLES.items():
        some = [(trial, attempt, row) for (trial, attempt), row in zip(attempts, rows, strict=True)
                if _outcome(attempt) == outcome]  # fmt: skip
        if some:
            figure.add_bar(
                y=[row for _, _, row in some], orientation="h", name=outcome, width=0.8,
                base=[round_digits((attempt.began - start) / seconds, 6) for _, attempt, _ in some],
                x=[round_digits((_end_time(attempt, findings) - attempt.began) / seconds, 6) for _, attempt, _ in some],
                marker={"color": look.colour, "line": {"width": 0.5, "color": "white"},
                        "pattern": {"shape": look.pattern, "size": 6, "solidity": 0.25}},
                text=[_attempt_label(trial, attempt) for trial, attempt, _ in some], textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title={"text": unit}, rangemode="tozero")
    ticks = {row: name for name, row in names.items()}
    figure.update_yaxes(tickvals=list(ticks), ticktext=[escape_plotly(name) for name in ticks.values()],
                        range=[max(rows) + 0.6, -0.6], showgrid=False)  # fmt: skip
    return lay_out(figure, height=min(150 + 26 * (max(rows) + 1), 720), barmode="overlay")


def timeline_caption(findings: FigureData) -> str:
    attempts = _drawn_attempts(findings)
    names = _device_rows(attempts, findings)[1]
    start = min(attempt.began for _, attempt in attempts)
    took = max(_end_time(attempt, findings) for _, attempt in attempts) - start
    busy = sum(_end_time(attempt, findings) - attempt.began for _, attempt in attempts)
    told = f"{len(attempts)} attempts in {took:.0f} s on {', '.join(names)}; {busy / (took or 1):.1f} trials at a time"
    if (again := len(attempts) - len({trial.number for trial, _ in attempts})) > 0:
        told += f"; {again} were further attempts at a trial"
    if (left := sum(len(trial.attempts) for trial in findings.all_trials) - len(attempts)) > 0:
        told += f"; {left} earlier ones are not drawn"
    return f"{told}."


def _drawn_attempts(findings: FigureData) -> list[tuple[TrialRecord, Attempt]]:
    found = [(trial, attempt) for trial in findings.all_trials for attempt in trial.attempts]
    return sorted(found, key=lambda pair: pair[1].began)[-MAX_BARS:]


def _end_time(attempt: Attempt, findings: FigureData) -> float:
    """When it ended; one that goes on has come as far as the latest that is known of any."""
    if attempt.ended is not None:
        return max(attempt.ended, attempt.began)
    times = [time for trial in findings.all_trials for one in trial.attempts for time in (one.began, one.ended or 0.0)]
    return max(times)


def _outcome(attempt: Attempt) -> str:
    return "running" if attempt.outcome is None else attempt.outcome if attempt.outcome in STATE_STYLES else "other"


def _device_rows(
    attempts: Sequence[tuple[TrialRecord, Attempt]], findings: FigureData
) -> tuple[list[int], Mapping[str, int]]:
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
            heapq.heappush(in_use, (_end_time(attempt, findings), row))
            rows[index] = first + row
        first += num_rows
    return rows, names


def _attempt_label(trial: TrialRecord, attempt: Attempt) -> str:
    took = "" if attempt.ended is None else f", {number_text(float(attempt.ended - attempt.began))} s"
    return (
        f"trial {trial.number}, attempt {attempt.attempt}{took}<br>{escape_plotly(params_text(trial.params))}"
        f"<br>worker {escape_plotly(attempt.worker_id)}: {escape_plotly(attempt.outcome or 'running')}"
    )
