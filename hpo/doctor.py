"""The checks of `hpo doctor`: versions, devices, data and the store, with advice where something is missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpo.api.stores import storage_url
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.system import provenance
from hpo.system.devices import Device, list_devices, num_cores, threads_per_worker
from hpo.train.device_proof import proofs_of

DATA_FOLDERS = {  # into which torchvision unpacks its data sets, below the root or below ROOT/<name>
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
}


@dataclass(frozen=True)
class Finding:
    """One checked thing.

    Attributes:
        subject: What was checked.
        found: What was found.
        advice: What to do about it; empty if there is nothing to do.
    """

    subject: str
    found: str
    advice: str = ""


def examine(*, storage: str | None = None) -> list[Finding]:
    """Check everything that a study needs on this machine; change nothing.

    Args:
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.
    """
    findings = [Finding(package, version) for package, version in provenance.versions().items()]
    return findings + _devices() + _data() + [_store(storage_url(storage))]


def _devices() -> list[Finding]:
    devices = list_devices()
    findings = _used_devices(devices)
    if any(device.kind == "cuda" for device in devices) and not _torch_has_cuda():
        findings.append(
            Finding(
                "CUDA", "this torch is built without it", "reinstall torch and torchvision from the package registry"
            )
        )
    if all(device.kind == "cpu" for device in devices):
        findings.append(
            Finding(
                "GPU",
                "none",
                f"trials train on {threads_per_worker(1)} of {num_cores()} CPU cores; "
                "for an NVIDIA GPU, check that nvidia-smi lists it",
            )
        )
    return findings


def _used_devices(devices: Sequence[Device]) -> list[Finding]:
    """Use each device but the CPU, in a process of its own, all at the same time."""
    findings = []
    with proofs_of(devices, precisions=("auto", "fp32")) as proofs:
        for device in devices:
            memory = f", {device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else ""
            advice = ""
            if device.occupied_by:
                pids = ", ".join(map(str, device.occupied_by))
                advice = f"occupied by process {pids}: --devices auto skips it; name it to share it"
            problem = proofs[device.name].problem() if device.name in proofs else None
            if problem is not None:
                advice = f"it cannot be used: {problem}"
            findings.append(Finding(device.name, f"{device.label}{memory}", advice))
    return findings


def _torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


def _data() -> list[Finding]:
    root = Path(os.environ.get("HPO_DATA") or "data")
    named = "HPO_DATA" if os.environ.get("HPO_DATA") else "the default; HPO_DATA names another"
    present = [
        name for name, folder in DATA_FOLDERS.items() if (root / folder).is_dir() or (root / name / folder).is_dir()
    ]
    advice = "" if present else "digits needs no files; other data sets are downloaded there where there is a network"
    return [Finding("data", f"{root} ({named}): {', '.join(present) or 'no data set'}", advice)]


def _store(url: str) -> Finding:
    try:
        store = Store(url)
        names = [study.name for study in store.studies.get_all()]
    except UserError as error:
        advice = "" if "there is no store" in str(error) else "name another with --storage or HPO_STORAGE"
        return Finding("store", str(error), advice)
    return Finding("store", f"{store.url}: {len(names)} studies ({', '.join(names) or 'none'})")
