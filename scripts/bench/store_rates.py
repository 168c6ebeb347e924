"""Reports a second beside what the database does by itself, and beside plain Optuna, on a Postgres of its own.

Processes do one thing at a time, all the same: report an epoch to hpo (without a pruner, and with the median's look);
report to plain Optuna and ask its median pruner; and update one row in a transaction through the same driver. The
blocks alternate, so that a busy machine slows all of them alike. The rates of all processes and the times of single
calls are printed. `make bench-store` runs it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from array import array
from collections.abc import Callable
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.pruners import MedianPruner

from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from scripts.bench.store import stores

KINDS = ("one row", "hpo, none", "hpo, median", "optuna, median")
EPOCHS = 1_000_000


def spec(pruner: str) -> StudySpec:
    space = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}
    return StudySpec.from_dict(
        {
            "name": pruner,
            "search": {"sampler": "random", "trials": 500, "space": space},
            "pruner": {"name": pruner},
            "objective": {"function": "none:none"},
            "training": {"epochs": EPOCHS},
        }
    )


def actions(url: str, index: int) -> list[Callable[[int], object]]:
    """Return what each kind does for an epoch."""
    store = Store(url)

    def one_row(epoch: int) -> None:
        with store.storage.engine.begin() as connection:
            connection.execute(ROW, {"value": epoch, "of_id": index})

    def reporting(pruner: str) -> Callable[[int], object]:
        study = store.studies.get(pruner)
        claim = store.trials.claim(study, store.workers.add(study.study_id, device=f"cpu:{index}"))
        assert claim is not None
        store.trials.suggest(claim, study.spec, attributes=lambda _: {})
        return lambda epoch: store.trials.report(claim, study.spec, epoch=epoch, metrics={"a": 0.5}, value=0.5)

    plain = optuna.load_study(study_name="plain", storage=url, pruner=MedianPruner())
    trial = plain.ask({"lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)})

    def report_plainly(epoch: int) -> None:
        trial.report(0.5, epoch)
        trial.should_prune()

    return [one_row, reporting("none"), reporting("median"), report_plainly]


TABLE = sa.table("bench_rows", sa.column("id", sa.Integer), sa.column("value", sa.Integer))
ROW = TABLE.update().where(TABLE.c.id == sa.bindparam("of_id")).values(value=sa.bindparam("value"))


def work(url: str, index: int, blocks: int, block_s: float, barrier: Any, results: Any) -> None:
    """Put how long each kind took each time, in seconds, by blocks."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    todo, epochs, times = actions(url, index), [0] * len(KINDS), []
    for _ in range(blocks):
        for kind, action in enumerate(todo):
            barrier.wait()
            took, now = array("d"), time.perf_counter()
            ends = now + block_s
            while now < ends:
                epochs[kind] += 1
                action(epochs[kind])
                began, now = now, time.perf_counter()
                took.append(now - began)
            times.append((kind, took))
    results.put(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each block")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    context = multiprocessing.get_context("spawn")
    with stores("postgres") as make:
        for workers in arguments.workers:
            url = make()
            store = Store(url, create=True)
            for pruner in ("none", "median"):
                store.studies.create(spec(pruner), metadata={})
            optuna.create_study(study_name="plain", storage=url, direction="maximize")
            with store.storage.engine.begin() as connection:
                connection.exec_driver_sql("CREATE TABLE bench_rows (id integer PRIMARY KEY, value integer)")
                connection.exec_driver_sql(f"INSERT INTO bench_rows SELECT n, 0 FROM generate_series(0, {workers}) n")
            barrier, results = context.Barrier(workers), context.Queue()
            started = [
                context.Process(target=work, args=(url, index, arguments.blocks, arguments.seconds, barrier, results))
                for index in range(workers)
            ]
            for process in started:
                process.start()
            found = [results.get(timeout=600) for _ in started]
            for process in started:
                process.join()
            for kind, name in enumerate(KINDS):
                blocks = list(zip(*([took for of, took in times if of == kind] for times in found), strict=True))
                rates = sorted(sum(map(len, block)) / arguments.seconds for block in blocks)
                all_ms = sorted(1000 * seconds for block in blocks for took in block for seconds in took)
                middle_ms, late_ms = all_ms[len(all_ms) // 2], all_ms[len(all_ms) * 99 // 100]
                print(
                    f"{workers:3} workers  {name:>15}  {statistics.median(rates):7.1f} a second "
                    f"({rates[0]:.1f} to {rates[-1]:.1f}, n = {arguments.blocks} blocks), "
                    f"median {middle_ms:.1f} ms, 99th percentile {late_ms:.1f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
