"""Devices as the product sees them: from torch, from NVML, in a pinned worker, and beside another process."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch

from hpo.system import devices
from scripts.gpu_day.common import Section, device, in_child
from scripts.gpu_day.stand_in import is_here

TIMEOUT_S = 30.0


def run(section: Section) -> None:
    with section.trying("torch"):
        found = devices._torch_cuda_devices()
        section.say("torch", [str(one) for one in found])
    missing = [name for name in ("pynvml", "psutil") if not is_here(name)]
    if missing:
        section.say("devices", f"not listed: {', '.join(missing)} is not here")
    else:
        with section.trying("devices"):
            section.say("devices", [str(one) for one in devices.list_devices()])
    if not section.needs_gpu("worker"):
        return
    with section.trying("worker"):
        environment = devices.worker_environment(found[0], threads=2)
        section.say("worker", in_child(seen_by_worker, timeout_s=TIMEOUT_S, environment=environment))
    if not missing:
        with section.trying("occupied"):
            section.say("occupied", seen_beside_another())


def seen_by_worker() -> dict[str, Any]:
    """Return what a worker's process sees of the machine."""
    return {
        "num_gpus": torch.cuda.device_count(),
        "gpu": torch.cuda.get_device_name(0),
        "uuid": str(torch.cuda.get_device_properties(0).uuid),
        "threads": torch.get_num_threads(),
    }


def seen_beside_another() -> dict[str, Any]:
    """Return whom the product says that the GPUs are occupied by, while a process holds one."""
    context = multiprocessing.get_context("spawn")
    is_held, may_end = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(is_held, may_end), daemon=True)
    holder.start()
    try:
        assert is_held.wait(TIMEOUT_S), "the other process did not get the GPU"
        # Its parent is this process, and an own child is no occupant; so a sibling looks.
        return {"holder": holder.pid, "seen": in_child(occupants, timeout_s=TIMEOUT_S)}
    finally:
        may_end.set()
        holder.join(TIMEOUT_S)


def hold(is_held: Any, may_end: Any) -> None:
    """Hold a GPU until told otherwise."""
    torch.zeros(1, device=device())
    is_held.set()
    may_end.wait(TIMEOUT_S)


def occupants() -> dict[str, list[int]]:
    """Return the processes on each device, but for the own family."""
    return {device.name: list(device.occupied_by) for device in devices.list_devices()}
