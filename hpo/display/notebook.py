"""The display of a study in a notebook: a table below the cell, renewed while the study trains."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

from hpo.analysis.text import counts_text, study_text
from hpo.display.progress import Pace, duration_text, study_progress
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.system.html import html_paragraph, html_table, html_text

NOTEBOOK_REFRESH_S = 1.0


def is_in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, whose cells can show HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell"


class NotebookDisplay:
    """The display of a study while it trains; a context manager, used as `LiveDisplay` is."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._watched: tuple[Store, StudyRecord] | None = None
        self._pace = Pace()
        self._next_read = 0.0

    def __enter__(self) -> NotebookDisplay:
        from IPython.display import HTML, display

        self._handle = display(HTML(html_paragraph("checking devices, data and network ...")), display_id=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watched is not None:
            self._next_read = 0.0
            with suppress(KeyError):  # Optuna's, where the study was deleted
                self.update(self._watched[0])
        else:
            self._show("")

    def watch(self, store: Store, study: StudyRecord) -> Any:
        """Begin to show this study, and return the function to call while workers run."""
        self._watched = store, study
        return self.update

    def update(self, store: Store) -> None:
        """Show what the store has, if the last update is long enough ago."""
        if self._watched is None or time.monotonic() < self._next_read:
            return
        began, study = time.monotonic(), self._watched[1]
        trials = store.trials.get_all(study)
        self._show(progress_html(study, trials, seconds_left=self._pace.seconds_left(study, trials)))
        ended = time.monotonic()
        self._next_read = ended + max(NOTEBOOK_REFRESH_S, 10 * (ended - began))

    def _show(self, text: str) -> None:
        from IPython.display import HTML

        self._handle.update(HTML(text))


def progress_html(study: StudyRecord, trials: Any, *, seconds_left: float | None) -> str:
    """Return how far a study has come, with a table of the trials in training."""
    progress = study_progress(study, trials)
    amount = f"{progress.done} of {progress.total} {progress.unit} ({counts_text(trials)})"
    if seconds_left is not None and progress.done < progress.total:
        amount += f", about {duration_text(seconds_left)} left"
    bar = f'<progress max="{progress.total}" value="{progress.done}"></progress> {html_text(amount)}'
    table = html_table(progress.columns, progress.rows) if progress.rows else ""
    sentences = "".join(map(html_paragraph, progress.lines))
    return f"{html_paragraph(f'study {study.name}: {study_text(study)}')}<p>{bar}</p>{table}{sentences}"
