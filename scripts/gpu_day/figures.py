"""Figures on disk: one JSON line each, flushed the moment it is known.

Whatever happens to the process that measures, the lines before it are there. Several processes may write at once.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGAN = "began"  # a section's first figure: what an earlier run of the section said no longer counts
LONGEST_TEXT = 2000  # characters that are kept of the end of a traceback or an output


@dataclass(frozen=True)
class Figures:
    """The figures of one section; their keys begin with its name."""

    folder: Path
    section: str

    def say(self, key: str, value: Any) -> None:
        """Put one figure on disk, and show it."""
        figure = {"key": f"{self.section}.{key}", "value": as_json(value), "at": round(time.time(), 1)}
        line = json.dumps(figure, default=str)
        with file_of(self.folder).open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    @contextmanager
    def trying(self, key: str) -> Iterator[None]:
        """Say how long a block took; say what it raises, as KEY.error, and continue after it."""
        start_s = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.say(f"{key}.error", "".join(traceback.format_exception(error))[-LONGEST_TEXT:])
        finally:
            self.say(f"{key}.wall_s", round(time.perf_counter() - start_s, 2))


def file_of(folder: Path) -> Path:
    """Return the file of all figures of a folder."""
    return folder / "figures.jsonl"


def read_figures(folder: Path) -> dict[str, Any]:
    """Return the last value of each figure, in the order in which they were said; a torn line is passed over."""
    figures: dict[str, Any] = {}
    text = file_of(folder).read_text(errors="replace") if file_of(folder).exists() else ""
    for line in text.splitlines():
        try:
            figure = json.loads(line)
        except ValueError:
            continue
        key = figure["key"]
        section, _, name = key.partition(".")
        if name == BEGAN:
            figures = {other: value for other, value in figures.items() if not other.startswith(f"{section}.")}
        figures[key] = figure["value"]
    return figures


def as_json(value: Any) -> Any:
    """Return the value with what JSON does not know as text: numbers that are not finite, and objects."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value
