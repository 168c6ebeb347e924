"""The actors on a Ray cluster: the supervisor of a study and its workers. Importing this needs Ray.

A worker's actor holds what Ray gave it (a GPU, cores) and runs the same process as on a single machine, which outlives
neither the actor nor its node. The supervisor runs the same loop as `hpo run` does over local processes.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

from hpo._version import __version__
from hpo.errors import StudyStopped, UserError
from hpo.study.processes import Process
from hpo.system.devices import Device, choose_devices, torch_device
from hpo.system.processes import machine_id
from hpo.system.readable import visible
from hpo.train.imports import ImportAllowlist
from hpo.workers.stages import add_due_trials
from hpo.workers.worker_handle import EXIT_NO_DEVICE, WorkerProcess, WorkerTask, describe_exit_code

IDLE_S = 30.0  # after so long without a trial, a worker gives back what Ray gave it
MAX_SHOWN_TRIALS = 16  # of a worker, in Ray's lists at once: each takes a thread of the actor
LINGER_S = 10.0  # a detached supervisor stays so long after the end, to tell watchers how the study ended
NUM_TAIL_LINES = 50  # of a worker's output, for the message on its death


@dataclass(frozen=True)
class WorkerEnvironment:
    """What the machine where the study was started sends along: environment variables and code.

    Args:
        variables: Environment variables, for those that a node does not have itself.
        allowlist: What the study may import there.
        folders: Folders of code; those that Ray has unpacked are relative to its working directory.
    """

    variables: Mapping[str, str] = field(repr=False)
    allowlist: ImportAllowlist
    folders: Sequence[str]

    def allowed(self) -> ImportAllowlist:
        """Return what the study may import on this node."""
        path = tuple(os.path.realpath(folder) for folder in self.folders)
        return replace(self.allowlist, folders=path if self.allowlist.folders else (), path=path)

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Set the variables that the node does not have itself, and let the code be imported."""
        for key, value in self.variables.items():
            os.environ.setdefault(key, value)
        with self.allowed().importable():
            yield


@dataclass(frozen=True)
class WorkerRequest:
    """A study and what its workers on the cluster need.

    Args:
        version: The version of hpo where the study was started.
        storage: URL of the store, with its password.
        study: The name of the study.
        devices: What each worker trains on: "cuda" or "cpu".
        threads: Threads of each worker.
        files: The folder for logs and checkpoints, where a node can make it.
        environment: What comes along from the machine where the study was started.
        options: Ray's options of a worker's actor.
        max_workers: None for as many as there is room for.
        num_open: The number of trials that have not ended, at the start.
        publishes: Whether the supervisor is detached, so that it shows the study in optuna-dashboard, as nobody else
            does, and ends by itself.
    """

    version: str
    storage: str = field(repr=False)
    study: str
    devices: str
    threads: int
    files: str
    environment: WorkerEnvironment
    options: Mapping[str, Any]
    max_workers: int | None
    num_open: int
    publishes: bool


@dataclass(frozen=True)
class Placement:
    """Where Ray has placed a worker: its process and its device."""

    process: Process
    device: str


@dataclass(frozen=True)
class PoolSnapshot:
    """The state of a study's supervisor."""

    num_placed: int
    has_ended: bool
    problem: str | None  # why it ended before the study


def call_on_node(environment: WorkerEnvironment, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Call a function on this node, in the folder of the study's own code."""
    with environment.unpacked():
        if environment.folders:
            os.chdir(environment.folders[0])
        return function(*args)


def resources_of(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the resources in an actor's options by the names that a cluster counts them under."""
    named = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
    return {name: amount for name, amount in (named | options["resources"]).items() if amount}


class StudyWorker:
    """The actor of a worker, on the node where Ray has placed it."""

    def __init__(self, request: WorkerRequest) -> None:
        self._request = request
        self._device: Device | None = None
        self._lacks_device = ""  # why, where this node has no such device
        try:
            self._device = _device(request.devices)
        except UserError as error:
            self._lacks_device = str(error)
        self._worker: WorkerProcess | None = None
        self._tail: deque[bytes] = deque(maxlen=NUM_TAIL_LINES)
        self._ended: dict[str, threading.Event] = {}

    def __repr__(self) -> str:
        device = "" if self._device is None else f", {self._device.name}"
        return f"hpo worker of study {self._request.study}{device}"

    def run(self) -> tuple[int, str]:
        """Start the worker's process, wait for its end, and return its exit code and the end of its output.

        Raises:
            UserError: The study was started by another version of hpo.
        """
        if self._request.version != __version__:
            raise UserError(
                f"a node has hpo {__version__}, and the study was started by {self._request.version}: install it"
            )
        if self._device is None:
            return EXIT_NO_DEVICE, self._lacks_device
        if self._worker is None:
            self._worker = self._prepare(self._device)
        self._tail.clear()
        self._worker.start(output=subprocess.PIPE)
        reader = threading.Thread(target=self._read, args=[self._worker.output], daemon=True)
        reader.start()
        while self._worker.is_running():
            time.sleep(0.05)
        reader.join(1.0)
        assert self._worker.exit_code is not None
        return self._worker.exit_code, b"".join(self._tail).decode(errors="replace")

    def placement(self, previous_pid: int | None) -> Placement | None:
        """Return where the worker is, once it has started a process with another pid than the previous one.

        Return None where this node has no device for it.
        """
        if self._device is None:
            return None
        while self._worker is None or self._worker.pid in (None, previous_pid):
            time.sleep(0.02)
        assert self._worker.pid is not None
        return Placement((machine_id(), self._worker.pid), self._device.name)

    def train(self, trial: str) -> None:
        """Wait until the trial has ended, so that Ray's lists of tasks and its timeline show it by the task's name."""
        self._ended.setdefault(trial, threading.Event()).wait()

    def end(self, trial: str) -> None:
        """End the wait for a trial."""
        self._ended.setdefault(trial, threading.Event()).set()

    def leave(self) -> None:
        """Ask the worker to save its trials, give them back and exit."""
        if self._worker is not None:
            self._worker.ask_to_leave()

    def _prepare(self, device: Device) -> WorkerProcess:
        request = self._request
        node = ray.get_runtime_context().get_node_id()
        task = WorkerTask(
            request.storage,
            request.study,
            device.name,
            torch_device(device),
            request.threads,
            request.environment.allowed(),
            host=f"{socket.gethostname()}/{node[:8]}",
            outlives=False,
        )
        missing = {key: value for key, value in request.environment.variables.items() if key not in os.environ}
        return WorkerProcess(
            task,
            device,
            environment={**missing, "HPO_FILES": _files(request.files)},
            folder=Path(request.environment.folders[0]) if request.environment.folders else None,
        )

    def _read(self, output: Any) -> None:
        for line in output:  # to this actor's log, which Ray keeps and shows
            self._tail.append(line)
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def _device(kind: str) -> Device:
    """Return the device that Ray gave this actor, with Ray's number; raise UserError where CUDA does not see it."""
    numbers = ray.get_gpu_ids()
    if kind == "cpu":
        (cpu,) = choose_devices("cpu")
        return replace(cpu, name=f"cpu for GPU {numbers[0]}") if numbers else cpu
    try:
        return replace(choose_devices("cuda")[0], name=f"cuda:{numbers[0]}")  # Ray hides the others
    except UserError:
        node = ray.get_runtime_context().get_node_id()[:8]
        raise UserError(
            f"Ray gave a worker GPU {', '.join(map(str, numbers))} of node {node}, where CUDA sees no device; "
            "--devices cpu trains on the CPU"
        ) from None


def _files(folder: str) -> str:
    """Return the folder, or a temporary one where this node cannot make it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:
        return str(Path(tempfile.gettempdir()) / "hpo_files")


class StudyController:
    """The actor that supervises the workers of a study until nothing is left to train or it is told to leave."""

    def __init__(self, request: WorkerRequest) -> None:
        self._request = request
        self._pool = RayPool(request)
        self._interrupted: list[int] = []
        self._problem: str | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def __repr__(self) -> str:
        return f"hpo supervisor of study {self._request.study}"

    def look(self) -> PoolSnapshot:
        """Return its state."""
        return PoolSnapshot(self._pool.num_placed, self._ended.is_set(), self._problem)

    def leave(self) -> None:
        """Let the workers save and give back their trials; a second call kills them."""
        self._interrupted.append(signal.SIGINT)

    def _run(self) -> None:
        try:
            with self._request.environment.unpacked():
                self._supervise()
        except (StudyStopped, UserError) as error:
            self._problem = str(error)
        except BaseException:
            self._problem = f"the study's supervisor failed:\n{traceback.format_exc()}"
        if self._problem is not None:
            print(visible(self._problem), flush=True)  # to its log, for those who were not watching
        self._ended.set()
        if self._request.publishes:  # it is detached, so nobody else ends it
            time.sleep(LINGER_S)
            ray.kill(ray.get_runtime_context().current_actor)

    def _supervise(self) -> None:
        from hpo.reports.publisher import Publisher
        from hpo.store.retry import OUTAGE_S
        from hpo.store.store import Store
        from hpo.workers.supervisor import supervise

        store = Store(self._request.storage).retrying(for_s=OUTAGE_S, until=lambda: bool(self._interrupted))
        study = store.studies.get(self._request.study)
        store.workers.reap(study)
        add_due_trials(store, study)  # the trial that ended last may have ended without adding them
        if not self._request.publishes:
            supervise(store, study, self._pool, interrupted=self._interrupted, on_tick=lambda _: None)
            return
        with Publisher(store, study) as publisher:
            supervise(
                store, study, self._pool, interrupted=self._interrupted, on_tick=lambda _: publisher.publish_if_due()
            )


class RayPool:
    """As many workers as a study can use and the cluster has room for, and some that wait, so that it may grow."""

    def __init__(self, request: WorkerRequest) -> None:
        self.workers: list[RayWorker] = []
        self._request = request
        self._idle_since: dict[Process, float] = {}
        self._num_made = 0
        self._add(request.num_open)  # they start while the supervisor still loads its modules

    @property
    def num_placed(self) -> int:
        """Number of workers that have a node."""
        return sum(worker.process is not None for worker in list(self.workers))

    def adjust(self, store: Any, study: Any) -> None:
        """Add workers while trials wait, and let idle ones leave."""
        self.workers = [worker for worker in self.workers if worker.is_running() or not worker.leaves]
        counts = store.trials.counts(study.study_id)
        training = store.workers.in_training(study)
        for worker in self.workers:
            worker.show(training.get(worker.process, ()) if worker.process is not None else ())
        waiting = store.workers.num_claimable(study)
        if waiting:
            self._add(waiting + counts.get("running", 0))
        self._release_idle(self._usable(), waiting, set(training))

    def _usable(self) -> list[RayWorker]:
        """Return the workers that stay.

        A worker whose device is given up is none of them, and keeps what Ray gave it: else Ray would give the same
        device to the next one.
        """
        return [worker for worker in self.workers if not (worker.leaves or worker.exit_code == EXIT_NO_DEVICE)]

    def _add(self, num_open: int) -> None:
        """Start workers for so many trials, and some more than there is room for."""
        room = self._request.max_workers or self.num_placed + max(1, self.num_placed, _room(self._request.options))
        for _ in range(min(num_open, room) - len(self._usable())):
            self.workers.append(RayWorker(self._request, self._num_made))
            self.workers[-1].start()
            self._num_made += 1

    def _release_idle(self, staying: Sequence[RayWorker], waiting: int, busy: set[Process]) -> None:
        now = time.monotonic()
        idle = [worker for worker in staying if worker.process not in busy and not waiting]
        self._idle_since = {
            worker.process: self._idle_since.get(worker.process, now) for worker in idle if worker.process is not None
        }
        for worker in idle[: len(staying) - 1]:  # one waits for what may follow the last trial
            since = now - IDLE_S if worker.process is None else self._idle_since[worker.process]
            if now - since >= IDLE_S:
                worker.leaves = True
                worker.ask_to_leave()


def _room(options: Mapping[str, Any]) -> int:
    """Return for how many more such actors the cluster may have room."""
    free: dict[str, float] = ray.available_resources()
    return min(math.floor(free.get(name, 0) / amount) for name, amount in resources_of(options).items())


class RayWorker:
    """A worker's actor as the supervisor sees it, placed or waiting for a node."""

    def __init__(self, request: WorkerRequest, index: int) -> None:
        self.exit_code: int | None = None
        self.leaves = False  # for good
        self._request, self._index = request, index
        self._actor: Any = None
        self._running: Any = None
        self._placing: Any = None
        self._placement: Placement | None = None
        self._output = ""
        self._failure: str | None = None  # why no worker can start anywhere on this cluster
        self._trials: set[str] = set()

    @property
    def process(self) -> Process | None:
        """The process that runs here or ran here last, once Ray has placed it."""
        return None if self._placement is None else self._placement.process

    def start(self) -> None:
        """Start a process on the actor's node, or wait for a node; do nothing once it has left for good."""
        if self._failure is not None:
            raise StudyStopped(self._failure, can_resume=True)
        if self.leaves:
            return
        if self._actor is None:
            worker = ray.remote(max_concurrency=4, concurrency_groups={"shown": MAX_SHOWN_TRIALS})(StudyWorker)
            name = f"study {self._request.study} worker {self._index} ({os.getpid()})"
            self._actor = worker.options(**self._request.options, name=name).remote(self._request)
        pid = None if self._placement is None else self._placement.process[1]
        self.exit_code, self._placement, self._trials = None, None, set()
        self._running, self._placing = self._actor.run.remote(), self._actor.placement.remote(pid)

    def is_running(self) -> bool:
        """Return whether there is a process, or one will start when there is room."""
        if self._running is None:
            return False
        if self._placement is None and ray.wait([self._placing], timeout=0)[0]:
            self._placement = self._get(self._placing)
        if not ray.wait([self._running], timeout=0)[0]:
            return True
        ended = self._get(self._running)
        self._running = None
        if ended is not None:
            self.exit_code, self._output = ended
        if self.leaves:
            self.kill()
        return False

    def show(self, trials: Sequence[tuple[int, int]]) -> None:
        """Let Ray show the trials that this worker trains, given by number and attempt."""
        if self._actor is None or self._placement is None:
            return
        names = {
            f"study {self._request.study}, trial {number}, attempt {attempt}, {self._placement.device}"
            for number, attempt in trials
        }
        for name in self._trials - names:
            self._actor.end.remote(name)
        for name in names - self._trials:
            self._actor.train.options(name=name, concurrency_group="shown").remote(name)
        self._trials = names

    def ask_to_leave(self) -> None:
        """Ask the process to save its trials, give them back and exit."""
        if self._placement is None:
            self.kill()
        elif self._actor is not None:
            self._actor.leave.remote()

    def kill(self) -> None:
        """Kill the actor and its process."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def describe_end(self) -> str:
        """Describe how the last process ended, with the end of its output."""
        if self.exit_code == EXIT_NO_DEVICE:
            return self._output
        if self.exit_code is None:
            return f"with its node: {self._output}"
        return f"{describe_exit_code(self.exit_code)}; the end of its output:\n{self._output[-3000:]}"

    def _get(self, reference: Any) -> Any:
        """Return an actor's answer; None where it could not be made, or it or its node is gone."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            self._failure = f"a worker could not start on the cluster: {error.cause or error}"
        except RuntimeEnvSetupError as error:
            self._failure = f"the study's code could not be unpacked on the cluster: {error}"
        except RayError as error:
            if "creation task" in str(error):
                self._failure = f"a worker could not start on the cluster: {error}"
            self._output, self._actor = str(error), None
        return None
