"""Whether a search is sure enough of its answer to end: the goal that `search.until` sets."""

from __future__ import annotations

import math

from hpo.analysis.answer import Best
from hpo.analysis.response import CONFIDENCE
from hpo.analysis.text import difference_text, is_shown_in_percent
from hpo.study.records import StudyRecord


def describe_reached_goal(study: StudyRecord, answer: Best | None) -> str | None:
    """Return how an answer reaches the goal of the search, in words; None where it does not, or there is no goal.

    An answer that leaves the best learning rate open reaches no goal.
    """
    goal, response = study.spec.search.goal, None if answer is None else answer.response
    if goal is None or response is None or not response.is_determined:
        return None
    if goal.unit == "decade":
        low, high = response.interval
        doubt = math.log10(high / low)
        finding = f"the {100 * CONFIDENCE:.0f} % interval is {doubt:.2g} decades wide"
    else:
        doubt = response.shortfall * (100 if is_shown_in_percent(response.value, study) else 1)
        behind = difference_text(study, response.shortfall, of=response.value)
        finding = f"the recommended rate is expected to be {behind} behind the best one"
    return finding if doubt <= goal.amount else None
