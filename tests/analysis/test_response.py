"""The response: the best learning rate, its interval, the plateau and the edge, of made trials whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hpo.analysis.response import (
    MIN_RATES,
    REACH_DECADES,
    ObservedTrial,
    Response,
    _expected_gain,
    _has_evidence,
    fit_response,
)

LOW, HIGH = 1e-5, 1e-1


def make_trials(lrs: Any, value: Any, *, diverged: Any = (), noise: float = 0.0, seed: int = 0) -> list[ObservedTrial]:
    """Return complete trials of one epoch, with values that may have noise, and trials that diverged in it."""
    x = np.log10(np.array(lrs, dtype=float))
    values = np.array([value(at) for at in x]) + noise * np.random.default_rng(seed).standard_normal(len(x))
    complete = [ObservedTrial(at, "complete", [1], [result]) for at, result in zip(x, values, strict=True)]
    return complete + [ObservedTrial(at, "diverged", [], []) for at in np.log10(np.array(diverged, dtype=float))]


def hill(x: float) -> float:
    return 0.9 - 0.1 * (x + 3) ** 2


def response(
    trials: list[ObservedTrial], *, num_epochs: int = 1, floor: float = 0.1, is_share: bool = True
) -> Response:
    found = fit_response(trials, num_epochs=num_epochs, low=LOW, high=HIGH, floor=floor, is_share=is_share)
    assert found is not None
    return found


def at(found: Response, lr: float) -> int:
    return int(np.abs(np.log(np.array(found.lrs) / lr)).argmin())


EVENLY = np.geomspace(LOW, HIGH, 15)


def test_the_top_of_a_smooth_response_is_found_and_held() -> None:
    held = []
    for seed in range(6):
        found = response(make_trials(EVENLY, hill, noise=0.005, seed=seed))
        assert hill(math.log10(found.best)) > 0.9 - 0.005
        assert found.value == pytest.approx(0.9, abs=0.01)
        low, high = found.interval
        held.append(low < 1e-3 < high)
        assert high < 5 * low
        assert found.plateau[0] <= found.best <= found.plateau[1]
        assert found.interval[0] <= found.plateau[0]
        assert found.plateau[1] <= found.interval[1]
        assert found.divergence_lr is None
    assert sum(held) >= 5  # of an interval with 90 % confidence
    assert found.noise == pytest.approx(0.005, abs=0.004)


def test_luck_that_is_larger_far_below_the_best_rate_hides_it_no_more_than_it_must() -> None:
    def behind(x: float) -> float:
        return 0.8 / (1 + math.exp(2.5 * (x + 4.4))) + 0.03 * max(0, x + 2.8) ** 2

    best, held, decades = min(np.linspace(-5, -1, 161), key=behind), [], []
    for seed in range(8):
        luck = iter(np.random.default_rng(seed).standard_normal(31))
        lrs = np.geomspace(LOW, HIGH, 31)
        found = response(make_trials(lrs, lambda x, luck=luck: 0.97 - behind(x) * math.exp(0.5 * next(luck))))
        low, high = found.interval
        held.append(low < 10**best < high)
        decades.append(math.log10(high / low))
    assert sum(held) >= 6
    assert np.median(decades) < 0.75  # of equal luck everywhere it would be 0.9


def test_the_band_holds_most_of_the_response() -> None:
    inside = []  # over 40 studies: 0.81 (15 trials, this noise), 0.83 (30 trials), 0.93 (30, five times the noise)
    for seed in range(10):
        found = response(make_trials(EVENLY, hill, noise=0.02, seed=seed))
        truth = [hill(math.log10(lr)) for lr in found.lrs]
        inside += [a <= b <= c for a, b, c in zip(found.low, truth, found.high, strict=True)]
    assert 0.7 < np.mean(inside) < 0.99


@pytest.mark.parametrize("num_low", [0, 1])
def test_the_band_for_trials_holds_their_values_also_one_that_is_far_below_the_others(num_low: int) -> None:
    """As in the quickstart: the only complete trial of a low rate lay outside of its band, 22 to 55 %."""
    inside = []
    for seed in range(6):
        lrs = [*[1.3e-5][:num_low], *np.geomspace(3e-4, 3e-2, 12)]
        trials = make_trials(lrs, lambda x: 0.198 if x < -4 else 0.98 - 0.02 * (x + 3) ** 2, noise=0.01, seed=seed)
        found = response(trials)
        for trial in trials:
            index = at(found, 10**trial.x)
            inside.append(found.trial_low[index] <= trial.values[-1] <= found.trial_high[index])
            assert trial.x > -4 or inside[-1]
        assert 0 <= min(found.trial_low) <= max(found.trial_high) <= 1
        assert max(found.mean) <= 1
    assert 0.8 < np.mean(inside) <= 1


def test_more_noise_is_more_doubt() -> None:
    quiet, loud = (response(make_trials(EVENLY, hill, noise=noise)) for noise in (0.003, 0.1))
    assert loud.noise > 5 * quiet.noise
    assert math.log(loud.interval[1] / loud.interval[0]) > 2 * math.log(quiet.interval[1] / quiet.interval[0])


def test_the_same_trials_in_any_order_give_the_same_numbers() -> None:
    trials = make_trials(EVENLY, hill, noise=0.01, diverged=[0.5])
    assert response(trials) == response(trials) == response(trials[::-1])


@pytest.mark.parametrize("lrs", [[], [1e-3], np.geomspace(1e-4, 1e-2, MIN_RATES - 1), [1e-3] * 20])
def test_too_few_learning_rates_give_no_response(lrs: Any) -> None:
    assert fit_response(make_trials(lrs, hill), num_epochs=1, low=LOW, high=HIGH) is None


def test_a_diverging_rate_is_not_recommended_and_the_edge_lies_between_what_trained_and_what_did_not() -> None:
    rising = make_trials(np.geomspace(LOW, 1e-3, 12), lambda x: 0.9 + 0.1 * x, diverged=np.geomspace(3e-3, HIGH, 6))
    found = response(rising)
    assert found.divergence_lr is not None
    assert 1e-3 < found.divergence_lr.lr < 3e-3
    assert found.divergence_lr.interval[0] < found.divergence_lr.lr < found.divergence_lr.interval[1]
    assert found.interval[1] < 3.5e-3
    assert found.diverging[at(found, HIGH)] > 0.95
    assert found.diverging[at(found, LOW)] < 0.05
    assert found.diverging[at(found, found.best)] < 0.2


def test_one_trial_that_diverges_where_others_train_moves_nothing_much() -> None:
    lrs, edge = np.geomspace(LOW, 1e-2, 16), [2e-2, 4e-2, 8e-2]
    without, with_one = (response(make_trials(lrs, hill, diverged=[*edge, *more])) for more in ([], [1e-5]))
    assert with_one.best == pytest.approx(without.best, rel=0.15)


def curve(final: float, *, until: int = 30, speed: float = 0.15) -> list[float]:
    """Return the accuracies of the first epochs of thirty, from that of a guess on."""
    return [0.1 + (final - 0.1) * (1 - math.exp(-speed * epoch)) for epoch in range(1, until + 1)]


def trained(x: float, values: list[float], state: str = "complete") -> ObservedTrial:
    return ObservedTrial(x, state, range(1, len(values) + 1), values)


def test_a_pruned_trial_counts_with_what_others_gained_since_and_less_the_younger_it_is() -> None:
    whole = [trained(x, curve(hill(x))) for x in np.linspace(-4.2, -2, 8)]
    bands = []
    for until in (2, 10):
        pruned = [trained(x, curve(hill(x), until=until), "pruned") for x in (-4.9, -4.6)]
        found = response(whole + pruned, num_epochs=30)
        index = at(found, 10**-4.75)
        assert found.low[index] < hill(-4.75) < found.high[index]
        bands.append(found.high[index] - found.low[index])
    alone = response(whole, num_epochs=30)
    assert bands[1] < bands[0] < alone.high[at(alone, 10**-4.75)] - alone.low[at(alone, 10**-4.75)]


def with_luck(fading: float, *, seed: int) -> list[ObservedTrial]:
    """Return whole trials, but none near the best rate, where two unlucky ones were pruned after their first epoch."""
    random = np.random.default_rng(seed)
    trials = []
    for x in np.linspace(-5, -1, 17):
        luck = 0.08 * random.standard_normal()
        values = curve(hill(x) + (0 if fading else luck))
        early = [luck * epoch**-fading if fading else 0 for epoch in range(1, 31)]
        seen = [value + more + 0.002 * random.standard_normal() for value, more in zip(values, early, strict=True)]
        trials.append(trained(float(x), seen))
    pruned = [trained(x, [curve(hill(x))[0] - 0.08], "pruned") for x in (-3.1, -2.9)]
    return [trial for trial in trials if abs(trial.x + 3) > 0.3] + pruned


@pytest.mark.parametrize("seed", [2, 4])
def test_early_luck_that_others_lost_by_the_end_leaves_little_doubt(seed: int) -> None:
    found = response(with_luck(0.7, seed=seed), num_epochs=30)
    assert found.interval[0] < 1e-3 < found.interval[1] < 10 * found.interval[0]
    assert found.mean[at(found, 1e-3)] == pytest.approx(hill(-3), abs=0.05)


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_luck_that_lasts_to_the_end_is_noise(seed: int) -> None:
    assert response(with_luck(0, seed=seed), num_epochs=30).noise > 0.03


def test_rates_at_which_all_were_pruned_at_chance_are_not_recommended() -> None:
    whole = [trained(x, curve(hill(x))) for x in (-3.4, -3.2, -3.0, -2.8)]
    pruned = [trained(x, [0.1, 0.1, 0.1], "pruned") for x in (-2.2, -2.0, -1.8, -1.6, -1.4, -1.2)]
    found = response(whole + pruned + [trained(-4.0, curve(hill(-4.0), until=4), "pruned")], num_epochs=30)
    assert 10**-3.7 < found.best < 10**-2.5
    assert found.diverging[at(found, 10**-1.6)] > 0.8


def test_a_race_leaves_open_no_rate_that_was_far_behind_early() -> None:
    lrs, trained = np.geomspace(LOW, HIGH, 13), {6: 50, 5: 25, 7: 10, 8: 3}  # the rest of them one epoch of 50

    def curve(index: int) -> list[float]:
        final, speed = 0.85 - 0.12 * (math.log10(lrs[index]) + 3) ** 2, 0.3 + 0.04 * index
        return [0.1 + (final - 0.1) * (1 - math.exp(-speed * epoch)) for epoch in range(1, trained.get(index, 1) + 1)]

    trials = [
        ObservedTrial(
            math.log10(lr), "complete" if index == 6 else "pruned", range(1, trained.get(index, 1) + 1), curve(index)
        )
        for index, lr in enumerate(lrs)
    ]
    found = response(trials, num_epochs=50)
    assert found.is_determined
    assert found.interval[0] < 1e-3 < found.interval[1] < 15 * found.interval[0]


def test_three_rates_that_have_a_value_are_enough_where_others_diverged() -> None:
    living, died = np.geomspace(1e-4, 1e-2, 3), np.geomspace(3e-2, HIGH, 2)
    assert LOW < response(make_trials(living, hill, diverged=died)).best <= 1e-2
    for trials in (make_trials(living, hill, diverged=died[:1]), make_trials(living[:2], hill, diverged=[0.02, *died])):
        assert fit_response(trials, num_epochs=1, low=LOW, high=HIGH) is None


def test_trials_that_are_still_in_training_point_to_a_rate_too() -> None:
    running = [trained(x, curve(hill(x), until=12), "running") for x in np.linspace(-5, -1.5, 12)]
    found = response(running, num_epochs=30)
    assert found.best == pytest.approx(1e-3, rel=0.5)
    assert found.interval[0] < 1e-3 < found.interval[1]


def test_trials_that_are_nearly_complete_are_evidence_beside_the_first_complete_ones() -> None:
    low = [trained(x, curve(hill(x))) for x in (-4.6, -4.2)]
    near = [trained(x, curve(hill(x), until=26), "running") for x in (-3.6, -3.2, -2.8, -2.4)]
    assert response(low + near, num_epochs=30).best == pytest.approx(1e-3, rel=0.7)
    young = [trained(x, curve(hill(x), until=2), "running") for x in (-3.6, -3.2, -2.8, -2.4)]
    assert response(low + young, num_epochs=30).best < 1.3e-4


@pytest.mark.parametrize(
    ("tried", "value"), [((1e-3, 1e-1), lambda x: 0.7 - 0.05 * x), ((1e-5, 1e-3), lambda x: 0.9 + x / 20)]
)
def test_no_rate_is_recommended_beyond_those_that_were_tried(tried: tuple[float, float], value: Any) -> None:
    """However steeply the response points to where nobody tried."""
    found = response(make_trials(np.geomspace(*tried, 8), value, noise=0.02))
    assert tried[0] <= found.best <= tried[1]
    assert found.interval[0] <= found.best <= found.interval[1]
    assert found.value == pytest.approx(value(math.log10(found.best)), abs=0.06)


def test_no_rate_is_recommended_in_a_gap_that_nobody_tried() -> None:
    lrs = [1e-5, 1.5e-5, 2e-5, 0.05, 0.07, 0.1]
    found = response(make_trials(lrs, hill, noise=0.001))
    assert min(abs(math.log10(found.best / lr)) for lr in lrs) <= REACH_DECADES + 0.03


def test_a_trial_that_is_clearly_worse_is_no_evidence_for_the_rates_near_it() -> None:
    x = np.linspace(-5.0, -1.0, 161)
    alive = [ObservedTrial(at, "complete", [1], [value]) for at, value in ((-4.0, 0.5), (-3.0, 0.9), (-2.0, 0.88))]
    evidence = x[_has_evidence(alive, x, np.full(161, 0.01))]
    assert evidence.min() == pytest.approx(-3.0 - REACH_DECADES)
    assert evidence.max() == pytest.approx(-2.0)
    assert not np.any((evidence > -3.0 + REACH_DECADES + 0.01) & (evidence < -2.0 - REACH_DECADES - 0.01))


def test_rates_that_diverged_or_were_pruned_are_no_evidence() -> None:
    whole = [trained(x, curve(0.9 + x / 20)) for x in (-4.0, -3.7, -3.4, -3.0)]
    pruned = [trained(x, curve(0.9 + x / 20, until=3), "pruned") for x in (-2.5, -2.0)]
    assert response([*whole, *pruned, ObservedTrial(-1.3, "diverged", [], [])], num_epochs=30).best <= 1e-3


def test_where_the_interval_is_most_of_the_range_nothing_is_determined() -> None:
    assert response(make_trials(EVENLY, hill, noise=0.005)).is_determined
    assert not response(make_trials(np.geomspace(1e-4, 1e-2, 5), hill, noise=0.2)).is_determined


def test_the_best_rate_has_two_digits() -> None:
    for seed in range(3):
        best = response(make_trials(EVENLY, hill, noise=0.01, seed=seed)).best
        assert best == float(f"{best:.2g}")


def test_low_values_are_held_by_the_band_as_high_ones_are() -> None:
    values = {-5.0: 0.2, -4.5: 0.35, -4.0: 0.6, -3.5: 0.8, -3.0: 0.86, -2.5: 0.87, -2.0: 0.84, -1.5: 0.6}
    found = response(make_trials([10**x for x in values], lambda x: values[round(x, 1)]))
    for x, value in values.items():
        index = at(found, 10**x)
        assert found.low[index] - 0.02 <= value <= found.high[index] + 0.02
    assert min(found.low) >= 0
    assert max(found.high) <= 1


def test_networks_that_die_late_are_dead_and_the_edge_lies_below_them() -> None:
    whole = [trained(x, curve(0.9 + 0.05 * x)) for x in np.linspace(-5, -2.4, 8)]
    late = [trained(-2.0, [*curve(0.8, until=20), *[0.1] * 10]), trained(-1.8, [*curve(0.8, until=5), *[0.1] * 25])]
    # The same answer to every image, of a class that is more common than others.
    constant = [trained(-1.5, [0.19] * 30), trained(-1.2, [0.19] * 30)]
    young = [trained(x, curve(0.8, until=2), "pruned") for x in (-1.9, -1.7)]
    found = response([*whole, *late, *constant, *young], num_epochs=30)
    assert found.divergence_lr is not None
    assert 10**-2.4 < found.divergence_lr.lr < 10**-1.9
    assert found.best <= 10**-2.35
    assert (found.num_diverged, found.num_guessing) == (0, 4)


def test_the_sensitivity_is_the_mean_shortfall_over_the_range() -> None:
    shortfall = float(np.mean([0.9 - hill(x) for x in np.linspace(-5, -1, 161)]))
    assert response(make_trials(EVENLY, hill)).sensitivity == pytest.approx(shortfall, abs=0.01)
    halved = make_trials(np.geomspace(LOW, 1e-3, 20), lambda x: 0.9, diverged=np.geomspace(1.2e-3, HIGH, 20))
    assert response(halved).sensitivity == pytest.approx((0.9 - 0.1) / 2, abs=0.03)


def test_what_is_known_leaves_little_to_gain_and_one_more_trial_brings_no_more_than_all_that_is_missing() -> None:
    few = response(make_trials(np.geomspace(LOW, HIGH, 5), hill, noise=0.005))
    many = response(make_trials(np.geomspace(LOW, HIGH, 40), hill, noise=0.005))
    assert 0 <= many.gain < 0.001
    assert few.gain > 0.005
    assert many.shortfall < 0.003 < few.shortfall
    for found in (few, many):
        assert found.gain <= found.shortfall
        assert (found.mirrored().gain, found.mirrored().shortfall) == (found.gain, found.shortfall)


def test_the_expected_gain_is_that_of_two_rates_of_which_one_is_unknown() -> None:
    # The value at the first rate is 0, at the second it is normal about 0: the better of the two is worth 0.4 of its
    # deviation more, seen without noise; with as much noise as deviation, 1 / sqrt(2) of that.
    worth = np.stack([np.zeros(40_000), np.random.default_rng(0).standard_normal(40_000)], axis=1)
    for noise, gain in ((0.0, 0.4), (1.0, 0.4 / math.sqrt(2))):
        found = _expected_gain(
            worth, np.array([noise, noise]), np.array([-3.0, -2.0]), has_evidence=np.array([True, False])
        )
        assert found == pytest.approx(gain, abs=0.02)


def test_a_flat_response_is_all_plateau() -> None:
    found = response(make_trials(EVENLY, lambda x: 0.8, noise=0.01))
    low, high = found.plateau
    assert math.log10(high / low) > 2
    assert found.sensitivity < 0.01
    assert found.value == pytest.approx(0.8, abs=0.01)  # and not the luckiest trial's


def test_what_little_is_known_of_does_not_do_equally_well() -> None:
    """A rate whose trials were pruned young may be as good; what is expected of it is far behind."""
    grown = [1 - math.exp(-epoch / 6) for epoch in range(1, 31)]
    ends = [(1e-3, 0.8, 30), (2e-2, 0.25, 30), (5e-3, 0.7, 3), (6e-4, 0.7, 1), (1e-4, 0.6, 1), (1e-5, 0.5, 1)]
    trials = [
        ObservedTrial(
            math.log10(lr),
            "complete" if epochs == 30 else "pruned",
            range(1, epochs + 1),
            [value * share for share in grown[:epochs]],
        )
        for lr, value, epochs in ends
    ]
    found = response(trials, num_epochs=30)
    assert found.high[at(found, 1e-4)] > found.value
    for lr in found.plateau:
        assert found.mean[at(found, lr)] >= max(found.mean) - found.noise - 0.01


def test_very_many_trials_are_no_trouble() -> None:
    lrs = 10 ** np.random.default_rng(1).uniform(-5, -1, 1000)
    found = response(make_trials(lrs, hill, noise=0.05))
    assert hill(math.log10(found.best)) > 0.9 - 0.005  # a tenth of the noise
    assert found.noise == pytest.approx(0.05, rel=0.5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_values_of_any_size_will_do(scale: float) -> None:
    found = response(make_trials(EVENLY, lambda x: scale * hill(x)), floor=-math.inf, is_share=False)
    assert found.best == pytest.approx(1e-3, rel=0.3)
    assert found.value == pytest.approx(0.9 * scale, rel=0.02)


def test_equal_values_are_no_division_by_zero() -> None:
    found = response(make_trials(EVENLY, lambda x: 0.5))
    assert found.value == pytest.approx(0.5)
    assert all(map(math.isfinite, [*found.mean, *found.low, *found.high, found.sensitivity, found.noise]))


def test_mirrored_is_the_same_seen_from_below() -> None:
    found = response(make_trials(EVENLY, hill))
    mirrored = found.mirrored()
    assert mirrored.mean == [-value for value in found.mean]
    assert all(a <= b <= c for a, b, c in zip(mirrored.low, mirrored.mean, mirrored.high, strict=True))
    assert (mirrored.best, mirrored.interval, mirrored.value) == (found.best, found.interval, -found.value)
    assert mirrored.mirrored() == found


def test_json_has_the_keys_that_it_always_had() -> None:
    found = response(make_trials(EVENLY, hill, diverged=[0.5]))
    plain = found.as_dict()
    assert found.divergence_lr is not None
    assert plain["edge"] == {"lr": found.divergence_lr.lr, "interval": found.divergence_lr.interval}
    assert plain["tops"] == found.draws_of_best
    assert not {"divergence_lr", "draws_of_best"} & plain.keys()


def test_in_figures_is_plain_data_without_the_curves() -> None:
    figures = response(make_trials(EVENLY, hill, diverged=[0.5])).summary_dict()
    assert figures.keys() == {
        "best",
        "value",
        "interval",
        "plateau",
        "edge",
        "sensitivity",
        "noise",
        "shortfall",
        "gain",
        "num_diverged",
        "num_guessing",
    }
    assert figures["edge"].keys() == {"lr", "interval"}


def test_the_plateau_is_no_excuse_for_diverging_and_the_best_lies_in_the_interval() -> None:
    for seed in range(5):
        trained = np.geomspace(LOW, 1e-3, 12)
        found = response(
            make_trials(trained, lambda x: 0.9 + 0.15 * x, diverged=np.geomspace(2e-3, HIGH, 8), noise=0.01, seed=seed)
        )
        assert found.diverging[at(found, found.plateau[1])] < 0.15
        assert found.interval[0] <= found.best <= found.interval[1]
        assert found.lrs[0] <= found.interval[0] < found.interval[1] <= found.lrs[-1]


@pytest.mark.parametrize("huge", [1e4, 1e30, 1e155, 1e300])
def test_one_huge_loss_moves_nothing(huge: float) -> None:
    trials = make_trials(EVENLY, lambda x: -0.05 - 0.1 * (x + 3) ** 2, diverged=[0.2, 0.4])
    usual = response(trials, floor=-math.inf, is_share=False)
    found = response([trained(trials[0].x, [-huge]), *trials[1:]], floor=-math.inf, is_share=False)
    assert found.best == pytest.approx(usual.best, rel=0.5)
    assert found.value == pytest.approx(usual.value, abs=0.05)
    assert found.sensitivity < 2


@pytest.mark.parametrize("diverged", [[1e-3], [1e-5, 2e-5, 4e-5]])
def test_where_only_rates_below_others_diverge_there_is_no_edge(diverged: list[float]) -> None:
    assert response(make_trials(np.geomspace(6e-5, HIGH, 14), hill, diverged=diverged)).divergence_lr is None
