"""The networks of `trials.NETWORKS`, which every test of an engine may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.train.engines import planning
from tests.train.engines.trials import NETWORKS


@pytest.fixture(autouse=True)
def networks(own_code: Path) -> None:
    (own_code / "own_lane_networks.py").write_text(NETWORKS)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the lanes of each test's engine measured by one step: what is fastest is not asked on a busy machine."""
    monkeypatch.setattr(planning, "MAX_MEASURING_S", 0.0)
