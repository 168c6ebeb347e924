"""Whether the range of learning rates should grow: where the best rates lie at an end of it (`search.grow`)."""

from __future__ import annotations

from collections.abc import Sequence

from hpo.analysis.answer import Best
from hpo.analysis.trials import has_rate, search_trials
from hpo.analysis.warnings import find_touched_end
from hpo.search.space import Range
from hpo.study.records import StudyRecord, TrialRecord

GROWTH_FACTOR = 10  # of an end, each time
MAX_GROWTHS = 3  # of one study


def find_grown_range(
    study: StudyRecord, trials: Sequence[TrialRecord], answer: Best | None
) -> tuple[float, float] | None:
    """Return the range with another decade at the end that the best rates touch, or None where it should not grow.

    The recommended rate is within a decade of that end, too: a mere doubt is no reason to train there. The range does
    not grow upwards where training diverged, nor more than MAX_GROWTHS times.
    """
    lr = study.spec.search.parameters.get("lr")
    response = None if answer is None else answer.response
    if not study.spec.search.grow or study.num_growths >= MAX_GROWTHS or response is None or not isinstance(lr, Range):
        return None
    low, high = float(lr.low), float(lr.high)
    touched = find_touched_end(response.draws_of_best, low, high)
    if touched == "low" and response.best <= low * GROWTH_FACTOR:
        return low / GROWTH_FACTOR, high
    died = [trial for trial in search_trials(trials) if has_rate(trial) and trial.state == "diverged"]
    if touched != "high" or response.best < high / GROWTH_FACTOR or died or response.divergence_lr is not None:
        return None
    return low, high * GROWTH_FACTOR
