"""Which display a study has when it is run from Python: one that suits where this process writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpo.display.notebook import NotebookDisplay, is_in_notebook


@contextmanager
def shown_progress(wanted: bool | None) -> Iterator[Callable[..., Any] | None]:
    """Show a study while it trains; give what watches it, or None for nothing.

    Args:
        wanted: Whether to show it. None: in a notebook and on a terminal, and not where the output is a file.
    """
    if wanted is False or (wanted is None and not is_in_notebook() and not sys.stdout.isatty()):
        yield None
    elif is_in_notebook():
        with NotebookDisplay() as display:
            yield display.watch
    else:
        from hpo.display.console import make_console
        from hpo.display.terminal import LiveDisplay

        with LiveDisplay(make_console()) as display:
            yield display.watch
