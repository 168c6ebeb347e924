"""What follows the trials of a study once all of them have ended: its confirmation, then the test of the winner."""

from __future__ import annotations

from hpo.analysis.answer import find_best
from hpo.analysis.due_trials import plan_due_trials
from hpo.store.store import Store
from hpo.study.records import ENDED, StudyRecord


def add_due_trials(store: Store, study: StudyRecord) -> bool:
    """Add the trials of the stage that is due, and return whether there is anything more to train.

    Any number of workers may call it at once: the first one adds them, and nobody adds them a second time.
    """
    if store.studies.stage_due(study) is None:
        return store.trials.num_left(study) > 0
    trials = store.trials.get_all(study)
    if any(trial.state not in ENDED for trial in trials):
        return True  # another caller has just added them
    found = find_best(study, trials)
    planned = plan_due_trials(study, trials, found) if found is not None else []
    store.studies.add_planned(study, planned, after=len(trials))
    return bool(planned)
