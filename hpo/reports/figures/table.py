"""The table of figures, one entry each: a title, a function that draws it, and a caption with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.analysis.answer import Best
from hpo.analysis.trials import search_trials
from hpo.reports.figures.confirmation import confirmation_caption, draw_confirmation
from hpo.reports.figures.curves import curves_caption, draw_curves
from hpo.reports.figures.data import FigureData
from hpo.reports.figures.epochs import draw_epochs, epochs_caption
from hpo.reports.figures.history import draw_history, history_caption
from hpo.reports.figures.importance import draw_importance, importance_caption, parameter_importances
from hpo.reports.figures.interactions import draw_interactions, interactions_caption
from hpo.reports.figures.range_test import draw_range_test, range_test_caption
from hpo.reports.figures.response import draw_response, response_caption
from hpo.reports.figures.timeline import draw_timeline, timeline_caption
from hpo.study.records import StudyRecord, TrialRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure. `draw` returns None if there is nothing to show; `caption` is asked only if there is."""

    title: str
    draw: Callable[[FigureData], go.Figure | None]
    caption: Callable[[FigureData], str]


@dataclass(frozen=True)
class DrawnFigure:
    """A figure of a study; `caption` says what it shows, with its numbers."""

    name: str
    title: str
    figure: go.Figure
    caption: str


FIGURES: dict[str, FigureKind] = {
    "response": FigureKind("The response to the learning rate", draw_response, response_caption),
    "confirmation": FigureKind("Confirmed on fresh seeds", draw_confirmation, confirmation_caption),
    "curves": FigureKind("Learning curves", draw_curves, curves_caption),
    "history": FigureKind("History", draw_history, history_caption),
    "epochs": FigureKind("Where the epochs went", draw_epochs, epochs_caption),
    "importance": FigureKind("What matters", draw_importance, importance_caption),
    "interactions": FigureKind("How they act together", draw_interactions, interactions_caption),
    "range_test": FigureKind("The range test", draw_range_test, range_test_caption),
    "timeline": FigureKind("Workers and devices", draw_timeline, timeline_caption),
}


def make_figure_data(study: StudyRecord, trials: Sequence[TrialRecord], best: Best | None) -> FigureData:
    """Return the data of the figures of a study with these trials and this answer."""
    searched = search_trials(trials)
    others = [trial for trial in trials if trial.kind != "search"]
    return FigureData(study, searched, best, parameter_importances(study, searched), others)


def draw_figures(data: FigureData, names: Sequence[str] = tuple(FIGURES)) -> list[DrawnFigure]:
    """Return the figures of these names that have something to show."""
    drawn = []
    for name in names:
        kind = FIGURES[name]
        figure = kind.draw(data)
        if figure is not None:
            drawn.append(DrawnFigure(name, kind.title, figure, kind.caption(data)))
    return drawn
