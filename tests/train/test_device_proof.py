"""The proof of a device: what it finds, and that nothing which it does is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from hpo.errors import UserError
from hpo.system.devices import Device
from hpo.train import device_proof
from hpo.train.device_proof import DeviceProof, proofs_of, prove_device

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
SICK = "Found no NVIDIA driver|No CUDA GPUs are available|Torch not compiled with CUDA enabled"


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_the_cpu_computes_and_the_proof_changes_no_random_state(precision: str) -> None:
    before = torch.random.get_rng_state()
    prove_device("cpu", precisions=[precision])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_proof_computes_in_lower_precision_where_the_study_does() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        device_proof._compute("cpu")


def test_a_precision_that_the_device_lacks_is_found() -> None:
    with pytest.raises(UserError, match=r"training\.precision = 'bf16' needs a GPU"):
        prove_device("cpu", precisions=["fp32", "bf16"])


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_device_whose_results_are_wrong_is_found(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    convolve = functional.conv2d
    monkeypatch.setattr(functional, "conv2d", lambda *arguments: factor * convolve(*arguments))
    with pytest.raises(RuntimeError, match=r"a convolution is wrong by \S+, where 36 is right"):
        prove_device("cpu", precisions=["fp32"])


@no_gpu
def test_a_process_of_its_own_tells_a_device_that_computes_from_one_that_does_not() -> None:
    sick = Device("cuda:0", "cuda", "NVIDIA H100", None, uuid="GPU-aaaa0000")
    with (
        DeviceProof("cpu", precisions=["auto"], environment=os.environ) as cpu,
        proofs_of([sick, Device("cpu", "cpu", "a CPU", None)], precisions=["auto"]) as proofs,
    ):
        assert cpu.problem() is None
        assert proofs.keys() == {"cuda:0"}  # the CPU needs no proof
        problem = proofs["cuda:0"].problem()
    assert problem is not None
    assert any(words in problem for words in SICK.split("|")), problem
    assert "\n" not in problem


def test_a_device_that_hangs_is_a_finding_and_its_process_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(10_000)\n")
    monkeypatch.setattr(device_proof, "PROOF_S", 0.2)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with DeviceProof("cpu", precisions=["fp32"], environment=environment) as proof:
        assert proof.problem() == "it computed nothing in 0.2 s"
    assert proof._process.poll() is not None


def test_a_process_that_dies_without_a_word_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.abort()\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with DeviceProof("cpu", precisions=["fp32"], environment=environment) as proof:
        assert proof.problem() == "the process that tried it ended with exit code -6"
