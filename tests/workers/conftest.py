"""Fixtures of the workers' tests: a user's loop, and reports that are waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.workers import lane_runner

WriteLoop = Callable[[str], None]


@pytest.fixture
def loop(own_code: Path) -> WriteLoop:
    """Write the module `loop`, whose function `train` the studies of `make_spec` call."""

    def write(body: str) -> None:
        lines = "\n".join("    " + line for line in body.strip().splitlines())
        (own_code / "loop.py").write_text(f"import math, pathlib, sys, time\ndef train(trial):\n{lines}\n")

    return write


@pytest.fixture
def prompt_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin no epoch before the store has the one before, so that `should_stop` can name an epoch."""
    monkeypatch.setattr(lane_runner, "MAX_REPORT_SHARE", 1e6)
