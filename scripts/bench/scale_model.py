"""A study with N workers on one Postgres as a closed queueing network, fed with the measured cost of each call.

A worker trains an epoch (thinks), reports it, and once a trial claims, is given values and finishes. Its calls queue
for the cores of the database and, to claim, for the lock on the study's row, which one worker holds at a time.

The network is solved by mean value analysis (Reiser and Lavenberg, Mean-Value Analysis of Closed Multichain Queuing
Networks, J. ACM 27, 1980). Several cores are one server as fast as all, and a delay (Seidmann, Schweitzer and
Shalev-Oren, Computerized Closed Queueing Network Models of Flexible Manufacturing Systems, Large Scale Systems 12,
1987). Who holds the lock uses a core meanwhile: to the others that is a shadow server's load (Sevcik, Priority
Scheduling Disciplines in Queuing Network Models of Computer Systems, IFIP 1977), and busy cores make the lock be held
for longer; both are iterated to a fixed point. Work at fixed intervals (leases, other programs) takes its share of the
cores first, as an open class does. The bounds are those of Lazowska, Zahorjan, Graham and Sevcik, Quantitative System
Performance, 1984.

Times are in seconds, rates per second. Everything is a pure function of its arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MOST = 20_000  # workers that are looked for
BEAT_S = 15.0  # between two renewals of a worker's leases: a quarter of hpo.store.ledger.LEASE_S
POLL_S, REAP_S = 5.0, 5.0  # of hpo.workers.worker: the first is LONGEST_POLL_S, which idle workers come to


@dataclass(frozen=True)
class Cost:
    """What a call takes: CPU of client and server, what is neither (disk, wake-ups), and messages to and fro."""

    client_s: float = 0.0
    server_s: float = 0.0
    other_s: float = 0.0
    round_trips: float = 0.0

    def __add__(self, more: Cost) -> Cost:
        return Cost(
            self.client_s + more.client_s,
            self.server_s + more.server_s,
            self.other_s + more.other_s,
            self.round_trips + more.round_trips,
        )

    def times(self, factor: float) -> Cost:
        return Cost(self.client_s * factor, self.server_s * factor, self.other_s * factor, self.round_trips * factor)


@dataclass(frozen=True)
class Line:
    """A cost that grows with the study's trials that have ended, those in training, and its workers."""

    base: Cost
    per_ended: Cost = Cost()
    per_running: Cost = Cost()
    per_worker: Cost = Cost()

    def at(self, *, ended: float, running: float, workers: float) -> Cost:
        grown = self.per_ended.times(ended) + self.per_running.times(running) + self.per_worker.times(workers)
        return self.base + grown


@dataclass(frozen=True)
class Costs:
    """The measured calls; `locked` is the part of `claim` that passes while the lock on the study's row is held."""

    claim: Line
    locked: Line
    suggest: Line
    keep: Line  # what a trial's checkpoints ask and tell the store, all together
    report: Line
    judged: Line  # a report after which the pruner looks at the study
    finish: Line
    renew: Line
    poll: Line  # one look of a worker that finds no slot waiting
    reap: Line


@dataclass(frozen=True)
class Load:
    """A study and its workers."""

    workers: int
    epoch_s: float
    epochs: float = 10.0  # of a trial, on average
    looks: float = 0.0  # of a trial's epochs, those after which the pruner looks at the study
    ended: float = 1000.0  # trials of the study that have ended


@dataclass(frozen=True)
class Place:
    """Where it runs."""

    cores: float  # of the database's machine
    shared: bool = False  # the clients run on these cores too
    other_cores: float = 0.0  # of them, what other programs keep busy
    round_trip_s: float = 0.0  # between a worker and the database, beyond that of one machine


@dataclass(frozen=True)
class Prediction:
    epochs_per_s: float
    cycle_s: float  # from one report to the next
    store_share: float  # of a worker's time, spent in calls of the store
    waiting_share: float  # of a worker's time, spent in queues: what more cores or fewer workers would take away
    cores_busy: float  # utilisation, 0 to 1
    lock_busy: float
    claim_s: float  # a claim with its wait for the lock


def mean_values(population: int, *, think_s: float, demands: tuple[float, float]) -> tuple[float, float, float]:
    """Throughput, and seconds at each of two single-server stations, of a closed network: exact mean value analysis."""
    first, second = demands
    queue_first = queue_second = throughput = 0.0
    time_first, time_second = demands
    for customers in range(1, population + 1):
        time_first, time_second = first * (1 + queue_first), second * (1 + queue_second)
        throughput = customers / (think_s + time_first + time_second)
        queue_first, queue_second = throughput * time_first, throughput * time_second
    return throughput, time_first, time_second


@dataclass(frozen=True)
class Demand:
    """An epoch's, with the trial's claim, values and end shared out over its epochs."""

    delay_s: float  # nobody else is kept waiting by it: training, the worker's own CPU, disk, network
    cores_s: float  # outside the lock
    locked_cores_s: float
    locked_delay_s: float
    claims: float  # of an epoch
    background: float  # cores that are busy at fixed intervals, whatever the throughput

    @property
    def alone_s(self) -> float:
        """A worker's cycle where it is the only one."""
        return self.delay_s + self.cores_s + self.locked_cores_s + self.locked_delay_s


def demand(costs: Costs, load: Load, place: Place, *, running: float | None = None) -> Demand:
    """Return the demand of a worker; `running` is how many of the others have a trial in training, None for all."""
    others = load.workers - 1 if running is None else running

    def at(line: Line) -> Cost:
        return line.at(ended=load.ended, running=others, workers=load.workers - 1)

    judged = load.looks / load.epochs
    claim, locked = at(costs.claim), at(costs.locked)
    outside = Cost(
        claim.client_s - locked.client_s,
        claim.server_s - locked.server_s,
        claim.other_s - locked.other_s,
        claim.round_trips - locked.round_trips,
    )
    once = outside + at(costs.suggest) + at(costs.keep) + at(costs.finish)
    epoch = at(costs.report).times(1 - judged) + at(costs.judged).times(judged) + once.times(1 / load.epochs)
    locked = locked.times(1 / load.epochs)
    beats = at(costs.renew).times(load.workers / BEAT_S)
    return Demand(
        delay_s=load.epoch_s + _delay(epoch, place),
        cores_s=_cores(epoch, place),
        locked_cores_s=_cores(locked, place),
        locked_delay_s=_delay(locked, place),
        claims=1 / load.epochs,
        background=_cores(beats, place) + place.other_cores,
    )


def idle(costs: Costs, load: Load, place: Place) -> Demand:
    """Of workers that find no slot waiting: they look for one, and for workers that died; no trial is in training."""

    def at(line: Line) -> Cost:
        return line.at(ended=load.ended, running=0, workers=load.workers)

    look = at(costs.poll) + at(costs.reap).times(POLL_S / REAP_S)
    beats = at(costs.renew).times(load.workers / BEAT_S)
    return Demand(
        delay_s=POLL_S + _delay(look, place),
        cores_s=_cores(look, place),
        locked_cores_s=0.0,
        locked_delay_s=0.0,
        claims=0.0,
        background=_cores(beats, place) + place.other_cores,
    )


def saturation(costs: Costs, load: Load, place: Place) -> tuple[float, str]:
    """Return the number of workers from which on they mostly queue, and for what: where the asymptotes meet.

    N x the busiest station's demand = the cycle of a worker that is alone; demands may grow with N.
    """

    def bounds(workers: int) -> tuple[float, float]:
        needs = demand(costs, replace(load, workers=workers), place)
        free = place.cores - needs.background
        cores = workers * (needs.cores_s + needs.locked_cores_s) / free if free > 0 else math.inf
        return cores / needs.alone_s, workers * (needs.locked_cores_s + needs.locked_delay_s) / needs.alone_s

    low, high = 1, 10_000_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if max(bounds(middle)) >= 1 else (middle, high)
    cores, lock = bounds(high)
    return high, "cores" if cores >= lock else "lock"


def most_workers(costs: Costs, load: Load, place: Place, *, share: float) -> int:
    """Return the most workers of which each gives the store no more than this share of its time."""
    low, high = 0, MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        crowd = replace(load, workers=middle)
        alone_s = demand(costs, crowd, place).alone_s  # without a queue
        fits = 1 - load.epoch_s / alone_s <= share and predict(costs, crowd, place).store_share <= share
        low, high = (middle, high) if fits else (low, middle)
    return low


def _cores(cost: Cost, place: Place) -> float:
    return cost.server_s + (cost.client_s if place.shared else 0.0)


def _delay(cost: Cost, place: Place) -> float:
    own = 0.0 if place.shared else cost.client_s
    return own + cost.other_s + cost.round_trips * place.round_trip_s


def predict(costs: Costs, load: Load, place: Place) -> Prediction:
    """Return the fixed point of how many trials are in training: a worker that waits to claim has none."""

    def at(running: float) -> tuple[Prediction, float]:
        needs = demand(costs, load, place, running=running)
        found = solve(needs, workers=load.workers, epoch_s=load.epoch_s, cores=place.cores)
        claiming = found.epochs_per_s * needs.claims * found.claim_s  # Little's law
        return found, max(0.0, load.workers - 1 - claiming)

    low, high = 0.0, load.workers - 1.0
    found, running = at(high)
    if running >= 0.99 * high:
        return found
    while high - low > 0.01 * load.workers:  # the more in training, the slower all is, and the more wait
        middle = (low + high) / 2
        found, running = at(middle)
        low, high = (middle, high) if running > middle else (low, middle)
    return found


def solve(needs: Demand, *, workers: int, epoch_s: float, cores: float) -> Prediction:
    """Return the fixed point of the cores that the lock's holders take and of how a busy machine slows them."""
    free = max(cores - needs.background, 0.01 * cores)

    def at(locked_busy: float, slowed: float) -> tuple[float, float, float]:
        left = max(free - locked_busy, 1e-3 * free)
        pause = needs.cores_s * max(left - 1, 0.0) / left  # of `left` cores: one as fast as all, and a delay
        held = needs.locked_cores_s * slowed + needs.locked_delay_s
        throughput, core_s, lock_s = mean_values(
            workers, think_s=needs.delay_s + pause, demands=(needs.cores_s / left, held)
        )
        return throughput, core_s + pause, lock_s

    def at_throughput(slowed: float) -> tuple[float, float, float]:
        low, high = 0.0, min(free, 1.0, workers * needs.locked_cores_s / needs.alone_s)  # one holder at a time
        for _ in range(14):
            busy = (low + high) / 2
            low, high = (busy, high) if at(busy, slowed)[0] * needs.locked_cores_s > busy else (low, busy)
        return at((low + high) / 2, slowed)

    low, high = 0.0, math.log(4 * workers / min(free, 1.0) + 1)  # both functions fall, so that each halving is right
    for _ in range(14):
        slowed = math.exp((low + high) / 2)
        found = at_throughput(slowed)[1] / needs.cores_s if needs.cores_s else 1.0
        low, high = ((low + high) / 2, high) if found > slowed else (low, (low + high) / 2)
    slowed = math.exp((low + high) / 2) if needs.cores_s else 1.0
    throughput, _, lock_s = at_throughput(slowed)
    cycle = workers / throughput
    return Prediction(
        epochs_per_s=throughput,
        cycle_s=cycle,
        store_share=1 - epoch_s / cycle,
        waiting_share=max(0.0, 1 - needs.alone_s / cycle),
        cores_busy=min(1.0, (throughput * (needs.cores_s + needs.locked_cores_s) + needs.background) / cores),
        lock_busy=min(1.0, throughput * (needs.locked_cores_s * slowed + needs.locked_delay_s)),
        claim_s=lock_s / needs.claims if needs.claims else 0.0,
    )
