"""What the answer is worth on networks that others trained, beside the best trial's learning rate.

    make bench-curves CURVES=curves.json.gz

The file is a list of tasks, each with the accuracy after every so many epochs at several learning rates (DeepOBS and
step-back; the README beside the data names its keys). A trial replays a task: its curve is that of its learning rate,
between recorded rates in proportion on the log scale, off by one amount with a standard deviation of 0.3 percentage
points, as another seed would be. Studies run through our race, or Optuna's TPE and pruners or Gaussian process, in
memory, and through `hpo.analysis`. The best trial's rate is what plain Optuna answers.
What a learning rate is worth in truth is the mean of the last tenth of its recorded curve.

Tasks are split in two halves, every second one: the constants of the answer were chosen on the first half. The bench
prints for each half and way to search:

- trainings: the epochs of all trials, in full trainings, a median;
- the share of studies within 0.5 and 1 percentage point of the best rate, the mean, 90 % quantile and worst shortfall,
  each of the recommended rate / of the best trial's rate;
- how often the 90 % interval holds the recorded rate that is best, within half a step of the recorded rates, which
  stand for those around them; and the median width of the interval, in decades;
- how often the best rate is called determined;
- where the recorded networks die above some rate: how often an edge is stated, and how often its 90 % interval reaches
  the gap between the highest rate that is better than guessing and the next recorded one.

Where too few rates have a value for a curve, the best trial's rate is recommended, and the whole range is the interval.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from threadpoolctl import threadpool_limits

from hpo.analysis import answer as analysis
from hpo.analysis.response import GUESS_SHARE
from hpo.config.study_spec import StudySpec
from hpo.search.proposals import fixed_values
from hpo.search.race import Racer, course_of, find_goals
from hpo.study.records import StudyRecord, TrialRecord

SEED_NOISE = 0.003
RACE, GP = "race", "gp"
STUDIES = {"none": 20, "median": 20, "hyperband": 20, "asha": 30, GP: 20}  # pruner of TPE, or Optuna's GP -> trials


@dataclass(frozen=True)
class PublicTask:
    """Recorded curves of a network at log10 of its learning rates."""

    name: str
    num_classes: int
    x: Any  # (R,)
    curves: Any  # (R, epochs), means of the recorded runs of a rate

    @property
    def num_epochs(self) -> int:
        return int(self.curves.shape[1])

    @property
    def final(self) -> Any:
        """What each recorded rate is worth."""
        return self.curves[:, -max(1, self.num_epochs // 10) :].mean(axis=1)

    @property
    def edge(self) -> tuple[float, float] | None:
        """The last recorded x at which networks learn, and the next one; None where they learn at all high rates."""
        guess = 1 / self.num_classes
        learns = np.flatnonzero(self.final > guess + GUESS_SHARE * (self.final.max() - guess))
        last = int(learns.max())
        return None if last == len(self.x) - 1 else (float(self.x[last]), float(self.x[last + 1]))

    def worth(self, x: float) -> float:
        return float(np.interp(x, self.x, self.final))

    def curve(self, x: float, random: np.random.Generator) -> list[float]:
        """Return the curve of another seed at this rate."""
        at = [float(np.interp(x, self.x, self.curves[:, epoch])) for epoch in range(self.num_epochs)]
        offset = SEED_NOISE * random.standard_normal()
        return [min(max(value + offset * min(1.0, 2 * value), 0.0), 1.0) for value in at]


def read_tasks(path: Path) -> list[PublicTask]:
    tasks = []
    for task in json.loads(gzip.decompress(path.read_bytes())):
        of_rate: dict[float, list[list[float]]] = {}
        for run in task["runs"]:
            of_rate.setdefault(run["lr"], []).append([value or 0.0 for value in run["accuracy"]])
        epochs = min(len(curve) for curves in of_rate.values() for curve in curves)
        means = [np.mean([curve[:epochs] for curve in of_rate[lr]], axis=0) for lr in sorted(of_rate)]
        tasks.append(PublicTask(task["task"], task["num_classes"], np.log10(sorted(of_rate)), np.array(means)))
    return tasks


def make_pruner(name: str, num_epochs: int) -> optuna.pruners.BasePruner:
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=num_epochs)
    return optuna.pruners.MedianPruner() if name == "median" else optuna.pruners.NopPruner()


def run(task: PublicTask, how: str, *, seed: int) -> list[TrialRecord]:
    """Return the trials of a study of Optuna's in memory."""
    random = np.random.default_rng(seed)
    study = optuna.create_study(
        study_name=f"{task.name}, seed {seed}",  # Hyperband draws its brackets by it
        direction="maximize",
        sampler=optuna.samplers.GPSampler(seed=seed) if how == GP else optuna.samplers.TPESampler(seed=seed),
        pruner=make_pruner(how, task.num_epochs),
    )
    trials = []
    for number in range(STUDIES[how]):
        trial = study.ask()
        x = trial.suggest_float("x", task.x[0], task.x[-1])
        state, seen, whole = "complete", 0, task.curve(x, random)
        for seen, value in enumerate(whole, start=1):
            trial.report(value, seen)
            if seen < len(whole) and trial.should_prune():
                state = "pruned"
                break
        curve = whole[:seen]
        if state == "complete":
            study.tell(trial, curve[-1])
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        trials.append(make_trial(number, state, 10**x, curve))
    return trials


def run_race(task: PublicTask, spec: StudySpec, *, seed: int) -> list[TrialRecord]:
    """Return the trials of a race in memory."""
    course = course_of(spec)
    assert course is not None
    random = np.random.default_rng(seed)
    rates = [float(point["lr"]) for point in fixed_values(spec)]
    whole = [task.curve(math.log10(rate), random) for rate in rates]
    reached = [0] * len(rates)

    def racer(number: int) -> Racer:
        state = "complete" if reached[number] == course.num_epochs else "waiting"
        return Racer(number, rates[number], state, dict(enumerate(whole[number][: reached[number]], start=1)))

    while (goals := find_goals(course, [racer(number) for number in range(len(rates))])) is not None:
        reached = [max(epoch, goals[number]) for number, epoch in enumerate(reached)]
    states = ["complete" if epoch == course.num_epochs else "pruned" for epoch in reached]
    return [
        make_trial(number, states[number], rates[number], whole[number][:epoch]) for number, epoch in enumerate(reached)
    ]


def make_trial(number: int, state: str, lr: float, curve: list[float]) -> TrialRecord:
    record = TrialRecord(number, state, {"lr": lr}, curve[-1], 1, None, None, None, {}, None, None)
    curves = {"val_accuracy": curve}
    return TrialRecord(**{**vars(record), "epochs": range(1, len(curve) + 1), "curves": curves})


def make_study(task: PublicTask, how: str, *, num_trainings: float) -> StudyRecord:
    space = {"lr": {"low": 10 ** task.x[0], "high": 10 ** task.x[-1], "log": True}}
    search = {"space": space} | (
        {"sampler": RACE, "trainings": num_trainings} if how == RACE else {"trials": STUDIES[how]}
    )
    spec = StudySpec.from_dict({"name": "s", "search": search, "training": {"epochs": task.num_epochs}})
    return StudyRecord(1, "s", spec, {"num_classes": task.num_classes, "num_val": 10_000}, None, None, 0.0)


def repeat(arguments: tuple[PublicTask, str, float, int]) -> dict[str, float]:
    """Make one study, and return what its answer is worth."""
    task, how, num_trainings, seed = arguments
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = make_study(task, how, num_trainings=num_trainings)
    trials = run_race(task, study.spec, seed=seed) if how == RACE else run(task, how, seed=seed)
    found = analysis.find_best(study, trials)
    if found is None:
        return {}
    best = int(task.final.argmax())
    step_low = (task.x[best] - task.x[max(best - 1, 0)]) / 2
    step_high = (task.x[min(best + 1, len(task.x) - 1)] - task.x[best]) / 2
    response = found.response
    low, high = (math.log10(rate) for rate in response.interval) if response else (task.x[0], task.x[-1])
    stated = response.divergence_lr if response else None
    stated_edge = [math.log10(rate) for rate in stated.interval] if stated else [math.nan, math.nan]
    edge = task.edge or (math.nan, math.nan)
    return {
        "trainings": sum(len(trial.epochs) for trial in trials) / task.num_epochs,
        "regret": task.final.max() - task.worth(math.log10(found.recommended["lr"])),
        "trial_regret": task.final.max() - task.worth(math.log10(found.params["lr"])),
        "held": low <= task.x[best] + step_high and high >= task.x[best] - step_low,
        "width": high - low,
        "determined": response is not None and response.is_determined,
        "edge stated": float(stated is not None) if task.edge else math.nan,
        "edge held": float(stated_edge[0] <= edge[1] and stated_edge[1] >= edge[0])
        if stated and task.edge
        else math.nan,
    }


def summarize(results: list[dict[str, float]]) -> dict[str, float]:
    """Return a row of the table; shortfalls in percentage points."""
    column = {key: np.array([one[key] for one in results], dtype=float) for key in results[0]}
    row = {"studies": len(results), "trainings": float(np.median(column["trainings"]))}
    for name, key in (("", "regret"), ("best trial's ", "trial_regret")):
        points = 100 * column[key]
        row |= {
            f"{name}within 0.5": float((points <= 0.5).mean()),
            f"{name}within 1": float((points <= 1).mean()),
            f"{name}mean": float(points.mean()),
            f"{name}p90": float(np.quantile(points, 0.9)),
            f"{name}worst": float(points.max()),
        }
    row["worse by 1"] = float((column["regret"] > column["trial_regret"] + 0.01).mean())
    row |= {"held": float(column["held"].mean()), "width": float(np.median(column["width"]))}
    return row | {key: float(np.nanmean(column[key])) for key in ("determined", "edge stated", "edge held")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, help="curves.json.gz")
    parser.add_argument("--repetitions", type=int, default=20, help="studies of each task")
    parser.add_argument("--only", choices=[RACE, *STUDIES], help="one way to search: the race, a pruner of TPE, or gp")
    parser.add_argument("--trainings", type=float, default=2.0, help="what a race may cost")
    arguments = parser.parse_args()
    tasks = read_tasks(arguments.curves)
    halves = {"chosen on": tasks[::2], "held out": tasks[1::2]}
    with Pool(os.cpu_count(), initializer=threadpool_limits, initargs=(1,)) as pool:
        for half, members in halves.items():
            for how in [arguments.only] if arguments.only else [RACE, *STUDIES]:
                jobs = [
                    (task, how, arguments.trainings, seed) for task in members for seed in range(arguments.repetitions)
                ]
                row = summarize([one for one in pool.map(repeat, jobs, chunksize=4) if one])
                cells = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
                search = how if how in (RACE, GP) else f"tpe + {how}, {STUDIES[how]} trials"
                print(f"{half}, {len(members)} tasks, {search}: {cells}", flush=True)


if __name__ == "__main__":
    main()
