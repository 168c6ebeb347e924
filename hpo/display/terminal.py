"""The display of a study: live on a terminal, as plain log lines elsewhere, and its answer as a table."""

from __future__ import annotations

import logging
import math
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.analysis.answer import Best
from hpo.analysis.answer_text import answer_lines, source_text
from hpo.analysis.comparison import ComparedStudy, Comparison
from hpo.analysis.confirmation import find_test_metric
from hpo.analysis.range_text import range_test_lines
from hpo.analysis.text import (
    growth_text,
    images_text,
    marked_text,
    number_text,
    params_text,
    plural,
    search_end_text,
    study_text,
    value_text,
    weights_text,
)
from hpo.analysis.trials import search_trials
from hpo.display.console import PlainConsole, make_console, make_table, print_table, styled
from hpo.display.progress import Pace, amount_done, duration_text, last_text, study_progress
from hpo.store.store import Store
from hpo.study.records import ENDED, StudyRecord, TrialRecord
from hpo.study.stages import latest
from hpo.system.readable import one_line

REFRESH_S = 0.5  # at least; longer if it takes long to read the study
MAX_ROWS = 60  # of the final table
BAR_WIDTH = 24
MAX_MIN_WIDTH = 24  # of a column of values: up to this, the values are not broken over lines
MAX_LIVE_WIDTH = 16  # the same while trials are in training, with more columns
STRIP_WIDTH = 31
CHANGES_COLUMN = 1  # in what a study differs from the first one
STRIP_COLUMN = 4  # behind the interval that it draws
WIDE = 120  # columns of a terminal with room for it

NO_BREAK = "\0"  # stands for a space in a command while a line is broken; no text that is shown holds one

STYLES = {
    "complete": "green",
    "pruned": "yellow",
    "diverged": "magenta",
    "failed": "red",
    "running": "cyan",
    "waiting": "dim",
}


class ProgressHandler(logging.Handler):
    """Passes on what the reading of images says of its progress in this process, from `show` to `close`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say
        self._logger = logging.getLogger("hpo.train.data.progress")

    def show(self) -> None:
        """Begin to pass messages on."""
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a message on."""
        self._say(record.getMessage())

    def close(self) -> None:
        """Pass nothing on any more."""
        self._logger.removeHandler(self)
        super().close()


class LiveDisplay:
    """The display of a study while it trains.

    A context manager: on a terminal it takes the lower lines of the screen until it is left. Call `update` often: it
    reads the store only as often as is reasonable.
    """

    def __init__(self, console: PlainConsole) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._store: Store | None = None
        self._study: StudyRecord | None = None
        self._next_read = 0.0
        self._reported: dict[int, tuple[str, int]] = {}
        self._progress = ProgressHandler(self._say)
        self._announced: set[str] = set()  # stages, values that the workers share, the end of the search
        self._num_trials = 0
        self._pace = Pace()

    @property
    def has_watched(self) -> bool:
        """Whether a study was watched; one that is answered from the store is not."""
        return self._study is not None

    def __enter__(self) -> LiveDisplay:
        if self._live is not None:
            self._live.start()
            self._live.update(styled(("checking devices, data and network ...", "dim")), refresh=True)
        self._progress.show()
        return self

    def _say(self, text: str) -> None:
        """Show how far the check of the study has come."""
        if self._live is not None:
            self._live.update(styled((text, "dim")), refresh=True)
        else:
            self._console.print(text)

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._next_read = 0.0  # to show what has ended since the last update
        try:
            if self._store is not None:
                with suppress(KeyError):  # Optuna's, where the study was deleted
                    self.update(self._store)
        finally:
            if self._live is not None:
                self._live.stop()

    def watch(self, store: Store, study: StudyRecord) -> Any:
        """Begin to show this study, and return the function to call while workers run."""
        self._progress.close()
        self._store, self._study = store, study
        self._console.print(heading(study))
        for found in (images_text(study), weights_text(study)):
            if found is not None:
                self._console.print(found)
        for line in range_test_lines(study):
            self._console.print(line)
        trials = store.trials.get_all(study)
        done, total, unit = amount_done(study, trials)
        if done:
            self._console.print(f"resuming: {done} of {total} {unit} are done already")
        self._num_trials = len(trials)
        self._reported = {trial.number: (trial.state, len(trial.epochs)) for trial in trials if trial.state in ENDED}
        self._announced |= {
            key for key, members in _stages(trials).items() if all(trial.state in ENDED for trial in members)
        }
        return self.update

    def update(self, store: Store) -> None:
        """Show what has changed in the store, if the last update is long enough ago."""
        self._store = store
        if time.monotonic() < self._next_read or self._study is None:
            return
        began = time.monotonic()
        for key, shared in store.studies.shared_values(self._study).items():
            if key not in self._announced:
                self._announced.add(key)
                self._console.print(shared["reason"])
        trials = store.trials.get_all(self._study)
        self._announce_bounds(store, self._study, trials)
        for key, members in _stages(trials).items():
            if key not in self._announced:
                self._announced.add(key)
                self._console.print(_stage_line(members))
        for trial in trials:
            if trial.state in ENDED and self._reported.get(trial.number, ("", 0))[0] != trial.state:
                self._console.print(_ended_line(self._study, trial))
            elif self._live is None and self._has_new_epoch(trial):
                self._console.print(_epoch_line(self._study, trial))
            self._reported[trial.number] = (trial.state, len(trial.epochs))
        if self._live is not None:
            left = self._pace.seconds_left(self._study, trials)
            self._live.update(_live_view(self._study, trials, seconds_left=left), refresh=True)
        ended = time.monotonic()
        self._next_read = ended + max(REFRESH_S, 10 * (ended - began))

    def _announce_bounds(self, store: Store, study: StudyRecord, trials: Sequence[TrialRecord]) -> None:
        """Say that the search ended before it had all of its trials, or that its range grew: their number changes."""
        if trials and len(trials) != self._num_trials:
            study = store.studies.get(study.name)
            for text in filter(None, (growth_text(study), search_end_text(study, trials))):
                if text not in self._announced:
                    self._announced.add(text)
                    self._console.print(text)
        self._num_trials = len(trials)

    def _has_new_epoch(self, trial: TrialRecord) -> bool:
        return bool(
            trial.state == "running"
            and trial.kind != "test"  # a test has the epochs of the trial that it measures
            and trial.epochs
            and self._reported.get(trial.number) != ("running", len(trial.epochs))
        )


def heading(study: StudyRecord) -> Text:
    """Return one line that says what is searched, and on which data."""
    return styled((f"study {study.name}", "bold"), f": {study_text(study)}")


def print_answer(
    console: PlainConsole,
    study: StudyRecord,
    trials: Sequence[TrialRecord],
    found: Best,
    *,
    storage: str,
    is_trained: bool,
    verbose: bool,
    next_steps: Sequence[str],
) -> None:
    """Print the table of learning rates and values, the answer, and what to type next.

    Args:
        console: Where to print.
        study: The study.
        trials: All of its trials.
        found: Its answer.
        storage: The URL of the store, as people may see it.
        is_trained: Whether the study was trained just now.
        verbose: Whether to show the details of the answer.
        next_steps: Commands, each with what it does.
    """
    searched = search_trials(trials)
    console.print(_trials_table(study, searched, found, width=console.width))
    num_marked = sum(found.is_recommended(trial.params) for trial in searched)
    console.print(f"  {marked_text(found.recommended, num_marked)}", style="dim")
    console.print()
    source = source_text(study, trials, storage=storage, is_trained=is_trained)
    headline, *lines = answer_lines(study, found, source=source, verbose=verbose)
    console.print(headline, style="bold")
    for line in lines:
        for part in broken_line(line, console.width):
            console.print(part, soft_wrap=True)
    for step in next_steps:
        console.print(step, style="dim", soft_wrap=True)


def broken_line(line: str, width: int) -> list[str]:
    """Return a line of the answer, "  label:  text", broken between words; what follows stands below the text.

    A command, in `backticks` or at the end, stays whole, so that it can be copied.
    """
    begin = re.match(r" *[^:]+: *", line)
    indent = " " * (len(begin[0]) if begin else 0)
    whole = re.sub(r"`[^`]+`|\bhpo [a-z].*", lambda command: command[0].replace(" ", NO_BREAK), line)
    parts = textwrap.wrap(
        whole,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )
    return [part.replace(NO_BREAK, " ") for part in parts]


def print_comparison(found: Comparison) -> None:
    """Print studies side by side, each with its interval on a common scale, then the conclusions and caveats."""
    ends = [
        end for study in found.studies if study.interval for end in (*study.interval, study.lr or study.interval[0])
    ]
    low, high = (math.log10(min(ends)), math.log10(max(ends))) if ends else (0.0, 1.0)
    columns, rows = found.table
    if make_console().width >= WIDE:
        columns.insert(STRIP_COLUMN, "")
        for row, study in zip(rows, found.studies, strict=True):
            row.insert(STRIP_COLUMN, _strip(study, low, high))
    else:  # the numbers come first; the conclusions also say in what the studies differ
        for row in (columns, *rows):
            del row[CHANGES_COLUMN]
    print_table(columns, rows)
    console = make_console()
    for line in found.conclusions:
        console.print(line, style="bold")
    for line in found.caveats:
        console.print(f"warning: {line}")


def _strip(study: ComparedStudy, low: float, high: float) -> str:
    """Draw the interval of a best rate and its middle, on a scale between log10 of two learning rates."""
    if study.interval is None or study.lr is None:
        return ""

    def cell(rate: float) -> int:
        return round((STRIP_WIDTH - 1) * (math.log10(rate) - low) / ((high - low) or 1.0))

    first, best, last = cell(study.interval[0]), cell(study.lr), cell(study.interval[1])
    cells = ["━" if first <= index <= last else "·" for index in range(STRIP_WIDTH)]
    cells[best] = "●"
    return "".join(cells)


def _trials_table(study: StudyRecord, trials: Sequence[TrialRecord], found: Best, *, width: int) -> Table:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    rows = sorted(trials, key=lambda trial: tuple(_sort_key(trial.params.get(key)) for key in keys))
    if len(rows) > MAX_ROWS:
        sign = -1 if study.spec.direction == "minimize" else 1
        rows = sorted(rows, key=lambda trial: -math.inf if trial.value is None else sign * trial.value, reverse=True)
        rows = sorted(rows, key=lambda trial: not found.is_recommended(trial.params))[:MAX_ROWS]
    has_bars = width >= 70 + BAR_WIDTH + 10 * len(keys)  # on a narrow screen numbers and words come first
    values = [trial.value for trial in rows if trial.value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    table = make_table(title=f"{len(rows)} of {len(trials)} trials" if len(rows) < len(trials) else None)
    table.add_column("", no_wrap=True)
    for key in keys:
        _add_values_column(table, key, rows)
    table.add_column(study.spec.metric, justify="right", overflow="fold", min_width=6)
    if has_bars:
        table.add_column("", width=BAR_WIDTH)
    table.add_column("state", overflow="fold")
    table.add_column("epochs", justify="right", no_wrap=True)
    table.add_column("trial", justify="right", no_wrap=True)
    for trial in rows:
        style = STYLES[trial.state]
        share = (trial.value - low) / (high - low or 1) if trial.value is not None else None
        if share is not None and study.spec.direction == "minimize":
            share = 1 - share
        bar = (
            ProgressBar(total=1, completed=max(0.02, share), width=BAR_WIDTH, complete_style=style)
            if share is not None
            else ""
        )
        table.add_row(
            "►" if found.is_recommended(trial.params) else "",
            *(number_text(trial.params[key]) if key in trial.params else "" for key in keys),
            "" if trial.value is None else value_text(trial.value, study),
            *([bar] if has_bars else []),
            _state_text(trial),
            str(len(trial.epochs)),
            str(trial.number),
            style="bold" if found.is_recommended(trial.params) else "",
        )
    return table


def print_trials(study: StudyRecord, trials: Sequence[TrialRecord]) -> None:
    """Print a row for each trial. What is alike for all of them, the kind or the attempt, has no column.

    On a narrow screen the reason is broken over lines, between two words; a learning rate never is.
    """
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    has_kinds = any(trial.kind != "search" for trial in trials)
    has_attempts = any(trial.attempt > 1 for trial in trials)
    table = make_table(padding=(0, 1, 0, 0))
    table.add_column("trial", justify="right", no_wrap=True)
    if has_kinds:
        table.add_column("kind", no_wrap=True)
    for key in keys:
        _add_values_column(table, key, trials)
    table.add_column(study.spec.metric, justify="right", overflow="fold", min_width=8)
    table.add_column("epochs", justify="right", no_wrap=True)
    if has_attempts:
        table.add_column("attempt", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for trial in trials:
        table.add_row(
            str(trial.number),
            *([trial.kind] if has_kinds else []),
            *(number_text(trial.params[key]) if key in trial.params else "" for key in keys),
            "" if trial.value is None else value_text(trial.value, study),
            str(len(trial.epochs)),
            *([str(trial.attempt)] if has_attempts else []),
            "" if trial.duration_s is None else f"{trial.duration_s:.1f}",
            _state_text(trial),
        )
    make_console().print(table)


def _add_values_column(table: Table, key: str, trials: Sequence[TrialRecord]) -> None:
    """Add the column of a searched setting; up to MAX_MIN_WIDTH its values are not broken over lines."""
    longest = max((len(one_line(number_text(trial.params.get(key, "")))) for trial in trials), default=0)
    title = "learning rate" if key == "lr" else key
    table.add_column(title, justify="right", overflow="fold", min_width=min(longest, MAX_MIN_WIDTH))


def _state_text(trial: TrialRecord) -> Text:
    """Return the state of a trial, with its reason where the state and the number of epochs do not say it all."""
    says_all = trial.state in ("complete", "waiting", "running") or not trial.reason
    reason = (trial.reason or "").removesuffix(f" after epoch {len(trial.epochs)}")
    return styled((trial.state if says_all else f"{trial.state}: {reason}", STYLES[trial.state]))


def _live_view(study: StudyRecord, trials: Sequence[TrialRecord], *, seconds_left: float | None) -> RenderableType:
    """Return the live part: a bar for the study, a line for each running trial, the best trial so far."""
    progress = study_progress(study, trials)
    bar = Table.grid(padding=(0, 1))
    left = "" if seconds_left is None else f"about {duration_text(seconds_left)} left"
    amount = f"{progress.done}/{progress.total} {progress.unit}"
    drawn = ProgressBar(total=progress.total, completed=progress.done, width=BAR_WIDTH)
    bar.add_row(amount, drawn, left)
    running = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(progress.columns):
        is_text = column in ("values", "device")  # the only ones that may be broken over lines, between two words
        longest = max((len(word) for row in progress.rows for word in row[index].split()), default=0)
        running.add_column(
            column,
            overflow="fold",
            no_wrap=not is_text,
            min_width=min(longest, MAX_LIVE_WIDTH),
            justify="left" if is_text else "right",
        )
    for row in progress.rows:
        running.add_row(*row)
    shown = running if progress.rows else styled(("starting workers ...", "dim"))
    return Group(bar, _counts(trials), shown, *progress.lines)


def _stages(trials: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Return the trials of the latest confirmation and of the latest test, each by a name of its own."""
    stages = [[trial for trial in latest(trials) if trial.kind == kind] for kind in ("confirm", "test")]
    return {f"{members[0].kind} from trial {members[0].number}": members for members in stages if members}


def _stage_line(trials: Sequence[TrialRecord]) -> str:
    """Return the line that announces a stage with these trials."""
    if trials[0].kind == "test":
        return f"evaluating the best rate on the test set: {plural(len(trials), 'network')}"
    rates = list(dict.fromkeys(params_text(trial.params) for trial in trials))
    return f"the search is done; training again on fresh seeds: {'; '.join(rates)}"


def _ended_line(study: StudyRecord, trial: TrialRecord) -> Text:
    seconds = "" if trial.duration_s is None else f"{trial.duration_s:.1f} s"
    value = "" if trial.value is None else f", {study.spec.metric} {value_text(trial.value, study)}"
    if trial.kind == "test" and trial.state == "complete":
        name = find_test_metric(study, [trial])
        value = f", {name} {last_text(study, trial, name)}"
    return styled(
        f"trial {trial.number} ",
        (trial.state, STYLES[trial.state]),
        f": {params_text(trial.params)}{value}, {trial.reason}, {seconds}",
    )


def _epoch_line(study: StudyRecord, trial: TrialRecord) -> str:
    left_out = (
        () if study.spec.objective else ("lr", "seconds", "train_accuracy")
    )  # our engines' own; a loop's are all shown
    metrics = "  ".join(f"{name} {last_text(study, trial, name)}" for name in trial.curves if name not in left_out)
    return f"trial {trial.number} epoch {trial.epochs[-1]}: {metrics}"


def _counts(trials: Sequence[TrialRecord]) -> Text:
    counts = {state: sum(trial.state == state for trial in trials) for state in ENDED}
    return styled(*((f"{count} {state}  ", STYLES[state]) for state, count in counts.items() if count))


def _sort_key(value: Any) -> tuple[int, Any]:
    return (2, "") if value is None else (1, value) if isinstance(value, str) else (0, value)
