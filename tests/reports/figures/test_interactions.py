"""The figure of the interactions."""

from __future__ import annotations

from typing import Any

from tests.analysis.examples import complete, make_study, numbered
from tests.reports.examples import drawn


def test_the_legend_has_the_states_that_are_drawn_and_no_other(large: Any) -> None:
    def states(entry: Any) -> set[str]:
        return {trace.name for trace in entry.figure.data if trace.showlegend is not False}

    assert states(large[2]["interactions"]) == {"complete", "pruned", "diverged"}
    space = {"lr": {"low": 1e-5, "high": 0.1, "log": True}, "width": [1, 2]}
    study = make_study(search={"trials": 16, "space": space}, objective={"function": "m:f", "metric": "val_accuracy"})
    assert states(drawn(study, numbered(*complete(width=1)))["interactions"]) == {"complete"}
