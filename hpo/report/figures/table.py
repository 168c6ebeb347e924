"""What a study has found, as Plotly figures with a text that says the same; a table of them, one entry each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.analysis.answer import Best, searched
from hpo.report.figures import confirmation as figures_answer
from hpo.report.figures import history as figures_search
from hpo.report.figures import response as figures_rate
from hpo.report.figures.style import Findings
from hpo.study.records import StudyRecord, TrialRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go

LEAST_RANKED = 50  # trials with a value, below which importance is noise
MOST_CATEGORIES = 8  # of a parameter with so few values each is a category
TARGET = 0.25  # "good" are so many of the trials; of Optuna's tenth of 40 trials nothing can be told
MOST_RANKED = 2000  # trials that importance is worked out from; of more, the latest


@dataclass(frozen=True)
class Figure:
    """One kind of figure. `draw` returns None where there is nothing to show; `tell` is only asked where there is."""

    title: str
    draw: Callable[[Findings], go.Figure | None]
    tell: Callable[[Findings], str]


@dataclass(frozen=True)
class Drawn:
    """A figure of a study; `text` says what it shows, with its numbers."""

    name: str
    title: str
    figure: go.Figure
    text: str


FIGURES: dict[str, Figure] = {
    "response": Figure("The response to the learning rate", figures_rate.response, figures_rate.tell_response),
    "confirmation": Figure("Confirmed on fresh seeds", figures_answer.confirmation, figures_answer.tell_confirmation),
    "curves": Figure("Learning curves", figures_rate.curves, figures_rate.tell_curves),
    "history": Figure("History", figures_search.history, figures_search.tell_history),
    "epochs": Figure("Where the epochs went", figures_rate.epochs, figures_rate.tell_epochs),
    "importance": Figure("What matters", figures_search.importance, figures_search.tell_importance),
    "interactions": Figure("How they act together", figures_search.interactions, figures_search.tell_interactions),
    "range_test": Figure("The range test", figures_answer.range_test, figures_answer.tell_range_test),
    "timeline": Figure("Workers and devices", figures_search.timeline, figures_search.tell_timeline),
}


def findings(study: StudyRecord, trials: Sequence[TrialRecord], best: Best | None) -> Findings:
    """What figures are drawn of; `best` is the trials' answer."""
    mine = searched(trials)
    others = [trial for trial in trials if trial.kind != "search"]
    return Findings(study, mine, best, importances(study, mine), others)


def draw(found: Findings, names: Sequence[str] = tuple(FIGURES)) -> list[Drawn]:
    """The figures of these names that have something to show."""
    drawn = [(name, FIGURES[name].draw(found)) for name in names]
    return [
        Drawn(name, FIGURES[name].title, figure, FIGURES[name].tell(found))
        for name, figure in drawn
        if figure is not None
    ]


def importances(study: StudyRecord, trials: Sequence[TrialRecord]) -> dict[str, float]:
    """The share of each searched parameter, together 1; empty for fewer than two, or where it cannot be told.

    PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023), as Optuna has it, over the trials as people see them: a
    parameter with cases is one. As the samplers are shown them, pruned trials count with their last report, diverged
    ones with the worst value of all.
    """
    names = [name for name in study.spec.search.parameters if name != "seed"]
    ended = [trial for trial in trials if trial.state in ("complete", "pruned", "diverged")][-MOST_RANKED:]
    values = [trial.value for trial in ended if trial.value is not None and math.isfinite(trial.value)]
    ranked = [trial for trial in ended if (trial.value is not None or trial.state == "diverged")
              and all(name in trial.params for name in names)]  # fmt: skip
    if len(names) < 2 or len(values) < LEAST_RANKED:
        return {}
    return _ped_anova(study, ranked, names, worst=(max if study.spec.direction == "minimize" else min)(values))


def _ped_anova(
    study: StudyRecord, trials: Sequence[TrialRecord], names: Sequence[str], *, worst: float
) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        ranking = optuna.create_study(direction="minimize" if study.spec.direction == "minimize" else "maximize")
        distributions = {name: _distribution([trial.params[name] for trial in trials]) for name in names}
        for trial in trials:
            told = {name: _told(trial.params[name], distributions[name]) for name in names}
            value = worst if trial.value is None else trial.value
            ranking.add_trial(optuna.create_trial(params=told, distributions=distributions, value=value))
        found = get_param_importances(
            ranking, evaluator=PedAnovaImportanceEvaluator(target_quantile=TARGET), params=list(names)
        )
    except (ValueError, RuntimeError):  # such as a parameter of one value
        return {}
    finally:
        optuna.logging.set_verbosity(verbosity)
    total = sum(found.values())
    return {name: share / total for name, share in found.items()} if total > 0 else {}


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    # Of a few values a density is all peaks, between which PED-ANOVA divides nothing by nothing.
    if any(isinstance(value, bool | str) for value in values) or len(set(values)) <= MOST_CATEGORIES:
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = float(min(values)), float(max(values))
    return FloatDistribution(low, high, log=low > 0 and high / low >= 100)


def _told(value: Any, distribution: Any) -> Any:
    return str(value) if hasattr(distribution, "choices") else float(value)
