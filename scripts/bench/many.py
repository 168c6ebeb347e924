"""The commands that read, on large stores: `hpo list`, `status`, `trials` and `best`, from start to last line.

A store holds one study of many ended trials, each with ten epochs, or many small studies. `make bench-many` writes the
rows directly, as the ledger leaves them, on SQLite and on a Postgres of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.storages._rdb.models import TrialIntermediateValueModel, TrialValueModel
from optuna.trial import TrialState

from hpo.config.study_spec import StudySpec
from hpo.store import schema
from hpo.store.store import Store
from scripts.bench.store import EPOCHS, curve, stores

COMMANDS = ("list", "status", "trials", "best")


def spec(name: str, trials: int) -> StudySpec:
    return StudySpec.from_dict(
        {
            "name": name,
            "search": {
                "sampler": "random",
                "trials": trials,
                "space": {"lr": {"low": 1e-5, "high": 1e-1, "log": True}},
            },
            "objective": {"function": "none:none"},
            "training": {"epochs": EPOCHS},
        }
    )


def fill(store: Store, name: str, trials: int) -> None:
    """Add a study of this many complete trials."""
    study = store.studies.create(spec(name, trials), metadata={})
    worker = store.workers.add(study.study_id, device="cpu")
    kind, draw = distribution_to_json(FloatDistribution(1e-5, 1e-1, log=True)), random.Random(0)
    began = datetime.now(UTC).replace(tzinfo=None)
    finite = TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
    rows: dict[Any, list[dict[str, Any]]] = {}

    def add(table: Any, **row: Any) -> None:
        rows.setdefault(table, []).append(row)

    with store.database.transaction() as connection:
        last = connection.execute(sa.select(sa.func.max(schema.optuna_trials.c.trial_id))).scalar() or 0
        for number in range(trials):
            trial_id, lr = last + 1 + number, 10 ** draw.uniform(-5, -1)
            ours = {"study_id": study.study_id, "number": number}
            add(
                schema.optuna_trials,
                **ours,
                trial_id=trial_id,
                state=TrialState.COMPLETE,
                datetime_start=began,
                datetime_complete=began,
            )
            add(schema.trial_params, trial_id=trial_id, param_name="lr", param_value=lr, distribution_json=kind)
            for key, value in {"seed": number, "device": "cpu", "host": "here", "ended": "complete: trained"}.items():
                add(schema.trial_user_attributes, trial_id=trial_id, key=key, value_json=json.dumps(value))
            add(schema.trial_system_attributes, trial_id=trial_id, key="fixed_params", value_json="{}")
            values = curve(lr, number)
            for epoch, value in enumerate(values, start=1):
                metrics = {"train_loss": 1 - value, "val_accuracy": value, "seconds": 1.0}
                add(schema.epochs_table, **ours, epoch=epoch, attempt=1, metrics=json.dumps(metrics))
                step = {"step": epoch, "intermediate_value": value, "intermediate_value_type": finite}
                add(schema.intermediate_values, trial_id=trial_id, **step)
            kept = {"objective": 0, "value": values[-1], "value_type": TrialValueModel.TrialValueType.FINITE}
            add(schema.trial_values, trial_id=trial_id, **kept)
            span = {"began_at": 1e9, "ended_at": 1e9 + EPOCHS, "outcome": "complete"}
            add(schema.attempts_table, **ours, attempt=1, worker_id=worker, last_epoch=0, **span)
        for table, of in rows.items():
            connection.execute(table.insert(), of)
        slots = schema.slots_table
        first = sa.select(schema.optuna_trials.c.trial_id).where(
            schema.optuna_trials.c.study_id == slots.c.study_id, schema.optuna_trials.c.number == slots.c.number
        )
        ended: dict[str, Any] = {"state": "complete", "attempt": 1, "last_epoch": EPOCHS, "ended_at": 1e9}
        connection.execute(
            slots.update()
            .where(slots.c.study_id == study.study_id)
            .values({**ended, "trial_id": first.scalar_subquery()})
        )


def seconds_of(url: str, command: str, study: str) -> tuple[float, float]:
    """Return how long a command takes, its start included, and how much of a core it uses."""
    arguments = [command] if command == "list" else [command, study]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "hpo", *arguments, "--storage", url], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stores", nargs="+", default=["sqlite", "postgres"])
    parser.add_argument("--trials", nargs="*", type=int, default=[5_000, 20_000])
    parser.add_argument("--studies", nargs="*", type=int, default=[1_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    figures: list[dict[str, Any]] = []
    shapes = [(1, trials) for trials in arguments.trials] + [(studies, 3) for studies in arguments.studies]
    for kind in arguments.stores:
        with stores(kind) as make:
            for num_studies, num_trials in shapes:
                url = make()
                store = Store(url, create=True)
                for index in range(num_studies):
                    fill(store, f"s{index}", num_trials)
                store.storage.engine.dispose()
                for command in COMMANDS:
                    taken = [seconds_of(url, command, "s0") for _ in range(arguments.repeats)]
                    row = {"store": kind, "studies": num_studies, "trials": num_trials, "command": command}
                    figures.append(row | {"seconds": taken})
                    seconds, cpu = (sorted(of) for of in zip(*taken, strict=True))
                    print(
                        f"{kind:>8}  {num_studies:5} studies of {num_trials:6} trials  {command:>7}  "
                        f"{statistics.median(seconds):6.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), "
                        f"CPU {statistics.median(cpu):6.2f} s ({cpu[0]:.2f} to {cpu[-1]:.2f}), n = {arguments.repeats}",
                        flush=True,
                    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
