"""Rich's terminal, to which a text means nothing: no markup, no emoji codes, no escape sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.style import Style
from rich.table import Table
from rich.text import Text

from hpo.system.readable import one_line

USUAL_WIDTH = 80  # columns of a terminal
SHORT = 10  # characters, such as a state or a number, which are not broken over lines on a usual terminal
LONGEST_WHOLE_WORD = 20  # characters, of a word that is not broken on a usual terminal
FILE_WIDTH = 100_000  # columns of an output that is no terminal: no line is broken or cut


class PlainConsole(Console):
    """A console that shows each text on one line as it is, wherever the text stands: in a line, a cell or a heading."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return what rich draws for a text; rich calls this for every one."""
        return super().render_str(one_line(text), **options)


def make_console() -> PlainConsole:
    """Return the console for standard output."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=FILE_WIDTH)


def styled(*parts: str | tuple[str, str | Style]) -> Text:
    """Return a line of texts, each alone or as (text, style)."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((one_line(text), style) for text, style in pairs))


def make_table(**options: Any) -> Table:
    """Return an empty table."""
    return Table(box=box.SIMPLE_HEAD, **options)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a plain table. On a screen that is too narrow for it, long texts are broken over lines, none is cut."""
    console, table = make_console(), make_table(padding=(0, 1, 0, 0))
    cells = [list(map(str, row)) for row in rows]
    for index, column in enumerate(columns):
        longest = max(len(one_line(row[index])) for row in [columns, *cells])
        is_short = longest <= SHORT and console.width >= USUAL_WIDTH
        words = one_line(" ".join(row[index] for row in [columns, *cells])).split()
        longest_word = min(max(map(len, words), default=0), LONGEST_WHOLE_WORD)
        min_width = longest_word if console.width >= USUAL_WIDTH else None
        table.add_column(column, overflow="fold", no_wrap=is_short, min_width=min_width)
    for row in cells:
        table.add_row(*row)
    console.print(table)


def make_progress(*, disable: bool = False) -> Progress:
    """Return a progress bar, which is gone when it ends."""
    console, columns = make_console(), (DescriptionColumn(), *Progress.get_default_columns()[1:])
    return Progress(*columns, console=console, transient=True, disable=disable or not console.is_terminal)


class DescriptionColumn(ProgressColumn):
    """The text before a bar, as it is; rich's own reads markup in it."""

    def render(self, task: Task) -> Text:
        """Return the text."""
        return styled(task.description)
