"""Where workers run: in this process, or as supervised local processes, behind one protocol."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

from hpo.database import PASSWORD_FILE
from hpo.devices import Device, num_cores, threads_per_worker, torch_device, worker_environment
from hpo.errors import StudyStopped, UserError
from hpo.outage import STORE_ERRORS
from hpo.records import ENDED, Study
from hpo.store import Store
from hpo.trust import Allowed
from hpo.worker import EXIT_RESTART, Worker
from hpo.worker_process import ASSIGNMENT, DRAIN_S, Assignment

TICK_S = 0.2
REAP_S = 5.0
KILL_S = DRAIN_S + 10.0  # after being asked to leave, a worker that is still there is killed
STRAGGLE_S = 10.0  # after a study's end, a worker that is still there hangs: idle ones look every POLL_S
MAX_CRASHES = 5  # for each worker: processes that died one after the other without an epoch in between

Watch = Callable[[], None]  # called several times a second while workers run: the place to show progress


class Launcher(Protocol):
    def run(self, store: Store, study: Study, *, watch: Watch) -> None:
        """Runs workers until no slot of the study is left or the study is stopped.

        Raises StudyStopped where that cannot be reached: workers that die again and again, or an interruption by
        Ctrl-C or SIGTERM. No worker is left when it returns or raises.
        """


class InProcess:
    """One worker in the calling process: for a debugger, and for tests."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def run(self, store: Store, study: Study, *, watch: Watch) -> None:
        with _interrupts() as interrupted:
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
            device = self._device.name
            # As a worker process would be: by UUID, before CUDA is first used, so that torch sees this device alone.
            if self._device.uuid is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = self._device.uuid
            try:
                torch_name = torch_device(self._device)
                Worker(store, study, device=device, torch_device=torch_name, should_stop=should_stop).run()
            except SystemExit:
                raise StudyStopped(f"the device {device} is unusable in this process", can_go_on=True) from None
            watch()
            if interrupted:
                raise StudyStopped("interrupted", can_go_on=True, interrupted=True)


class LocalProcesses:
    """Worker processes on this machine, each pinned to a device, restarted when they die.

    They run in sessions of their own, so that Ctrl-C reaches this process alone, and end when it does, however it does.
    """

    def __init__(self, devices: Sequence[Device], *, workers: int | None, allowed: Allowed) -> None:
        count = workers or len(devices)
        self._devices = [devices[index % len(devices)] for index in range(count)]
        self._allowed = allowed

    def run(self, store: Store, study: Study, *, watch: Watch) -> None:
        store.reap(study)
        store.go_on(study)  # what ended last may have ended without it
        devices = self._devices[: max(1, store.most_at_once(study))]
        threads = threads_per_worker(len(self._devices))  # not fewer workers' more: their digits would differ
        logs = store.folder(study) / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {logs} for the workers' logs cannot be made: {error.strerror}") from None
        processes = [
            _Process(self._assignment(store, study, device, threads), device, logs / f"worker-{index}.log")
            for index, device in enumerate(devices)
        ]
        with _interrupts() as interrupted:
            store.give_up = lambda: bool(interrupted)  # an outage is waited out, unless somebody does not want to
            try:
                for process in processes:
                    process.start()
                self._supervise(store, study, processes, interrupted, watch)
            finally:
                store.give_up = lambda: True
                _drain(processes, interrupted, watch)
                with suppress(*STORE_ERRORS):  # who goes on with the study does it too
                    store.reap(study)
                store.give_up = lambda: False
        watch()
        if interrupted:
            raise StudyStopped("interrupted", can_go_on=True, interrupted=True)

    def _assignment(self, store: Store, study: Study, device: Device, threads: int) -> Assignment:
        # A password that came from a file is read from there again: no environment need show it.
        known = store.url.set(password=None) if os.environ.get(PASSWORD_FILE) else store.url
        url = known.render_as_string(hide_password=False)
        return Assignment(url, study.name, device.name, torch_device(device), threads, self._allowed)

    def _supervise(
        self, store: Store, study: Study, processes: list[_Process], interrupted: list[int], watch: Watch
    ) -> None:  # fmt: skip
        crashes, before, next_reap = 0, _progress(store, study), time.monotonic() + REAP_S
        finished_since: float | None = None
        while not interrupted:
            running = [process for process in processes if process.is_running()]
            look = time.monotonic() > next_reap or len(running) < len(processes)
            over = look and _is_over(store, study)
            if over and not running:
                return
            if look:
                is_finished = over and _is_finished(store, study)
                finished_since = (finished_since or time.monotonic()) if is_finished else None
                if finished_since is not None and time.monotonic() - finished_since > STRAGGLE_S:
                    return  # who is still here hangs, and is ended like one that does not leave when asked
            gone = [] if over else [process for process in processes if process.exit_code is not None]
            if gone:  # while there is work left
                killed = {process.pid for process in gone if process.exit_code == -signal.SIGKILL}
                asked = {process.pid for process in gone if process.exit_code in (EXIT_RESTART, -signal.SIGTERM)}
                crashed = {process.pid for process in gone} - killed - asked
                store.reap(study, crashed_pids=crashed, killed_pids=killed)
            for process in gone:
                progress = _progress(store, study)
                crashes = 0 if process.exit_code == EXIT_RESTART or progress > before else crashes + 1
                before = progress
                if crashes >= MAX_CRASHES * len(processes):
                    raise StudyStopped(
                        f"workers died {crashes} times without coming an epoch further, the last one "
                        f"{process.ending()}; the end of its log, {process.log}:\n{process.log_tail()}",
                        can_go_on=True,
                    )
                process.start()
            if time.monotonic() > next_reap:
                store.reap(study)
                next_reap = time.monotonic() + REAP_S
            watch()
            time.sleep(TICK_S)


class _Process:
    """One worker process, which can be started again."""

    def __init__(self, assignment: Assignment, device: Device, log: Path) -> None:
        self.log = log
        self.exit_code: int | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            **worker_environment(device, threads=assignment.threads),
            ASSIGNMENT: json.dumps(dataclasses.asdict(assignment)),
            "PYTHONSAFEPATH": "1",  # or the working directory would come before the folders that are allowed
            "PYTHONPATH": os.pathsep.join(
                filter(None, [*assignment.allowed.python_path(), os.environ.get("PYTHONPATH")])
            ),
        }

    def start(self) -> None:
        self.exit_code = None
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "hpo.worker_process"],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def is_running(self) -> bool:
        if self._popen is None or self.exit_code is not None:
            return False
        self.exit_code = self._popen.poll()
        if self.exit_code is not None:
            with suppress(ProcessLookupError):  # what the user's code has started there must not outlive it
                os.killpg(self._popen.pid, signal.SIGKILL)
        return self.exit_code is None

    def ask_to_leave(self) -> None:
        if self.is_running():
            assert self._popen is not None
            assert self._popen.stdin is not None
            self._popen.stdin.close()
            self._popen.terminate()

    def kill(self) -> None:
        if self.is_running():
            assert self._popen is not None
            self._popen.kill()
            self._popen.wait()

    def ending(self) -> str:
        code = self.exit_code or 0
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _drain(processes: Sequence[_Process], interrupted: list[int], watch: Watch) -> None:
    """Asks every worker to leave and waits; kills those that are still there after KILL_S or a second Ctrl-C."""
    for process in processes:
        process.ask_to_leave()
    deadline = time.monotonic() + KILL_S
    while running := [process for process in processes if process.is_running()]:
        if time.monotonic() > deadline or len(interrupted) > 1:
            for process in running:
                process.kill()
        with suppress(*STORE_ERRORS):  # showing progress must not keep the workers from being ended
            watch()
        time.sleep(TICK_S)


def _is_over(store: Store, study: Study) -> bool:
    return store.is_stopping(study.study_id) or _is_finished(store, study)


def _is_finished(store: Store, study: Study) -> bool:
    return store.num_left(study) == 0


def _progress(store: Store, study: Study) -> int:
    """Grows with every epoch that a trial comes further, and with every trial that ends."""
    return store.num_epochs(study) + sum(
        count for state, count in store.counts(study.study_id).items() if state in ENDED
    )


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them, up to the third. Does nothing outside the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 2:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
