"""The file of a report."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import UserError

if TYPE_CHECKING:
    pass


REPORT_MARK = "<!-- hpo report -->"
# How reports of ours begin or, those that are images, end: they alone may be written over. Anywhere inside, the words
# prove nothing: a database of studies holds them too, in the notes for optuna-dashboard.
BEGINS = (
    f"<!doctype html>\n{REPORT_MARK}\n".encode(),
    f"{REPORT_MARK}\n# Study ".encode(),
    b'{\n "what": "hpo report of study ',
)
PNG_TEXT = b"tEXtSoftware\0hpo report"


def write_report_file(path: Path, content: bytes) -> None:
    """Puts a report there, all of it or nothing. Raises UserError where there is no report of ours."""
    try:
        path = path.resolve()  # what a link leads to is replaced, not the link
        if path.exists() and not is_report(path.read_bytes()):
            raise UserError(f"--output {path} exists and is no report of ours; name another file")
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(aside, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~mask)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None


def is_report(content: bytes) -> bool:
    """Whether a file is a report that `render` made."""
    is_svg = content.startswith(b"<svg") and content.endswith(f"{REPORT_MARK}\n".encode())
    is_png = content.startswith(b"\x89PNG") and content[:-16].endswith(PNG_TEXT)  # before its checksum and IEND
    return content.startswith(BEGINS) or is_svg or is_png
