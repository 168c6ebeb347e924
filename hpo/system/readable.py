"""Text that people read: control characters shown as escapes, on streams that can write every character.

Text of users and stores may hold characters that no one sees and that do something: a terminal obeys escape sequences,
and others end a line or turn its order around. JSON needs none of this, as it escapes them itself.
"""

from __future__ import annotations

import codecs
import io
import logging
import sys
import traceback
from types import TracebackType
from typing import Any

ERRORS = "hpo.substitute"  # how our streams treat characters that their encoding does not have
# What we draw with, in ASCII, each as wide as the original; any other character is written as an escape.
ASCII_SIGNS = dict(zip("►●━·│└─…▁▂▃▄▅▆▇█", ">o=.|'-~__--==##", strict=True)) | {"±": "+-", "⚠": "!"}


def visible(text: str) -> str:
    """Return a text of one or more lines with every control character, and what reorders a line, as an escape."""
    return _escaped(text, kept="\n\t")


def one_line(text: str) -> str:
    """Return a text on one line: like `visible`, with line breaks and tabs as escapes, too."""
    return _escaped(text, kept="")


def _escaped(text: str, *, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in kept else repr(letter)[1:-1] for letter in text)


class ReadableFormatter(logging.Formatter):
    """A formatter with one line for each message, followed by a traceback if there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message on one line."""
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Return the traceback."""
        return visible(super().formatException(ei))


def prepare_output(*, encoding: str | None = None) -> None:
    """Let standard output and error take every character, and show tracebacks and warnings of this process readably.

    Args:
        encoding: The encoding that the streams are given. Default: they keep theirs.
    """
    codecs.register_error(ERRORS, _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=ERRORS)
    sys.excepthook = _print_exception
    if logging.lastResort is not None:  # it writes warnings where nobody has set up logging
        logging.lastResort.setFormatter(ReadableFormatter())


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Return what is written for the first character that cannot be, as `codecs.register_error` asks for it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    return ASCII_SIGNS.get(letter) or ascii(letter)[1:-1], error.start + 1


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(visible("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
