"""Standard output and error of a command that outlives its reader: `hpo run | head` trains to the end.

Python ignores SIGPIPE and raises BrokenPipeError instead, wherever the command happens to print.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING

from hpo.errors import StudyStopped

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

READER_GONE = (errno.EPIPE, errno.EIO)  # a pipe that nobody reads any more; a terminal that was closed


class OutputFile(io.FileIO):
    """Standard output or standard error. Once nobody reads it, what is written to it is dropped."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write to the file.

        Raises:
            StudyStopped: The file cannot be written, such as on a full disk.
        """
        if not (size := memoryview(data).nbytes):
            return 0  # click tries a stream out with nothing, and swallows what that raises
        try:
            return super().write(data)
        except OSError as error:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            if error.errno not in READER_GONE:
                raise StudyStopped(f"the output cannot be written: {error.strerror}", can_resume=True) from None
        if self.fileno() == 1:
            print("hpo: the output was closed; continuing without it", file=sys.stderr, flush=True)
        return size


def outlive_readers() -> None:
    """Put an OutputFile in the place of each of this process's standard streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue  # closed, or replaced by whoever calls us, such as a test
        stream.flush()
        file = OutputFile(stream.fileno(), "wb", closefd=False)
        is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # not with PYTHONUNBUFFERED
        prepared = io.TextIOWrapper(
            io.BufferedWriter(file) if is_buffered else file,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, prepared)
