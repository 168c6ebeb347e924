"""The timeline of a study: which device trained which trial, and when."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from hpo.analysis.text import number_text, params_text, plural
from hpo.reports.figures.data import FigureData
from hpo.reports.figures.style import STATE_STYLES, escape_plotly, lay_out, round_digits
from hpo.study.records import Attempt, TrialRecord

MAX_BARS = 3000  # attempts that are drawn; of more, the latest
TIME_UNITS = ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))


def draw_timeline(data: FigureData) -> go.Figure | None:
    """Draw a bar for every attempt at a trial, from its beginning to its end, in a row of its device."""
    attempts = _drawn_attempts(data)
    if not attempts:
        return None
    start = min(attempt.began for _, attempt in attempts)
    end = max(_end_time(attempt, data) for _, attempt in attempts)
    unit_s, unit = next((unit_s, unit) for least, unit_s, unit in TIME_UNITS if end - start >= least)
    rows, first_rows = _device_rows(attempts, data)
    figure = go.Figure()
    for outcome, style in STATE_STYLES.items():
        bars = [
            (trial, attempt, row)
            for (trial, attempt), row in zip(attempts, rows, strict=True)
            if _outcome(attempt) == outcome
        ]
        if bars:
            figure.add_bar(
                y=[row for _, _, row in bars],
                orientation="h",
                name=outcome,
                width=0.8,
                base=[round_digits((attempt.began - start) / unit_s, 6) for _, attempt, _ in bars],
                x=[round_digits((_end_time(attempt, data) - attempt.began) / unit_s, 6) for _, attempt, _ in bars],
                marker={
                    "color": style.colour,
                    "line": {"width": 0.5, "color": "white"},
                    "pattern": {"shape": style.pattern, "size": 6, "solidity": 0.25},
                },
                text=[_attempt_label(trial, attempt) for trial, attempt, _ in bars],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )
    figure.update_xaxes(title={"text": unit}, rangemode="tozero")
    figure.update_yaxes(
        tickvals=list(first_rows.values()),
        ticktext=[escape_plotly(device) for device in first_rows],
        range=[max(rows) + 0.6, -0.6],
        showgrid=False,
    )
    return lay_out(figure, height=min(150 + 26 * (max(rows) + 1), 720), barmode="overlay")


def timeline_caption(data: FigureData) -> str:
    """Return how many attempts there were on which devices, and how many trials were trained at a time."""
    attempts = _drawn_attempts(data)
    devices = _device_rows(attempts, data)[1]
    start = min(attempt.began for _, attempt in attempts)
    took = max(_end_time(attempt, data) for _, attempt in attempts) - start
    busy = sum(_end_time(attempt, data) - attempt.began for _, attempt in attempts)
    at_a_time = busy / (took or 1)
    together = "one trial" if f"{at_a_time:.1f}" == "1.0" else f"{at_a_time:.1f} trials"
    caption = f"{plural(len(attempts), 'attempt')} in {took:.0f} s on {', '.join(devices)}; {together} at a time"
    if (again := len(attempts) - len({trial.number for trial, _ in attempts})) > 0:
        were = "1 was a further attempt" if again == 1 else f"{again} were further attempts"
        caption += f"; {were} at a trial"
    if (left := sum(len(trial.attempts) for trial in data.all_trials) - len(attempts)) > 0:
        caption += "; 1 earlier one is not drawn" if left == 1 else f"; {left} earlier ones are not drawn"
    return f"{caption}."


def _drawn_attempts(data: FigureData) -> list[tuple[TrialRecord, Attempt]]:
    attempts = [(trial, attempt) for trial in data.all_trials for attempt in trial.attempts]
    return sorted(attempts, key=lambda pair: pair[1].began)[-MAX_BARS:]


def _end_time(attempt: Attempt, data: FigureData) -> float:
    """Return when an attempt ended; a running one is drawn up to the latest known time of all attempts."""
    if attempt.ended is not None:
        return max(attempt.ended, attempt.began)
    attempts = [attempt for trial in data.all_trials for attempt in trial.attempts]
    return max(time for attempt in attempts for time in (attempt.began, attempt.ended or 0.0))


def _outcome(attempt: Attempt) -> str:
    if attempt.outcome is None:
        return "running"
    return attempt.outcome if attempt.outcome in STATE_STYLES else "other"


def _device_rows(
    attempts: Sequence[tuple[TrialRecord, Attempt]], data: FigureData
) -> tuple[list[int], Mapping[str, int]]:
    """Return the row of each attempt, and the first row of each device.

    A device has as many rows as it trained trials at once.
    """
    by_device: dict[str, list[int]] = {}
    for index, (_, attempt) in enumerate(attempts):
        by_device.setdefault(f"{attempt.host or 'unknown'} {attempt.device or ''}".strip(), []).append(index)
    rows = [0] * len(attempts)
    first_rows: dict[str, int] = {}
    first = 0
    for device, indexes in sorted(by_device.items()):
        first_rows[device] = first
        free: list[int] = []
        in_use: list[tuple[float, int]] = []  # (end, row)
        num_rows = 0
        for index in indexes:
            attempt = attempts[index][1]
            while in_use and in_use[0][0] <= attempt.began + 1e-3:
                heapq.heappush(free, heapq.heappop(in_use)[1])
            if not free:
                heapq.heappush(free, num_rows)
                num_rows += 1
            row = heapq.heappop(free)
            heapq.heappush(in_use, (_end_time(attempt, data), row))
            rows[index] = first + row
        first += num_rows
    return rows, first_rows


def _attempt_label(trial: TrialRecord, attempt: Attempt) -> str:
    took = "" if attempt.ended is None else f", {number_text(float(attempt.ended - attempt.began))} s"
    return (
        f"trial {trial.number}, attempt {attempt.attempt}{took}<br>{escape_plotly(params_text(trial.params))}"
        f"<br>worker {escape_plotly(attempt.worker_id)}: {escape_plotly(attempt.outcome or 'running')}"
    )
