"""A real study under faults of every kind, held to the same study without them: `make chaos`.

    python -m scripts.chaos                            # both stores, 100 faults each and more
    python -m scripts.chaos --store sqlite --short     # what the tests run
    python -m scripts.chaos --store pgbouncer          # Postgres behind PgBouncer in transaction mode
    python -m scripts.chaos --short --store sqlite --sabotage stale     # shows that a verdict can fall

Trains a small network with `hpo run` and a few workers while processes are killed and stopped, databases and disks fail
and checkpoints are torn. Exits with 1 where one of the four verdicts (verdicts.py) falls.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping

from scripts.chaos import verdicts
from scripts.chaos.arena import Arena, PostgresServer, Problem
from scripts.chaos.faults import ESSENTIAL, Chaos, Stuck, make_deck, summarize
from scripts.chaos.sabotage import SABOTAGE
from scripts.chaos.verdicts import Evidence

PROBLEMS = {
    "grid": Problem(sampler="grid", trials=16, epochs=10, checkpoint_epochs="auto"),
    "random": Problem(sampler="random", trials=8, epochs=10, checkpoint_epochs=2, confirm=True),
}
SHORT = {
    "grid": Problem(sampler="grid", trials=6, epochs=12, checkpoint_epochs="auto", workers=2),
    "random": Problem(sampler="random", trials=4, epochs=8, checkpoint_epochs=2, confirm=True, workers=2),
}
SHORT_FAULTS = 7
REFERENCE_S = 300.0  # within which a study without faults must end
began = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)


def run_without_faults(problem: Problem) -> Evidence:
    """In SQLite: where a study is kept changes none of its numbers."""
    arena = Arena(problem)
    try:
        arena.open(None)
        command = arena.start()
        exit_code = command.process.wait(timeout=REFERENCE_S)
        if exit_code != 0:
            raise Stuck(f"the study without faults ended with {exit_code}: {command.text()[-1000:]}")
        return verdicts.gather(arena, list(arena.read_record()), living=[])
    finally:
        arena.end()


def run_with_faults(
    problem: Problem,
    reference: Evidence,
    *,
    name: str,
    server: PostgresServer | None,
    deck: list[str],
    needed: frozenset[str],
    rng: random.Random,
    num_faults: int,
    interval_s: float,
    sabotage: str | None,
) -> tuple[Counter[str], Mapping[str, int], list[str]]:
    """Return the faults that were injected, the figures, and what is wrong."""
    arena = Arena(problem, sabotage=sabotage)
    chaos = Chaos(arena, deck, rng, interval_s, needed, say=lambda text: say(f"{name}: {text}"))
    wrong: list[str] = []
    try:
        arena.open(server)
        try:
            chaos.run(num_faults)
        except Stuck as error:
            wrong.append(f"stuck: {error}")
        seen = verdicts.gather(arena, chaos.lines, living=arena.processes())
        for number, check in enumerate(verdicts.CHECKS, 1):
            found = list(check(seen, reference, problem))
            wrong += [f"{number}: {text}" for text in found]
            title = (check.__doc__ or "").split("\n")[0].rstrip(".")
            say(f"{name}: {f'VIOLATED {len(found)} times' if found else 'holds'}: {title}")
        wrong += chaos.strange
        figures = {**verdicts.figures(seen, problem), "commands given again": chaos.reruns}
        disk = "a tmpfs filled up" if arena.is_mounted else "ENOSPC injected, as nothing can be mounted here"
        say(f"{name}: {', '.join(f'{value} {key}' for key, value in figures.items())}; full disk: {disk}")
        return chaos.counts, figures, wrong
    finally:
        arena.keep = bool(wrong) and sabotage is None
        arena.end()


def _end(number: int, _frame: object) -> None:
    """Clear away what was started and mounted; `timeout` sends its signal twice."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a study under faults.")
    parser.add_argument("--store", choices=["sqlite", "postgres", "pgbouncer", "both"], default="both")
    parser.add_argument("--faults", type=int, help="on each store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one small study on each store")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between two faults, on average")
    parser.add_argument("--sabotage", choices=sorted(SABOTAGE), help="break the product on purpose")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    stores = ["sqlite", "postgres"] if arguments.store == "both" else [arguments.store]
    num_faults = arguments.faults or (SHORT_FAULTS if arguments.short else 100)
    problems = SHORT if arguments.short else PROBLEMS
    references: dict[str, Evidence] = {}
    counts: list[tuple[str, Counter[str]]] = []
    all_figures, wrong = [], []
    for store in stores:
        rng = random.Random(f"{arguments.seed} {store}")
        database = "sqlite" if store == "sqlite" else "postgres"
        deck, injected = make_deck(database, size=num_faults, rng=rng), Counter[str]()
        server = None if store == "sqlite" else PostgresServer(pooled=store == "pgbouncer")
        kinds = ["grid", "random"]
        if arguments.short:  # one of them on each store
            kinds = [kinds[database == "postgres"]]
        try:
            for round_number in range(20):
                kind = kinds[round_number % len(kinds)]
                problem = problems[kind]
                if kind not in references:
                    say(f"{kind}: {problem.num_slots} trials of {problem.epochs} epochs without faults")
                    references[kind] = run_without_faults(problem)
                left = num_faults - injected.total()
                missing = [fault for fault in ESSENTIAL[database] if not injected[fault]]
                deck = [*missing, *deck]
                wanted = left if arguments.short or round_number else (num_faults + 1) // 2
                found, figures, violations = run_with_faults(
                    problem,
                    references[kind],
                    name=f"{store}, {kind}",
                    server=server,
                    deck=deck,
                    needed=frozenset(missing),
                    rng=rng,
                    num_faults=wanted,
                    interval_s=arguments.interval,
                    sabotage=arguments.sabotage,
                )
                injected += found
                all_figures.append(figures)
                wrong += [f"{store}, {kind}: {text}" for text in violations]
                if injected.total() >= num_faults and all(injected[fault] for fault in ESSENTIAL[database]):
                    break
        finally:
            if server is not None:
                server.end()
        counts.append((store, injected))
    print("\n" + "\n".join(summarize(counts)))
    print("\n" + "\n".join(f"{value:8}  {name}" for name, value in verdicts.added(all_figures).items()))
    for text in wrong[:40]:
        print(f"\nWRONG  {text}")
    seconds = time.monotonic() - began
    total = sum(injected.total() for _, injected in counts)
    print(
        f"\n{total} faults, seed {arguments.seed}, {seconds:.0f} s: "
        + (f"{len(wrong)} WRONG" if wrong else "all four hold")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
