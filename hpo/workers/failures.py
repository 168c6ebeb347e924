"""What an exception in training was: its message, whether memory ran out, and whether two are the same failure."""

from __future__ import annotations

from types import TracebackType

from hpo.store.ledger import OUT_OF_MEMORY


def failure_key(error: BaseException) -> str:
    """Equal for two exceptions of the same type raised at the same place."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY  # wherever it ran out
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame is not None else ""
    return f"{type(error).__name__} {where}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host's memory or a device's ran out."""
    text = message(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def message(error: BaseException) -> str:
    """What it says, as far as it can."""
    try:
        return str(error)
    except Exception:  # a user's exception may not even be able to say what it is
        return ""
