"""How often the interval for the best learning rate holds it, how wide it is, and what the recommendation costs.

    make bench-analysis

Studies of 20 to 40 trials (random, grid or TPE, in turn) on responses whose best learning rate is known: made ones
(smooth; with a wide, nearly flat top; rising up to a cliff; with two peaks nearly as high; noisy; smooth under ASHA),
and curves of real networks (record_curves.py), with and without ASHA, where a trial is one of the ten recorded seeds of
the nearest recorded rate. Made curves come with noise from trial to trial and from epoch to epoch, and gain more late
at low learning rates. The trials go through Optuna's samplers and pruners and through `hpo.analysis`, as in a study.

Printed for each: how often the interval that is said to hold the best learning rate with 90 % does, and for recorded
curves how often it comes within half a step of the recorded rates, which stand for those around them; its median width
in decades; the same for the span of the best quarter of the trials, and that span's width once it is stretched about
its middle, by one factor for all, until it holds as often; how far the recommended rate and the best trial's are, in
truth, behind the best one. Which recorded rate is the best is itself not certain after ten seeds: each study is asked
for the best one of another bootstrap sample of them.

Then each study is confirmed, three rates on five seeds each: how often the confirmed value is within its stated
standard error of the truth at that rate, how much higher than that truth the value of the search's best trial was, and
how far the confirmed rate is behind the best one.

Last, the correction: studies in which every learning rate is equally good, how often ours calls them tied, and how much
higher the best trial's value is than the truth, against the response's and the confirmed one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hpo.analysis import answer as analysis
from hpo.analysis.confirmation import find_confirmation
from hpo.analysis.due_trials import plan_due_trials
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
    """What trials of a learning rate do. Learning rates are given as log10; `curve` is None for one that diverges."""

    low: float
    high: float
    curve: Callable[[float, np.random.Generator], list[float] | None]
    worth: Curve  # the expected value, diverging included
    best: float
    step: float = 0.0  # between the learning rates that there are
    mean: Curve | None = None  # the expected value of trials that do not diverge, where that is known


def made(mean: Curve, edge: float, *, width: float, noise: float) -> Task:
    def diverging(x: Any) -> Any:
        return 1 / (1 + np.exp(-(x - edge) / width))

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
    """A study's trials, through Optuna's sampler and pruner in memory."""
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
    """What a confirmation of these trials says, against the truth."""
    study = make_study(task)
    found = analysis.find_best(study, trials)
    assert found is not None
    again = []
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
    """One study of a scenario, and what is said of it."""
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
        "regret": top - float(task.worth(math.log10(found.response.best))),
        "trial_regret": top - float(task.worth(math.log10(found.params["lr"]))),
        "confirmed": confirm(task, trials, random),
    }


def holds(one: dict[str, Any], which: str, factor: float = 1.0, *, slack: float = 0.0) -> bool:
    low, high = one[which]
    middle, half = (low + high) / 2, factor * (high - low) / 2 + slack
    return bool(abs(one["best"] - middle) <= half + 1e-9)


def width(results: Sequence[dict[str, Any]], which: str, factor: float = 1.0) -> float:
    return factor * float(np.median([one[which][1] - one[which][0] for one in results]))


def stretched(results: Sequence[dict[str, Any]], share: float) -> float:
    """The factor by which the best quarter's span has to be stretched to hold the best rate in this share."""
    factors = np.arange(0.05, 40, 0.05)
    return float(next((f for f in factors if np.mean([holds(one, "quarter", f) for one in results]) >= share), np.inf))


def flat(repetition: int) -> dict[str, Any]:
    """A study in which every learning rate is equally good."""
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
    """Confirmations of three rates, so many deviations of a trial apart, on five seeds each; no search before them."""
    random = np.random.default_rng(0)
    task = made(lambda x: 0.8, 9.0, width=0.05, noise=0.01)
    study, told = make_study(task), []
    for _ in range(CONFIRMATIONS):
        trials, truths = [], {}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200, help="studies of each kind")
    parser.add_argument("--only", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    columns = ("held", "nearly", "width", "quarter held", "its width", "stretched", "regret", "best trial's")
    columns += ("confirmed: within", "confirmed: inflation", "confirmed: regret")
    print(
        f"{arguments.repetitions} studies each\n{'':20}"
        + "".join(f"{column:>{max(14, len(column) + 2)}}" for column in columns)
    )
    with Pool(os.cpu_count(), initializer=threadpool_limits, initargs=(1,)) as pool:
        for scenario in arguments.only:
            every = pool.map(repeat, [(scenario, number) for number in range(arguments.repetitions)], chunksize=4)
            results = [one for one in every if one]
            held = float(np.mean([holds(one, "interval") for one in results]))
            row = {
                "studies": len(results),
                "held": held,
                "nearly": float(np.mean([holds(one, "interval", slack=one["slack"]) for one in results])),
                "width": width(results, "interval"),
                "quarter held": float(np.mean([holds(one, "quarter") for one in results])),
                "its width": width(results, "quarter"),
                "stretched": width(results, "quarter", stretched(results, held)),
                "regret": float(np.mean([one["regret"] for one in results])),
                "best trial's": float(np.mean([one["trial_regret"] for one in results])),
                **{
                    f"confirmed: {key}": float(np.mean([one["confirmed"][key] for one in results if one["confirmed"]]))
                    for key in ("within", "inflation", "regret")
                },
            }
            figures[scenario] = row
            forms = ("14.0%", "14.0%", "14.2f", "14.0%", "14.2f", "14.2f", "14.4f", "14.4f", "19.0%", "22.4f", "19.4f")
            cells = "".join(format(row[column], form) for column, form in zip(columns, forms, strict=True))
            unknown = f"  ({len(every) - len(results)} without a response)" if len(results) < len(every) else ""
            print(f"{scenario:20}{cells}{unknown}", flush=True)
        if len(arguments.only) == len(SCENARIOS):
            equal = pool.map(flat, range(arguments.repetitions), chunksize=4)
            row = {key: float(np.mean([one[key] for one in equal])) for key in equal[0]}
            figures["all equally good"] = row
            print(
                f"\nall learning rates equally good: tied in {row['tied']:.0%}; the best trial is "
                f"{row['trial_inflation']:.4f} above the truth, the response {row['response_inflation']:.4f}\n"
                f"confirmed: {row['confirmed_error']:+.4f} off the truth, within the standard error in "
                f"{row['confirmed_within']:.0%}, the runner-up called worse in {row['confirmed_worse']:.0%}"
            )
        for apart in (0.0, 0.3, 0.5, 1.0, 3.0):
            row = figures[f"confirmed, {apart:g} apart"] = shrunk(apart)
            print(
                f"{CONFIRMATIONS} confirmations of three rates {apart:g} deviations apart: within the standard error "
                f"{row['within']:.0%}, {row['error']:+.2f} deviations off; the winner's plain mean "
                f"{row['mean within']:.0%}, {row['mean error']:+.2f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
