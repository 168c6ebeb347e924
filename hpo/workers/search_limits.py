"""The limits of a search, `search.until` and `search.hours`: whoever would claim a trial ends it where one is reached.

What has been trained so far decides, whoever asks: the answer of the store's trials, and their time in training.
"""

from __future__ import annotations

from hpo.analysis.answer import find_best
from hpo.analysis.search_goal import describe_reached_goal
from hpo.store.store import Store
from hpo.study.records import StudyRecord


class SearchLimits:
    """The limits of a study's search, as one worker knows them; called from the thread that claims."""

    def __init__(self, store: Store, study: StudyRecord) -> None:
        self._store = store
        self._study = study
        self._num_ended = 0  # trials that had ended when the answer was asked for last

    def end_search_if_reached(self) -> None:
        """End the search where a limit is reached, so that nobody begins another trial of it."""
        search = self._study.spec.search
        if search.limits == (None, None):
            return
        num_unbegun, num_ended = self._store.searches.progress(self._study)
        if not num_unbegun:
            return
        reason = None
        if search.hours is not None and self._store.searches.hours_in_training(self._study) >= search.hours:
            reason = f"it has trained for {search.hours:g} h"
        elif num_ended != self._num_ended:  # the answer takes a while, and changes little before another one ends
            self._num_ended = num_ended
            found = find_best(self._study, self._store.trials.get_all(self._study))
            reason = describe_reached_goal(self._study, found)
        if reason is not None:
            self._store.searches.end(self._study, reason)
