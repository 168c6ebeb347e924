"""How often the interval for the best learning rate holds it, how wide it is, and what the recommendation costs.

    make bench-analysis

The studies have 20 to 40 trials (random, grid or TPE, in turn) on responses whose best learning rate is known. There
are made responses (smooth; with a wide, nearly flat top; rising up to a cliff; with two peaks nearly as high; noisy;
smooth under ASHA), and curves of real networks (record_curves.py), with and without ASHA, where a trial is one of the
ten recorded seeds of the nearest recorded rate. Made curves have noise from trial to trial and from epoch to epoch, and
gain more late at low learning rates. The trials go through Optuna's samplers and pruners and through `hpo.analysis`, as
in a study.

The bench prints for each kind of study:

- how often the 90 % interval of the best learning rate holds it, and for recorded curves how often it is within half a
  step of the recorded rates, which stand for those around them;
- the median width of the interval in decades;
- the share of the complete trials' values that lie in the 90 % band that is drawn for trials;
- the same for the span of the best quarter of the trials, and the width of that span once it is stretched about its
  middle, by one factor for all, until it holds as often;
- how far, in truth, the recommended rate and the best trial's rate are behind the best one.

Ten seeds leave it uncertain which recorded rate is the best: each study is asked for the best one of another bootstrap
sample of them.

Then each study is confirmed, three rates on five seeds each: how often the confirmed value is within its stated
standard error of the truth at that rate, how much higher than that truth the value of the search's best trial was, and
how far the confirmed rate is behind the best one.

Last comes the correction: studies in which every learning rate is equally good, how often they are called tied, and how
much higher the best trial's value is than the truth, compared with the response's and the confirmed one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from threadpoolctl import threadpool_limits

from hpo.analysis import answer as analysis
from hpo.analysis.confirmation import find_confirmation
from hpo.analysis.due_trials import plan_due_trials
from hpo.analysis.response import Response
from hpo.analysis.trials import value_of
from hpo.config.study_spec import StudySpec
from hpo.study.records import StudyRecord, TrialRecord

CURVES = Path(__file__).parent / "curves.json"
EPOCHS = 9
CLASSES = 10
CHANCE = 1 / CLASSES
SAMPLERS = ("random", "grid", "tpe")
CONFIRMATIONS = 2000
Curve = Callable[[Any], Any]  # over log10 of the learning rate


@dataclass(frozen=True)
class Task:
    """The trials of each learning rate, which is given as log10; `curve` returns None for a trial that diverges."""

    low: float
    high: float
    curve: Callable[[float, np.random.Generator], list[float] | None]
    worth: Curve  # the expected value, diverging included
    best: float
    step: float = 0.0  # between the learning rates of the task, if it has only some
    mean: Curve | None = None  # the expected value of trials that do not diverge, if that is known


def made(mean: Curve, divergence: float, *, width: float, noise: float) -> Task:
    def diverging(x: Any) -> Any:
        return 1 / (1 + np.exp(-(x - divergence) / width))

    def curve(x: float, random: np.random.Generator) -> list[float] | None:
        if random.random() < diverging(x):
            return None
        final = mean(x) + noise * random.standard_normal()
        speed = 0.25 + 0.5 / (1 + math.exp(-2 * (x + 3)))
        shares = [(1 - math.exp(-speed * epoch)) / (1 - math.exp(-speed * EPOCHS)) for epoch in range(1, EPOCHS + 1)]
        wobble = 0.7 * noise * random.standard_normal(EPOCHS - 1)
        return [CHANCE + (final - CHANCE) * s + w for s, w in zip(shares, [*wobble, 0.0], strict=True)]

    def worth(x: Any) -> Any:
        return mean(x) * (1 - diverging(x)) + CHANCE * diverging(x)

    everywhere = np.linspace(-5.0, -1.0, 4001)
    return Task(-5.0, -1.0, curve, worth, float(everywhere[worth(everywhere).argmax()]), mean=mean)


def hill(x: Any, top: float, width: float, power: float = 2.0) -> Any:
    return np.exp(-(np.abs((x - top) / width) ** power))


def _smooth(top: float, random: np.random.Generator) -> Task:
    return made(lambda x: CHANCE + 0.7 * hill(x, top, 1.3), top + 1.6, width=0.05, noise=0.01)


def _plateau(top: float, random: np.random.Generator) -> Task:
    tilt = random.choice([-0.004, 0.004])
    return made(lambda x: CHANCE + (0.7 + tilt * (x - top)) * hill(x, top, 1.2, 6), top + 1.6, width=0.05, noise=0.01)


def _cliff(top: float, random: np.random.Generator) -> Task:
    return made(lambda x: CHANCE + 0.7 * np.exp(-np.clip(top - x, 0, None) / 1.5), top, width=0.03, noise=0.01)


def _two_peaks(top: float, random: np.random.Generator) -> Task:
    more = random.uniform(0.01, 0.05) * random.choice([-1, 1])

    def mean(x: Any) -> Any:
        return CHANCE + 0.65 * hill(x, top - 0.7, 0.5) + (0.65 + more) * hill(x, top + 0.8, 0.5)

    return made(mean, top + 1.7, width=0.05, noise=0.01)


def _noisy(top: float, random: np.random.Generator) -> Task:
    return made(lambda x: CHANCE + 0.5 * hill(x, top, 1.3), top + 1.3, width=0.15, noise=0.05)


def recorded(name: str, random: np.random.Generator) -> Task:
    task = json.loads(CURVES.read_text())["tasks"][name]
    rates, seeds, epochs = np.log10(task["lrs"]), task["val_accuracy"], task["epochs"]
    finals = np.array([[curve[-1] if len(curve) == epochs else CHANCE for curve in curves] for curves in seeds])
    drawn = random.integers(finals.shape[1], size=finals.shape)
    best = float(rates[np.take_along_axis(finals, drawn, axis=1).mean(axis=1).argmax()])

    def curve(x: float, random: np.random.Generator) -> list[float] | None:
        curves = seeds[int(np.abs(rates - x).argmin())]
        chosen: list[float] = curves[random.integers(len(curves))]
        return chosen if len(chosen) == epochs else None

    means = finals.mean(axis=1)
    return Task(
        float(rates[0]),
        float(rates[-1]),
        curve,
        lambda x: np.interp(x, rates, means),
        best,
        step=float(rates[1] - rates[0]),
    )


MADE: dict[str, Callable[[float, np.random.Generator], Task]] = {
    "smooth": _smooth,
    "plateau": _plateau,
    "cliff": _cliff,
    "two peaks": _two_peaks,
    "noisy": _noisy,
}
SCENARIOS: dict[str, tuple[str, str]] = {  # name: (task, pruner)
    **{name: (name, "none") for name in MADE},
    "smooth, ASHA": ("smooth", "asha"),
    **{
        f"{name}{', ASHA' if pruner == 'asha' else ''}": (name, pruner)
        for name in ("mnist-adam", "cifar10-adam", "cifar10-sgd")
        for pruner in ("none", "asha")
    },
}


def run(task: Task, pruner: str, random: np.random.Generator, *, sampler: str) -> list[TrialRecord]:
    """Return the trials of a study, through Optuna's sampler and pruner in memory."""
    num_trials = int(random.integers(20, 41))
    seed = int(random.integers(2**31))
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed) if sampler == "tpe" else optuna.samplers.RandomSampler(seed=seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        if pruner == "asha"
        else optuna.pruners.NopPruner(),
    )
    if sampler == "grid":
        for x in np.linspace(task.low, task.high, num_trials):
            study.enqueue_trial({"x": float(x)})
    trials = []
    for number in range(num_trials):
        trial = study.ask()
        x = trial.suggest_float("x", task.low, task.high)
        if task.step:  # a recorded rate stands for those around it
            x = task.low + round((x - task.low) / task.step) * task.step
        curve, state, seen = task.curve(x, random), "diverged", 0
        for seen, value in enumerate(curve or (), start=1):
            trial.report(value, seen)
            state = "complete"
            if seen < EPOCHS and trial.should_prune():
                state = "pruned"
                break
        curve = (curve or [])[:seen]
        complete = state == "complete"
        study.tell(trial, curve[-1] if complete else None, state=None if complete else optuna.trial.TrialState.PRUNED)
        trials.append(
            TrialRecord(
                number,
                state,
                {"lr": 10**x},
                curve[-1] if curve else None,
                1,
                None,
                None,
                None,
                {},
                None,
                None,
                list(range(1, seen + 1)),
                {"val_accuracy": curve},
            )
        )
    return trials


def make_study(task: Task) -> StudyRecord:
    space = {"lr": {"low": 10**task.low, "high": 10**task.high, "log": True}}
    search, confirm = {"trials": 40, "space": space}, {"top": 3, "seeds": 5}
    spec = StudySpec.from_dict({"name": "s", "search": search, "training": {"epochs": EPOCHS}, "confirm": confirm})
    return StudyRecord(1, "s", spec, {"num_classes": CLASSES, "num_val": 1000}, None, None, 0.0)


def confirm(task: Task, trials: list[TrialRecord], random: np.random.Generator) -> dict[str, float]:
    """Return what a confirmation of these trials says, compared with the truth."""
    study = make_study(task)
    found = analysis.find_best(study, trials)
    assert found is not None
    again: list[TrialRecord] = []
    for planned in plan_due_trials(study, trials, found):
        x = math.log10(float(planned.params["lr"]))
        curve = task.curve(task.low + round((x - task.low) / task.step) * task.step if task.step else x, random)
        again.append(
            TrialRecord(
                len(trials) + len(again),
                "complete" if curve else "diverged",
                dict(planned.params),
                curve[-1] if curve else None,
                1,
                None,
                None,
                None,
                {},
                None,
                None,
                kind=planned.kind,
                replicate=planned.replicate,
            )
        )
    confirmed = find_confirmation(study, trials + again, search_value=found.value)
    if confirmed is None or confirmed.standard_error is None:
        return {}
    x = math.log10(confirmed.winner.params["lr"])
    truth = float(task.worth(x)) if task.mean is None else float(task.mean(x))  # where no seed diverged
    return {
        "within": abs(confirmed.value - truth) <= confirmed.standard_error,
        "error": confirmed.value - truth,
        "inflation": found.value - truth,
        "worse": confirmed.runner_up is not None and confirmed.runner_up.is_worse,
        "regret": float(np.max(task.worth(np.linspace(task.low, task.high, 4001)))) - float(task.worth(x)),
    }


def repeat(arguments: tuple[str, int]) -> dict[str, Any]:
    """Make one study of a scenario, and return what its answer says, compared with the truth."""
    scenario, repetition = arguments
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name, pruner = SCENARIOS[scenario]
    random = np.random.default_rng([repetition, *scenario.encode()])
    task = MADE[name](random.uniform(-3.6, -2.2), random) if name in MADE else recorded(name, random)
    trials = run(task, pruner, random, sampler=SAMPLERS[repetition % len(SAMPLERS)])
    found = analysis.find_best(make_study(task), trials)
    if found is None or found.response is None:
        return {}
    complete = sorted((t for t in trials if t.state == "complete"), key=lambda t: t.value or 0.0, reverse=True)
    quarter = [math.log10(trial.params["lr"]) for trial in complete[: max(2, len(complete) // 4)]]
    top = float(np.max(task.worth(np.linspace(task.low, task.high, 4001))))
    return {
        "best": task.best,
        "slack": task.step / 2,
        "interval": [math.log10(rate) for rate in found.response.interval],
        "quarter": [min(quarter), max(quarter)],
        "in_band": share_in_band(found.response, complete),
        "regret": top - float(task.worth(math.log10(found.response.best))),
        "trial_regret": top - float(task.worth(math.log10(found.params["lr"]))),
        "confirmed": confirm(task, trials, random),
    }


def share_in_band(response: Response, complete: Sequence[TrialRecord]) -> float:
    """Return the share of complete trials whose value lies in the band that is drawn for them."""
    x, inside = np.log10(response.lrs), []
    for trial in complete:
        at = int(np.abs(x - math.log10(trial.params["lr"])).argmin())
        if response.diverging[at] <= 0.5:
            inside.append(response.trial_low[at] <= value_of(trial) <= response.trial_high[at])
    return float(np.mean(inside)) if inside else math.nan


def holds(one: dict[str, Any], which: str, factor: float = 1.0, *, slack: float = 0.0) -> bool:
    low, high = one[which]
    middle, half = (low + high) / 2, factor * (high - low) / 2 + slack
    return bool(abs(one["best"] - middle) <= half + 1e-9)


def width(results: Sequence[dict[str, Any]], which: str, factor: float = 1.0) -> float:
    return factor * float(np.median([one[which][1] - one[which][0] for one in results]))


def stretched(results: Sequence[dict[str, Any]], share: float) -> float:
    """Return the factor that stretches the best quarter's span to hold the best rate in this share of studies."""
    factors = np.arange(0.05, 40, 0.05)
    return float(next((f for f in factors if np.mean([holds(one, "quarter", f) for one in results]) >= share), np.inf))


def flat(repetition: int) -> dict[str, Any]:
    """Make a study in which every learning rate is equally good, and return how wrong its answer is."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    random = np.random.default_rng([repetition, 1])
    task = made(lambda x: 0.8 + 0 * x, 9.0, width=0.05, noise=0.01)
    trials = run(task, "none", random, sampler=SAMPLERS[repetition % len(SAMPLERS)])
    found = analysis.find_best(make_study(task), trials)
    assert found is not None
    assert found.response is not None
    return {
        "tied": "tied" in {warning.kind for warning in found.warnings},
        "trial_inflation": found.value - 0.8,
        "response_inflation": found.response.value - 0.8,
        **{f"confirmed_{key}": value for key, value in confirm(task, trials, random).items()},
    }


def shrunk(apart: float) -> dict[str, float]:
    """Confirm three rates, `apart` deviations of a trial from each other, on five seeds each, without a search."""
    random = np.random.default_rng(0)
    task = made(lambda x: 0.8, 9.0, width=0.05, noise=0.01)
    study, told = make_study(task), []
    for _ in range(CONFIRMATIONS):
        trials: list[TrialRecord] = []
        truths: dict[float, float] = {}
        for index in range(3):
            lr = 10.0 ** (-3 + index)
            truths[lr] = 0.8 - 0.01 * apart * index
            for seed, value in enumerate(truths[lr] + 0.01 * random.standard_normal(5)):
                trials.append(
                    TrialRecord(
                        len(trials),
                        "complete",
                        {"lr": lr},
                        float(value),
                        1,
                        None,
                        None,
                        None,
                        {},
                        None,
                        None,
                        kind="confirm",
                        replicate=seed,
                    )
                )
        found = find_confirmation(study, trials, search_value=0.8)
        assert found is not None
        assert found.standard_error is not None
        assert found.winner.mean is not None
        truth = truths[found.winner.params["lr"]]
        told.append((found.value - truth, found.winner.mean - truth, found.standard_error))
    errors, naive, stated = np.array(told).T / 0.01
    return {
        "within": float(np.mean(np.abs(errors) <= stated)),
        "error": float(errors.mean()),
        "mean within": float(np.mean(np.abs(naive) <= stated)),
        "mean error": float(naive.mean()),
    }


COLUMNS = {  # of a scenario's row -> format
    "held": "14.0%",
    "nearly": "14.0%",
    "width": "14.2f",
    "in band": "14.0%",
    "quarter held": "14.0%",
    "its width": "14.2f",
    "stretched": "14.2f",
    "regret": "14.4f",
    "best trial's": "14.4f",
    "confirmed: within": "19.0%",
    "confirmed: inflation": "22.4f",
    "confirmed: regret": "19.4f",
}


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the row of a scenario from the results of its studies."""
    held = mean_of([holds(one, "interval") for one in results])
    confirmed = [one["confirmed"] for one in results if one["confirmed"]]
    return {
        "studies": len(results),
        "held": held,
        "nearly": mean_of([holds(one, "interval", slack=one["slack"]) for one in results]),
        "width": width(results, "interval"),
        "in band": float(np.nanmean([one["in_band"] for one in results])),
        "quarter held": mean_of([holds(one, "quarter") for one in results]),
        "its width": width(results, "quarter"),
        "stretched": width(results, "quarter", stretched(results, held)),
        "regret": mean_of([one["regret"] for one in results]),
        "best trial's": mean_of([one["trial_regret"] for one in results]),
        **{f"confirmed: {key}": mean_of([one[key] for one in confirmed]) for key in ("within", "inflation", "regret")},
    }


def mean_of(values: Sequence[float]) -> float:
    return float(np.mean(values))


def print_flat(row: dict[str, float]) -> None:
    print(
        f"\nall learning rates equally good: tied in {row['tied']:.0%}; the best trial is "
        f"{row['trial_inflation']:.4f} above the truth, the response {row['response_inflation']:.4f}\n"
        f"confirmed: {row['confirmed_error']:+.4f} off the truth, within the standard error in "
        f"{row['confirmed_within']:.0%}, the runner-up called worse in {row['confirmed_worse']:.0%}"
    )


def print_shrunk(apart: float, row: dict[str, float]) -> None:
    print(
        f"{CONFIRMATIONS} confirmations of three rates {apart:g} deviations apart: within the standard error "
        f"{row['within']:.0%}, {row['error']:+.2f} deviations off; the winner's plain mean "
        f"{row['mean within']:.0%}, {row['mean error']:+.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200, help="studies of each kind")
    parser.add_argument("--only", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    heads = "".join(f"{column:>{max(14, len(column) + 2)}}" for column in COLUMNS)
    print(f"{arguments.repetitions} studies each\n{'':20}{heads}")
    with Pool(os.cpu_count(), initializer=threadpool_limits, initargs=(1,)) as pool:
        for scenario in arguments.only:
            every = pool.map(repeat, [(scenario, number) for number in range(arguments.repetitions)], chunksize=4)
            results = [one for one in every if one]
            row = rows[scenario] = summarize(results)
            cells = "".join(format(row[column], form) for column, form in COLUMNS.items())
            unknown = f"  ({len(every) - len(results)} without a response)" if len(results) < len(every) else ""
            print(f"{scenario:20}{cells}{unknown}", flush=True)
        if len(arguments.only) == len(SCENARIOS):
            equal = pool.map(flat, range(arguments.repetitions), chunksize=4)
            row = rows["all equally good"] = {key: mean_of([one[key] for one in equal]) for key in equal[0]}
            print_flat(row)
        for apart in (0.0, 0.3, 0.5, 1.0, 3.0):
            row = rows[f"confirmed, {apart:g} apart"] = shrunk(apart)
            print_shrunk(apart, row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
