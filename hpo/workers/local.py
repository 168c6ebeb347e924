"""Launchers of this machine: a worker in the calling process, or worker processes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped, UserError
from hpo.store.store import Store
from hpo.store.urls import PASSWORD_FILE
from hpo.study.processes import Process
from hpo.study.records import StudyRecord
from hpo.system.devices import (
    choose_devices,
    group_devices,
    pinned_here,
    threads_per_worker,
    torch_device,
)
from hpo.system.processes import machine_id
from hpo.train.device_proof import proofs_of
from hpo.train.imports import ImportAllowlist
from hpo.workers.executors import InProcess, Local
from hpo.workers.launcher import Launcher, Proof, Returned, interrupts
from hpo.workers.stages import add_due_trials
from hpo.workers.supervisor import TICK_S, OnTick, supervise
from hpo.workers.worker import Worker
from hpo.workers.worker_device import DeviceFailed, precisions_to_prove
from hpo.workers.worker_handle import WorkerProcess, WorkerTask, describe_exit_code

logger = logging.getLogger(__name__)


class InProcessLauncher(Launcher):
    """A launcher that trains in the calling process: for a debugger, and for tests."""

    def __init__(self, executor: InProcess, spec: StudySpec) -> None:
        self._device = choose_devices(executor.devices)[0]
        super().__init__(
            executor.devices,
            device_kinds={self._device.kind},
            own_devices=[self._device],
            threads=executor.threads,
        )
        self._precisions = precisions_to_prove(spec, torch_device(self._device))
        self._begun = ExitStack()
        self._proofs: Mapping[str, Proof] = {}

    def start_early(self) -> None:
        """Start to prove the device; see `Launcher.start_early`."""
        self._proofs = self._begun.enter_context(proofs_of([self._device], precisions=self._precisions))

    def __exit__(self, *_: object) -> None:
        self._begun.close()

    def proofs(self) -> Mapping[str, Proof]:
        """Return the proof of the device, in a process of its own."""
        return self._proofs

    def run(self, store: Store, study: StudyRecord, *, on_tick: OnTick) -> None:
        """Run the worker, as `Launcher.run` says."""
        with interrupts() as interrupted:
            last_tick, has_told = 0.0, False

            def should_stop() -> bool:  # called before every step of training
                nonlocal last_tick, has_told
                if interrupted and not has_told:
                    has_told = True
                    logger.warning("saving after this epoch; Ctrl-C twice more ends at once")
                if time.monotonic() - last_tick > TICK_S:
                    last_tick = time.monotonic()
                    on_tick(store)
                return bool(interrupted)

            store = store.retrying(until=lambda: bool(interrupted))
            store.workers.reap(study)
            if study.spec.has_recipe:
                import torch

                torch.set_num_threads(
                    self.threads or threads_per_worker(1)
                )  # as in a worker process: the same sums, digit for digit
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
    `start_early` starts them, to load torch and prove their devices while the study is checked.
    """

    def __init__(self, executor: Local, spec: StudySpec, *, allowed: ImportAllowlist, url: URL) -> None:
        self._devices = group_devices(choose_devices(executor.devices), spec.engine.devices_per_trial)
        self._num_workers = executor.workers or len(self._devices)
        # The same however many workers are needed: with another number of threads the digits would differ.
        self._threads = executor.threads or threads_per_worker(self._num_workers)
        self._num_early = min(self._num_workers, spec.num_trials)
        kinds = {device.kind for device in self._devices}
        super().__init__(
            executor.devices,
            device_kinds=kinds,
            own_devices=self._devices[: self._num_early],
            threads=executor.threads,
        )
        self._spec, self._allowed, self._url = spec, allowed, url
        self._early: list[WorkerProcess] = []

    def start_early(self) -> None:
        """Start the workers; see `Launcher.start_early`."""
        self._early = [self._make_worker(index) for index in range(self._num_early)]
        for worker in self._early:
            worker.start_early()

    def __exit__(self, *_: object) -> None:
        for worker in self._early:
            worker.dismiss()

    def proofs(self) -> Mapping[str, Proof]:
        """Return what the workers find of their devices, other than the CPU."""
        first = zip(self.own_devices, self._early, strict=False)  # there may be several for each device
        return {device.name: worker for device, worker in first if device.kind != "cpu"}

    def call(self, function: Callable[..., Returned], *args: Any, on_device: bool = False) -> Returned:
        """Call a function here; where it needs a GPU, without the workers that have their devices already.

        A GPU may be exclusive to one process, and in a container a worker may be taken for somebody else's.
        """
        if on_device and any(device.kind == "cuda" for device in self.own_devices):
            for worker in self._early:
                worker.dismiss()
        return super().call(function, *args, on_device=on_device)

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
        num_needed = min(self._num_workers, max(1, store.trials.most_at_once(study)))
        early, not_needed = self._early[:num_needed], self._early[num_needed:]
        for worker in not_needed:
            worker.dismiss()
        workers = early + [self._make_worker(index) for index in range(len(early), num_needed)]
        return LocalPool([LocalWorker(worker, logs / f"worker-{index}.log") for index, worker in enumerate(workers)])

    def _make_worker(self, index: int) -> WorkerProcess:
        device = self._devices[index % len(self._devices)]
        # The worker reads a password from the same file again, so that its environment does not show it.
        url = self._url.set(password=None) if os.environ.get(PASSWORD_FILE) else self._url
        task = WorkerTask(
            url.render_as_string(hide_password=False),
            self._spec.name,
            device.name,
            torch_device(device),
            self._threads,
            self._allowed,
            precisions=precisions_to_prove(self._spec, torch_device(device)),
        )
        return WorkerProcess(task, device)


class LocalPool:
    """The workers of this machine, whose number does not change."""

    def __init__(self, workers: Sequence[LocalWorker]) -> None:
        self.workers = workers

    def adjust(self, store: Store, study: StudyRecord) -> None:
        """Do nothing: the pool keeps its size."""


class LocalWorker:
    """A device of this machine, or a share of one, where one worker process after the other runs."""

    def __init__(self, worker: WorkerProcess, log: Path) -> None:
        self._worker = worker
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
        """Start a process, or have the one begin that was started early."""
        if not self._worker.begin(self._log):
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
        tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
        end = describe_exit_code(self._worker.exit_code or 0)
        return f"{end}; the end of its log, {self._log}:\n{tail}"
