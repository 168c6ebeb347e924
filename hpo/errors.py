"""Errors that a user can mend: one clear sentence with the setting, the rule and the value, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

MAX_VALID_NAMES = 30  # that a message lists


class UserError(Exception):
    """A wrong request; the command line prints the message alone and exits with 2."""

    exit_code = 2


class StudyStopped(Exception):
    """A study that could not finish; the command line prints the message alone and exits with 1.

    `can_resume` is true where the same command, given again, has something left to do. `interrupted` is true where
    Ctrl-C or SIGTERM ended the study.
    """

    def __init__(self, message: str, *, can_resume: bool = False, interrupted: bool = False) -> None:
        super().__init__(message)
        self.can_resume = can_resume
        self.interrupted = interrupted


@dataclass(frozen=True)
class Rule:
    """A field's rule in words ("... must be WORDS, got ..."), for fields whose bounds alone do not tell it."""

    words: str


def unknown_name(setting: str, value: object, valid: Iterable[str]) -> UserError:
    """Return the error for a name that is not in a table: setting, value, and the names, of many the nearest."""
    valid, text = sorted(valid), str(value)
    shown = valid
    if len(valid) > MAX_VALID_NAMES:
        shown = difflib.get_close_matches(text, valid, n=MAX_VALID_NAMES, cutoff=0.0)
    names = ", ".join(shown) + (f" ({len(valid)} in all)" if len(valid) > len(shown) else "")
    return UserError(f"{setting} must be one of {names}; got {value!r}{did_you_mean(text, valid)}")


def did_you_mean(value: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` where a valid name is close to the value, else the empty text."""
    near = difflib.get_close_matches(value, list(valid), n=1, cutoff=0.65)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_keys(section: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise `UserError` for the first key of a section that is not valid; the section "" is the file itself."""
    valid = sorted(valid)
    for key in given:
        if key not in valid:
            name = f"{section}.{key}" if section else key
            raise UserError(f"unknown key {name}{did_you_mean(key, valid)}; valid keys: {', '.join(valid)}")
