"""Which rows of a parametrized test `make test` runs, and which only `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(rows: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the rows of a parametrization, all but the quick ones with the mark `slow`."""
    return [row if row in quick else _slow(row) for row in rows]


def _slow(row: Any) -> Any:
    values = row if isinstance(row, tuple) else (row,)
    return pytest.param(*values, marks=pytest.mark.slow)
