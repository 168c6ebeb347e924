"""Where the epochs of a study went: by learning rate, and by how and when trials ended."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpo.reports.figures.data import FigureData, rate_of
from hpo.reports.figures.style import STATE_STYLES, count_axis, lay_out, shares_text
from hpo.study.records import TrialRecord


def draw_epochs(data: FigureData) -> go.Figure | None:
    """Draw the epochs by learning rate and state of the trial, and how many trials ended after which epoch."""
    trained = [trial for trial in data.all_trials if _num_trained(trial) > 0]
    if not trained:
        return None
    figure = make_subplots(rows=2, vertical_spacing=0.24, row_heights=[0.55, 0.45])
    bins = _rate_bins(trained)
    names = [name for name, _ in bins]
    for state, style in STATE_STYLES.items():
        spent = [sum(_num_trained(trial) for trial in members if trial.state == state) for _, members in bins]
        if not any(spent):
            continue
        marker = {"color": style.colour, "pattern": {"shape": style.pattern, "size": 6, "solidity": 0.25}}
        figure.add_bar(
            x=names,
            y=spent,
            name=state,
            legendgroup=state,
            marker=marker,
            hovertemplate=f"{state}: %{{y}} epochs<br>learning rate %{{x}}<extra></extra>",
            row=1,
            col=1,
        )
        ends = [_num_trained(trial) for trial in trained if trial.state == state]
        lasts = sorted(set(ends))
        figure.add_bar(
            x=lasts,
            y=[ends.count(last) for last in lasts],
            name=state,
            legendgroup=state,
            showlegend=False,
            marker=marker,
            hovertemplate=f"{state} after epoch %{{x}}: %{{y}} trials<extra></extra>",
            row=2,
            col=1,
        )
    figure.update_xaxes(title={"text": "learning rate", "standoff": 8}, type="category", row=1)
    figure.update_yaxes(title={"text": "epochs"}, row=1)
    most = max(map(_num_trained, trained))
    figure.update_xaxes(title={"text": "epochs that a trial was trained"}, **count_axis(1, most), row=2)
    figure.update_yaxes(title={"text": "trials"}, row=2)
    return lay_out(figure, height=460, barmode="stack", bargap=0.25)


def epochs_caption(data: FigureData) -> str:
    """Return how many epochs were trained, and how many there would have been without pruning."""
    trained = [trial for trial in data.all_trials if _num_trained(trial) > 0]
    spent = dict.fromkeys((trial.state for trial in trained), 0.0)
    for trial in trained:
        spent[trial.state] += _num_trained(trial)
    most = data.study.spec.training.epochs
    full = sum(int(trial.params.get("epochs", most)) for trial in trained)
    total = int(sum(spent.values()))
    saved = f"; training all of these trials to the end would have taken {full:,}" if full > total else ""
    again = sum(len(trial.epochs) for trial in data.others if trial.kind == "confirm")
    confirmed = f" {again:,} of them were spent on the confirmation." if again else ""
    return f"{total:,} epochs were trained{saved}.{confirmed} By how the trial ended: {shares_text(spent)}."


def _num_trained(trial: TrialRecord) -> int:
    """Return how many epochs a trial was trained; one that tests has those of the network that it measures, too."""
    loaded = trial.attempts[0].resumed_from if trial.kind == "test" and trial.attempts else 0
    return len(trial.epochs) - (loaded or 0)


def _rate_bins(trials: Sequence[TrialRecord]) -> list[tuple[str, list[TrialRecord]]]:
    """Return trials by their learning rate, in bins of half a decade, or of a decade if those would be many."""
    rated = [(math.log10(rate), trial) for trial in trials if (rate := rate_of(trial))]
    if not rated:
        return [("all", list(trials))]
    lowest, highest = min(rate for rate, _ in rated), max(rate for rate, _ in rated)
    width = 0.5 if highest - lowest <= 5 else 1.0
    first, last = math.floor(lowest / width), math.floor(highest / width)
    bins: list[list[TrialRecord]] = [[] for _ in range(min(last - first, 30) + 1)]
    for rate, trial in rated:
        bins[min(math.floor(rate / width) - first, len(bins) - 1)].append(trial)
    ends = [10 ** (width * (first + index)) for index in range(len(bins) + 1)]
    names = [f"{float(f'{end:.1g}'):g}" for end in ends]  # 10, not 1e+01
    return [(f"{names[index]}–{names[index + 1]}", members) for index, members in enumerate(bins)]
