"""How soon a tuner knows a good learning rate: hpo, a plain Optuna script, Ray Tune.

    make bench-search                                       # on recorded learning curves (record_curves.py)
    python -m scripts.bench.search --live mnist-adam        # the same, training for real; HPO_DATA names the data,
                                                            # and for CIFAR-10 CIFAR10 the folder of its images

Each tuner has 30 trials of 9 epochs, one range of learning rates and the same curves; a trial is one of ten seeds.
After every epoch the bench judges the tuner's learning rate of choice: is it within one standard error, of a mean over
five seeds, of the best of a dense grid? It counts the epochs (live: and seconds, start-up included) until the choice is
good, and until it is good for good, and the share of repetitions in which it is good after so many epochs, luck and
all. The judge uses the means over all ten seeds. Five fresh ones for each repetition would judge their own luck: the
best of the whole grid over the five others passes in 44 % (MNIST) and 42 % (CIFAR-10, Adam) of 200 such splits.

The choice of hpo is the learning rate that, by `hpo status`, all trials together point to. The others have no such
thing and choose the trial with the highest accuracy that was last reported, in training or not. Ray Tune is measured if
it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import torch

import hpo
from hpo.analysis.peak import find_peak
from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from hpo.study.records import StudyRecord
from hpo.train.checkpoint import Checkpoint
from hpo.train.config import EpochResult, TrialConfig
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.planning import LanePlan
from hpo.workers import lane_runner
from hpo.workers.worker import Worker
from scripts.bench.record_curves import CURVES, tasks

TRIALS = 30
RETRAINED = 5  # seeds; a good choice is within one standard error of a mean over so many of the best
PROCESSES = 2  # trials at once of Ray Tune, on two cores
BUDGETS = (8, 16, 32, 64)  # epochs after which the good choices are counted
EPOCH_S = 60.0  # that a replayed epoch claims to have taken, so that its report is no share of it
POLL_S = 0.25  # between reads of a study in training


@dataclass(frozen=True)
class Step:
    """What a tuner would have answered after `epochs` epochs of all its trials, `seconds` after its start."""

    epochs: int
    lr: float | None
    seconds: float = 0.0


class Landscape:
    """A recorded task. The repetition decides which seed a trial has."""

    def __init__(self, name: str, recorded: dict[str, Any], repetition: int) -> None:
        self.name, self.repetition = name, repetition
        self.epochs: int = recorded["epochs"]
        self.low, self.high = recorded["range"]
        self.recorded = recorded
        finals = [[curve[-1] for curve in curves] for curves in recorded["val_accuracy"]]
        means = [statistics.fmean(values) for values in finals]
        best = max(range(len(means)), key=means.__getitem__)
        least = means[best] - statistics.stdev(finals[best]) / math.sqrt(RETRAINED)
        self.good = [lr for lr, mean in zip(recorded["lrs"], means, strict=True) if mean >= least]

    def curve(self, lr: float) -> tuple[list[float], bool]:
        """Return the accuracies of a trial, of a seed that follows from its learning rate, and whether it diverges."""
        curves = self.recorded["val_accuracy"][self.recorded["lrs"].index(self._nearest(lr))]
        curve: list[float] = random.Random(f"{self.repetition} {lr}").choice(curves)
        return curve, len(curve) < self.epochs

    def whole_curve(self, lr: float) -> list[float]:
        """Return the accuracies for a script that does not notice divergence: the accuracy then stays as it was."""
        curve, _ = self.curve(lr)
        left = self.epochs - len(curve)
        return curve + curve[-1:] * left

    def is_good(self, lr: float | None) -> bool:
        return lr is not None and self._nearest(lr) in self.good

    def _nearest(self, lr: float) -> float:
        """Return the learning rate of the grid that stands for this one."""
        return float(min(self.recorded["lrs"], key=lambda known: abs(math.log(known / lr))))


Accuracies = Callable[[float], Iterable[float]]  # of a trial of this learning rate, epoch by epoch


class BestLast:
    """The choice of tuners that have no other: the trial with the highest accuracy that was last reported."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps: list[Step] = []
        self._last: dict[Any, tuple[float, float]] = {}

    def report(self, trial: Any, lr: float, accuracy: float) -> None:
        self._last[trial] = (accuracy, lr)
        self.steps.append(Step(len(self.steps) + 1, max(self._last.values())[1], time.perf_counter() - self.began))


# A plain Optuna script


def plain_optuna(landscape: Landscape, accuracies: Accuracies, log: BestLast) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", landscape.low, landscape.high, log=True)
        for epoch, accuracy in enumerate(accuracies(lr), start=1):
            log.report(trial.number, lr, accuracy)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=landscape.repetition),
        pruner=optuna.pruners.MedianPruner(),
    )
    study.optimize(objective, n_trials=TRIALS)


# Ray Tune


def ray_tune(landscape: Landscape, accuracies: Accuracies, log: BestLast) -> None:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    class Log(tune.Callback):  # type: ignore[misc]
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            log.report(trial.trial_id, result["config"]["lr"], result["accuracy"])

    def train(config: dict[str, float]) -> None:
        for epoch, accuracy in enumerate(accuracies(config["lr"]), start=1):
            tune.report({"accuracy": accuracy, "epoch": epoch})

    if not ray.is_initialized():
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        ray.init(num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            train,
            param_space={"lr": tune.loguniform(landscape.low, landscape.high)},
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                num_samples=TRIALS,
                search_alg=OptunaSearch(seed=landscape.repetition),
                scheduler=ASHAScheduler(time_attr="epoch", max_t=landscape.epochs, grace_period=1),
                max_concurrent_trials=PROCESSES,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Log()]),
        ).fit()


# Ours


def our_spec(landscape: Landscape, settings: dict[str, Any]) -> StudySpec:
    training = {"epochs": landscape.epochs, "seed": landscape.repetition}
    return StudySpec.from_dict(
        {
            "name": "ours",
            "search": {
                "trials": TRIALS,
                "seed": landscape.repetition,
                "space": {"lr": {"low": landscape.low, "high": landscape.high, "log": True}},
            },
            "pruner": {"name": "asha"},
            "checkpoints": {"keep_best": 0},
            **settings,
            "training": {**training, **settings.get("training", {})},
        }
    )


class Replay(PlainEngine):
    """An engine that trains nothing: each epoch of its trial is the next one of a recorded curve."""

    def __init__(self, landscape: Landscape) -> None:
        super().__init__(device="cpu")
        self._landscape = landscape

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None) -> int:
        assert config.training.lr is not None
        self._lr, self._epoch = config.training.lr, 0
        self._curve, self._diverges = self._landscape.curve(self._lr)
        return 0

    def run_epoch(self) -> list[EpochResult]:
        accuracy = self._curve[self._epoch]
        self._epoch += 1
        is_over = self._diverges and self._epoch == len(self._curve)
        return [
            EpochResult(
                lane=0,
                epoch=self._epoch,
                train_loss=0.0,
                train_accuracy=0.0,
                val_loss=0.0,
                val_accuracy=accuracy,
                test_accuracy=None,
                lr=self._lr,
                seconds=EPOCH_S,
                diverged="as recorded" if is_over else None,
            )
        ]

    def evict(self, lane: int) -> None:
        pass


def read_step(store: Store, study: StudyRecord, *, began: float) -> Step:
    trials = store.trials.get_all(study)
    epochs, peak = sum(len(trial.epochs) for trial in trials), find_peak(study, trials)
    return Step(epochs, peak.lr if peak else None, time.perf_counter() - began)


def ours_replayed(landscape: Landscape) -> list[Step]:
    """Run the real store, worker, sampler, pruner and lanes; only what trains an epoch is replaced."""
    steps: list[Step] = []
    spec = our_spec(landscape, {"training": {"checkpoint_epochs": 1000}})  # there is nothing to save

    class ReplayLanes(LaneEngine):
        def __init__(self, **options: Any) -> None:
            # The plan for networks that gain nothing from a stack, as those of these tasks on a CPU.
            alone = LanePlan(device="the CPU", lanes=options["num_interleaved"], convolution=None, reason="recorded")
            super().__init__(**{**options, "get_or_set_plan": lambda device, measure: alone})

        def _plain_engine(self) -> PlainEngine:
            return Replay(landscape)

        def run_epoch(self) -> list[EpochResult]:
            steps.append(read_step(store, study, began=began))
            return super().run_epoch()

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(lane_runner, "LaneEngine", ReplayLanes):
        store = Store(f"sqlite:///{folder}/ours.db", create=True)
        study = store.studies.create(spec, metadata={})
        Worker(store, study, device="cpu", torch_device="cpu", should_stop=lambda: False).run()
        return [*steps, read_step(store, study, began=began)]


# For real


def train(landscape: Landscape, lr: float, *, threads: int | None = None) -> Iterator[float]:
    """Train a trial of the plain scripts by the plain engine, which is as fast as a hand-written loop (engine.py).

    A trial that has diverged costs no more time; a script would not notice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    spec = our_spec(landscape, task_settings(landscape))
    engine = PlainEngine(device="cpu")
    engine.admit(spec.trial_config({"lr": lr}, seed=random.Random(f"{landscape.repetition} {lr}").randrange(2**31)))
    diverged = None
    for _ in range(landscape.epochs):
        if not diverged:
            (result,) = engine.run_epoch()
            diverged = result.diverged
        yield result.val_accuracy


def task_settings(landscape: Landscape) -> dict[str, Any]:
    task = tasks(os.environ.get("CIFAR10"))[landscape.name]
    return {key: task[key] for key in ("model", "data", "training")}


def ours_live(landscape: Landscape) -> list[Step]:
    """Run `hpo.run` in a process of its own, and read its study as `hpo status` does."""
    spec = our_spec(landscape, task_settings(landscape))
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/ours.db"
        began = time.perf_counter()
        process = multiprocessing.get_context("spawn").Process(target=hpo.run, args=(spec,), kwargs={"storage": url})
        process.start()
        while process.is_alive():
            time.sleep(POLL_S)
            with contextlib.suppress(hpo.UserError):  # there is no study yet
                store = Store(url)
                steps.append(read_step(store, store.studies.get("ours"), began=began))
        process.join()
        return steps


# The figures


def settled(landscape: Landscape, steps: Sequence[Step]) -> tuple[Step | None, Step | None]:
    """Return when the choice was good for the first time, and since when it was good for good; None is never."""
    first = next((step for step in steps if landscape.is_good(step.lr)), None)
    since = None
    for step in steps:
        since = (since or step) if landscape.is_good(step.lr) else None
    return first, since


def shares(landscapes: Sequence[Landscape], logs: Sequence[Sequence[Step]]) -> list[float]:
    """Return the share of repetitions in which the choice is good after each of BUDGETS."""
    found = []
    for budget in BUDGETS:
        last = [max((step for step in log if step.epochs <= budget), key=lambda step: step.epochs) for log in logs]
        found.append(statistics.fmean(land.is_good(step.lr) for land, step in zip(landscapes, last, strict=True)))
    return found


def measure(name: str, landscape: Landscape, *, live: bool) -> list[Step]:
    if name == "ours":
        return ours_live(landscape) if live else ours_replayed(landscape)
    log = BestLast()
    if live:
        # The script has the machine to itself; Ray's trials share it.
        threads = None if name == "optuna" else max(1, (os.cpu_count() or 1) // PROCESSES)
        accuracies: Accuracies = functools.partial(train, landscape, threads=threads)
    else:
        accuracies = landscape.whole_curve
    OTHERS[name](landscape, accuracies, log)
    return log.steps


OTHERS: dict[str, Callable[[Landscape, Accuracies, BestLast], None]] = {"optuna": plain_optuna, "ray": ray_tune}
LABELS = {"ours": "ours (TPE, ASHA)", "optuna": "Optuna script (TPE, median)", "ray": "Ray Tune (Optuna, ASHA)"}


def quartiles_text(values: Sequence[float]) -> str:
    """Return the median and the quartiles; infinite values are "never"."""
    low, middle, high = (
        "never" if math.isinf(value) else f"{value:.0f}"
        for value in np.percentile(values, [25, 50, 75], method="inverted_cdf")
    )
    return f"{middle} ({low} to {high})"


def print_table(
    task: str, landscapes: Sequence[Landscape], logs: dict[str, list[list[Step]]], *, live: bool
) -> list[dict[str, Any]]:
    """Print a row for each tuner of a task, and return the figures."""
    rates = ", ".join(f"{lr:.2g}" for lr in landscapes[0].good)
    print(f"\n{task}: good are {rates}, of {len(landscapes[0].recorded['lrs'])} learning rates")
    heads = ["until good", "until for good"]
    if live:
        heads += ["seconds until good", "for good"]
    after = "".join(f"{f'after {budget}':>10}" for budget in BUDGETS)
    print(f"{'':29}" + "".join(f"{head:>20}" for head in heads) + f"{'never':>7}{after}")
    figures = []
    for name, of_tuner in logs.items():
        pairs = [settled(landscape, log) for landscape, log in zip(landscapes, of_tuner, strict=True)]
        firsts, lasts = zip(*pairs, strict=True)
        epochs = [[step.epochs if step else math.inf for step in steps] for steps in (firsts, lasts)]
        seconds = [[step.seconds if step else math.inf for step in steps] for steps in (firsts, lasts)]
        good = shares(landscapes, of_tuner)
        cells = [quartiles_text(values) for values in (epochs + seconds if live else epochs)]
        print(f"{LABELS[name]:29}" + "".join(f"{cell:>20}" for cell in cells), end="")
        print(f"{lasts.count(None):>7}" + "".join(f"{share:>10.0%}" for share in good), flush=True)
        figures.append({"task": task, "tuner": name, "epochs": epochs, "seconds": seconds, "good_after": good})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how soon tuners know a good learning rate.")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--live", metavar="TASK", help="train this task for real, and count seconds too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()

    recorded = json.loads(CURVES.read_text())["tasks"]
    names = ["ours", "optuna"]
    if importlib.util.find_spec("ray") is not None:
        names.append("ray")
    else:
        print("Ray Tune is not installed and not measured: pip install 'ray[tune]'")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, optuna {optuna.__version__}, "
        f"n = {arguments.repetitions}; medians and quartiles"
    )
    figures = []
    for task in [arguments.live] if arguments.live else recorded:
        landscapes = [Landscape(task, recorded[task], repetition) for repetition in range(arguments.repetitions)]
        logs: dict[str, list[list[Step]]] = {name: [] for name in names}
        for landscape in landscapes:
            for name in names:  # taking turns
                logs[name].append(measure(name, landscape, live=bool(arguments.live)))
        figures += print_table(task, landscapes, logs, live=bool(arguments.live))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
