"""The networks of `trials.NETWORKS`, which every test of an engine may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.engines.trials import NETWORKS


@pytest.fixture(autouse=True)
def networks(own_code: Path) -> None:
    (own_code / "own_lane_networks.py").write_text(NETWORKS)
