"""Where workers run: in this process, as local processes, or on a Ray cluster, behind one interface."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from hpo.config.import_policy import ImportAllowlist
from hpo.errors import StudyStopped, UserError
from hpo.store.database import PASSWORD_FILE
from hpo.store.studies import Store
from hpo.study.processes import Process
from hpo.study.records import StudyRecord
from hpo.system import processes as liveness
from hpo.system.devices import Device, choose_devices, num_cores, threads_per_worker, torch_device
from hpo.workers.launcher import Launcher, interrupts
from hpo.workers.stages import add_due_trials
from hpo.workers.supervisor import TICK_S, Watch, supervise
from hpo.workers.worker import Worker
from hpo.workers.worker_handle import WorkerProcess, WorkerTask, ending


class InProcessLauncher(Launcher):
    """One worker in the calling process: for a debugger, and for tests."""

    def __init__(self, devices: str) -> None:
        self._device = choose_devices(devices)[0]
        super().__init__(devices, kinds={self._device.kind})

    def run(self, store: Store, study: StudyRecord, *, watch: Watch) -> None:
        with interrupts() as interrupted:
            last_watch = 0.0

            def should_stop() -> bool:  # asked before every step of training
                nonlocal last_watch
                if time.monotonic() - last_watch > TICK_S:
                    last_watch = time.monotonic()
                    watch()
                return bool(interrupted)

            store.give_up = lambda: bool(interrupted)
            store.reap(study)
            if study.spec.objective is None:
                import torch

                torch.set_num_threads(num_cores())  # as a worker process would have: the same sums, digit for digit
            # As a worker process would be: by UUID, before CUDA is first used, so that torch sees this device alone.
            if self._device.uuid is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = self._device.uuid
            try:
                Worker(
                    store,
                    study,
                    device=self._device.name,
                    torch_device=torch_device(self._device),
                    should_stop=should_stop,
                ).run()
            except SystemExit:
                raise StudyStopped(
                    f"the device {self._device.name} is unusable in this process", can_resume=True
                ) from None
            watch()
            if interrupted:
                raise StudyStopped("interrupted", can_resume=True, interrupted=True)


class LocalLauncher(Launcher):
    """Worker processes on this machine, each pinned to a device, restarted when they die.

    They run in sessions of their own, so that Ctrl-C reaches this process alone, and end when it does, however it does.
    """

    def __init__(self, devices: str, *, workers: int | None, allowed: ImportAllowlist) -> None:
        self._devices = choose_devices(devices)
        super().__init__(devices, kinds={device.kind for device in self._devices})
        self._workers = workers or len(self._devices)
        self._allowed = allowed

    def run(self, store: Store, study: StudyRecord, *, watch: Watch) -> None:
        with interrupts() as interrupted:
            store.reap(study)
            add_due_trials(store, study)  # what ended last may have ended without it
            supervise(store, study, self._crew(store, study), interrupted=interrupted, watch=watch)
        if interrupted:
            raise StudyStopped("interrupted", can_resume=True, interrupted=True)

    def _crew(self, store: Store, study: StudyRecord) -> LocalPool:
        logs = store.folder(study) / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {logs} for the workers' logs cannot be made: {error.strerror}") from None
        places = [
            LocalWorker(self._assignment(store, study, device), device, logs / f"worker-{index}.log")
            for index in range(min(self._workers, max(1, store.most_at_once(study))))
            for device in [self._devices[index % len(self._devices)]]
        ]
        return LocalPool(places)

    def _assignment(self, store: Store, study: StudyRecord, device: Device) -> WorkerTask:
        # A password that came from a file is read from there again: no environment need show it.
        known = store.url.set(password=None) if os.environ.get(PASSWORD_FILE) else store.url
        url = known.render_as_string(hide_password=False)
        threads = threads_per_worker(self._workers)  # not fewer workers' more: their digits would differ
        return WorkerTask(url, study.name, device.name, torch_device(device), threads, self._allowed)


class LocalPool:
    """The workers of this machine: as many as there were at the start."""

    def __init__(self, places: Sequence[LocalWorker]) -> None:
        self.places = places

    def adjust(self, store: Store, study: StudyRecord) -> None:
        return None


class LocalWorker:
    """A device of this machine, or a share of one, where one worker process after the other runs."""

    def __init__(self, assignment: WorkerTask, device: Device, log: Path) -> None:
        self._worker = WorkerProcess(assignment, device)
        self._log = log
        self.is_running = self._worker.is_running
        self.ask_to_leave = self._worker.ask_to_leave
        self.kill = self._worker.kill

    @property
    def exit_code(self) -> int | None:
        return self._worker.exit_code

    @property
    def process(self) -> Process | None:
        return None if self._worker.pid is None else (liveness.machine_id(), self._worker.pid)

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._worker.start(output=log)

    def last_words(self) -> str:
        tail = self._log.read_text(errors="replace")[-3000:]
        return f"{ending(self._worker.exit_code or 0)}; the end of its log, {self._log}:\n{tail}"
