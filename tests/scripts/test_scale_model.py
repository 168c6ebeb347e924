"""The model of many workers: it keeps the bounds of every closed network, and what its document names exists."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from math import factorial
from pathlib import Path

import pytest

from scripts.bench import scale_model as model
from scripts.bench.scale_model import Cost, Costs, Demand, Line, Load, Place

ROOT = Path(__file__).parents[2]
LINE = Line(Cost(client_s=0.01, server_s=0.002, other_s=0.0005, round_trips=20))
COSTS = Costs(
    claim=Line(Cost(0.013, 0.003, 0.0005, 22), per_running=Cost(server_s=1e-6)),
    locked=Line(Cost(0.009, 0.002, 0.0005, 15), per_running=Cost(server_s=1e-6)),
    suggest=Line(Cost(0.04, 0.007, 0.0005, 80), per_running=Cost(client_s=2e-3, server_s=8e-5)),
    keep=LINE,
    report=LINE,
    judged=Line(LINE.base, per_running=Cost(client_s=7e-4, server_s=2e-5)),
    finish=LINE,
    renew=LINE,
    poll=LINE,
    reap=Line(LINE.base, per_worker=Cost(client_s=2e-5, server_s=1e-6)),
)
NEEDS = Demand(delay_s=5.0, cores_s=0.02, locked_cores_s=0.001, locked_delay_s=0.0004, claims=0.1, background=0.0)
CROWDS = (1, 2, 10, 64, 200, 500, 2000)


def repairman(machines: int, *, think_s: float, service_s: float, repairmen: int = 1) -> float:
    """Throughput of machines that break down after think_s and are mended in service_s: its birth-death chain."""
    weights = [1.0]
    for broken in range(machines):
        weights.append(weights[-1] * (machines - broken) / think_s * service_s / min(broken + 1, repairmen))
    busy = sum(weight * min(broken, repairmen) for broken, weight in enumerate(weights)) / sum(weights)
    return busy / service_s


def solve(needs: Demand, workers: int, cores: float = 1.0) -> model.Prediction:
    return model.solve(needs, workers=workers, epoch_s=5.0, cores=cores)


def test_a_worker_that_is_alone_waits_for_nobody() -> None:
    found = solve(NEEDS, 1)
    assert found.cycle_s == pytest.approx(NEEDS.alone_s, rel=1e-3)
    assert found.waiting_share == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("machines", [1, 3, 20, 100])
def test_one_station_is_the_machine_repairman(machines: int) -> None:
    exact = repairman(machines, think_s=5.0, service_s=0.1)
    assert model.mean_values(machines, think_s=5.0, demands=(0.1, 0.0))[0] == pytest.approx(exact, rel=1e-9)
    needs = Demand(delay_s=5.0, cores_s=0.1, locked_cores_s=0.0, locked_delay_s=0.0, claims=0.0, background=0.0)
    assert solve(needs, machines).epochs_per_s == pytest.approx(exact, rel=1e-6)


def test_the_repairman_of_the_tests_is_erlangs() -> None:
    machines, think_s, service_s = 7, 2.0, 0.5
    terms = [factorial(machines) / factorial(machines - n) * (service_s / think_s) ** n for n in range(machines + 1)]
    assert repairman(machines, think_s=think_s, service_s=service_s) == pytest.approx((1 - 1 / sum(terms)) / service_s)


@pytest.mark.parametrize("cores", [2, 8])
def test_many_cores_are_near_as_many_repairmen(cores: int) -> None:
    needs = Demand(delay_s=1.0, cores_s=0.1, locked_cores_s=0.0, locked_delay_s=0.0, claims=0.0, background=0.0)
    for workers in (1, 5, 10 * cores, 11 * cores, 15 * cores, 40 * cores):
        exact = repairman(workers, think_s=1.0, service_s=0.1, repairmen=cores)
        assert solve(needs, workers, cores).epochs_per_s == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("cores", [1, 2, 8])
@pytest.mark.parametrize("needs", [NEEDS, replace(NEEDS, cores_s=0.001), replace(NEEDS, locked_delay_s=0.02)])
def test_throughput_keeps_to_the_asymptotes_and_does_not_fall(needs: Demand, cores: int) -> None:
    found = [solve(needs, workers, cores) for workers in CROWDS]
    held = needs.locked_cores_s + needs.locked_delay_s
    for workers, one in zip(CROWDS, found, strict=True):
        assert one.epochs_per_s <= workers / needs.alone_s * 1.001
        assert one.epochs_per_s <= cores / (needs.cores_s + needs.locked_cores_s) * 1.001
        assert one.epochs_per_s <= 1 / held * 1.001
        assert one.epochs_per_s * one.cycle_s == pytest.approx(workers)  # Little's law
    for fewer, more in itertools.pairwise(found):
        assert (
            more.epochs_per_s >= fewer.epochs_per_s * 0.98
        )  # the fixed point of two busy stations: 1.2 % at most here
        assert more.waiting_share >= fewer.waiting_share - 1e-3


def test_a_crowd_comes_to_what_the_busiest_station_can_do() -> None:
    cores = solve(replace(NEEDS, locked_cores_s=0.0), 5000, 2)
    assert cores.epochs_per_s == pytest.approx(2 / 0.02, rel=0.02)
    assert cores.cores_busy == pytest.approx(1, abs=0.02)
    both = solve(NEEDS, 5000, 2)  # who holds the lock is slowed down by the others, who then queue for the lock
    assert both.epochs_per_s == pytest.approx(2 / 0.021, rel=0.06)
    lock = solve(replace(NEEDS, cores_s=1e-4, locked_cores_s=0.0, locked_delay_s=0.02), 5000, 2)
    assert lock.epochs_per_s == pytest.approx(50, rel=0.02)
    assert lock.lock_busy == pytest.approx(1, abs=0.02)


def test_what_others_do_takes_its_share() -> None:
    alone, beside = (solve(replace(NEEDS, background=busy), 5000, 2).epochs_per_s for busy in (0.0, 1.0))
    assert beside == pytest.approx(alone / 2, rel=0.03)


def test_clients_of_the_databases_machine_use_its_cores_and_others_their_own() -> None:
    load = Load(10, 5.0)
    away, here = (model.demand(COSTS, load, Place(cores=2, shared=shared)) for shared in (False, True))
    assert here.cores_s + here.locked_cores_s > away.cores_s + away.locked_cores_s
    assert here.alone_s == pytest.approx(away.alone_s)
    far = model.demand(COSTS, load, Place(cores=2, round_trip_s=0.001))
    assert far.alone_s - away.alone_s == pytest.approx(0.001 * (20 + (22 + 80 + 20 + 20) / 10))


def test_looks_at_the_study_cost_as_the_trials_in_training() -> None:
    def store_s(workers: int, looks: float) -> float:
        return model.demand(COSTS, Load(workers, 5.0, looks=looks), Place(cores=2)).alone_s - 5.0

    assert store_s(1000, 9.0) - store_s(1000, 0.0) == pytest.approx(0.9 * 999 * 7.2e-4, rel=1e-6)
    assert store_s(1000, 9.0) > 5 * store_s(100, 9.0)


def test_saturation_is_where_the_asymptotes_meet() -> None:
    load, place = Load(1, 3.0), Place(cores=8)
    number, what = model.saturation(COSTS, load, place)
    assert what in ("cores", "lock")
    before, after = (model.predict(COSTS, replace(load, workers=int(number * part)), place) for part in (0.5, 1.5))
    assert before.waiting_share < 0.05 < after.waiting_share
    assert model.saturation(COSTS, replace(load, epoch_s=60.0), place)[0] > number
    most = model.most_workers(COSTS, load, place, share=0.1)
    shares = [model.predict(COSTS, replace(load, workers=n), place).store_share for n in (most, most + 1)]
    assert shares[0] <= 0.1 < shares[1]


@pytest.mark.slow
def test_idle_workers_look_as_often_as_they_may() -> None:
    load, place = Load(10, 0.0), Place(cores=8)
    needs = model.idle(COSTS, load, place)
    assert model.solve(needs, workers=10, epoch_s=model.POLL_S, cores=8).epochs_per_s == pytest.approx(
        10 / needs.alone_s, rel=0.01
    )
    crowd = model.solve(model.idle(COSTS, replace(load, workers=100_000), place), workers=100_000, epoch_s=5, cores=8)
    assert crowd.cores_busy == pytest.approx(1, abs=0.01)


def test_the_constants_are_the_workers() -> None:
    from hpo.store import ledger
    from hpo.workers import worker

    assert (worker.LONGEST_POLL_S, worker.REAP_S, ledger.LEASE_S / 4) == (model.POLL_S, model.REAP_S, model.BEAT_S)


def test_what_the_document_names_exists() -> None:
    text, makefile = (ROOT / "docs/results/scale.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
        assert target in makefile.split(".PHONY:")[1].split("\n")[0]
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text):
        assert (ROOT / "docs/results" / path).exists(), path
    for script in re.findall(r"scripts/\w+\.py", text):
        assert (ROOT / script).exists(), script
    assert "docs/results/scale.md" in (ROOT / "README.md").read_text()
