"""Workers that start together: how long each waits for its first claim, on a Postgres of its own.

Eight processes of eight threads, each with a store of its own, as a worker's process has, open one study and claim a
trial at the same moment. `make bench-store` runs it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from typing import Any

from hpo.store.store import Store
from scripts.bench.store import THREADS, spec, stores

TRIALS = 1000


def work(url: str, num_threads: int, ready: Any, gate: Any, waits: Any) -> None:
    """Put the number of each thread's first trial and the seconds that it took to claim it."""

    def claim(index: int) -> None:
        store = Store(url)
        study = store.studies.get("load")
        worker = store.workers.add(study.study_id, device=f"cpu:{os.getpid()}-{index}")
        with store.database.connect():
            pass  # as a worker has when it claims, a connection
        ready.release()
        gate.wait()
        began = time.perf_counter()
        claimed = store.trials.claim(study, worker)
        assert claimed is not None
        waits.put((claimed.number, time.perf_counter() - began))

    threads = [threading.Thread(target=claim, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def start_together(url: str, num_processes: int) -> list[float]:
    """Return how long the workers of one start waited, sorted."""
    context = multiprocessing.get_context("spawn")
    ready, gate, waits = context.Semaphore(0), context.Event(), context.Queue()
    started = [context.Process(target=work, args=(url, THREADS, ready, gate, waits)) for _ in range(num_processes)]
    for process in started:
        process.start()
    for _ in range(num_processes * THREADS):
        ready.acquire()
    time.sleep(1)  # until the last thread waits at the gate
    gate.set()
    found = [waits.get(timeout=600) for _ in range(num_processes * THREADS)]
    for process in started:
        process.join()
    numbers, seconds = zip(*found, strict=True)
    assert len(set(numbers)) == len(numbers)  # no two were given the same trial
    return sorted(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with stores("postgres") as make:
        url = make()
        Store(url, create=True).studies.create(spec(TRIALS), metadata={})
        runs = [start_together(url, arguments.processes) for _ in range(arguments.repeats)]
    middles = sorted(statistics.median(waits) for waits in runs)
    longest = sorted(waits[-1] for waits in runs)
    print(
        f"{arguments.processes * THREADS} workers that start together: median wait for a claim "
        f"{statistics.median(middles):.2f} s ({middles[0]:.2f} to {middles[-1]:.2f}), longest "
        f"{statistics.median(longest):.2f} s ({longest[0]:.2f} to {longest[-1]:.2f}), n = {len(runs)} starts"
    )


if __name__ == "__main__":
    main()
