"""Studies on a real Ray of several nodes, with a real Postgres: nodes that come and go, commands that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store import schema
from hpo.store.ledger import MAX_TRIAL_CRASHES
from hpo.store.store import Store
from hpo.study.records import TrialRecord
from hpo.train.imports import ImportAllowlist
from hpo.workers.executors import Ray
from hpo.workers.launching import make_launcher

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'hpo-studies[ray]')")
pytest.importorskip("grpc", reason="Ray's client is not installed (pip install 'hpo-studies[ray]')")

from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.state import list_actors  # noqa: E402

from hpo.workers.ray_actors import IDLE_S  # noqa: E402
from hpo.workers.worker_handle import EXIT_NO_DEVICE  # noqa: E402

if TYPE_CHECKING:
    from tests.conftest import Hpo, Postgres

MakeSpec = Callable[..., StudySpec]
WaitFor = Callable[..., Any]

NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 * 2**20}
ON_GPUS = ("--on", "auto", "--devices", "cpu", "--resource", "num_gpus=1")  # logical GPUs, which only Ray knows

# Trains epochs of a tenth of a second, and keeps what it has trained. Each node has one GPU: a second trial that trains
# there at the same time finds the lock taken.
LOOP = """
import fcntl, json, os, pathlib, time

HERE = pathlib.Path(os.environ["HPO_TEST_FOLDER"])  # forwarded to every node
lock = open(HERE / f"device of {os.environ.get('RAY_RAYLET_PID')}.lock", "w")

def train(trial):
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    kept = trial.checkpoint_dir / "epoch"
    first = int(kept.read_text()) if kept.exists() else 0
    for epoch in range(first + 1, trial.epochs + 1):
        time.sleep(0.1)
        with open(HERE / "trained.log", "a") as log:
            log.write(json.dumps([trial.number, trial.attempt, epoch, os.getpid(), __file__]) + "\\n")
        end = trial.report(epoch, val_accuracy=trial.params["lr"])
        kept.write_text(str(epoch))
        if end:
            return
        while epoch >= 3 and (HERE / "hold").exists():
            time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes, each with a CPU and a logical GPU; Ray Client and the dashboard listen on the first."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        client, dashboard = one.getsockname()[1], other.getsockname()[1]
    ports = {"ray_client_server_port": client, "dashboard_port": dashboard}
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, **ports})
    cluster.client_port = client
    for name in ("two", "three"):
        add_node(cluster, name)
    yield cluster
    cluster.shutdown()


def add_node(cluster: Cluster, name: str) -> None:
    """Add a node that unpacks code into a folder of its own, as on a machine of its own."""
    cluster.add_node(**NODE, runtime_env_dir_name=f"runtime_resources_{name}")


@pytest.fixture
def on_cluster(cluster: Cluster, hpo: Hpo, postgres: Postgres) -> Iterator[Hpo]:
    """`hpo` with an empty Postgres store and RAY_ADDRESS; its actors are killed afterwards."""
    with postgres.database() as hpo.url:
        hpo.environment = {"RAY_ADDRESS": cluster.address, "HPO_TEST_FOLDER": str(hpo.folder)}
        yield hpo
        hpo.end()
        with connected(cluster):
            for named in ray.util.list_named_actors(all_namespaces=True):
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(named["name"], namespace=named["namespace"]))


@pytest.fixture
def wait_for(wait_for: WaitFor, cluster: Cluster, on_cluster: Hpo) -> WaitFor:
    """Wait as everywhere; where it was in vain, raise what the trials, workers and logs say."""

    def wait(condition: Callable[[], Any], **options: Any) -> Any:
        try:
            return wait_for(condition, **options)
        except AssertionError as error:
            found = [*trials(on_cluster), *workers(on_cluster), *list_actors(cluster.address, detail=True)]
            logs = Path(cluster.head_node.get_logs_dir_path()).glob("worker-*.out")
            raise AssertionError("\n".join(map(str, [error, *found, *(log.read_text() for log in logs)]))) from None

    return wait


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    ray.init(address=cluster.address, namespace="tests", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def living_actors(cluster: Cluster) -> list[Any]:
    found: list[Any] = list_actors(cluster.address, detail=True, filters=[("state", "=", "ALIVE")])
    return found


def trials(hpo: Hpo) -> list[TrialRecord]:
    store = Store(hpo.url)
    return store.trials.get_all(store.studies.get("s"))


def trained(hpo: Hpo) -> list[list[Any]]:
    log = hpo.folder / "trained.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def num_held(hpo: Hpo) -> int:
    """Return how many trials are in training and have reached the epoch at which the file "hold" keeps them."""
    try:
        return sum(trial.state == "running" and max(trial.epochs, default=0) >= 3 for trial in trials(hpo))
    except UserError:  # there is no study yet
        return 0


def num_lost(hpo: Hpo) -> int:
    return sum(attempt.outcome == "lost" for trial in trials(hpo) for attempt in trial.attempts)


def test_a_study_on_three_nodes_loses_a_node_gains_one_and_loses_its_command(
    cluster: Cluster, on_cluster: Hpo, make_spec: MakeSpec, wait_for: WaitFor
) -> None:
    """A trial repeats at most one epoch for each death: of its node, of the supervisor's node, or of the command.

    The node that is removed is the supervisor's, unless Ray has placed that on the head, which is rare.
    """
    hpo = on_cluster
    hpo.write(make_spec(search={"sampler": "random", "trials": 24}, epochs=8), LOOP)
    (hpo.folder / "hold").touch()
    first = hpo.start("run", "study.toml", *ON_GPUS)
    wait_for(lambda: num_held(hpo) == 3)
    with connected(cluster):
        supervisors = [actor for actor in living_actors(cluster) if actor.class_name == "StudyController"]
    _head, *others = cluster.list_all_nodes()
    cluster.remove_node(next((node for node in others if node.node_id == supervisors[0].node_id), others[-1]))
    wait_for(lambda: num_held(hpo) == 2)  # at once, not after the lease
    add_node(cluster, "four")
    wait_for(lambda: num_held(hpo) == 3)
    assert len({row["host"] for row in workers(hpo)}) == 4
    first.kill()
    first.wait()
    wait_for(lambda: not hpo.worker_pids())  # they end with it
    (hpo.folder / "hold").unlink()
    assert Counter(trial.state for trial in trials(hpo))["complete"] < 20
    exit_code, output = hpo.run("run", "study.toml", *ON_GPUS)
    assert exit_code == 0, output
    found = trials(hpo)
    assert Counter(trial.state for trial in found) == {"complete": 24}, [trial.error for trial in found]
    assert {trial.attributes["device"] for trial in found} == {"cpu for GPU 0"}
    assert len({trial.attributes["host"] for trial in found}) >= 3
    repeated = Counter(epochs_trained(hpo))
    assert set(repeated) == {(number, epoch) for number in range(24) for epoch in range(1, 9)}
    for trial in found:
        redone = sum(repeated[trial.number, epoch] - 1 for epoch in range(1, 9))
        assert redone <= trial.attempt - 1, (trial.number, redone, trial.attempt)
    assert sum(trial.attempt - 1 for trial in found) >= 4
    assert {attempt.outcome for trial in found for attempt in trial.attempts} == {
        "complete",
        "lost",
    }  # nobody found a lock taken


def titles_of_processes() -> set[str]:
    """Return the command lines of all processes, of which Ray makes the name of the task that one runs."""
    return {" ".join(process.info["cmdline"] or ()).strip() for process in psutil.process_iter(["cmdline"])}


def workers(hpo: Hpo) -> list[dict[str, Any]]:
    store = Store(hpo.url)
    return store.studies.rows(schema.workers_table, store.studies.get("s"))


def test_a_detached_study_goes_on_without_its_command_and_is_watched_stopped_and_taken_up_from_elsewhere(
    cluster: Cluster, on_cluster: Hpo, make_spec: MakeSpec, wait_for: WaitFor
) -> None:
    hpo = on_cluster
    hpo.write(make_spec(*(index / 10 for index in range(1, 7)), epochs=8), LOOP)
    (hpo.folder / "hold").touch()
    exit_code, output = hpo.run("run", "study.toml", *ON_GPUS, "--detach")
    assert (exit_code, "study s trains on the cluster without this command" in output) == (0, True), output
    wait_for(lambda: num_held(hpo) == 3)

    status = json.loads(hpo.run("status", "s", "--json")[1])
    assert {(worker["device"], worker["epoch"]) for worker in status["workers"]} == {("cpu for GPU 0", 3)}
    assert len({worker["host"] for worker in status["workers"]}) == 3  # the name of the machine and of the node
    with connected(cluster):
        nodes = {node["NodeID"][:8] for node in ray.nodes() if node["Alive"]}
        assert {worker["host"].partition("/")[2] for worker in status["workers"]} == nodes
        # The names of running tasks, as Ray's dashboard has them; Ray loses some of what tells it that a task runs.
        trials_shown = {f"ray::study s, trial {number}, attempt 1, cpu for GPU 0" for number in range(3)}
        wait_for(lambda: trials_shown <= titles_of_processes())
        alive = living_actors(cluster)
        assert sum(actor.name.startswith("study s worker ") for actor in alive) == 3
        assert {actor.repr_name for actor in alive} == {
            "hpo supervisor of study s",
            "hpo worker of study s, cpu for GPU 0",
        }

    # Its workers die with the supervisor. Ray restarts it, and it starts others, with the code that came along.
    os.kill(next(actor.pid for actor in alive if "supervisor" in actor.repr_name), signal.SIGKILL)
    wait_for(lambda: num_lost(hpo) == 3 and num_held(hpo) == 3)
    assert {trial.number for trial in trials(hpo) for tried in trial.attempts if tried.outcome == "lost"} == {0, 1, 2}

    watching = hpo.start("run", "study.toml", *ON_GPUS)  # attaches, and starts no further workers
    stdout = watching.stdout
    assert stdout is not None
    wait_for(lambda: "study s:" in stdout.readline())
    time.sleep(1.0)
    assert len(workers(hpo)) == 6
    assert hpo.run("stop", "s")[0] == 0
    (hpo.folder / "hold").unlink()
    output, _ = watching.communicate(timeout=500)
    assert (watching.returncode, "study 's' was stopped with 6 trials left" in output) == (1, True), output
    assert "resume with: hpo run study.toml --devices cpu --on auto --resource num_gpus=1" in output
    with connected(cluster):
        wait_for(lambda: not ray.util.list_named_actors(all_namespaces=True))

    (hpo.folder / "hold").touch()
    going_on = hpo.start("resume", "s", *ON_GPUS, "--allow", "loop", "--workers", "2")
    wait_for(lambda: Counter(trial.state for trial in trials(hpo))["running"] == 2)
    going_on.send_signal(signal.SIGINT)
    (hpo.folder / "hold").unlink()
    output, _ = going_on.communicate(timeout=500)
    assert (going_on.returncode, "interrupted" in output) == (1, True), output
    assert Counter(trial.state for trial in trials(hpo))["running"] == 0
    again = Counter(epochs_trained(hpo)) - Counter(set(epochs_trained(hpo)))
    assert all(number < 3 and epoch <= 3 and count == 1 for (number, epoch), count in again.items())


def epochs_trained(hpo: Hpo) -> list[tuple[int, int]]:
    """Return trial and epoch of all that was trained, repetitions included."""
    return [(number, epoch) for number, _, epoch, _, _ in trained(hpo)]


def test_the_code_of_a_study_travels_through_ray_client_and_a_node_needs_no_folder_of_the_users(
    cluster: Cluster, on_cluster: Hpo, make_spec: MakeSpec
) -> None:
    hpo = on_cluster
    hpo.write(make_spec(0.1, 0.2, 0.3, epochs=2), f"import helper, pathlib\n{LOOP}")
    (hpo.folder / "helper.py").write_text("import pathlib\nassert pathlib.Path('words.txt').read_text() == 'beside'\n")
    (hpo.folder / "words.txt").write_text("beside")
    exit_code, output = hpo.run("run", "study.toml", *through_client(cluster))
    assert exit_code == 0, output
    assert Counter(trial.state for trial in trials(hpo)) == {"complete": 3}
    files = {Path(file) for _, _, _, _, file in trained(hpo)}
    assert {file.name for file in files} == {"loop.py"}
    assert not any(file.is_relative_to(hpo.folder) for file in files)


def through_client(cluster: Cluster) -> tuple[str, ...]:
    return ("--on", f"ray://127.0.0.1:{cluster.client_port}", *ON_GPUS[2:])


def test_a_process_that_dies_on_a_node_is_replaced_there_and_counts_against_its_trial(
    cluster: Cluster, on_cluster: Hpo, make_spec: MakeSpec
) -> None:
    hpo = on_cluster
    crash = "    if trial.params['lr'] < 0.2:\n        os.abort()\n"
    hpo.write(make_spec(0.1, 0.2, 0.3, epochs=2), LOOP.replace("def train(trial):\n", f"def train(trial):\n{crash}"))
    exit_code, output = hpo.run("run", "study.toml", *ON_GPUS, "--workers", "1")
    assert exit_code == 0, output
    found = trials(hpo)
    assert [trial.state for trial in found] == ["failed", "complete", "complete"]
    assert found[0].attempt == MAX_TRIAL_CRASHES
    assert {row["device"] for row in workers(hpo)} == {"cpu for GPU 0"}


def test_what_keeps_workers_from_starting_is_said_in_a_sentence(
    cluster: Cluster, on_cluster: Hpo, make_spec: MakeSpec
) -> None:
    hpo = on_cluster
    hpo.write(make_spec(0.1, 0.2, epochs=2), LOOP)
    exit_code, output = hpo.run("run", "study.toml", "--on", "auto")  # Ray has GPUs, and CUDA has none
    assert exit_code == 1, output
    assert "where CUDA sees no device; --devices cpu trains on the CPU" in output
    assert "Traceback" not in output


def raylets() -> set[int]:
    return {process.pid for process in psutil.process_iter(["name"]) if "raylet" in process.info["name"]}


def test_a_ray_of_its_own_trains_from_an_sqlite_store_and_ends_with_the_command(
    cluster: Cluster, hpo: Hpo, make_spec: MakeSpec
) -> None:
    before = raylets()
    hpo.environment = {"HPO_TEST_FOLDER": str(hpo.folder)}
    hpo.write(make_spec(0.1, 0.2, 0.3, epochs=2), LOOP.replace("fcntl.flock", "(lambda *_: None)"))
    (hpo.folder / "numpy.py").write_text("raise RuntimeError('imported in place of the library')")
    exit_code, output = hpo.run("run", "study.toml", "--on", "ray", "--devices", "cpu")
    assert exit_code == 0, output
    assert Counter(trial.state for trial in trials(hpo)) == {"complete": 3}
    assert before
    assert raylets() == before


def test_a_ray_of_its_own_that_does_not_start_in_time_is_one_sentence(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times_out(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nOn several lines.")  # Ray's own type

    monkeypatch.setattr(ray, "init", times_out)
    with (
        pytest.raises(UserError, match=r"^--on ray: The current node timed out during startup\.$"),
        make_launcher(Ray("ray", "cpu"), make_spec(), ImportAllowlist(), url=f"sqlite:///{tmp_path}/hpo.db"),
    ):
        pass


# How many workers there are


class FakeWorker:
    """A worker that is placed at once where there is room."""

    room = 0

    def __init__(self, _request: Any, index: int) -> None:
        self.process: tuple[str, int] | None = None
        self.leaves, self.index = False, index
        self.exit_code: int | None = None

    def is_running(self) -> bool:
        if self.process is None and FakeWorker.room > 0:
            FakeWorker.room -= 1
            self.process = ("node", self.index)
        return not self.leaves

    def start(self) -> None: ...

    def show(self, _trials: object) -> None: ...

    def ask_to_leave(self) -> None:
        FakeWorker.room += self.process is not None


class Counts:
    """The store as a pool sees it: how many trials wait, and which processes have one."""

    def __init__(self) -> None:
        self.waiting, self.busy = 0, set[tuple[str, int]]()
        self.trials = self.workers = self  # the parts of a store that know them

    def counts(self, _study_id: int) -> dict[str, int]:
        return {"waiting": self.waiting, "running": len(self.busy)}

    def num_claimable(self, _study: object) -> int:
        return self.waiting

    def in_training(self, _study: object) -> dict[tuple[str, int], list[tuple[int, int]]]:
        return {process: [(0, 1)] for process in self.busy}


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Counts, Callable[[float], list[FakeWorker]]]]:
    """Return a function that makes a pool, its store, and a call that lets time pass and returns the placed workers."""
    from hpo.workers import ray_actors

    def make(*, limit: int | None, room: int) -> tuple[Any, Counts, Callable[[float], list[FakeWorker]]]:
        at, store, FakeWorker.room = 1000.0, Counts(), room
        monkeypatch.setattr(ray_actors, "RayWorker", FakeWorker)
        monkeypatch.setattr(ray_actors, "_room", lambda _options: FakeWorker.room)
        monkeypatch.setattr(time, "monotonic", lambda: at)
        made: Any = ray_actors.RayPool(type("Request", (), {"max_workers": limit, "options": {}, "num_open": 0})())

        def after(seconds: float) -> list[FakeWorker]:
            nonlocal at
            at += seconds
            made.adjust(store, type("Study", (), {"study_id": 1})())
            return [worker for worker in made.workers if worker.is_running() and worker.process is not None]

        return made, store, after

    return make


def test_a_crew_takes_all_room_and_asks_for_more_so_that_a_cluster_may_grow(crew: Any) -> None:
    made, store, after = crew(limit=None, room=4)
    store.waiting = 100
    assert len(after(0)) == 4
    after(5)
    assert len(made.workers) == 8  # as many again wait, which an autoscaler sees
    FakeWorker.room = 20
    assert len(after(5)) == 24  # the waiting ones and new ones fill the room


@pytest.mark.parametrize(("limit", "expected"), [(None, 3), (2, 2), (50, 3)])
def test_there_are_never_more_workers_than_trials_nor_than_were_asked_for(
    crew: Any, limit: int | None, expected: int
) -> None:
    made, store, after = crew(limit=limit, room=10)
    store.waiting = 3
    assert len(after(0)) == len(made.workers) == expected


def test_idle_workers_leave_but_the_last_one_waits_for_what_may_follow(crew: Any) -> None:
    _made, store, after = crew(limit=None, room=4)
    store.waiting = 4
    workers_placed = after(0)
    store.waiting, store.busy = 0, {workers_placed[0].process}
    assert len(after(5)) == 4
    assert len(after(IDLE_S - 1)) == 4
    assert [worker.index for worker in after(1)] == [0]
    store.busy = set()
    assert [worker.index for worker in after(100)] == [0]
    store.waiting = 15  # a confirmation
    assert len(after(5)) == 4


def test_a_worker_that_has_lost_its_device_keeps_it_from_the_others_and_another_takes_its_place(crew: Any) -> None:
    made, store, after = crew(limit=2, room=5)
    store.waiting = 9
    lost, _ = after(0)
    lost.exit_code = EXIT_NO_DEVICE
    assert [worker.index for worker in after(5)] == [0, 1, 2]
    assert lost in made.workers  # so Ray cannot give its GPU to the next one
    store.waiting = 0
    after(5)
    assert [worker.index for worker in after(IDLE_S) if worker is not lost] == [2]


def test_workers_that_wait_for_room_are_not_waited_for(crew: Any) -> None:
    made, store, after = crew(limit=None, room=2)
    store.waiting = 10
    workers_placed = after(0)
    after(5)
    assert len(made.workers) == 4
    store.waiting, store.busy = 0, {worker.process for worker in workers_placed}
    after(5)
    assert [worker for worker in made.workers if not worker.leaves] == workers_placed
