"""Fixtures of the workers' tests: a user's loop, and reports that are waited for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpo.workers import lane_runner

WriteLoop = Callable[[str], None]


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteLoop]:
    """Write the module `loop`, whose function `train` the studies of `make_spec` call."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body: str) -> None:
        lines = "\n".join("    " + line for line in body.strip().splitlines())
        (tmp_path / "loop.py").write_text(f"import math, pathlib, sys, time\ndef train(trial):\n{lines}\n")

    yield write
    sys.modules.pop("loop", None)


@pytest.fixture
def prompt_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin no epoch before the store has the one before, so that `should_stop` can name an epoch."""
    monkeypatch.setattr(lane_runner, "MAX_REPORT_SHARE", 1e6)
