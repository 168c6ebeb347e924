"""A GPU that NVML lists and torch cannot use: the driver's list is a fake, and torch's failure is real.

Put on a PYTHONPATH as the module `pynvml`, it shows one GPU. A machine without a GPU has none that torch can use.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FAKE_NVML = """
class NVMLError(Exception):
    pass

class NVMLError_LibraryNotFound(NVMLError):
    pass

class NVMLError_DriverNotLoaded(NVMLError):
    pass

class NVMLError_NotFound(NVMLError):
    pass

NVML_DEVICE_MIG_DISABLE, NVML_DEVICE_MIG_ENABLE = 0, 1

class Memory:
    total = 80 * 2**30

def nvmlInit():
    pass

def nvmlShutdown():
    pass

def nvmlDeviceGetCount():
    return 1

def nvmlDeviceGetHandleByIndex(index):
    return "GPU-aaaa0000"

def nvmlDeviceGetHandleByUUID(uuid):
    return uuid

def nvmlDeviceGetUUID(handle):
    return handle

def nvmlDeviceGetName(handle):
    return "NVIDIA H100 80GB HBM3"

def nvmlDeviceGetMemoryInfo(handle):
    return Memory

def nvmlDeviceGetMigMode(handle):
    raise NVMLError("Not Supported")

def nvmlDeviceGetComputeRunningProcesses(handle):
    return []

def nvmlDeviceGetMPSComputeRunningProcesses(handle):
    return []
"""
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which is not sick")
WHY_SICK = ("Found no NVIDIA driver", "No CUDA GPUs are available", "Torch not compiled with CUDA enabled")


def write_sick_gpu(folder: Path) -> Path:
    """Write the module into a folder of its own, for a PYTHONPATH, and return the folder."""
    path = folder / "sick_gpu"
    path.mkdir()
    (path / "pynvml.py").write_text(FAKE_NVML)
    return path


def tells_why(text: str) -> bool:
    """Return whether a text has torch's reason why it cannot use the GPU."""
    return any(reason in text for reason in WHY_SICK)
