"""Devices of this machine: which there are, which are free, how to pin a worker to one, how to divide the CPU's cores.

NVML lists the CUDA devices, because it starts no CUDA context; torch is imported only where NVML does not answer.
NVML counts in PCI order while CUDA may count the fastest first, so a worker is pinned by UUID and never by index.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpo.errors import UserError

logger = logging.getLogger(__name__)

# As many hardware queues as there are, so that the streams of many lanes do not wait for each other; and the workspace
# that cuBLAS keeps for each of them, 8 MiB and 128 KiB: by default, on a Hopper GPU, it is 32 MiB.
STREAMS_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}
MAX_CPU_THREADS = 1024  # of a process; more are a mistake, such as a time or a size
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # of which the first one that is set counts
MPS_SERVER = "nvidia-cuda-mps-server"


@dataclass(frozen=True)
class Device:
    """A device to train on; `name` is what users type and what trials record: "cuda:0", "mps" or "cpu"."""

    name: str
    kind: Literal["cuda", "mps", "cpu"]
    label: str
    memory_bytes: int | None
    uuid: str | None = None
    occupied_by: tuple[int, ...] = ()
    """The pids of compute processes other than ours; empty too where the driver hides them (WSL, a container)."""


def list_devices() -> list[Device]:
    """Return every device that this process may use: CUDA devices in PCI order, then MPS, and the CPU always last."""
    return [*_cuda_devices(), *_mps_devices(), _cpu_device()]


def choose_devices(request: str) -> list[Device]:
    """Return the devices that `--devices` asks for, in the order of the request.

    "auto" is every CUDA device that no other process occupies, else MPS, else the CPU. Anything else is a comma list of
    names, where "cuda" stands for all CUDA devices; a device that is named is used, occupied or not. Raises UserError
    for a device that does not exist, for one named twice, and for "auto" where every CUDA device is occupied.
    """
    names = [part.strip() for part in request.split(",")]
    devices = [_cpu_device()] if set(names) == {"cpu"} else list_devices()  # listing all may load torch
    if names == ["auto"]:
        return _choose_free(devices)
    chosen: list[Device] = []
    for name in names:
        matches = [device for device in devices if name in (device.name, device.kind)]
        if not matches:
            raise _unknown_device_error(name, devices)
        for device in matches:
            if device in chosen:
                raise UserError(f"--devices must name each device once; {device.name} is named twice in {request!r}")
        chosen += matches
    return chosen


def worker_environment(device: Device, *, threads: int) -> dict[str, str]:
    """Return the environment variables of a worker on `device`; they must be set before its process starts.

    They pin it to the device. On a CUDA device they make room for many streams that compute side by side, unless the
    user has set them otherwise.
    """
    pinning = {
        "CUDA_VISIBLE_DEVICES": device.uuid or "",
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
    }
    if device.kind != "cuda":
        return pinning
    return pinning | {name: os.environ.get(name, value) for name, value in STREAMS_ENVIRONMENT.items()}


@contextmanager
def pinned_here(device: Device) -> Iterator[str]:
    """Pin this process to `device` for a while, and give torch's name of the device in it.

    CUDA reads CUDA_VISIBLE_DEVICES when a process first asks for a device, which may be long past: the device is then
    looked for, by its UUID, among those that torch sees. The variable is as before in the end.

    Raises:
        UserError: This process has used CUDA before, and does not see the device.
    """
    if device.uuid is None:
        yield torch_device(device)
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    torch = sys.modules.get("torch")
    has_begun = torch is not None and torch.cuda.is_initialized()
    if not has_begun:
        os.environ["CUDA_VISIBLE_DEVICES"] = device.uuid
    try:
        yield _place_in_torch(device, has_begun=has_begun)
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _place_in_torch(device: Device, *, has_begun: bool) -> str:
    """Return torch's name of a CUDA device in this process, which may have begun to use CUDA before it was pinned."""
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError):
        return torch_device(device)  # whoever trains on it proves it first, and says why it cannot be used
    seen = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    kind, _, uuid = str(device.uuid).partition("-")  # torch leaves out the kind: GPU or MIG
    if uuid in seen:
        return f"cuda:{seen.index(uuid)}"
    if kind == "MIG" and len(seen) == 1 and not has_begun:
        return torch_device(device)  # an older driver gives an instance the UUID of its GPU
    raise UserError(
        f"--devices {device.name} must name a device that this process sees, which has used CUDA before it was asked "
        f"for {device.uuid}; it sees {', '.join(seen) or 'none'}"
    )


def group_devices(devices: Sequence[Device], size: int) -> list[Device]:
    """Return devices for trials that take so many each: a group of GPUs is one device, a CPU stays one.

    GPUs that are left over are not used. Raises UserError where there are fewer than `size`.
    """
    if size == 1 or all(device.kind == "cpu" for device in devices):
        return list(devices)
    cuda = [device for device in devices if device.kind == "cuda"]
    groups = [cuda[start : start + size] for start in range(0, len(cuda) - size + 1, size)]
    if not groups:
        raise UserError(
            f"engine.devices_per_trial = {size} needs as many CUDA devices, or the CPU; "
            f"got {', '.join(device.name for device in devices)}"
        )
    return [
        replace(
            group[0],
            name="+".join(device.name for device in group),
            label=f"{size} x {group[0].label}",
            uuid=",".join(device.uuid or "" for device in group),
        )
        for group in groups
    ]


def torch_device(device: Device) -> str:
    """Return torch's name of the device inside a worker that is pinned to it: the one GPU it sees is the first."""
    return "cuda:0" if device.kind == "cuda" else device.kind


def num_cores() -> int:
    """Return how many CPU cores this process may use: its affinity, further limited by a container's CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_cgroup_cores(Path("/"))]))


def threads_per_worker(num_workers: int) -> int:
    """Return how many CPU threads each worker gets: what the environment asks for, else its share of the cores."""
    return _threads_asked_for() or max(1, num_cores() // num_workers)


def _threads_asked_for() -> int | None:
    """Return the threads that the user's environment gives each process, or None.

    As for OpenMP, only the first number of a list counts, and none that is not from 1 to MAX_CPU_THREADS.
    """
    for name in THREAD_VARIABLES:
        first = os.environ.get(name, "").split(",")[0].strip()
        if first.isdecimal() and 0 < int(first) <= MAX_CPU_THREADS:
            return int(first)
    return None


def _choose_free(devices: list[Device]) -> list[Device]:
    """Return the devices that "auto" stands for."""
    cuda = [device for device in devices if device.kind == "cuda"]
    free = [device for device in cuda if not device.occupied_by]
    occupied = [
        f"{device.name} by pid {', '.join(map(str, device.occupied_by))}" for device in cuda if device.occupied_by
    ]
    if cuda and not free:
        raise UserError(
            "--devices auto takes only CUDA devices that no other process occupies, and all are occupied"
            f" ({'; '.join(occupied)}); to share one, name it: --devices {cuda[0].name}, or take --devices cpu"
        )
    if occupied:
        logger.warning("--devices auto skips devices that other processes use: %s", "; ".join(occupied))
    return free or devices[:1]  # MPS comes before the CPU


def _unknown_device_error(name: str, devices: list[Device]) -> UserError:
    available = ", ".join(["auto", *sorted({name for device in devices for name in (device.name, device.kind)})])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return UserError(f"unknown device {name!r} in --devices; available: {available}{hidden}")


def _cuda_devices() -> list[Device]:
    import pynvml  # type: ignore[import-untyped, unused-ignore]

    try:
        pynvml.nvmlInit()
        try:
            return [_nvml_device(pynvml, index, uuid) for index, uuid in enumerate(_visible_uuids(_gpus(pynvml)))]
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        pass  # no NVIDIA driver, as on most machines
    except pynvml.NVMLError as error:
        logger.warning("NVML fails (%s): torch lists the CUDA devices instead, and cannot tell which are in use", error)
    return _torch_cuda_devices()


def _nvml_device(pynvml: Any, index: int, uuid: str) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    try:
        memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:  # chips that share the CPU's memory
        memory_bytes = None
    pids = _compute_pids(pynvml, handle)
    return Device(
        name=f"cuda:{index}",
        kind="cuda",
        label=pynvml.nvmlDeviceGetName(handle),
        memory_bytes=memory_bytes,
        uuid=uuid,
        occupied_by=tuple(sorted(pids - _own_process_tree())) if pids else (),
    )


def _compute_pids(pynvml: Any, handle: Any) -> set[int]:
    """Return the processes that compute on a device: the clients of an MPS server, but not the server."""
    pids: set[int] = set()
    for list_processes in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses,
    ):
        with suppress(pynvml.NVMLError):  # WSL, virtual GPUs, drivers that know no MPS
            pids |= {process.pid for process in list_processes(handle)}
    return {pid for pid in pids if not _is_mps_server(pynvml, pid)}


def _is_mps_server(pynvml: Any, pid: int) -> bool:
    try:
        name = pynvml.nvmlSystemGetProcessName(pid)  # the driver also knows processes outside of this container
    except pynvml.NVMLError:
        return False
    return MPS_SERVER in (name.decode(errors="replace") if isinstance(name, bytes) else name)


def _gpus(pynvml: Any) -> dict[str, list[str]]:
    """Return the UUIDs of what can be computed on, by the UUID of each GPU: the GPU itself, or its MIG instances."""
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return {pynvml.nvmlDeviceGetUUID(handle): _instances(pynvml, handle) for handle in handles}


def _instances(pynvml: Any, handle: Any) -> list[str]:
    """Return the UUIDs of a GPU's MIG instances where it is divided into some, else its own."""
    try:
        current_mode, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:  # GPUs without MIG
        current_mode = pynvml.NVML_DEVICE_MIG_DISABLE
    if current_mode != pynvml.NVML_DEVICE_MIG_ENABLE:
        return [pynvml.nvmlDeviceGetUUID(handle)]
    instances = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(pynvml.NVMLError_NotFound):  # there may be fewer
            instances.append(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)))
    return instances


def _visible_uuids(gpus: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the UUIDs that CUDA_VISIBLE_DEVICES leaves visible, by the rules of the CUDA C++ programming guide.

    Entries are indices, GPU UUIDs or unique beginnings of one, or UUIDs of MIG instances. An invalid entry hides itself
    and all after it; a device that is named twice hides all. Where a GPU is divided, CUDA takes its first MIG instance
    for it. Without the variable, CUDA sees one MIG instance alone; all are listed, as each worker is pinned to its own.

    Args:
        gpus: What `_gpus` returns.
    """
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return [uuid for instances in gpus.values() for uuid in instances]
    visible: list[str] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.startswith("MIG-"):
            matches = [entry]
        elif entry.isdecimal():
            matches = [uuid for instances in list(gpus.values())[int(entry) :][:1] for uuid in instances[:1]]
        else:
            named = [uuid for uuid in gpus if entry.startswith("GPU-") and uuid.startswith(entry)]
            matches = [gpus[named[0]][0]] if len(named) == 1 and gpus[named[0]] else []
        if len(matches) != 1:
            break
        if matches[0] in visible:
            return []
        visible += matches
    return visible


def _torch_cuda_devices() -> list[Device]:
    """Return the CUDA devices where NVML is missing (some containers, Jetson); who else uses them is then unknown."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    all_properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        Device(f"cuda:{index}", "cuda", properties.name, properties.total_memory, f"GPU-{properties.uuid}")
        for index, properties in enumerate(all_properties)
    ]


def _mps_devices() -> list[Device]:
    if sys.platform != "darwin":
        return []
    import torch

    return [Device("mps", "mps", "Apple GPU", None)] if torch.backends.mps.is_available() else []


def _cpu_device() -> Device:
    import psutil

    model = re.search(r"model name\s*:\s*(.+)", _text_of(Path("/proc/cpuinfo")))
    label = model[1] if model else platform.processor() or platform.machine()
    return Device("cpu", "cpu", label, psutil.virtual_memory().total)


def _own_process_tree() -> set[int]:
    """Return the pids of this process, its ancestors (such as a notebook that holds a GPU) and its descendants."""
    import psutil

    me = psutil.Process()
    return {process.pid for process in [me, *me.parents(), *me.children(recursive=True)]}


def _cgroup_cores(root: Path) -> Iterator[int]:
    """Yield the CPU quotas that bind this process, in cores rounded up: of its cgroup and parents (v2), or of v1."""
    own = re.search(r"^0::/(.*)$", _text_of(root / "proc/self/cgroup"), re.MULTILINE)
    v1, v2 = root / "sys/fs/cgroup/cpu", root / "sys/fs/cgroup" / (own[1] if own else "")
    limits = [_text_of(folder / "cpu.max") for folder in (v2, *v2.parents)]
    limits.append(_text_of(v1 / "cpu.cfs_quota_us") + " " + _text_of(v1 / "cpu.cfs_period_us"))
    for limit in limits:
        match limit.split():
            case [quota, period] if quota.isdecimal():  # no limit is "max" in v2, -1 in v1
                yield math.ceil(int(quota) / int(period))


def _text_of(file: Path) -> str:
    """Return the text of a file, or nothing where it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
