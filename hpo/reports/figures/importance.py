"""The importance of the parameters: what share of the differences between good trials and all of them each explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from hpo.reports.figures.data import FigureData
from hpo.reports.figures.style import BLUE, escape_plotly, lay_out, round_digits, shares_text
from hpo.study.records import StudyRecord, TrialRecord

MIN_RANKED = 50  # trials with a value; with fewer, importance is noise
MAX_CATEGORIES = 8  # a parameter with at most so many values is treated as categorical
GOOD_SHARE = 0.25  # of the trials, which count as good; Optuna's tenth of 40 trials says nothing
MAX_RANKED = 2000  # trials that importance is computed from; of more, the latest


def parameter_importances(study: StudyRecord, trials: Sequence[TrialRecord]) -> dict[str, float]:
    """Return the share of each searched parameter, together 1; empty for fewer than two, or if they cannot be computed.

    The method is Optuna's PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023) over the trials as people see them: a
    conditional parameter is one parameter. Pruned trials count with their last report, diverged ones with the worst
    value of all, as samplers see them.
    """
    names = [name for name in study.spec.search.parameters if name != "seed"]
    ended = [trial for trial in trials if trial.state in ("complete", "pruned", "diverged")][-MAX_RANKED:]
    values = [trial.value for trial in ended if trial.value is not None and math.isfinite(trial.value)]
    ranked = [
        trial
        for trial in ended
        if (trial.value is not None or trial.state == "diverged") and all(name in trial.params for name in names)
    ]
    if len(names) < 2 or len(values) < MIN_RANKED:
        return {}
    worst = max(values) if study.spec.direction == "minimize" else min(values)
    return _ped_anova(study, ranked, names, worst=worst)


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
            params = {name: _optuna_value(trial.params[name], distributions[name]) for name in names}
            value = worst if trial.value is None else trial.value
            ranking.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
        importances = get_param_importances(
            ranking, evaluator=PedAnovaImportanceEvaluator(target_quantile=GOOD_SHARE), params=list(names)
        )
    except (ValueError, RuntimeError):  # such as a parameter of one value
        return {}
    finally:
        optuna.logging.set_verbosity(verbosity)
    total = sum(importances.values())
    return {name: share / total for name, share in importances.items()} if total > 0 else {}


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    # The density of a few values is all peaks; between them PED-ANOVA would divide 0 by 0.
    if any(isinstance(value, bool | str) for value in values) or len(set(values)) <= MAX_CATEGORIES:
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = float(min(values)), float(max(values))
    return FloatDistribution(low, high, log=low > 0 and high / low >= 100)


def _optuna_value(value: Any, distribution: Any) -> Any:
    return str(value) if hasattr(distribution, "choices") else float(value)


def draw_importance(data: FigureData) -> go.Figure | None:
    """Draw a bar for the importance of each parameter."""
    if not data.importances:
        return None
    ranked = sorted(data.importances.items(), key=lambda item: item[1])
    figure = go.Figure()
    figure.add_bar(
        y=[escape_plotly(name) for name, _ in ranked],
        x=[round_digits(share) for _, share in ranked],
        orientation="h",
        marker={"color": BLUE},
        text=[f"{share:.0%}" for _, share in ranked],
        textposition="auto",
        hovertemplate="%{y}: %{x:.0%}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", title={"text": "importance"})
    figure.update_yaxes(type="category")
    return lay_out(figure, height=110 + 34 * len(ranked), margin={"l": 8, "r": 8, "t": 8, "b": 8})


def importance_caption(data: FigureData) -> str:
    """Return the importances, and how far to trust them."""
    states = {trial.state for trial in data.trials}
    counted = {"pruned": "their last report", "diverged": "the worst value"}
    counting = [f"{state} trials count with {what}" for state, what in counted.items() if state in states]
    sentences = [
        f"Importance for being among the best quarter of trials (PED-ANOVA): {shares_text(data.importances)}",
        *([" and ".join(counting).capitalize()] if counting else []),
        "It is rough: of a hundred trials, a parameter that does nothing may get a fifth",
    ]
    return f"{'. '.join(sentences)}."
