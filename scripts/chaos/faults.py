"""The faults, and the loop that injects them, in a seeded order, into a study that is run as a user would run it."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.chaos.arena import LEASE_S, Arena, Command, Postgres, SQLite

REAP_S = 5.0  # how often a supervisor looks for lost leases (CHECK_S of hpo.workers.supervisor)
PAST_LEASE_S = LEASE_S + 1.0
TAKEN_AWAY_S = LEASE_S + REAP_S + 2.0  # after which a stopped worker's trial is certainly somebody else's
MAX_ORDERS = 4  # given to workers and not yet carried out
WINDOW = 6  # faults in front of the deck of which one is chosen
CALM_S = 240.0  # within which a study must end once nothing disturbs it any more
LAST_TRIAL = "SIGKILL of everything with one trial left"  # once in each study
LEAVE_S = 60.0  # within which every process must be gone once its study has ended


class Stuck(Exception):
    """The study did not come to its end."""


@dataclass
class Chaos:
    """A study under faults, which are dealt from the front of `deck`."""

    arena: Arena
    deck: list[str]
    rng: random.Random
    interval_s: float  # mean time between two faults
    needed: frozenset[str]  # faults without which the study may not be left alone
    say: Callable[[str], None]
    counts: Counter[str] = field(default_factory=Counter)
    lines: list[dict[str, Any]] = field(default_factory=list)  # of the workers' record, and ours
    reruns: int = 0  # how often the command was given again after it had ended otherwise than by our SIGKILL
    strange: list[str] = field(default_factory=list)  # ends of commands that no user should see
    training: dict[int, dict[str, Any]] = field(default_factory=dict)  # what each worker's pid last began
    is_database_busy: bool = False
    empty_the_disk: Callable[[], None] | None = None
    second: Command | None = None
    _later: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    _main: Command | None = None
    _finished: set[int] = field(default_factory=set)
    _last_trial_hit: bool = False

    def run(self, num_faults: int) -> None:
        """Injects this many faults, with those needed, or as many as the study lives for, then lets it finish.

        Raises Stuck.
        """
        next_fault, next_word, calm_since = time.monotonic() + 4.0, time.monotonic() + 10.0, None
        self._main = self.arena.start()
        while True:
            self._note_record()
            self._do_what_is_due()
            if self._is_finished(self._main):
                break
            total = sum(self.counts.values())
            is_enough = total >= num_faults and self.needed <= self.counts.keys()
            if calm_since is None and (is_enough or not self.deck):
                calm_since = time.monotonic()
                self._withdraw_orders()
                self.say(f"{total} faults; nothing disturbs the study from now on")
            if calm_since is not None and time.monotonic() - calm_since > CALM_S:
                raise Stuck(f"the study did not end within {CALM_S:.0f} s without faults")
            if self._is_last_trial() and not self._last_trial_hit and kill_everything(self):
                # Its slot alone is waiting then: what the command starts for it must be what it was.
                self._last_trial_hit = True
                self.count(LAST_TRIAL)
            if calm_since is None and time.monotonic() > next_fault:
                self._deal()
                next_fault = time.monotonic() + self.rng.expovariate(1 / self.interval_s)
            if time.monotonic() > next_word:
                self.say(f"{total} faults, {len(self._finished)} trials finished")
                next_word = time.monotonic() + 10.0
            time.sleep(0.03)
        self._withdraw_orders()
        self._wait_for_the_end()

    def _wait_for_the_end(self) -> None:
        """Wait for the commands and the workers, which should leave by themselves once the study is at its end."""
        deadline = time.monotonic() + LEAVE_S
        while time.monotonic() < deadline or self._later:
            self._note_record()
            self._do_what_is_due()
            commands = [command for command in self.arena.commands if command.process.poll() is None]
            if not commands and not self._later and not self.arena.processes():
                break
            time.sleep(0.1)
        self._note_record()
        if commands:
            raise Stuck(f"{len(commands)} commands did not end within {LEAVE_S:.0f} s after their study had")
        for command in self.arena.commands:
            if "Traceback (most" in command.text():
                self.strange.append(f"{command.output.name} ended with a traceback: {command.text()[-600:]}")

    def _is_finished(self, command: Command) -> bool:
        """Whether the command came to the study's end; where it was ended before, it is given again."""
        exit_code = command.process.poll()
        if exit_code is None:
            return False
        if exit_code == 0:
            return True
        if exit_code > 0:
            self.reruns += 1
        if self.reruns > 100:
            raise Stuck(f"the command ended again and again, at last with: {command.text()[-300:]}")
        self._main = self.arena.start()
        return False

    def _deal(self) -> None:
        """Injects the first fault in front of the deck that can be injected now.

        Nothing is proved by faults while everything is being started: there must be a worker that trains.
        """
        if self.victim() is None:
            return
        for fault in self.deck[:WINDOW]:
            if FAULTS[fault](self):
                self.deck.remove(fault)
                return

    def _is_last_trial(self) -> bool:
        return len(self._finished) == self.arena.problem.num_slots - 1

    def count(self, fault: str) -> None:
        self.counts[fault] += 1

    def _note_record(self) -> None:
        for line in self.arena.read_record():
            self.lines.append(line)
            if line["what"] == "trained":
                self.training[line["pid"]] = line
            elif line["what"] == "unsaved" and self.empty_the_disk:
                self.empty_the_disk()
            elif line["what"] in ("finished", "refused"):
                self.training.pop(line["pid"], None)
                if line["what"] == "finished":
                    self._finished.add(line["number"])
            elif line["what"] == "fault":
                self.count(line["fault"])
                if line["fault"].startswith("SIGSTOP"):
                    self.go_on_later(line["pid"])

    def _do_what_is_due(self) -> None:
        due = [action for at, action in self._later if at <= time.monotonic()]
        self._later = [(at, action) for at, action in self._later if at > time.monotonic()]
        for action in due:
            action()

    def _withdraw_orders(self) -> None:
        for path in (self.arena.folder / "orders").iterdir():
            path.unlink(missing_ok=True)

    # What faults are made of

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def go_on_later(self, pid: int) -> None:
        """SIGCONT after the lease: of some before anybody noticed, of others when their trial has been given away."""
        self.later(self.rng.choice([PAST_LEASE_S, TAKEN_AWAY_S, TAKEN_AWAY_S]), lambda: send(pid, signal.SIGCONT))

    def order(self, fault: str) -> bool:
        path = self.arena.folder / "orders" / fault
        if path.exists() or len(list(path.parent.iterdir())) >= MAX_ORDERS:
            return False
        path.touch()
        return True

    def victim(self) -> int | None:
        """Return a worker that has trained an epoch of its trial; the others are only being started."""
        living = [pid for pid in self.arena.workers() if pid in self.training]
        return self.rng.choice(living) if living else None

    @property
    def main(self) -> Command:
        assert self._main is not None
        return self._main


def send(pid: int, number: signal.Signals) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def ordered(fault: str) -> Callable[[Chaos], bool]:
    """Order a fault that a worker carries out on itself at an exact moment, and counts when it comes to that."""
    return lambda chaos: chaos.order(fault)


def to_a_worker(fault: str, number: signal.Signals) -> Callable[[Chaos], bool]:
    def inject(chaos: Chaos) -> bool:
        pid = chaos.victim()
        if pid is None or not send(pid, number):
            return False
        chaos.training.pop(pid, None)
        if number == signal.SIGSTOP:
            chaos.go_on_later(pid)
        chaos.count(fault)
        return True

    return inject


def kill_all_workers(chaos: Chaos) -> bool:
    pids = chaos.arena.workers()
    if chaos.victim() is None:
        return False
    for pid in pids:
        send(pid, signal.SIGKILL)
    chaos.training.clear()
    return True


def terminate_all_workers(chaos: Chaos) -> bool:
    return [send(pid, signal.SIGTERM) for pid in chaos.arena.workers()] != []


def kill_everything(chaos: Chaos) -> bool:
    """As a power cut does, but for the disk's cache. The command first, or it would replace its workers."""
    if chaos.victim() is None:
        return False
    send(chaos.main.process.pid, signal.SIGKILL)
    return kill_all_workers(chaos) or True


def to_the_command(number: signal.Signals) -> Callable[[Chaos], bool]:
    def inject(chaos: Chaos) -> bool:
        return chaos.victim() is not None and send(chaos.main.process.pid, number)

    return inject


def start_a_second(chaos: Chaos) -> bool:
    if chaos.second is not None and chaos.second.process.poll() is None:
        return False
    command = chaos.second = chaos.arena.start()
    chaos.later(chaos.rng.uniform(5, 15), lambda: command.process.send_signal(signal.SIGINT))
    return True


def fill_the_disk(chaos: Chaos) -> bool:
    """Until a checkpoint could not be written, or a while."""
    if chaos.empty_the_disk is not None:
        return False
    flag, ballast = chaos.arena.folder / "full", chaos.arena.disk / "ballast"

    def empty() -> None:
        (ballast if chaos.arena.is_mounted else flag).unlink(missing_ok=True)
        chaos.empty_the_disk = None

    chaos.empty_the_disk = empty
    if chaos.arena.is_mounted:
        _fill(ballast)
    else:
        flag.touch()
    chaos.later(15.0, empty)
    return True


def _fill(ballast: Path) -> None:
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    size = 2**20
    while size:
        try:
            os.write(descriptor, bytes(size))
        except OSError:
            size //= 2
    os.close(descriptor)


def tear_a_checkpoint(chaos: Chaos) -> bool:
    """Tear the newest checkpoint of a trial in training, or change a byte of it, and kill its worker."""
    pid = chaos.victim()
    if pid is None or not send(pid, signal.SIGSTOP):
        return False
    number = chaos.training[pid]["number"]
    found = sorted(chaos.arena.disk.glob(f"chaos-*/{number:06d}/epoch-*.ckpt"))
    if not found:
        send(pid, signal.SIGCONT)
        return False
    with found[-1].open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if chaos.rng.random() < 0.5:
            file.truncate(chaos.rng.randrange(size))
        else:
            place = chaos.rng.randrange(size)
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1]))
    epoch = int(found[-1].stem.split("-")[1])
    chaos.lines.append({"what": "torn", "number": number, "epoch": epoch, "at": time.time()})
    send(pid, signal.SIGKILL)
    chaos.training.pop(pid)
    return True


def to_the_database(
    begin: Callable[[Any], None], end: Callable[[Any], None] = lambda database: None, *, seconds: float = 0.0
) -> Callable[[Chaos], bool]:
    def inject(chaos: Chaos) -> bool:
        if chaos.is_database_busy:
            return False
        try:
            begin(chaos.arena.database)
        except sqlite3.OperationalError:  # a worker that is stopped has the lock
            return False
        chaos.is_database_busy = True

        def over() -> None:
            end(chaos.arena.database)
            chaos.is_database_busy = False

        chaos.later(seconds * chaos.rng.uniform(1.0, 1.5), over)
        return True

    return inject


def counted(fault: str, inject: Callable[[Chaos], bool]) -> Callable[[Chaos], bool]:
    def inject_and_count(chaos: Chaos) -> bool:
        injected = inject(chaos)
        if injected:
            chaos.count(fault)
        return injected

    return inject_and_count


def restart(mode: str) -> Callable[[Postgres], None]:
    def restart_it(database: Postgres) -> None:
        database.server.stop(mode)
        database.server.start()

    return restart_it


# How often in a hundred each fault comes, on SQLite and on Postgres; 0: not on this one.
MOMENTS = {
    "SIGKILL mid-epoch": (7, 7),
    "SIGKILL claimed, not begun": (5, 5),
    "SIGKILL half of a checkpoint written": (7, 6),
    "SIGKILL checkpoint written, not renamed": (3, 3),
    "SIGKILL checkpoint renamed, older ones there": (3, 3),
    "SIGKILL reported, not saved": (6, 5),
    "SIGKILL reported, not finished": (4, 4),
    "SIGKILL finished, not cleaned up": (3, 3),
    "SIGKILL in a transaction": (5, 4),
    "SIGSTOP claimed, not begun": (3, 2),
    "SIGSTOP half of a checkpoint written": (2, 2),
    "SIGSTOP reported, not saved": (4, 3),
    "SIGSTOP reported, not finished": (2, 2),
    "SIGSTOP in a transaction": (2, 2),
    "a commit's answer is lost": (0, 4),
}
FROM_OUTSIDE: dict[str, tuple[int, int, Callable[[Chaos], bool]]] = {
    "SIGTERM of all workers": (1, 1, terminate_all_workers),
    "SIGKILL of all workers": (2, 2, kill_all_workers),
    "SIGKILL of everything": (2, 2, kill_everything),
    "SIGKILL of the command": (2, 2, to_the_command(signal.SIGKILL)),
    "Ctrl-C": (2, 2, to_the_command(signal.SIGINT)),
    "a second command": (2, 2, start_a_second),
    "the disk full": (4, 4, fill_the_disk),
    "a torn checkpoint": (5, 5, tear_a_checkpoint),
    "the database locked": (5, 0, to_the_database(SQLite.lock, SQLite.unlock, seconds=max(LEASE_S, 2 * 2.0) + 1)),
    "the database restarted": (0, 2, to_the_database(restart("fast"))),
    "the database crashed": (0, 2, to_the_database(restart("immediate"))),
    "the database down": (
        0,
        2,
        to_the_database(lambda db: db.server.stop("fast"), lambda db: db.server.start(), seconds=LEASE_S + 1),
    ),
    "the database cut off": (0, 2, to_the_database(Postgres.cut_off, Postgres.let_in, seconds=LEASE_S + 1)),
    "the database frozen": (
        0,
        2,
        to_the_database(lambda db: db.server.freeze(), lambda db: db.server.thaw(), seconds=LEASE_S + 1),
    ),
}
SIGNALS = {
    "SIGKILL at any moment": (8, 7, signal.SIGKILL),
    "SIGSTOP at any moment": (8, 7, signal.SIGSTOP),
    "SIGTERM": (4, 4, signal.SIGTERM),
}
FAULTS: dict[str, Callable[[Chaos], bool]] = {
    **{fault: ordered(fault) for fault in MOMENTS},
    **{fault: counted(fault, inject) for fault, (_, _, inject) in FROM_OUTSIDE.items()},
    **{fault: to_a_worker(fault, number) for fault, (_, _, number) in SIGNALS.items()},
}


# What comes on each store before anything else, and to its end in the shortest run; together, all that matters most.
ESSENTIAL = {
    "sqlite": (
        "SIGKILL mid-epoch",
        "SIGKILL half of a checkpoint written",
        "SIGSTOP at any moment",
        "a torn checkpoint",
        "the database locked",
        "the disk full",
        "a second command",
    ),
    "postgres": (
        "SIGKILL claimed, not begun",
        "SIGKILL reported, not finished",
        "SIGSTOP at any moment",
        "SIGTERM",
        "the database crashed",
        "the database cut off",
        "SIGKILL of all workers",
    ),
}


def make_deck(store: str, *, size: int, rng: random.Random) -> list[str]:
    """More than `size` names of faults, as often as the tables say: some cannot be injected when they are dealt."""
    column = ("sqlite", "postgres").index(store)
    tables: tuple[Mapping[str, tuple[Any, ...]], ...] = (MOMENTS, FROM_OUTSIDE, SIGNALS)
    shares = {fault: row[column] for table in tables for fault, row in table.items()}
    deck: list[str] = []
    while len(deck) < 2 * size + 20:
        block = [fault for fault, share in shares.items() for _ in range(share)]
        rng.shuffle(block)
        deck += block
    return deck


def summarize(counts: Sequence[tuple[str, Counter[str]]]) -> list[str]:
    """Return the faults by kind, a column for each store."""
    faults = [fault for fault in [*FAULTS, LAST_TRIAL] if any(c[fault] for _, c in counts)]
    width = max(map(len, faults), default=0)
    rows = [f"{fault:<{width}}" + "".join(f"{c[fault] or '-':>10}" for _, c in counts) for fault in faults]
    heads = f"{'':<{width}}" + "".join(f"{name:>10}" for name, _ in counts)
    total = f"{'in all':<{width}}" + "".join(f"{c.total():>10}" for _, c in counts)
    return [heads, *rows, total]
