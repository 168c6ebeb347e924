"""What a study has found, as Plotly figures with a text that says the same; a table of them, one entry each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.analysis.answer import Best
from hpo.analysis.trials import search_trials
from hpo.report.figures import confirmation as figures_answer
from hpo.report.figures import curves, epochs, importance, interactions, range_test, timeline
from hpo.report.figures import history as figures_search
from hpo.report.figures import response as figures_rate
from hpo.report.figures.data import FigureData
from hpo.study.records import StudyRecord, TrialRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go
from hpo.report.figures.importance import parameter_importances


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure. `draw_figures` returns None where there is nothing to show; `tell` is only asked where there is."""

    title: str
    draw: Callable[[FigureData], go.Figure | None]
    tell: Callable[[FigureData], str]


@dataclass(frozen=True)
class DrawnFigure:
    """A figure of a study; `text` says what it shows, with its numbers."""

    name: str
    title: str
    figure: go.Figure
    text: str


FIGURES: dict[str, FigureKind] = {
    "response": FigureKind(
        "The response to the learning rate", figures_rate.draw_response, figures_rate.response_caption
    ),
    "confirmation": FigureKind(
        "Confirmed on fresh seeds", figures_answer.draw_confirmation, figures_answer.confirmation_caption
    ),
    "curves": FigureKind("Learning curves", curves.draw_curves, curves.curves_caption),
    "history": FigureKind("History", figures_search.draw_history, figures_search.history_caption),
    "epochs": FigureKind("Where the epochs went", epochs.draw_epochs, epochs.epochs_caption),
    "importance": FigureKind("What matters", importance.draw_importance, importance.importance_caption),
    "interactions": FigureKind(
        "How they act together", interactions.draw_interactions, interactions.interactions_caption
    ),
    "range_test": FigureKind("The range test", range_test.draw_range_test, range_test.range_test_caption),
    "timeline": FigureKind("Workers and devices", timeline.draw_timeline, timeline.timeline_caption),
}


def make_figure_data(study: StudyRecord, trials: Sequence[TrialRecord], best: Best | None) -> FigureData:
    """What figures are drawn of; `best` is the trials' answer."""
    mine = search_trials(trials)
    others = [trial for trial in trials if trial.kind != "search"]
    return FigureData(study, mine, best, parameter_importances(study, mine), others)


def draw_figures(found: FigureData, names: Sequence[str] = tuple(FIGURES)) -> list[DrawnFigure]:
    """The figures of these names that have something to show."""
    drawn = [(name, FIGURES[name].draw(found)) for name in names]
    return [
        DrawnFigure(name, FIGURES[name].title, figure, FIGURES[name].tell(found))
        for name, figure in drawn
        if figure is not None
    ]
