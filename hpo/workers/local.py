"""Launchers of this machine: a worker in the calling process, or worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from hpo.config.import_policy import ImportAllowlist
from hpo.errors import StudyStopped, UserError
from hpo.store.database import PASSWORD_FILE
from hpo.store.store import Store
from hpo.study.processes import Process
from hpo.study.records import StudyRecord
from hpo.system.devices import (
    Device,
    choose_devices,
    num_cores,
    pinned_here,
    threads_per_worker,
    torch_device,
)
from hpo.system.processes import machine_id
from hpo.workers.launcher import Launcher, interrupts
from hpo.workers.stages import add_due_trials
from hpo.workers.supervisor import TICK_S, OnTick, supervise
from hpo.workers.worker import Worker
from hpo.workers.worker_device import DeviceFailed
from hpo.workers.worker_handle import WorkerProcess, WorkerTask, describe_exit_code


class InProcessLauncher(Launcher):
    """A launcher that trains in the calling process: for a debugger, and for tests."""

    def __init__(self, devices: str) -> None:
        self._device = choose_devices(devices)[0]
        super().__init__(devices, device_kinds={self._device.kind}, own_devices=[self._device])

    def run(self, store: Store, study: StudyRecord, *, on_tick: OnTick) -> None:
        """Run the worker, as `Launcher.run` says."""
        with interrupts() as interrupted:
            last_tick = 0.0

            def should_stop() -> bool:  # called before every step of training
                nonlocal last_tick
                if time.monotonic() - last_tick > TICK_S:
                    last_tick = time.monotonic()
                    on_tick(store)
                return bool(interrupted)

            store = store.retrying(until=lambda: bool(interrupted))
            store.workers.reap(study)
            if study.spec.objective is None:
                import torch

                torch.set_num_threads(num_cores())  # as in a worker process: the same sums, digit for digit
            with pinned_here(self._device) as place:
                try:
                    Worker(store, study, device=self._device.name, torch_device=place, should_stop=should_stop).run()
                except DeviceFailed as failure:
                    raise StudyStopped(str(failure), can_resume=True) from None
                except SystemExit:
                    raise StudyStopped(
                        f"this process can no longer use the device {self._device.name}, after an error on it; "
                        "a new one can",
                        can_resume=True,
                    ) from None
            on_tick(store)
            if interrupted:
                raise StudyStopped("interrupted", can_resume=True, interrupted=True)


class LocalLauncher(Launcher):
    """A launcher of worker processes on this machine, each pinned to a device and restarted when it dies.

    They run in sessions of their own, so that Ctrl-C reaches only this process. They end when it ends, in whatever way.
    """

    def __init__(self, devices: str, *, workers: int | None, allowed: ImportAllowlist) -> None:
        self._devices = choose_devices(devices)
        kinds = {device.kind for device in self._devices}
        super().__init__(devices, device_kinds=kinds, own_devices=self._devices)
        self._workers = workers or len(self._devices)
        self._allowed = allowed

    def run(self, store: Store, study: StudyRecord, *, on_tick: OnTick) -> None:
        """Run the worker processes, as `Launcher.run` says."""
        with interrupts() as interrupted:
            store.workers.reap(study)
            add_due_trials(store, study)  # the trial that ended last may have ended without adding them
            supervise(store, study, self._pool(store, study), interrupted=interrupted, on_tick=on_tick)
        if interrupted:
            raise StudyStopped("interrupted", can_resume=True, interrupted=True)

    def _pool(self, store: Store, study: StudyRecord) -> LocalPool:
        logs = store.folder(study) / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {logs} for the workers' logs cannot be made: {error.strerror}") from None
        num_workers = min(self._workers, max(1, store.trials.most_at_once(study)))
        devices = [self._devices[index % len(self._devices)] for index in range(num_workers)]
        return LocalPool(
            [
                LocalWorker(self._task(store, study, device), device, logs / f"worker-{index}.log")
                for index, device in enumerate(devices)
            ]
        )

    def _task(self, store: Store, study: StudyRecord, device: Device) -> WorkerTask:
        # The worker reads a password from the same file again, so that its environment does not show it.
        url = store.url.set(password=None) if os.environ.get(PASSWORD_FILE) else store.url
        # The same however many workers are needed: with another number of threads the digits would differ.
        threads = threads_per_worker(self._workers)
        storage = url.render_as_string(hide_password=False)
        return WorkerTask(storage, study.name, device.name, torch_device(device), threads, self._allowed)


class LocalPool:
    """The workers of this machine, whose number does not change."""

    def __init__(self, workers: Sequence[LocalWorker]) -> None:
        self.workers = workers

    def adjust(self, store: Store, study: StudyRecord) -> None:
        """Do nothing: the pool keeps its size."""


class LocalWorker:
    """A device of this machine, or a share of one, where one worker process after the other runs."""

    def __init__(self, task: WorkerTask, device: Device, log: Path) -> None:
        self._worker = WorkerProcess(task, device)
        self._log = log

    @property
    def exit_code(self) -> int | None:
        """Exit code of the last process, once it has ended."""
        return self._worker.exit_code

    @property
    def process(self) -> Process | None:
        """The process that runs here, or that ran here last."""
        return None if self._worker.pid is None else (machine_id(), self._worker.pid)

    def start(self) -> None:
        """Start a process."""
        with self._log.open("ab") as log:
            self._worker.start(output=log)

    def is_running(self) -> bool:
        """Return whether the process runs."""
        return self._worker.is_running()

    def ask_to_leave(self) -> None:
        """Have the process save and release its trials and end."""
        self._worker.ask_to_leave()

    def kill(self) -> None:
        """Kill the process."""
        self._worker.kill()

    def describe_end(self) -> str:
        """Return how the last process ended, with the end of its log."""
        tail = self._log.read_text(errors="replace")[-3000:]
        end = describe_exit_code(self._worker.exit_code or 0)
        return f"{end}; the end of its log, {self._log}:\n{tail}"
