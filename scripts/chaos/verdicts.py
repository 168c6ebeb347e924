"""The four verdicts on a study under faults, from its tables, the triggers' audit, its checkpoints and its record."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
import sqlalchemy as sa

from scripts.chaos.arena import Arena, Problem
from scripts.chaos.worker_side import digest

Row = dict[str, Any]
ENDED = ("complete", "pruned", "diverged", "failed")
SAVING_SHARE = 0.05  # of its training that saving a trial may take, where the study leaves it to the worker
FAIR_ENDS = (*ENDED, "released", "lost")  # of an attempt; anything else is an exception in a line


@dataclass(kw_only=True)
class Evidence:
    """All that the verdicts are given: plain rows, each of which a test can change to see a verdict fall."""

    slots: list[Row]
    attempts: list[Row]
    epochs: list[Row]  # number, epoch, attempt and the metrics, without the seconds
    reports: list[Row]  # of the triggers: each report that was accepted, and who had the slot at that moment
    states: list[Row]  # of the triggers: each change of a slot's state
    optuna: list[Row]  # Optuna's trials: number, state, value, params, its curve
    finals: dict[int, str | None]  # digest of the checkpoint of each trial's last epoch; None: there is none
    problems: list[str]  # where the ledger and Optuna's tables do not agree
    record: list[Row]  # of the workers, and of the harness where it tore a checkpoint
    living: list[int] = field(default_factory=list)  # processes that were left when everything should have ended


def gather(arena: Arena, record: list[Row], *, living: list[int]) -> Evidence:
    from hpo.store.schema import attempts_table, epochs_table, slots_table
    from hpo.store.store import Store

    store = Store(arena.database.url)
    study = store.studies.get("chaos")
    with store.storage.engine.connect() as connection:
        reports, states = (
            [dict(row) for row in connection.execute(sa.text(f"SELECT * FROM {name} ORDER BY id")).mappings()]
            for name in ("chaos_reports", "chaos_states")
        )
    curves = [
        {
            **{key: row[key] for key in ("number", "epoch", "attempt")},
            "metrics": {k: v for k, v in _metrics(row).items() if k != "seconds"},
        }
        for row in sorted(store.studies.rows(epochs_table, study), key=lambda row: (row["number"], row["epoch"]))
    ]
    theirs = optuna.load_study(study_name="chaos", storage=store.storage).trials
    numbers = range(len(store.studies.rows(slots_table, study)))
    return Evidence(
        slots=store.studies.rows(slots_table, study),
        attempts=store.studies.rows(attempts_table, study),
        epochs=curves,
        reports=reports,
        states=states,
        optuna=[
            {
                "number": trial.number,
                "state": trial.state.name,
                "value": trial.value,
                "params": trial.params,
                "curve": dict(trial.intermediate_values),
            }
            for trial in theirs
        ],
        finals={number: _final(arena, store, study, number) for number in numbers},
        problems=store.problems(study),
        record=sorted(record, key=lambda line: line["at"]),
        living=living,
    )


def _metrics(row: Row) -> dict[str, Any]:
    import json

    metrics: dict[str, Any] = json.loads(row["metrics"])
    return metrics


def _final(arena: Arena, store: Any, study: Any, number: int) -> str | None:
    """Return the digest of what the product itself reads as the trial's last checkpoint."""
    from hpo.train.checkpoint import CheckpointFolder

    trial = store.trials.get_all(study)[number]
    if "seed" not in trial.attributes:
        return None
    config = study.spec.trial_config(trial.params, seed=trial.attributes["seed"])
    folder = CheckpointFolder(
        f"{store.checkpoints_url(study)}/{number:06d}", identity={"study": study.metadata["uid"], "trial": number}
    )
    found, _ = folder.load(config)
    return digest(found.state, found.results) if found is not None and found.epoch == arena.problem.epochs else None


def check_counts(seen: Evidence, reference: Evidence, problem: Problem) -> Iterator[str]:
    """1: exactly N slots finished, none twice, none lost, no trial left running; every grid point exactly once."""
    numbers = list(range(problem.num_slots))
    if sorted(row["number"] for row in seen.slots) != numbers:
        yield f"slots {sorted(row['number'] for row in seen.slots)} in place of 0 to {problem.num_slots - 1}"
    for row in seen.slots:
        if row["state"] != "complete":
            yield f"trial {row['number']} is {row['state']}: {row['reason']}"
    ends = Counter(row["number"] for row in seen.states if row["new"] in ENDED)
    if ends != Counter(numbers):
        yield f"trials ended other than once: {dict(ends - Counter(numbers)) or dict(Counter(numbers) - ends)}"
    yield from (
        f"trial {row['number']} was {row['old']} and became {row['new']} again"
        for row in seen.states
        if row["old"] in ENDED
    )
    if [(trial["number"], trial["state"]) for trial in seen.optuna] != [(number, "COMPLETE") for number in numbers]:
        yield f"to Optuna: {Counter(trial['state'] for trial in seen.optuna)}"
    points, theirs = ([trial["params"] for trial in trials] for trials in (seen.optuna, reference.optuna))
    if points != theirs or (problem.sampler == "grid" and len({str(point) for point in points}) != problem.trials):
        yield "the points that were tried are not those of the study without faults, each once"
    for number in numbers:
        found = [row["epoch"] for row in seen.epochs if row["number"] == number]
        if found != list(range(1, problem.epochs + 1)):
            yield f"trial {number} has the epochs {found}"
        tries = sorted((row for row in seen.attempts if row["number"] == number), key=lambda row: row["attempt"])
        if [row["attempt"] for row in tries] != list(range(1, len(tries) + 1)):
            yield f"trial {number} has the attempts {[row['attempt'] for row in tries]}"
        outcomes = [row["outcome"] for row in tries]
        if outcomes.count("complete") != 1 or outcomes[-1:] != ["complete"]:
            yield f"the attempts at trial {number} ended: {outcomes}"
        yield from (
            f"an exception, which no fault explains, ended an attempt at trial {number}: {row['error']}"
            for row in tries
            if row["outcome"] not in FAIR_ENDS
        )
    yield from seen.problems


def check_bits(seen: Evidence, reference: Evidence, problem: Problem) -> Iterator[str]:
    """2: every completed trial's final parameters and curve equal those of the same study run without faults."""
    expected = {(line["number"], line["epoch"]): line["digest"] for line in _lines(reference, "trained")}
    same = {row["number"]: row["tested"] for row in seen.slots if row["tested"] is not None}  # if it is trained again
    for line in _lines(seen, "trained"):  # also what no report came of
        if line["digest"] != expected.get((same.get(line["number"], line["number"]), line["epoch"])):
            yield f"trial {line['number']}, attempt {line['attempt']}, differs after epoch {line['epoch']}"
    unsaved = {line["number"] for line in _lines(seen, "unsaved") if line["epoch"] == problem.epochs}
    for number in range(problem.num_slots):
        curve, other = (
            [(row["epoch"], row["metrics"]) for row in evidence.epochs if row["number"] == number]
            for evidence in (seen, reference)
        )
        if curve != other or not curve:
            yield f"trial {number} has another curve"
        theirs, others = (
            [(trial["value"], trial["curve"]) for trial in evidence.optuna if trial["number"] == number]
            for evidence in (seen, reference)
        )
        if theirs != others:
            yield f"trial {number} has another value or curve to Optuna: {theirs} in place of {others}"
        if number >= problem.trials:
            continue  # of those that confirm nothing is kept
        final = seen.finals.get(number)
        if final != reference.finals[number] and not (final is None and number in unsaved):
            yield f"trial {number} has {'no' if final is None else 'another'} final checkpoint"
        if reference.finals[number] != expected.get((number, problem.epochs)):
            yield f"trial {number} without faults: its checkpoint is not what was trained"


def redone(seen: Evidence) -> list[tuple[Row, int]]:
    """Each attempt, and how many whole epochs that were trained and reported before it trains once more."""
    reported: dict[tuple[int, int], int] = defaultdict(int)
    for row in seen.reports:
        key = (row["number"], row["attempt"])
        reported[key] = max(reported[key], row["epoch"])
    found, reached = [], defaultdict[int, int](int)
    for row in sorted(seen.attempts, key=lambda row: (row["number"], row["attempt"])):
        number, start = row["number"], row["resumed_from"]
        if start is None:
            continue  # ended before it began
        found.append((row, reached[number] - start))
        reached[number] = max(start, reported[(number, row["attempt"])])
    return found


def check_redone(seen: Evidence, reference: Evidence, problem: Problem) -> Iterator[str]:
    """3: at most one checkpoint interval of training redone per fault, and every whole checkpoint gone on from.

    A checkpoint that the disk did not take, or that was torn, is a fault of its own beside the one that ended the
    attempt: it may cost one interval more.
    """
    damaged = {(line["number"], line["epoch"]) for line in seen.record if line["what"] in ("torn", "unsaved")}
    for row, num_epochs in redone(seen):
        number, start = row["number"], row["resumed_from"]
        num_damaged = sum(other == number and start < epoch <= start + num_epochs for other, epoch in damaged)
        if _is_more_than_an_interval(seen, problem, row, num_epochs, num_damaged):
            yield (
                f"attempt {row['attempt']} at trial {number} does {num_epochs} epochs again, "
                f"{num_damaged} checkpoints of which were damaged"
            )
        promised = _saved_before_a_report(seen, number, before_attempt=row["attempt"])
        yield from (
            f"attempt {row['attempt']} at trial {number} went on from epoch {start}, though epoch {epoch} was to be "
            "saved before the next one was reported"
            for epoch in promised
            if epoch > start and (number, epoch) not in damaged
        )
    whole: dict[int, set[int]] = defaultdict(set)  # the epochs of each trial whose checkpoint is there in full
    for line in seen.record:
        if line["what"] == "saved":
            whole[line["number"]].add(line["epoch"])
        elif line["what"] == "torn":
            whole[line["number"]].discard(line["epoch"])
        elif line["what"] == "began" and line["epoch"] < max(whole[line["number"]], default=0):
            yield (
                f"attempt {line['attempt']} at trial {line['number']} went on from epoch {line['epoch']}, "
                f"with a checkpoint of {max(whole[line['number']])}"
            )


def _is_more_than_an_interval(seen: Evidence, problem: Problem, row: Row, num_epochs: int, num_damaged: int) -> bool:
    """Return whether an attempt trains more again than lies between two checkpoints.

    With "auto" the epochs but the last take, by the record, less time than saving costs / SAVING_SHARE.
    """
    if problem.checkpoint_epochs != "auto":
        return num_epochs > problem.checkpoint_epochs * (1 + num_damaged)
    again = range(row["resumed_from"] + 1, row["resumed_from"] + num_epochs + 1)
    before = [
        line
        for line in seen.record
        if line.get("number") == row["number"] and line.get("attempt", row["attempt"]) < row["attempt"]
    ]
    seconds: dict[int, float] = {line["epoch"]: line["seconds"] for line in before if line["what"] == "trained"}
    costs_s = [line["cost_s"] for line in before if line["what"] == "judged" and line["epoch"] in again]
    interval_s = max(costs_s, default=0.0) / SAVING_SHARE
    longest_s = max((seconds[epoch] for epoch in again), default=0.0)
    return sum(seconds[epoch] for epoch in again[:-1]) > interval_s + num_damaged * (interval_s + longest_s)


def _saved_before_a_report(seen: Evidence, number: int, *, before_attempt: int) -> set[int]:
    """Return the epochs that earlier attempts at a trial chose to save, and reported a later one of."""
    reported = Counter[int]()
    for row in seen.reports:
        if row["number"] == number:
            reported[row["attempt"]] = max(reported[row["attempt"]], row["epoch"])
    return {
        line["epoch"]
        for line in _lines(seen, "chosen")
        if line["number"] == number and line["attempt"] < before_attempt and line["epoch"] < reported[line["attempt"]]
    }


def check_stale(seen: Evidence, reference: Evidence, problem: Problem) -> Iterator[str]:
    """4: no report of a stale worker accepted; no worker left alive or hanging."""
    latest: dict[int, int] = defaultdict(int)
    for row in seen.reports:
        if row["attempt"] != row["holder"] or row["state"] != "running" or row["attempt"] < latest[row["number"]]:
            yield (
                f"attempt {row['attempt']} at trial {row['number']} reported epoch {row['epoch']} when attempt "
                f"{row['holder']} had the slot, which was {row['state']}"
            )
        latest[row["number"]] = max(latest[row["number"]], row["attempt"])
    accepted = {(row["number"], row["attempt"], row["epoch"]) for row in seen.reports}
    if not _lines(seen, "reported"):
        yield "no report was seen by the worker's side, so that no fault struck after one"
    for line in _lines(seen, "reported"):
        if (line["number"], line["attempt"], line["epoch"]) not in accepted:
            yield f"a report of trial {line['number']}, epoch {line['epoch']}, was accepted and is not in the store"
    if seen.living:
        yield f"processes left: {seen.living}"


CHECKS = (check_counts, check_bits, check_redone, check_stale)


def _lines(evidence: Evidence, what: str) -> list[Row]:
    return [line for line in evidence.record if line["what"] == what]


def figures(seen: Evidence, problem: Problem) -> Mapping[str, int]:
    again = [max(0, num_epochs) for _, num_epochs in redone(seen)]  # a test goes on from where another trial ended
    needed = problem.num_trained * problem.epochs
    return {
        "trials": len(seen.slots),
        "attempts": len(seen.attempts),
        "epochs needed": needed,
        "epochs trained": len(_lines(seen, "trained")),
        "redone after a report": sum(again),
        "most redone by an attempt": max(again, default=0),
        "reports accepted": len(seen.reports),
        "stale reports refused": len(_lines(seen, "refused")),
        "checkpoints compared": sum(final is not None for final in seen.finals.values()),
        "checkpoints not written": len(_lines(seen, "unsaved")),
        "checkpoints torn": len(_lines(seen, "torn")),
    }


def added(several: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the figures of several studies together: sums, but for the most."""
    return {
        name: (max if name.startswith("most") else sum)(figures[name] for figures in several) for name in several[0]
    }
