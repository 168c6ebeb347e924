"""The file of a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import UserError
from hpo.system.files import replace_file

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
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None


def is_report(content: bytes) -> bool:
    """Whether a file is a report that `render` made."""
    is_svg = content.startswith(b"<svg") and content.endswith(f"{REPORT_MARK}\n".encode())
    is_png = content.startswith(b"\x89PNG") and content[:-16].endswith(PNG_TEXT)  # before its checksum and IEND
    return content.startswith(BEGINS) or is_svg or is_png
