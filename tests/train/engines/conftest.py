"""The networks of `trials.NETWORKS`, which every test of an engine may name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.train.engines.trials import NETWORKS


@pytest.fixture(autouse=True)
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_lane_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_lane_networks", raising=False)
