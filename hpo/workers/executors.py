"""Executors: plain descriptions of where the workers of a study run, and of how many there are.

An executor connects to nothing and loads neither torch nor Ray. `hpo.workers.launching` makes a launcher of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hpo.errors import UserError
from hpo.system.devices import MAX_CPU_THREADS

OWN_RAY, RUNNING_RAY, RAY_CLIENT = "ray", "auto", "ray://"  # the addresses, of which the last one is a prefix
PLACEMENTS = {"pack": "DEFAULT", "spread": "SPREAD"}  # our name: Ray's name


@dataclass(frozen=True)
class Local:
    """Worker processes on this machine.

    Args:
        devices: "auto" for every free GPU, else the CPU; or a list such as "cpu", "mps", "cuda" or "cuda:0,cuda:1".
        workers: Number of processes. Default: one for each device.
        threads: CPU threads of each process. Default: OMP_NUM_THREADS where it is set, else its share of the cores.

    Raises:
        UserError: `workers` or `threads` is below 1, `threads` is above 1024, or an argument is of the wrong type.
    """

    devices: str = "auto"
    workers: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_devices(self.devices)
        _check_count("--workers", self.workers)
        _check_count("--threads", self.threads, most=MAX_CPU_THREADS)


@dataclass(frozen=True)
class InProcess:
    """The calling process itself, which trains without workers: for a debugger.

    Args:
        devices: As in `Local`; it trains on the first one.
        threads: As in `Local`.

    Raises:
        UserError: As for `Local`.
    """

    devices: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_devices(self.devices)
        _check_count("--threads", self.threads, most=MAX_CPU_THREADS)


@dataclass(frozen=True)
class Ray:
    """Workers that a Ray cluster places.

    Args:
        address: "auto", the cluster that RAY_ADDRESS names or else the Ray that runs on this machine; "ray", a Ray of
            its own on this machine that ends with the study; or "ray://HOST:PORT", a cluster through Ray Client.
        devices: What each worker trains on: "auto", "cpu" or "cuda"; with address "ray" as in `Local`.
        workers: Number of workers at most. Default: as many as the cluster has room for.
        resources: What each worker needs: `num_cpus` (its threads; default 1), `num_gpus` (at most 1; default 1 where
            it trains on a GPU), `memory` (bytes), and resources of the cluster's own.
        placement: "pack" fills one node after the other, "spread" uses as many nodes as possible.

    Raises:
        UserError: An argument is none of these.
    """

    address: str = RUNNING_RAY
    devices: str = "auto"
    workers: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    placement: str = "pack"

    def __post_init__(self) -> None:
        is_client = str(self.address).startswith(RAY_CLIENT) and "@" not in self.address
        if self.address not in (OWN_RAY, RUNNING_RAY) and not is_client:
            got = "one with a login, which is not shown" if "@" in str(self.address) else repr(self.address)
            raise UserError(f"--on must be ray, auto or ray://HOST:PORT, got {got}")
        if self.placement not in PLACEMENTS:
            raise UserError(f"--placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}")
        if not isinstance(self.resources, Mapping):
            raise UserError(f"--resource must give an amount to each name, got {self.resources!r}")
        for name, amount in self.resources.items():
            _check_resource(name, amount)
        _check_devices(self.devices)
        _check_count("--workers", self.workers)


Executor = Local | InProcess | Ray


def _check_devices(devices: str) -> None:
    if not isinstance(devices, str):
        raise UserError(f"--devices must be a text such as 'cpu' or 'cuda:0,cuda:1', got {devices!r}")


def _check_count(option: str, count: int | None, *, most: int | None = None) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
        raise UserError(f"{option} must be an integer, got {count!r}")
    if count is not None and count < 1:
        raise UserError(f"{option} must be at least 1, got {count}")
    if count is not None and most is not None and count > most:
        raise UserError(f"{option} must be at most {most}, got {count}")


def _check_resource(name: str, amount: float) -> None:
    if not isinstance(amount, int | float):
        raise UserError(f"--resource {name} must be a number, got {amount!r}")
    may_be_zero = name in ("num_cpus", "num_gpus")
    is_enough = amount >= 0 if may_be_zero else amount > 0  # NaN is neither
    if not is_enough or amount == math.inf:
        rule = "not be below 0" if may_be_zero else "be above 0"
        raise UserError(f"--resource {name} must {rule}, got {amount:g}")
    if name == "num_gpus" and amount > 1:
        raise UserError(f"--resource num_gpus must be at most 1, as a worker trains on one GPU, got {amount:g}")


def choose_executor(
    executor: Executor | None, *, devices: str | None, workers: int | None, in_process: bool
) -> Executor:
    """Return the executor that is given, or the one that its short forms describe; by default `Local()`.

    Raises:
        UserError: Two of them exclude each other.
    """
    if executor is not None:
        if devices is not None or workers is not None or in_process:
            raise UserError("executor cannot be combined with its short forms: devices, workers and in_process")
        return executor
    devices = "auto" if devices is None else devices
    if not in_process:
        return Local(devices, workers)
    if workers is not None:
        raise UserError(f"workers cannot be used with in_process, got {workers}")
    return InProcess(devices)
