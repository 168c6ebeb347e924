"""Whatever a text holds, people see all of it, and no terminal obeys it."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.system.readable import ASCII_SIGNS, ERRORS, ReadableFormatter, one_line, prepare_output, visible

quick = settings(derandomize=True, deadline=None, max_examples=100)
# Any text, half characters too, and often what a terminal or a writing direction obeys.
texts = st.lists(
    st.one_of(
        st.text(st.characters(), max_size=4),
        st.characters(max_codepoint=0x9F),
        st.sampled_from(["\x1b[31m", "\x1b]0;title\x07", "\u202e", "\u2066", "\ud800", "\r\n", "\x9b2J", "\u2028"]),
    ),
    max_size=6,
).map("".join)


@quick
@given(text=texts)
def test_a_line_is_printable_and_keeps_every_character(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert line == "".join(map(one_line, text))
    assert all(one_line(letter) in (letter, repr(letter)[1:-1]) for letter in text)


@quick
@given(text=texts)
def test_a_text_of_several_lines_keeps_them(text: str) -> None:
    assert [one_line(line) for line in visible(text).split("\n")] == list(map(one_line, text.split("\n")))


def log_line(text: str, error: Exception | None = None) -> str:
    raised = (type(error), error, None) if error else None
    record = logging.LogRecord("name", logging.WARNING, "path", 1, "%s", (text,), raised)
    return ReadableFormatter("%(levelname)s %(message)s").format(record)


@quick
@given(text=texts)
def test_a_message_of_a_log_is_one_line_and_its_traceback_obeys_nobody(text: str) -> None:
    assert log_line(text) == f"WARNING {one_line(text)}"
    message, _, trace = log_line("m", ValueError(text)).partition("\n")
    assert message == "WARNING m"
    assert trace == visible(f"ValueError: {text}" if text else "ValueError")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@quick
@given(text=texts)
def test_a_stream_of_any_encoding_takes_every_text(encoding: str, text: str) -> None:
    written = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        stream = io.TextIOWrapper(written, encoding=encoding, newline="")
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "excepthook", sys.excepthook)
        prepare_output()
        print(text, end="", flush=True)
        shown = written.getvalue().decode(encoding)
        sys.excepthook(ValueError, ValueError(text), None)
        stream.flush()
        written.getvalue().decode(encoding)
        stream.detach()
    assert shown.encode("ascii", ERRORS) == text.encode("ascii", ERRORS)


def test_signs_have_their_width_in_ascii_too() -> None:
    assert all(len(sign) == len(plain) or sign == "±" for sign, plain in ASCII_SIGNS.items())
