"""How a study behaves with 100, 1,000 and 10,000 workers: costs measured, a model of them, and the model checked.

    make bench-scale

On a Postgres of its own: what each call of a worker costs in a study of so many trials and workers (time, CPU of the
client and of the server, messages to and fro, how long a claim holds the lock on the study's row), and what the model
of scale_model.py makes of that. Then the model's word for 64 workers on this machine, which share its cores with the
server, is printed, and after that measured: 64 processes, each with a store of its own, that claim, report to a pruner
and finish, and sleep where they would train. With --json all figures go to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, distribution_to_json
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.system import provenance
from hpo.workers.stages import add_due_trials
from scripts.bench import scale_model as model
from scripts.bench.scale_model import Cost, Costs, Line, Load, Place
from scripts.bench.store import stores

EPOCHS = 10
VALUE = 0.5  # of every epoch: the median pruner looks, and drops nobody
METRICS = {"train_loss": 1.0, "val_accuracy": VALUE}
CALLS = ("claim", "locked", "suggest", "keep", "report", "judged", "finish", "renew", "poll", "reap")
MORE_CALLS = ("poll, confirm", "share")


@dataclass(frozen=True)
class Size:
    """A study: trials that have ended, trials in training, and workers that have not left."""

    ended: int
    running: int
    workers: int


SIZES = (
    Size(200, 1, 1),
    Size(1000, 1, 1),
    Size(10_000, 1, 1),
    Size(1000, 64, 64),
    Size(1000, 256, 256),
    Size(1000, 1024, 1024),
    Size(1000, 1, 1024),
)
ENDED = 1000  # trials of the predicted studies that have ended
LARGE = Size(1000, 4096, 4096)  # not fitted: holds the lines against a size four times their largest
LOADS = ((1.0, "median"), (1.0, "none"), (5.0, "median"))  # seconds of an epoch and the pruner
KINDS = {"1 s": 1.0, "30 s": 30.0, "10 min": 600.0}
LOOKS = {"none": 0.0, "asha": 2.0, "median": EPOCHS - 1.0}  # of a trial of ten epochs


def spec(trials: int, *, pruner: str = "median", confirm: bool = False) -> StudySpec:
    return StudySpec.from_dict(
        {
            "name": "scale",
            "search": {"sampler": "tpe", "trials": trials, "space": {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}},
            "pruner": {"name": pruner},
            "training": {"epochs": EPOCHS},
            "objective": {"function": "none:none"},
        }
        | ({"confirm": {"top": 3}} if confirm else {})
    )


def fill(store: Store, size: Size, *, waiting: int) -> StudyRecord:
    """Make a study of this size, with all that the ledger and Optuna keep of a trial, and `waiting` slots."""
    study = store.studies.create(spec(size.ended + size.running + waiting), metadata={})
    distribution = distribution_to_json(FloatDistribution(1e-5, 1e-1, log=True))
    known = provenance.trial_metadata(device="cpu", host="here", seed=1) | {"ended": "complete: trained for 10 epochs"}
    values = {
        "study": study.study_id,
        "ended": size.ended,
        "claimed": size.ended + size.running,
        "workers": size.workers,
        "epochs": EPOCHS,
        "distribution": distribution,
        "known": json.dumps(known),
    }
    mine = "FROM trials WHERE study_id = :study"
    steps = f"CROSS JOIN LATERAL generate_series(1, CASE WHEN number < :ended THEN :epochs ELSE {EPOCHS // 2} END) step"
    statements = (
        "INSERT INTO trials (study_id, number, state, datetime_start, datetime_complete) "
        "SELECT :study, n, (CASE WHEN n < :ended THEN 'COMPLETE' ELSE 'RUNNING' END)::trialstate, now(), "
        "CASE WHEN n < :ended THEN now() END FROM generate_series(0, :claimed - 1) n ORDER BY n",
        "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
        f"SELECT trial_id, 'lr', power(10, -1 - 4 * random()), :distribution {mine}",
        "INSERT INTO trial_user_attributes (trial_id, key, value_json) SELECT trial_id, key, value::text "
        "FROM trials CROSS JOIN json_each(cast(:known AS json)) "
        "WHERE study_id = :study AND (key <> 'ended' OR number < :ended)",
        "INSERT INTO trial_system_attributes (trial_id, key, value_json) "
        f"SELECT trial_id, 'fixed_params', '{{}}' {mine}",
        "INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type) "
        f"SELECT trial_id, step, 0.5, 'FINITE' FROM trials {steps} WHERE study_id = :study",
        "INSERT INTO trial_values (trial_id, objective, value, value_type) "
        f"SELECT trial_id, 0, 0.5 + 0.1 * random(), 'FINITE' {mine} AND number < :ended",
        "UPDATE hpo_slots s SET state = CASE WHEN s.number < :ended THEN 'complete' ELSE 'running' END, attempt = 1, "
        "trial_id = t.trial_id, furthest = :epochs, worker_id = 'worker-' || (t.number - :ended), lease_until = 5e10 "
        "FROM trials t WHERE s.study_id = :study AND t.study_id = :study AND t.number = s.number",
        "INSERT INTO hpo_epochs (study_id, number, epoch, attempt, metrics) "
        f"SELECT :study, number, step, 1, '{{\"val_accuracy\": 0.5}}' FROM trials {steps} WHERE study_id = :study",
        "INSERT INTO hpo_attempts (study_id, number, attempt, worker_id, began_at, furthest) "
        f"SELECT :study, number, 1, 'worker', 0, 0 {mine}",
        "INSERT INTO hpo_workers (worker_id, study_id, host, machine, pid, pid_started, device, started_at, seen_at) "
        "SELECT 'worker-' || n, :study, 'host-' || n / 8, 'machine-' || n / 8, 1, 1, 'cuda:' || n % 8, 0, 5e10 "
        "FROM generate_series(0, :workers - 1) n",
    )
    with store.storage.engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement), values)
    with store.storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")  # as autovacuum does meanwhile in a study that grows slowly
    return study


class Server:
    """The processes of the Postgres that a store is in, and the CPU that they have used."""

    def __init__(self, store: Store) -> None:
        with store.storage.engine.connect() as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            self.version = connection.exec_driver_sql("SHOW server_version").scalar_one()
        parent = psutil.Process(pid).parent()
        assert parent is not None
        self._main = parent

    def usage(self) -> tuple[float, float]:
        """CPU of those that live and of those that have ended, and how long those that live waited for a core."""
        ended = self._main.cpu_times()
        used = [usage(f"{process.pid}") for process in self._processes()]
        return ended.children_user + ended.children_system + sum(cpu for cpu, _ in used), sum(late for _, late in used)

    def backend_bytes(self) -> list[int]:
        """Return what each process of a connection has to itself."""
        named = [process for process in self._processes() if "idle" in " ".join(process.cmdline())]
        return [process.memory_full_info().uss for process in named]

    def _processes(self) -> list[psutil.Process]:
        return [self._main, *self._main.children()]


def usage(process: str) -> tuple[float, float]:
    """Seconds that a process, or a thread, has used of a core and waited for one, by Linux' scheduler."""
    with contextlib.suppress(OSError):  # it has ended
        used, late, _ = Path(f"/proc/{process}/schedstat").read_text().split()
        return int(used) / 1e9, int(late) / 1e9
    return 0.0, 0.0


class Meter:
    """Measures calls one at a time: CPU of the client and of the server, what else passes, or messages to and fro.

    Waiting for a core that another program has is left out: how busy this machine is, is no property of a call.

    `counts` those messages: libpq then writes down all that it sends and hears, which takes time, so that nothing else
    is measured.
    """

    def __init__(self, store: Store, *, counts: bool = False) -> None:
        self.samples: dict[str, list[Cost]] = {}
        self._server = Server(store)
        self._counts = counts
        self._trips = self._read = 0
        self._locked: tuple[float, ...] | None = None
        engine = store.storage.engine
        if counts:
            self._trace = tempfile.TemporaryFile()  # noqa: SIM115  # as long as its connections
            sa.event.listen(engine, "connect", lambda dbapi, _: dbapi.pgconn.trace(self._trace.fileno()))
            engine.dispose()
        sa.event.listen(engine, "after_cursor_execute", self._after_execute)

    def __call__(self, name: str, call: Any) -> Any:
        self._locked, began = None, self._now()
        answer = call()
        ended = self._now()
        self._add(name, began, ended)
        if name == "claim" and self._locked is not None:
            self._add("locked", self._locked, ended)
        return answer

    def _add(self, name: str, began: tuple[float, ...], ended: tuple[float, ...]) -> None:
        server_s, late_s, seconds, client_s, trips = (
            after - before for before, after in zip(began, ended, strict=True)
        )
        other_s = max(0.0, seconds - client_s - server_s - late_s)
        self.samples.setdefault(name, []).append(Cost(client_s, server_s, other_s, trips))

    def _now(self) -> tuple[float, ...]:
        if self._counts:
            heard = os.pread(self._trace.fileno(), 1 << 28, self._read)  # libpq writes at the file's own position
            self._read += len(heard)
            self._trips += heard.count(b"ReadyForQuery")
        server_s, server_late_s = self._server.usage()
        late_s = server_late_s + usage("thread-self")[1]
        return server_s, late_s, time.perf_counter(), time.thread_time(), self._trips

    def _after_execute(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if self._locked is None and "FOR UPDATE" in statement and "hpo_studies" in statement:
            self._locked = self._now()


def keep(store: Store, study: StudyRecord, claim: Any) -> None:
    """Ask and tell the store what hpo.workers.checkpoints does of a trial, from its beginning to its end."""
    store.trials.last_report(claim)
    store.trials.begin(claim, resumed_from=0)
    store.trials.best(study, 1)
    store.trials.keeping_weights(study, 1)


def use(store: Store, study: StudyRecord, meter: Meter, *, trials: int) -> None:
    """Every call of a worker's, over and over."""
    worker = store.workers.add(study.study_id, device="cpu")
    unjudged = spec(study.spec.num_trials, pruner="none")

    def attributes(_: Mapping[str, Any]) -> Mapping[str, Any]:
        return provenance.trial_metadata(device="cpu", host="here", seed=1)

    for _ in range(trials):
        claim = meter("claim", lambda: store.trials.claim(study, worker))
        meter("suggest", lambda claim=claim: store.trials.suggest(claim, study.spec, attributes=attributes))
        meter("keep", lambda claim=claim: keep(store, study, claim))
        for epoch in range(1, 5):
            told: dict[str, Any] = {"epoch": epoch, "metrics": METRICS, "value": VALUE}
            name, judge = ("judged", study.spec) if epoch % 2 else ("report", unjudged)
            meter(name, lambda claim=claim, judge=judge, told=told: store.trials.report(claim, judge, **told))
            meter("renew", lambda claim=claim: store.workers.renew([claim], worker))
        meter("finish", lambda claim=claim: store.trials.finish(claim, "complete", reason="trained for 4 epochs"))
    with store.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo_slots SET state = 'complete' WHERE state = 'waiting'")
    confirmed = replace(study, spec=spec(study.spec.num_trials, confirm=True))

    def look(study: StudyRecord) -> None:  # as hpo.workers.worker's loop where no slot is left for it
        assert store.trials.claim(study, worker) is None
        add_due_trials(store, study)
        store.studies.is_stopping(study.study_id)

    for _ in range(trials):
        meter("poll", lambda: look(study))
        if store.trials.counts(study.study_id).get("running"):
            meter("poll, confirm", lambda: look(confirmed))
        meter("reap", lambda: store.workers.reap(study))
        # As a worker with lanes asks for its share of the trials.
        meter("share", lambda: (store.trials.counts(study.study_id), store.workers.get_all(study)))


def measure_calls(make: Any, size: Size, *, trials: int) -> dict[str, list[Cost]]:
    samples: dict[str, list[Cost]] = {}
    for counts, number in ((False, trials), (True, 1)):
        store = Store(make(), create=True)
        study = fill(store, size, waiting=number + 8)
        meter = Meter(store, counts=counts)
        store.database.cached.get_all_trials(study.study_id, deepcopy=False)  # the first look is a worker's start
        use(store, study, meter, trials=number)
        store.storage.engine.dispose()
        if not counts:
            samples = meter.samples
            continue
        for name, counted in meter.samples.items():
            trips = statistics.median(cost.round_trips for cost in counted)
            samples[name] = [replace(cost, round_trips=trips) for cost in samples[name]]
    return samples


def measure_start(make: Any, size: Size) -> Cost:
    """Return what a new worker's first read of the study costs, for its first trial's values."""
    url = make()
    study = fill(Store(url, create=True), size, waiting=1)
    store = Store(url)
    meter = Meter(store)
    meter("start", lambda: store.database.cached.get_all_trials(study.study_id, deepcopy=False))
    return meter.samples["start"][0]


def median(costs: Sequence[Cost]) -> Cost:
    return Cost(**{key: statistics.median(getattr(cost, key) for cost in costs) for key in asdict(Cost())})


def fitted(measured: Mapping[Size, Cost]) -> Line:
    """Return the line through medians, with no part below zero; small costs weigh as much as large ones."""
    rows = [[1, size.ended, size.running - 1, size.workers - 1] for size in measured]
    parts: dict[str, list[float]] = {}
    for key in asdict(Cost()):
        values = np.array([getattr(cost, key) for cost in measured.values()])
        weights = 1 / np.maximum(values, max(1e-5, 0.02 * float(values.max())))
        parts[key] = list(nnls(np.array(rows) * weights[:, None], values * weights)[0])
    return Line(*(Cost(**{key: float(parts[key][column]) for key in parts}) for column in range(4)))


# A measurement with many workers


def train(url: str, seed: int, load: Load, pruner: str, gates: Any, results: Any) -> None:
    """Run a worker that sleeps where it would train, and put (call, when it began, seconds) of all calls."""
    store = Store(url).retrying(for_s=60)
    study = store.studies.get("scale")
    judge = spec(study.spec.num_trials, pruner=pruner)
    worker = store.workers.add(study.study_id, device=f"cpu:{seed}")
    store.database.cached.get_all_trials(study.study_id, deepcopy=False)  # the first look is a worker's start
    draw = random.Random(seed)
    calls: list[tuple[str, float, float]] = []

    def timed(name: str, call: Any, *arguments: Any, **options: Any) -> Any:
        began = time.time()
        answer = call(*arguments, **options)
        calls.append((name, began, time.time() - began))
        return answer

    def begin() -> Any:
        claim = timed("claim", store.trials.claim, study, worker)
        described = provenance.trial_metadata(device="cpu", host="here", seed=1)
        timed("suggest", store.trials.suggest, claim, study.spec, attributes=lambda _: described)
        timed("keep", keep, store, study, claim)
        return claim

    ready, end = gates
    claim = begin()  # not all at the same moment, from which on they would go together
    first = draw.randint(1, EPOCHS)
    ready.wait()
    beaten = time.monotonic() - draw.uniform(0, model.BEAT_S)
    while True:
        for epoch in range(first, EPOCHS + 1):
            if end.wait(load.epoch_s * draw.uniform(0.5, 1.5)):
                results.put(calls)
                return
            if time.monotonic() - beaten > model.BEAT_S:
                timed("renew", store.workers.renew, [claim], worker)
                beaten = time.monotonic()
            told: dict[str, Any] = {"epoch": epoch, "metrics": METRICS, "value": VALUE}
            timed("report", store.trials.report, claim, judge, **told, may_prune=epoch < EPOCHS)
        timed("finish", store.trials.finish, claim, "complete", reason="trained")
        claim, first = begin(), 1


def measure_load(url: str, load: Load, pruner: str, *, warm_s: float, window_s: float) -> dict[str, float]:
    """Return what so many workers reach, after a while, in this many seconds."""
    context = multiprocessing.get_context("forkserver")
    # All that a worker imports is imported once: 64 processes that did it would keep the machine busy for minutes.
    context.set_forkserver_preload(
        ["scripts.bench.scale", "hpo.search.study_views", "optuna.samplers", "optuna.pruners"]
    )
    gates, results = (context.Barrier(load.workers + 1), context.Event()), context.Queue()
    workers = [
        context.Process(target=train, args=(url, seed, load, pruner, gates, results)) for seed in range(load.workers)
    ]
    for worker in workers:
        worker.start()
    gates[0].wait()
    print(f"{load.workers} workers began", file=sys.stderr, flush=True)
    time.sleep(warm_s)
    store = Store(url)
    server = Server(store)

    def now() -> tuple[float, float, float, float]:
        clients_s = sum(usage(str(worker.pid))[0] for worker in workers)
        return time.time(), server.usage()[0], clients_s, busy_s()

    before = now()
    time.sleep(window_s)
    after = now()
    backends = server.backend_bytes()
    gates[1].set()
    calls = [call for _ in workers for call in results.get(timeout=120)]
    for worker in workers:
        worker.join()
    seconds, server_s, client_s, busy = (late - early for early, late in zip(before, after, strict=True))
    inside = [call for call in calls if before[0] <= call[1] + call[2] < after[0]]
    reports = sum(name == "report" for name, _, _ in inside)
    spent = sum(
        min(began + took, after[0]) - max(began, before[0])
        for _, began, took in calls
        if began < after[0] and began + took > before[0]
    )
    claims = [took for name, _, took in inside if name == "claim"]
    return {
        "epochs_per_s": reports / seconds,
        "store_share": spent / seconds / load.workers,
        "server_s": server_s / reports,
        "client_s": client_s / reports,
        "other_cores": max(0.0, (busy - server_s - client_s) / seconds),
        "claim_s": statistics.median(claims) if claims else math.nan,
        "claims": len(claims),
        "reports": reports,
        "connections": len(backends),
        "backend_bytes": statistics.median(backends),
    }


def spin(go: Any) -> None:
    """Keep a core busy as Python programs do, in memory of its own."""
    table = {number: [number] for number in range(200_000)}
    draw = random.Random(0)
    while go.wait():
        for _ in range(10_000):
            table[draw.randrange(200_000)][0] += 1


def crowded(make: Any, *, blocks: int) -> tuple[Cost, list[float]]:
    """By what a call's CPU grows where all cores are busy, as many workers keep them, and its spread.

    Calls with every core kept busy by another program, against calls without, in turn: busy cores share caches, and
    often units of one physical core.
    """
    store = Store(make(), create=True)
    study = fill(store, Size(200, 1, 1), waiting=4)
    worker = store.workers.add(study.study_id, device="cpu")
    claim = store.trials.claim(study, worker)
    assert claim is not None
    store.trials.suggest(claim, study.spec, attributes=lambda _: {"seed": 1})
    unjudged, meter, epochs = spec(study.spec.num_trials, pruner="none"), Meter(store), iter(range(1, 1_000_000))
    context = multiprocessing.get_context("spawn")
    go = context.Event()
    spinners = [context.Process(target=spin, args=(go,), daemon=True) for _ in range(2 * (os.cpu_count() or 1))]
    for spinner in spinners:
        spinner.start()
    time.sleep(10.0)
    ratios = []
    for _ in range(blocks):
        for name in ("alone", "crowded"):
            (go.set if name == "crowded" else go.clear)()
            time.sleep(0.3)
            for _ in range(10):
                told: dict[str, Any] = {"epoch": next(epochs), "metrics": METRICS, "value": VALUE}
                meter(name, lambda told=told: store.trials.report(claim, unjudged, **told))
        alone, beside = (median(meter.samples[name][-10:]) for name in ("alone", "crowded"))
        ratios.append((beside.client_s + beside.server_s) / (alone.client_s + alone.server_s))
    for spinner in spinners:
        spinner.terminate()
    store.storage.engine.dispose()
    alone, beside = median(meter.samples["alone"]), median(meter.samples["crowded"])
    return Cost(beside.client_s / alone.client_s, beside.server_s / alone.server_s), ratios


def scaled(costs: Costs, by: Cost) -> Costs:
    """With CPU of client and server times so much."""

    def cost(one: Cost) -> Cost:
        return replace(one, client_s=one.client_s * by.client_s, server_s=one.server_s * by.server_s)

    def line(one: Line) -> Line:
        return Line(cost(one.base), cost(one.per_ended), cost(one.per_running), cost(one.per_worker))

    return Costs(**{name: line(getattr(costs, name)) for name in CALLS})


def busy_s() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def checkpoint_s(parameters: int, *, times: int) -> tuple[list[float], int]:
    """Seconds to save so many parameters and Adam's two moments of them, in a folder of this machine; and bytes."""
    import torch

    from hpo.train.checkpoint import Checkpoint, CheckpointFolder

    state = {name: torch.randn(parameters) for name in ("weights", "first", "second")}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointFolder(folder, identity={"trial": 0})
        seconds = []
        for epoch in range(1, times + 2):
            began = time.perf_counter()
            checkpoints.save(Checkpoint(config_digest="", epoch=epoch, state=state, results=[]))
            seconds.append(time.perf_counter() - began)
        size = max(path.stat().st_size for path in Path(folder).iterdir())
    return seconds[1:], size


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return low, middle, high


def wall_s(cost: Cost) -> float:
    return cost.client_s + cost.server_s + cost.other_s


def print_costs(measured: Mapping[Size, Mapping[str, list[Cost]]]) -> None:
    print(
        "\nCosts: milliseconds, median (quartiles) of a call; of these CPU of the client and of the server; round trips"
    )
    print(
        f"{'ended':>6} {'running':>7} {'workers':>7}  {'call':14} {'n':>4} {'ms':>8} {'(quartiles)':>19} "
        f"{'client':>8} {'server':>7} {'trips':>6}"
    )
    for size, calls in measured.items():
        for name in (*CALLS, *MORE_CALLS):
            if name not in calls:
                continue
            low, middle, high = (1000 * value for value in quartiles([wall_s(cost) for cost in calls[name]]))
            cost = median(calls[name])
            print(
                f"{size.ended:6} {size.running:7} {size.workers:7}  {name:14} {len(calls[name]):4} {middle:8.1f} "
                f"({low:8.1f} {high:8.1f}) {1000 * cost.client_s:8.1f} {1000 * cost.server_s:7.1f} "
                f"{cost.round_trips:6.0f}"
            )


def measure_all(make: Any, sizes: Sequence[Size], *, trials: int, rounds: int) -> dict[Size, dict[str, list[Cost]]]:
    """In rounds over all sizes, so that what else the machine does falls on all of them."""
    measured: dict[Size, dict[str, list[Cost]]] = {size: {} for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            few = max(1, trials // (1 + size.running // 500))  # each call takes seconds
            for name, costs in measure_calls(make, size, trials=few).items():
                measured[size].setdefault(name, []).extend(costs)
            print(f"measured {size}", file=sys.stderr, flush=True)
    return measured


def model_of(measured: Mapping[Size, Mapping[str, list[Cost]]]) -> Costs:
    def line(name: str) -> Line:
        return fitted({size: median(calls[name]) for size, calls in measured.items()})

    return Costs(**{name: line(name) for name in CALLS})


def print_predictions(costs: Costs, place: Place) -> list[dict[str, Any]]:
    rows = []
    print(
        f"\nA database of {place.cores:g} cores, {1000 * place.round_trip_s:g} ms from its workers; 10 epochs a trial"
    )
    print("pruner  epoch   workers  epochs/s  in the store  queueing  cores busy  lock busy  claim s")
    for pruner, looks in LOOKS.items():
        for kind, epoch_s in KINDS.items():
            for workers in (100, 1000, 10_000):
                load = Load(workers, epoch_s, epochs=EPOCHS, looks=looks, ended=ENDED)
                found = model.predict(costs, load, place)
                rows.append({"pruner": pruner, "epoch_s": epoch_s, "workers": workers, **asdict(found)})
                print(
                    f"{pruner:7} {kind:>6} {workers:8}  {found.epochs_per_s:8.2f} "
                    f"{100 * found.store_share:11.1f} % "
                    f"{100 * found.waiting_share:8.1f} % {100 * found.cores_busy:9.1f} % "
                    f"{100 * found.lock_busy:8.1f} % "
                    f"{found.claim_s:8.2f}"
                )
            load = Load(1, epoch_s, epochs=EPOCHS, looks=looks, ended=ENDED)
            number, what = model.saturation(costs, load, place)
            tenth = model.most_workers(costs, load, place, share=0.1)
            print(
                f"{pruner:7} {kind:>6} saturates from {number} workers on, for the {what}; "
                f"up to {tenth} give the store a tenth of their time at most"
            )
            rows.append({"pruner": pruner, "epoch_s": epoch_s, "saturates": number, "by": what, "tenth": tenth})
    return rows


def without_looks(costs: Costs) -> Costs:
    """As if no call read the trials that are in training."""
    return replace(
        costs, suggest=replace(costs.suggest, per_running=Cost()), judged=replace(costs.judged, per_running=Cost())
    )


def print_remedies(costs: Costs, place: Place) -> list[dict[str, Any]]:
    """Return what each change would gain, for epochs of 30 s and ASHA."""
    load = Load(1, 30.0, epochs=EPOCHS, looks=LOOKS["asha"], ended=ENDED)
    longer = replace(load, epoch_s=300.0, epochs=EPOCHS / 10, looks=1.0)
    part = replace(place, cores=place.cores / 10)
    remedies: dict[str, tuple[Costs, Load, Place, int]] = {
        "as it is": (costs, load, place, 1),
        "an epoch of 300 s, one a trial, in place of ten": (costs, longer, place, 1),
        "no pruner": (costs, replace(load, looks=0.0), place, 1),
        "twice the cores": (costs, load, replace(place, cores=2 * place.cores), 1),
        "ten studies in one database": (costs, load, part, 10),
        "ten studies in ten databases": (costs, load, place, 10),
        "if no call read the trials in training": (without_looks(costs), load, place, 1),
    }
    rows = []
    print("\nRemedies, epochs of 30 s, ASHA: training's share of a worker's time, lock and cores, and the most workers")
    for name, (these, one, there, parts) in remedies.items():
        for workers in (1000, 10_000):
            crowd = replace(one, workers=workers // parts)
            found = model.predict(these, crowd, there)
            number, what = model.saturation(these, crowd, there)
            rows.append({"remedy": name, "workers": workers, "saturates": parts * number, "by": what, **asdict(found)})
            print(
                f"{name:48} {workers:6} workers: {100 - 100 * found.store_share:5.1f} % training, lock "
                f"{100 * found.lock_busy:4.0f} %, cores {100 * found.cores_busy:4.0f} %, claim {found.claim_s:6.1f} s; "
                f"saturates from {parts * number} on, for the {what}"
            )
    return rows


def print_idle(costs: Costs, place: Place) -> list[dict[str, Any]]:
    rows = []
    print("\nWorkers that find no slot waiting")
    for workers in (100, 1000, 10_000):
        needs = model.idle(costs, Load(workers, 0.0, ended=ENDED), place)
        found = model.solve(needs, workers=workers, epoch_s=model.POLL_S, cores=place.cores)
        wanted = workers * needs.cores_s / needs.alone_s + needs.background
        rows.append({"workers": workers, "looks_per_s": found.epochs_per_s, "cores_wanted": wanted, **asdict(found)})
        print(
            f"{workers:8} idle: {found.epochs_per_s:8.1f} looks/s, {wanted:6.2f} cores of the database wanted, "
            f"{100 * found.cores_busy:5.1f} % of {place.cores:g} busy, a look every {found.cycle_s:.2f} s"
        )
    return rows


def compare(costs: Costs, load: Load, place: Place, measured: Mapping[str, float]) -> dict[str, Any]:
    """Return what the model predicts, with the cores that others took, and also with the CPU that was used."""
    needs = model.demand(costs, load, place)
    said_cpu_s = needs.cores_s + needs.locked_cores_s
    ratio = (measured["client_s"] + measured["server_s"]) / said_cpu_s
    beside = replace(place, other_cores=measured["other_cores"])
    dearer = scaled(costs, Cost(client_s=ratio, server_s=ratio))
    return {
        "before": asdict(model.predict(costs, load, place)),
        "others": asdict(model.predict(costs, load, beside)),
        "others_and_cpu": asdict(model.predict(dearer, load, beside)),
        "said_cpu_s": said_cpu_s,
        "cpu_ratio": ratio,
    }


def check(make: Any, costs: Costs, *, workers: int, repeats: int, window_s: float) -> list[dict[str, Any]]:
    """Print what the model predicts for this machine, and what is measured, in turn."""
    by, ratios = crowded(make, blocks=8)
    print(
        f"\nwith all cores busy a call takes {by.client_s:.2f} times the client's CPU, {by.server_s:.2f} times the "
        f"server's ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)} blocks)"
    )
    costs = scaled(costs, by)
    rows = []
    print(f"{workers} workers on this machine, which they share with the database: predicted, then measured")
    for repeat in range(repeats):
        for epoch_s, pruner in LOADS:
            url = make()
            fill(Store(url, create=True), Size(200, 1, 1), waiting=20_000)
            place = Place(cores=float(os.cpu_count() or 1), shared=True)
            load = Load(workers, epoch_s, epochs=EPOCHS, looks=LOOKS[pruner], ended=200)
            predicted = model.predict(costs, load, place)
            print(
                f"epoch {epoch_s:g} s, {pruner}: predicted, where nothing else runs, {predicted.epochs_per_s:.1f} "
                f"epochs/s, {100 * predicted.store_share:.0f} % in the store, claim {predicted.claim_s:.2f} s",
                flush=True,
            )
            measured = measure_load(url, load, pruner, warm_s=10.0, window_s=window_s)
            rows.append({"repeat": repeat, "epoch_s": epoch_s, "pruner": pruner, "measured": measured})
            rows[-1] |= compare(costs, load, place, measured)
            print_check(rows[-1])
    return rows


def print_check(row: Mapping[str, Any]) -> None:
    measured = row["measured"]
    found = measured["epochs_per_s"]
    ratios = ", ".join(
        f"{found / row[key]['epochs_per_s']:.2f} ({key})" for key in ("before", "others", "others_and_cpu")
    )
    print(
        f"    measured {found:.1f} epochs/s (n = {measured['reports']}); of the prediction {ratios}; others "
        f"{measured['other_cores']:.2f} cores; CPU of an epoch {1000 * measured['client_s']:.0f} + "
        f"{1000 * measured['server_s']:.0f} ms, {row['cpu_ratio']:.2f} of what was said; in the store "
        f"{100 * measured['store_share']:.0f} %, said {100 * row['before']['store_share']:.0f}, "
        f"{100 * row['others']['store_share']:.0f}, {100 * row['others_and_cpu']['store_share']:.0f} %; claim "
        f"{measured['claim_s']:.2f} s (n = {measured['claims']}), "
        f"said {row['before']['claim_s']:.2f}, "
        f"{row['others']['claim_s']:.2f}, {row['others_and_cpu']['claim_s']:.2f}; {measured['connections']} "
        f"connections of {measured['backend_bytes'] / 1e6:.1f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=9, help="trials of each round of calls at each size")
    parser.add_argument("--rounds", type=int, default=2, help="over all sizes")
    parser.add_argument("--cores", type=float, default=8, help="of the database that is predicted")
    parser.add_argument("--round-trip-ms", type=float, default=0.5, help="between it and a worker")
    parser.add_argument("--workers", type=int, default=64, help="that are really started to check the model")
    parser.add_argument("--repeats", type=int, default=3, help="of that check")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured in each, after a warm-up")
    parser.add_argument("--costs", metavar="FILE", help="take the costs from what --json wrote before")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    figures: dict[str, Any] = {}
    with stores("postgres") as make:
        version = Server(Store(make(), create=True)).version
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, PostgreSQL {version}, Python "
            f"{platform.python_version()}, Optuna {optuna.__version__}, SQLAlchemy {sa.__version__}",
            flush=True,
        )
        if arguments.costs:
            figures = json.loads(Path(arguments.costs).read_text())
            measured = {
                Size(**row["size"]): {name: [Cost(**cost) for cost in calls] for name, calls in row["calls"].items()}
                for row in figures["costs"]
            }
        else:
            measured = measure_all(make, SIZES, trials=arguments.trials, rounds=arguments.rounds)
            measured |= measure_all(make, (LARGE,), trials=arguments.trials, rounds=1)
            figures["costs"] = [
                {"size": asdict(size), "calls": {name: list(map(asdict, costs)) for name, costs in calls.items()}}
                for size, calls in measured.items()
            ]
            figures["start"] = asdict(measure_start(make, Size(10_000, 1, 1)))
            figures["checkpoints"] = {str(num): checkpoint_s(num, times=10) for num in (1_000_000, 11_000_000)}
        print_costs(measured)
        print(f"reading 10,000 ended trials for the first time: {wall_s(Cost(**figures['start'])):.1f} s")
        for num, (seconds, size) in figures["checkpoints"].items():
            low, middle, high = (1000 * value for value in quartiles(seconds))
            print(
                f"a checkpoint of {int(num):,} parameters, {size / 1e6:.0f} MB: {middle:.0f} ms ({low:.0f} {high:.0f})"
            )
        costs = model_of({size: calls for size, calls in measured.items() if size != LARGE})
        for name in ("suggest", "judged", "reap"):
            line = getattr(costs, name).at(ended=LARGE.ended, running=LARGE.running, workers=LARGE.workers)
            found = statistics.median(map(wall_s, measured[LARGE][name]))
            print(
                f"{name} with {LARGE.running} in training: the line says {wall_s(line):.2f} s, measured {found:.2f} s"
            )
        figures["lines"] = asdict(costs)
        if arguments.repeats:
            figures["check"] = check(
                make, costs, workers=arguments.workers, repeats=arguments.repeats, window_s=arguments.seconds
            )
        place = Place(cores=arguments.cores, round_trip_s=arguments.round_trip_ms / 1000)
        figures["predictions"] = print_predictions(costs, place)
        figures["remedies"] = print_remedies(costs, place)
        figures["idle"] = print_idle(costs, place)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
