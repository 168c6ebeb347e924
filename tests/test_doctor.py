"""The doctor: it uses each device, and says what is wrong with one that cannot be used."""

from __future__ import annotations

import pytest

from hpo import doctor
from hpo.system.devices import Device
from tests.workers.sick_gpu import needs_no_gpu, tells_why

CPU = Device("cpu", "cpu", "a CPU", 2**35)
SICK = Device("cuda:0", "cuda", "NVIDIA H100", 80 * 2**30, uuid="GPU-aaaa0000")


@needs_no_gpu
def test_a_gpu_that_is_listed_and_cannot_be_used_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "list_devices", lambda: [SICK, CPU])
    findings = {finding.subject: finding for finding in doctor.examine(storage="sqlite:////nowhere/x.db")}
    assert findings["cuda:0"].found == "NVIDIA H100, 80 GiB"
    assert findings["cuda:0"].advice.startswith("it cannot be used: ")
    assert tells_why(findings["cuda:0"].advice)
    assert findings["cpu"].advice == ""
