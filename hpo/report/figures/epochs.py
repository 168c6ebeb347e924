"""Where the epochs went."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.report.figures.data import FigureData, rate_of
from hpo.report.figures.style import (
    STATE_STYLES,
    lay_out,
    shares_text,
)
from hpo.study.records import TrialRecord


def draw_epochs(findings: FigureData) -> go.Figure | None:
    """Epochs of training by learning rate and by how the trial ended, and how many trials ended after which epoch."""
    trained = [trial for trial in findings.all_trials if trial.epochs]
    if not trained:
        return None
    figure = make_subplots(rows=2, vertical_spacing=0.24, row_heights=[0.55, 0.45])
    bins = _rate_bins(trained)
    names = [name for name, _ in bins]
    for state, look in STATE_STYLES.items():
        spent = [sum(len(trial.epochs) for trial in some if trial.state == state) for _, some in bins]
        if not any(spent):
            continue
        marker = {"color": look.colour, "pattern": {"shape": look.pattern, "size": 6, "solidity": 0.25}}
        figure.add_bar(
            x=names, y=spent, name=state, legendgroup=state, marker=marker,
            hovertemplate=f"{state}: %{{y}} epochs<br>learning rate %{{x}}<extra></extra>", row=1, col=1,
        )  # fmt: skip
        ends = [len(trial.epochs) for trial in trained if trial.state == state]
        lasts = sorted(set(ends))
        figure.add_bar(
            x=lasts, y=[ends.count(last) for last in lasts], name=state, legendgroup=state, showlegend=False,
            marker=marker, hovertemplate=f"{state} after epoch %{{x}}: %{{y}} trials<extra></extra>", row=2, col=1,
        )  # fmt: skip
    figure.update_xaxes(title={"text": "learning rate"}, type="category", row=1)
    figure.update_yaxes(title={"text": "epochs"}, row=1)
    figure.update_xaxes(title={"text": "epochs that a trial was trained"}, row=2)
    figure.update_yaxes(title={"text": "trials"}, row=2)
    return lay_out(figure, height=460, barmode="stack", bargap=0.25)


def epochs_caption(findings: FigureData) -> str:
    spent: dict[str, float] = {}
    for trial in findings.all_trials:
        spent[trial.state] = spent.get(trial.state, 0) + len(trial.epochs)
    most = findings.study.spec.training.epochs
    full = sum(int(trial.params.get("epochs", most)) for trial in findings.all_trials if trial.epochs)
    total = int(sum(spent.values()))
    saved = f", where training all of these trials to their end would have taken {full:,}" if full > total else ""
    again = sum(len(trial.epochs) for trial in findings.others if trial.kind == "confirm")
    confirmed = f" {again:,} of them confirmed what was found." if again else ""
    return f"{total:,} epochs were trained{saved}.{confirmed} By how the trial ended: {shares_text(spent)}."


def _rate_bins(trials: Sequence[TrialRecord]) -> list[tuple[str, list[TrialRecord]]]:
    """Trials by their learning rate: half a decade each, or a decade where those would be many."""
    rated = [(math.log10(rate), trial) for trial in trials if (rate := rate_of(trial))]
    if not rated:
        return [("all", list(trials))]
    span = max(rate for rate, _ in rated) - min(rate for rate, _ in rated)
    width = 0.5 if span <= 5 else 1.0
    first = math.floor(min(rate for rate, _ in rated) / width)
    last = math.floor(max(rate for rate, _ in rated) / width)
    bins: list[list[TrialRecord]] = [[] for _ in range(min(last - first, 30) + 1)]
    for rate, trial in rated:
        bins[min(math.floor(rate / width) - first, len(bins) - 1)].append(trial)
    ends = [10 ** (width * (first + index)) for index in range(len(bins) + 1)]
    return [(f"{ends[index]:.1g}–{ends[index + 1]:.1g}", some) for index, some in enumerate(bins)]
