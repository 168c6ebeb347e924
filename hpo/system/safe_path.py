"""How Python processes of ours are started, so that no file beside a study is taken for a library."""

from __future__ import annotations

# Python's options with which a folder is not on the path because a process starts there: a file that is called like a
# library's module must not be imported in its place.
SAFE_PATH = ("-P",)
