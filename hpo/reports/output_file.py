"""The file of a report: written whole or not at all, and never over a file that is no report.

Reports are told from other files by how they begin or, if they are images, end. A report's words inside a file prove
nothing: a database of studies holds them too, in the notes for optuna-dashboard.
"""

from __future__ import annotations

from pathlib import Path

from hpo.errors import UserError
from hpo.system.files import replace_file

REPORT_MARK = "<!-- hpo report -->"
BEGINNINGS = (
    f"<!doctype html>\n{REPORT_MARK}\n".encode(),
    f"{REPORT_MARK}\n# Study ".encode(),
    b'{\n "what": "hpo report of study ',
)
PNG_TEXT = b"tEXtSoftware\0hpo report"  # the chunk before the last one of a PNG


def write_report_file(path: Path, content: bytes) -> None:
    """Write a report to a file, all of it or nothing.

    Raises:
        UserError: The file exists and is no report, or it cannot be written.
    """
    try:
        path = path.resolve()  # replace the target of a link, not the link
        if path.exists() and not is_report(path.read_bytes()):
            raise UserError(f"--output {path} exists and was not written by hpo report; name another file")
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None


def is_report(content: bytes) -> bool:
    """Return whether a file with this content is a report that `render_report` made."""
    is_svg = content.startswith(b"<svg") and content.endswith(f"{REPORT_MARK}\n".encode())
    is_png = content.startswith(b"\x89PNG") and content[:-16].endswith(PNG_TEXT)  # before its checksum and IEND
    return content.startswith(BEGINNINGS) or is_svg or is_png
