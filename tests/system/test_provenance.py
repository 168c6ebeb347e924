"""The provenance of a result."""

from __future__ import annotations

import sys

import pytest
import torch

from hpo.system.provenance import trial_metadata


def test_a_trial_records_the_threads_that_its_last_digits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial_metadata(device="cpu", host="h", seed=1)["threads"] == torch.get_num_threads()
    monkeypatch.delitem(sys.modules, "torch")
    assert trial_metadata(device="cpu", host="h", seed=1)["threads"] is None
