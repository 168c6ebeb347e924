"""What runs on a Ray cluster: a study's supervisor and its workers, each an actor; loaded where Ray is.

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
from hpo.config.import_policy import ImportAllowlist
from hpo.errors import StudyStopped, UserError
from hpo.study.processes import Process
from hpo.system import processes as liveness
from hpo.system.devices import Device, choose_devices, torch_device
from hpo.workers.stages import add_due_trials
from hpo.workers.worker_handle import WorkerProcess, WorkerTask, ending

IDLE_S = 30.0  # after which a worker that finds nothing to train gives back what Ray gave it
MOST_SHOWN = 16  # trials of a worker that Ray shows at once: each takes a thread of the actor
KEPT_S = 10.0  # that the supervisor stays after a study's end, for whoever asks how it ended
TAIL_LINES = 50  # of a worker's output, for the message on its death


@dataclass(frozen=True)
class WorkerEnvironment:
    """What comes along from the machine where the study was started."""

    environment: Mapping[str, str] = field(repr=False)  # for what a node does not have itself
    modules: Sequence[str]  # that the study may import
    folders: Sequence[str]  # of code; those that Ray has unpacked are relative to the working directory that it gives

    def allowed(self) -> ImportAllowlist:
        return ImportAllowlist(tuple(self.modules), tuple(os.path.realpath(folder) for folder in self.folders))

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """The environment is set, where the node's own says nothing else, and the code can be imported."""
        for key, value in self.environment.items():
            os.environ.setdefault(key, value)
        with self.allowed().importable():
            yield


@dataclass(frozen=True)
class WorkerRequest:
    """A study and what its workers on the cluster need; `storage` is a URL with its password."""

    version: str  # of hpo, where the study was started
    storage: str = field(repr=False)
    study: str
    devices: str  # what a worker trains on: "cuda" or "cpu"
    threads: int
    files: str  # the folder for logs and checkpoints, where a node can make it
    luggage: WorkerEnvironment
    options: Mapping[str, Any]  # of a worker's actor
    limit: int | None  # of workers; None: as many as there is room for
    num_open: int  # trials, to begin with
    publishes: bool  # whether the supervisor shows the study in optuna-dashboard, as nobody else does


@dataclass(frozen=True)
class Placement:
    """Where a worker has been placed, and its process there."""

    process: Process
    device: str


@dataclass(frozen=True)
class PoolSnapshot:
    """How a study's supervisor stands."""

    num_placed: int
    has_ended: bool
    problem: str | None  # why it has ended before the study


def answer(luggage: WorkerEnvironment, question: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a function returns on a node, where the study's own code lies."""
    with luggage.unpacked():
        if luggage.folders:
            os.chdir(luggage.folders[0])
        return question(*args)


def needs(options: Mapping[str, Any]) -> dict[str, float]:
    """The resources of an actor's options by the names that a cluster counts them under."""
    named = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
    return {name: amount for name, amount in (named | options["resources"]).items() if amount}


class StudyWorker:
    """A worker's place on the node where Ray has put this actor."""

    def __init__(self, plan: WorkerRequest) -> None:
        self._plan = plan
        self._problem: UserError | None = None
        try:
            if plan.version != __version__:
                raise UserError(
                    f"a node has hpo {__version__}, and the study was started by {plan.version}: install it"
                )
            self._device: Device | None = _device(plan.devices)
        except UserError as error:  # for who has it run: an actor that cannot be made does not say why so well
            self._device, self._problem = None, error
        self._worker: WorkerProcess | None = None
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._ended: dict[str, threading.Event] = {}

    def __repr__(self) -> str:
        device = "" if self._device is None else f", {self._device.name}"
        return f"hpo worker of study {self._plan.study}{device}"

    def run(self) -> tuple[int, str]:
        """Starts the worker's process and waits for its end; returns its exit code and the end of its output."""
        if self._worker is None:
            self._worker = self._prepare()
        self._tail.clear()
        self._worker.start(output=subprocess.PIPE)
        reader = threading.Thread(target=self._read, args=[self._worker.output], daemon=True)
        reader.start()
        while self._worker.is_running():
            time.sleep(0.05)
        reader.join(1.0)
        assert self._worker.exit_code is not None
        return self._worker.exit_code, b"".join(self._tail).decode(errors="replace")

    def seat(self, after: int | None) -> Placement:
        """Where it is, once a process has been started that has another pid than `after`."""
        while self._worker is None or self._worker.pid in (None, after):
            time.sleep(0.02)
        assert self._device is not None
        assert self._worker.pid is not None
        return Placement((liveness.machine_id(), self._worker.pid), self._device.name)

    def train(self, trial: str) -> None:
        """Takes as long as the trial does: so Ray's lists of tasks and its timeline show it, by the task's name."""
        self._ended.setdefault(trial, threading.Event()).wait()

    def end(self, trial: str) -> None:
        self._ended.setdefault(trial, threading.Event()).set()

    def leave(self) -> None:
        if self._worker is not None:
            self._worker.ask_to_leave()

    def _prepare(self) -> WorkerProcess:
        if self._problem is not None:
            raise self._problem
        plan, device = self._plan, self._device
        assert device is not None
        node = ray.get_runtime_context().get_node_id()
        assignment = WorkerTask(
            plan.storage,
            plan.study,
            device.name,
            torch_device(device),
            plan.threads,
            plan.luggage.allowed(),
            host=f"{socket.gethostname()}/{node[:8]}",
            outlives=False,
        )
        known = {key: value for key, value in plan.luggage.environment.items() if key not in os.environ}
        return WorkerProcess(
            assignment,
            device,
            environment={**known, "HPO_FILES": _files(plan.files)},
            folder=Path(plan.luggage.folders[0]) if plan.luggage.folders else None,
        )

    def _read(self, output: Any) -> None:
        for line in output:  # into this actor's log, which Ray keeps and shows
            self._tail.append(line)
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def _device(kind: str) -> Device:
    """The device that this actor was given, named as Ray numbers it. Raises UserError where it is not there."""
    numbers = ray.get_gpu_ids()
    if kind == "cpu":
        (cpu,) = choose_devices("cpu")
        return replace(cpu, name=f"cpu for GPU {numbers[0]}") if numbers else cpu
    try:
        return replace(choose_devices("cuda")[0], name=f"cuda:{numbers[0]}")  # Ray has hidden the others
    except UserError:
        node = ray.get_runtime_context().get_node_id()[:8]
        raise UserError(
            f"Ray gave a worker GPU {', '.join(map(str, numbers))} of node {node}, where CUDA sees no device; "
            "--devices cpu trains on the CPU"
        ) from None


def _files(folder: str) -> str:
    """The folder, or one of this node's own where it cannot be made here."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:
        return str(Path(tempfile.gettempdir()) / "hpo_files")


class StudyController:
    """Supervises a study's workers on the cluster, until there is nothing left to train or it is told to leave."""

    def __init__(self, plan: WorkerRequest) -> None:
        self._plan = plan
        self._crew = RayPool(plan)
        self._interrupted: list[int] = []
        self._problem: str | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def __repr__(self) -> str:
        return f"hpo supervisor of study {self._plan.study}"

    def look(self) -> PoolSnapshot:
        return PoolSnapshot(self._crew.num_placed, self._ended.is_set(), self._problem)

    def leave(self) -> None:
        """Has the workers save and give back their trials; asked a second time, kills them."""
        self._interrupted.append(signal.SIGINT)

    def _run(self) -> None:
        try:
            with self._plan.luggage.unpacked():
                self._supervise()
        except (StudyStopped, UserError) as error:
            self._problem = str(error)
        except BaseException:
            self._problem = f"the study's supervisor failed:\n{traceback.format_exc()}"
        if self._problem is not None:
            print(self._problem, flush=True)  # in its log, for those who were not there
        self._ended.set()
        if self._plan.publishes:  # it is detached: nobody else ends it
            time.sleep(KEPT_S)
            ray.kill(ray.get_runtime_context().current_actor)

    def _supervise(self) -> None:
        from hpo.report.publisher import Publisher
        from hpo.store.retry import OUTAGE_S
        from hpo.store.studies import Store
        from hpo.workers.supervisor import supervise

        store = Store(self._plan.storage, patience_s=OUTAGE_S, give_up=lambda: bool(self._interrupted))
        study = store.study(self._plan.study)
        store.reap(study)
        add_due_trials(store, study)  # what ended last may have ended without it
        if not self._plan.publishes:
            supervise(store, study, self._crew, interrupted=self._interrupted, watch=lambda: None)
            return
        with Publisher(store, study) as publisher:
            supervise(store, study, self._crew, interrupted=self._interrupted, watch=publisher.look)


class RayPool:
    """As many workers as a study has use for and the cluster room, with some waiting for room, so that it may grow."""

    def __init__(self, plan: WorkerRequest) -> None:
        self.places: list[RayWorker] = []
        self._plan = plan
        self._idle_since: dict[Process, float] = {}
        self._num_made = 0
        self._add(plan.num_open)  # they start while the supervisor still loads what it needs

    @property
    def num_placed(self) -> int:
        return sum(place.process is not None for place in list(self.places))

    def adjust(self, store: Any, study: Any) -> None:
        self.places = [place for place in self.places if place.is_running() or not place.leaves]
        counts = store.counts(study.study_id)
        training = store.in_training(study)
        for place in self.places:
            place.show(training.get(place.process, ()) if place.process is not None else ())
        waiting = counts.get("waiting", 0)
        if waiting:
            self._add(waiting + counts.get("running", 0))
        self._send_idle_home([place for place in self.places if not place.leaves], waiting, set(training))

    def _add(self, num_open: int) -> None:
        """Starts as many workers as so many trials have use for, and some more than there is room for."""
        room = self._plan.limit or self.num_placed + max(1, self.num_placed, _room(self._plan.options))
        for _ in range(min(num_open, room) - sum(not place.leaves for place in self.places)):
            self.places.append(RayWorker(self._plan, self._num_made))
            self.places[-1].start()
            self._num_made += 1

    def _send_idle_home(self, staying: Sequence[RayWorker], waiting: int, busy: set[Process]) -> None:
        at = time.monotonic()
        idle = [place for place in staying if place.process not in busy and not waiting]
        self._idle_since = {
            place.process: self._idle_since.get(place.process, at) for place in idle if place.process is not None
        }
        for place in idle[: len(staying) - 1]:  # one waits for what follows the last trial
            since = at - IDLE_S if place.process is None else self._idle_since[place.process]
            if at - since >= IDLE_S:
                place.leaves = True
                place.ask_to_leave()


def _room(options: Mapping[str, Any]) -> int:
    """How many more such actors the cluster may have room for."""
    free: dict[str, float] = ray.available_resources()
    return min(math.floor(free.get(name, 0) / amount) for name, amount in needs(options).items())


class RayWorker:
    """A worker's actor as the supervisor sees it, whether it has been placed yet or not."""

    def __init__(self, plan: WorkerRequest, index: int) -> None:
        self.exit_code: int | None = None
        self.leaves = False  # for good
        self._plan, self._index = plan, index
        self._actor: Any = None
        self._run: Any = None
        self._seat: Any = None
        self._seated: Placement | None = None
        self._words = ""
        self._failed: str | None = None  # why no worker can be started here, nor anywhere
        self._trials: set[str] = set()

    @property
    def process(self) -> Process | None:
        return None if self._seated is None else self._seated.process

    def start(self) -> None:
        if self._failed is not None:
            raise StudyStopped(self._failed, can_resume=True)
        if self.leaves:
            return
        if self._actor is None:
            worker = ray.remote(max_concurrency=4, concurrency_groups={"shown": MOST_SHOWN})(StudyWorker)
            name = f"study {self._plan.study} worker {self._index} ({os.getpid()})"
            self._actor = worker.options(**self._plan.options, name=name).remote(self._plan)
        pid = None if self._seated is None else self._seated.process[1]
        self.exit_code, self._seated, self._trials = None, None, set()
        self._run, self._seat = self._actor.run.remote(), self._actor.seat.remote(pid)

    def is_running(self) -> bool:
        if self._run is None:
            return False
        if self._seated is None and ray.wait([self._seat], timeout=0)[0]:
            self._seated = self._get(self._seat)
        if not ray.wait([self._run], timeout=0)[0]:
            return True
        ended = self._get(self._run)
        self._run = None
        if ended is not None:
            self.exit_code, self._words = ended
        if self.leaves:
            self.kill()
        return False

    def show(self, trials: Sequence[tuple[int, int]]) -> None:
        """Has Ray show which trials this worker trains, given by number and attempt."""
        if self._actor is None or self._seated is None:
            return
        names = {
            f"study {self._plan.study}, trial {number}, attempt {attempt}, {self._seated.device}"
            for number, attempt in trials
        }
        for name in self._trials - names:
            self._actor.end.remote(name)
        for name in names - self._trials:
            self._actor.train.options(name=name, concurrency_group="shown").remote(name)
        self._trials = names

    def ask_to_leave(self) -> None:
        if self._seated is None:
            self.kill()
        elif self._actor is not None:
            self._actor.leave.remote()

    def kill(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def last_words(self) -> str:
        if self.exit_code is None:
            return f"with its node: {self._words}"
        return f"{ending(self.exit_code)}; the end of its output:\n{self._words[-3000:]}"

    def _get(self, reference: Any) -> Any:
        """What an actor has answered; None where it, or its node, is no more, or it could not be made."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            self._failed = f"a worker could not start on the cluster: {error.cause or error}"
        except RuntimeEnvSetupError as error:
            self._failed = f"the study's code could not be unpacked on the cluster: {error}"
        except RayError as error:
            if "creation task" in str(error):
                self._failed = f"a worker could not start on the cluster: {error}"
            self._words, self._actor = str(error), None
        return None
