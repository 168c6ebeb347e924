"""The bounds of a search: whoever would claim a trial ends it where a limit is reached, or lets its range grow.

What has been trained so far decides, whoever asks: the answer of the store's trials, and their time in training.
"""

from __future__ import annotations

from hpo.analysis.answer import find_best
from hpo.analysis.growth import find_grown_range
from hpo.analysis.search_goal import describe_reached_goal
from hpo.store.searches import SearchProgress
from hpo.store.store import Store
from hpo.study.records import StudyRecord


class SearchLimits:
    """The bounds of a study's search, as one worker knows them; called from the thread that claims."""

    def __init__(self, store: Store, study: StudyRecord) -> None:
        self._store = store
        self._study = study
        self._num_ended = 0  # trials that had ended when the answer was asked for last

    def check(self) -> bool:
        """End the search, or let its range grow, where that is due; return whether its last trial may be begun.

        Of a search that may grow, the last trial waits for all others to end. So nobody takes the study for finished
        before this was decided.
        """
        search = self._study.spec.search
        if search.limits == (None, None) and not search.grow:
            return True
        progress = self._store.searches.progress(self._study)
        if not progress.num_unbegun:
            return True
        if search.hours is not None and self._store.searches.hours_in_training(self._study) >= search.hours:
            self._store.searches.end(self._study, f"it has trained for {search.hours:g} h")
            return True
        is_last = search.grow and progress.num_unbegun == 1 and not progress.num_open
        if search.until is not None or is_last:
            return self._ask(progress, is_last=is_last)
        return not search.grow

    def _ask(self, progress: SearchProgress, *, is_last: bool) -> bool:
        """Ask the answer what is due, once for each number of trials that have ended: it takes a while."""
        may_begin_last = is_last or not self._study.spec.search.grow
        if progress.num_ended == self._num_ended:
            return may_begin_last
        self._num_ended = progress.num_ended
        trials = self._store.trials.get_all(self._study)
        found = find_best(self._study, trials)
        wider, reason = find_grown_range(self._study, trials, found), describe_reached_goal(self._study, found)
        if wider is not None and is_last:
            self._store.searches.grow(self._study, wider)
            return False
        if reason is not None and wider is None:
            self._store.searches.end(self._study, reason)
        return may_begin_last
