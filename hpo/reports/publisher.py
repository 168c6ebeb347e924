"""The report's figures and answer in optuna-dashboard, renewed while a study trains; nothing waits for them."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from hpo.analysis.answer import find_best
from hpo.store.store import Store
from hpo.study.records import StudyRecord

if TYPE_CHECKING:
    from hpo.reports.study_report import StudyReport

logger = logging.getLogger(__name__)

FIRST_S, EVERY_S = 5.0, 30.0  # the first time loads what drawing needs, so that the end does not have to
MAX_TIME_SHARE = 0.05  # of the study's time that goes into publishing
END_S = 10.0  # how long a study's end waits for publishing
MAX_FIGURE_CHARACTERS = 200_000  # of a figure; Optuna reads the figures of all studies to find one by its name


def publish_report(store: Store, report: StudyReport) -> None:
    """Store the report's figures and, as the study's note, its answer for optuna-dashboard.

    Figures of more than MAX_FIGURE_CHARACTERS are left out. The report's own figures are changed.

    Raises:
        STORE_ERRORS: The store cannot be written.
    """
    from hpo.reports.figures.style import fit_card
    from hpo.reports.figures.table import FIGURES
    from hpo.reports.markdown import escape_markdown, markdown_answer

    figures: dict[str, str | None] = dict.fromkeys(FIGURES)
    for drawn in report.figures:
        fit_card(drawn.figure, drawn.title)
        text = drawn.figure.to_json()
        if len(text) <= MAX_FIGURE_CHARACTERS:
            figures[drawn.name] = text
    note = [*markdown_answer(report), ""]
    note += [f"**{drawn.title}.** {escape_markdown(drawn.caption)}\n" for drawn in report.figures]
    note += [f"All of it as one page: hpo report {escape_markdown(report.study.name)}"]
    store.studies.show(report.study, figures, note="\n".join(note))


class Publisher:
    """Publish a study from a thread of its own, every EVERY_S and once more at the end of the `with` block.

    `publish_if_due` starts the thread and returns at once. The thread has its own connections to the store and never
    waits for an outage to pass. The first error is logged, and none ends the study. Any number of processes may publish
    a study: the latest one's report is shown.
    """

    def __init__(self, store: Store, study: StudyRecord) -> None:
        self._url = store.url.render_as_string(hide_password=False)
        self._study = study
        self._store: Store | None = None
        self._thread: threading.Thread | None = None
        self._next = time.monotonic() + FIRST_S
        self._published: tuple[dict[str, int], int] | None = None
        self._failed = False

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None:  # whoever interrupts a study wants it to end
            self._join()
            self._start()
            self._join()

    def publish_if_due(self) -> None:
        """Start to publish if EVERY_S have passed; call this as often as you like while the study trains."""
        is_busy = self._thread is not None and self._thread.is_alive()
        if not is_busy and time.monotonic() > self._next:
            self._next = float("inf")  # until the thread knows how long publishing took
            self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._publish, name="publisher", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(END_S)

    def _publish(self) -> None:
        began = time.monotonic()
        try:
            self._publish_what_is_new()
        except Exception as error:  # of the store, or of a figure; neither is a reason to end a study
            if not self._failed:
                logger.warning(
                    "the dashboard's figures could not be updated: %s", error, exc_info=logger.isEnabledFor(10)
                )
            self._failed = True
        ended = time.monotonic()
        self._next = ended + max(EVERY_S, (ended - began) / MAX_TIME_SHARE)

    def _publish_what_is_new(self) -> None:
        import scipy.linalg  # noqa: F401  loaded now: at first there is too little to fit, at the end no time
        import scipy.special  # noqa: F401

        from hpo.reports.study_report import make_report

        self._store = self._store or Store(self._url)
        store, study = self._store, self._study
        state = store.trials.counts(study.study_id), store.trials.num_epochs(study)
        if state == self._published:
            return
        trials = store.trials.get_all(study)
        publish_report(store, make_report(study, trials, find_best(study, trials), storage=str(store.url)))
        self._published = state
