"""The race: who trains on, whatever the order of the reports, and for how many epochs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from hpo.search.race import Course, Racer, find_goals, trains_on

COURSE = Course(num_epochs=50, budget=100)
Curve = Callable[[int, int], float | None]  # the value of a trial after an epoch; None: it diverges


def peaked(number: int, epoch: int) -> float:
    """Return values of which trial 9 has the best at the end, and trial 12 at first."""
    best = 12 if epoch < 5 else 9
    return 0.9 - 0.05 * abs(number - best) - 0.3 / epoch


def starters(course: Course = COURSE) -> list[Racer]:
    return [Racer(number, 10.0 ** (number - 9), "waiting", {}) for number in range(course.num_starters)]


def run(
    course: Course = COURSE,
    curve: Curve = peaked,
    *,
    num_workers: int = 1,
    seed: int = 0,
    kills: float = 0.0,
    racers: Sequence[Racer] | None = None,
) -> list[Racer]:
    """Run a race to its end, an epoch of one trial at a time; a share of the epochs ends with a kill.

    A trial that is killed begins again from its start, or from a rung at which it was saved.
    """
    draw = random.Random(seed)
    trials = {racer.number: racer for racer in racers or starters(course)}
    while (goals := find_goals(course, list(trials.values()))) is not None:
        on_way = [racer for racer in trials.values() if trains_on(course, racer, goals)]
        running = [racer for racer in on_way if racer.state == "running"]
        racer = draw.choice(running if len(running) == num_workers else on_way)
        values, state = dict(racer.values), "running"
        if kills and draw.random() < kills:
            saved = draw.choice([0, 3, 10])
            values = {epoch: value for epoch, value in values.items() if epoch <= saved}
            state = "waiting"
        elif (value := curve(racer.number, racer.epoch + 1)) is None:
            state = "diverged"
        else:
            values[racer.epoch + 1] = value
            if len(values) >= goals[racer.number]:
                state = "complete" if len(values) == course.num_epochs else "waiting"
        trials[racer.number] = Racer(racer.number, racer.lr, state, values)
    return list(trials.values())


def epochs_of(racers: Sequence[Racer]) -> list[int]:
    return [racer.epoch for racer in racers]


def test_the_best_at_each_rung_train_on() -> None:
    assert epochs_of(run()) == [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 50, 25, 10, 1, 1]


@pytest.mark.parametrize("num_workers", [2, 5, 16, 40])
def test_any_number_of_workers_decides_as_one_does(num_workers: int) -> None:
    alone = run()
    for seed in range(5):
        assert run(num_workers=num_workers, seed=seed) == alone


def test_a_kill_changes_nothing() -> None:
    """Check it whatever of a trial the kill has cost, and however many workers there are."""
    alone = run()
    for seed in range(4):
        assert run(num_workers=1 + seed, seed=seed, kills=0.1) == alone


@pytest.mark.parametrize(("num_epochs", "trainings"), [(5, 2.0), (10, 20.0), (17, 3.5), (50, 2.0)])
def test_the_budget_is_exact_in_epochs(num_epochs: int, trainings: float) -> None:
    course = Course(num_epochs, budget=int(trainings * num_epochs))
    for curve in (peaked, lambda number, epoch: None if number > 10 else peaked(number, epoch)):
        ended = run(course, curve)
        assert sum(epochs_of(ended)) <= course.budget
        assert any(racer.state == "complete" for racer in ended)
    everything = course.num_starters * num_epochs
    assert sum(epochs_of(run(course))) > min(course.budget, everything) - num_epochs


def test_where_those_that_lead_die_the_next_take_their_place_until_one_is_complete() -> None:
    def dying(number: int, epoch: int) -> float | None:
        return None if epoch > 45 and number in (11, 12) else peaked(number, epoch)

    ended = run(curve=dying)
    assert [racer.epoch for racer in ended if racer.state == "diverged"] == [45, 45]
    assert [(racer.number, racer.epoch) for racer in ended if racer.state == "complete"] == [(13, 50)]
    assert sum(epochs_of(ended)) > COURSE.budget


def test_a_race_is_over_where_nothing_is_left_that_could_be_complete() -> None:
    assert {racer.state for racer in run(curve=lambda number, epoch: None)} == {"diverged"}


def test_what_is_left_of_the_budget_goes_to_those_that_came_furthest() -> None:
    ended = run(Course(50, budget=125))
    assert sorted(epochs_of(ended), reverse=True)[:3] == [50, 50, 10]


def test_ties_are_decided_by_the_loss_then_by_the_distance_to_the_middle() -> None:
    """Check it at the first rung, where nothing may be learnt yet: order must decide nothing."""
    tied = [Racer(racer.number, racer.lr, "waiting", {1: 0.1}) for racer in starters()]
    for order in (tied, tied[::-1]):
        goals = find_goals(COURSE, order)
        assert goals is not None
        assert {number for number, goal in goals.items() if goal > 1} == {6, 7, 8, 9}
    losing = [Racer(racer.number, racer.lr, "waiting", {1: 0.1}, {1: 2.3 - 0.01 * racer.number}) for racer in tied]
    goals = find_goals(COURSE, losing)
    assert goals is not None
    assert {number for number, goal in goals.items() if goal > 1} == {12, 13, 14, 15}


def test_a_loop_that_reports_now_and_then_is_charged_what_it_trained() -> None:
    rare = [Racer(racer.number, racer.lr, "waiting", {5: peaked(racer.number, 5)}) for racer in starters()]
    goals = find_goals(COURSE, rare)
    assert goals is not None
    assert sum(epochs_of(rare)) == 80
    assert [number for number, goal in goals.items() if goal > 5] == [8, 9], "20 epochs are left for trainings of 5"


def test_a_trial_that_joins_late_is_compared_with_those_before_it() -> None:
    """Check that it takes the place of the one that it beats, and that the race is run to its end all the same."""
    late = Racer(16, 20.0, "waiting", {})
    ended = run(curve=lambda number, epoch: 0.95 if number == 16 else peaked(number, epoch), racers=[*run(), late])
    assert ended[16].epoch == 50
    assert [racer.epoch for racer in ended[:16]] == epochs_of(run())


def test_each_course_names_the_least_budget_that_it_can_be_run_with() -> None:
    for num_epochs in range(1, 60):
        trainings = Course(num_epochs, budget=0).least_trainings
        assert Course(num_epochs, budget=int(trainings * num_epochs + 1e-9)).num_starters >= 5
        assert Course(num_epochs, budget=int(trainings * num_epochs + 1e-9) - 1).num_starters <= 5
