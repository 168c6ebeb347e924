"""What the commands write: every text as it is, with control characters as escapes, whatever a store holds.

No other module of the command line prints; what rich draws goes through `hpo.display.console`. `click.echo` would write
UTF-8 to a terminal that asks for ASCII.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from hpo.system.readable import one_line, visible


def say(text: str) -> None:
    """Print a text on one line."""
    print(one_line(text), flush=True)


def say_error(text: str) -> None:
    """Print a text of one or more lines to standard error."""
    print(visible(text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a value as indented JSON; it must hold no number that is not finite."""
    print(_json_text(value), flush=True)


def print_json_list(values: Iterable[Any]) -> None:
    """Print a list as `print_json` does, one value after the other: the text of many would fill the memory."""
    before = "[\n"
    for value in values:
        print(before, textwrap.indent(_json_text(value), "  "), sep="", end="")
        before = ",\n"
    print("[]" if before == "[\n" else "\n]", flush=True)


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False)
