"""Files that are there whole or not at all: written aside, flushed to the disk, renamed to their place."""

from __future__ import annotations

import codecs
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_TEMPORARY_NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)


def read_text(path: str | Path) -> str:
    """Return the text of a user's file in UTF-8, or as editors on Windows write it: with a byte order mark, or UTF-16.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: It is neither.
    """
    content = Path(path).read_bytes()
    text = content.decode("utf-16" if content.startswith(_WIDE_MARKS) else "utf-8-sig")
    return text.replace("\r\n", "\n")


def replace_file(
    path: str | Path, content: bytes | memoryview, *, is_private: bool = False, sync_folder: bool = False
) -> None:
    """Write a file so that readers find the old content or the new one, whole, whatever is killed or fails.

    A file that exists keeps its permissions and, where this process may set it, its owner. A killed writer leaves a
    temporary file beside `path`, of which `target_of_temporary` knows the name.

    Args:
        path: Where the content goes. A symbolic link there is replaced, not followed.
        content: The whole new content.
        is_private: Give a new file to its owner alone, in place of what the umask leaves to others.
        sync_folder: Also flush the folder, so that a power cut cannot undo the rename later.

    Raises:
        OSError: The file cannot be written. The old content, or its absence, is then as it was.
    """
    folder, name = os.path.split(path)
    folder = folder or os.curdir
    existing = os.stat(path) if os.path.exists(path) else None
    mode = 0o600 if is_private else 0o666
    if existing is not None:
        mode = existing.st_mode & 0o777
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")  # no two processes choose the same
    # Created with at most the final permissions: nobody may read it earlier who may not read it later.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
            if existing is not None:
                with suppress(PermissionError):  # the file may be another user's
                    os.fchown(descriptor, existing.st_uid, existing.st_gid)
                os.fchmod(descriptor, mode)  # after fchown, and past the umask
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if sync_folder:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def target_of_temporary(name: str) -> str | None:
    """Return the name of the file that a temporary file of `replace_file` was to become, or None for another file."""
    match = _TEMPORARY_NAME.fullmatch(name)
    return match[1] if match else None
