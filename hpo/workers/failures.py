"""Exceptions in training: their message, whether memory ran out, and whether two are the same failure."""

from __future__ import annotations

from types import TracebackType

from hpo.store.ledger import OUT_OF_MEMORY


def failure_key(error: BaseException) -> str:
    """Return a text that is equal for two exceptions of the same type raised at the same place."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY  # wherever it ran out
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame is not None else ""
    return f"{type(error).__name__} {place}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the host or of a device ran out."""
    text = error_message(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def error_message(error: BaseException) -> str:
    """Return the text of an exception, or nothing where it cannot give one."""
    try:
        return str(error)
    except Exception:  # the exception's own class is the user's code, which may raise one itself
        return ""
