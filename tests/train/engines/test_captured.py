"""A trial in a captured lane is the plain engine's, whatever its neighbours are and whoever had the lane before.

The lanes' functions run uncaptured here, as on every CPU. Between captured lanes it is bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hpo.train.config import ModelConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines import captured as captured_module
from hpo.train.engines.captured import CapturedLane, capture_key
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.captured_optimizers import NotCapturable
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.planning import LanePlan
from hpo.train.engines.protocol import Stopped
from tests.rows import slow_except
from tests.train.engines.replay import RecordedGraph, ReplayingRunner
from tests.train.engines.trials import (
    ARTICLE,
    BATCH_NORM,
    CPU,
    DROPOUT,
    EPOCHS,
    EPS,
    QUICK_SETTINGS,
    SETTINGS,
    UNUSUAL,
    WITH_RULE,
    assert_close,
    assert_equal,
    timeless,
    train,
    trial,
)

NETWORKS = {"article": ARTICLE, "batch_norm": BATCH_NORM, "dropout": DROPOUT, "unusual": UNUSUAL}


@pytest.mark.parametrize(
    "settings", slow_except(SETTINGS, *QUICK_SETTINGS), ids=lambda given: given.get("schedule", given["optimizer"])
)
def test_every_optimizer_and_schedule_is_the_plain_engines(settings: dict[str, Any]) -> None:
    config = trial(**settings, weight_decay=1e-2, gradient_clip=1.0, label_smoothing=0.1)
    captured = CapturedLanes(device=CPU)
    another = captured.admit(replace(config, seed=9))
    captured.run_epoch()
    captured.evict(another)  # its lane is the trial's now
    assert_close(train(captured, config), train(PlainEngine(device="cpu"), config))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_is_the_plain_engines_among_others(name: str) -> None:
    """Others of its kind and of other kinds join, diverge and leave meanwhile."""
    config = trial(model=NETWORKS[name], optimizer="sgd", momentum=0.9)
    others = [
        replace(config, seed=1, training=replace(config.training, lr=1e30)),
        trial(model=DROPOUT, batch_size=32, optimizer="adagrad"),
        trial(model=BATCH_NORM, batch_size=50, optimizer="adam"),
        replace(config, seed=2),
    ]
    captured = CapturedLanes(device=CPU)
    held = [captured.admit(other) for other in others[:2]]
    lane = captured.admit(config)
    for epoch in range(EPOCHS):
        held.append(captured.admit(others[2 + epoch % 2]))
        assert sorted(result.lane for result in captured.run_epoch()) == sorted([lane, *held])
        captured.evict(held.pop(0))
    among = captured.checkpoint(lane)
    assert_equal(among, train(CapturedLanes(device=CPU), config))
    assert_close(among, train(PlainEngine(device="cpu"), config))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        pytest.param(ARTICLE, {"optimizer": "adam"}, id="adam"),
        pytest.param(DROPOUT, {"optimizer": "adamw", "schedule": "one_cycle"}, id="dropout"),
        pytest.param(BATCH_NORM, {"optimizer": "sgd", "momentum": 0.9}, id="batch_norm"),
        pytest.param(UNUSUAL, {"optimizer": "sgd"}, id="unusual", marks=pytest.mark.slow),
        *(
            pytest.param(ARTICLE, {"optimizer": name}, id=name, marks=pytest.mark.slow)
            for name in WITH_RULE
            if name != "adam"
        ),
    ],
)
def test_graphs_need_nothing_from_the_host(
    model: ModelConfig, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With graphs emulated, a lane trains one trial after the other as the plain engine does."""
    monkeypatch.setattr(captured_module, "_EagerRunner", ReplayingRunner)
    config = trial(model=model, gradient_clip=1.0, eps=EPS, **{"schedule": "cosine", **settings})
    captured = CapturedLanes(device=CPU)
    another = captured.admit(replace(config, seed=9, training=replace(config.training, lr=1e-3)))
    captured.run_epoch()
    captured.evict(another)
    assert_close(train(captured, config), train(PlainEngine(device="cpu"), config))


def test_the_emulated_graph_repeats_what_the_host_computed() -> None:
    """The control: a number of the host's stays what it was, one on the device does not."""
    on_host, on_device, total = 1.0, torch.ones(()), torch.zeros(())
    with RecordedGraph() as graph:
        total += on_device * 2 + on_host
    on_host = 100.0
    on_device += 9
    graph.replay()
    assert float(total) == (1 * 2 + 1) + (10 * 2 + 1)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        pytest.param(DROPOUT, {"optimizer": "adam"}, id="fused"),
        pytest.param(BATCH_NORM, {"optimizer": "nadam"}, id="rule", marks=pytest.mark.slow),
        pytest.param(BATCH_NORM, {"optimizer": "sgd", "momentum": 0.9}, id="momentum"),
        pytest.param(BATCH_NORM, {"optimizer": "sgd"}, id="no-momentum", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_are_resumed_by_either_engine(model: ModelConfig, settings: dict[str, Any]) -> None:
    config = trial(model=model, schedule="cosine", eps=1e-4, epochs=3, **settings)
    plain, captured = PlainEngine(device="cpu"), CapturedLanes(device=CPU)
    whole = train(CapturedLanes(device=CPU), config)
    plain.admit(config)
    plain.run_epoch()
    lane = captured.admit(config, plain.checkpoint(0))
    captured.run_epoch()
    second = captured.checkpoint(lane)
    captured.run_epoch()
    assert_close(captured.checkpoint(lane), whole)
    plain.evict(0)
    plain.admit(config, second)
    plain.run_epoch()
    assert_close(plain.checkpoint(0), whole)
    again = CapturedLanes(device=CPU)
    again.admit(config, second)
    again.run_epoch()
    assert_equal(again.checkpoint(0), captured.checkpoint(lane))


def test_a_checkpoint_before_the_first_epoch_is_the_start() -> None:
    config = trial(optimizer="adam")
    captured = CapturedLanes(device=CPU)
    lane = captured.admit(config)
    start = captured.checkpoint(lane)
    captured.run_epoch()
    again = CapturedLanes(device=CPU)
    again.admit(config, start)
    assert timeless(again.run_epoch()) == timeless(list(captured.checkpoint(lane).results))


def test_the_test_accuracy_is_the_plain_engines() -> None:
    config = trial(data={"name": "digits", "train_samples": 150}, report_test_accuracy=True, epochs=1)
    expected = train(PlainEngine(device="cpu"), config).results[-1]
    found = train(CapturedLanes(device=CPU), config).results[-1]
    assert found.test_accuracy == pytest.approx(expected.test_accuracy, abs=0.01)
    assert found.test_accuracy is not None


def test_stops_before_the_next_step_and_forgets_what_was_begun() -> None:
    num_steps = 0

    def should_stop() -> bool:
        nonlocal num_steps
        num_steps += 1
        return num_steps == 3

    config = trial()
    captured = CapturedLanes(device=CPU, should_stop=should_stop)
    lanes = [captured.admit(config), captured.admit(replace(config, seed=4))]
    with pytest.raises(Stopped):
        captured.run_epoch()
    for lane in lanes:
        captured.evict(lane)
    assert_equal(train(captured, config), train(CapturedLanes(device=CPU), config))


def test_a_lane_is_captured_once_for_all_trials_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(CapturedLane, "_prepare", lambda lane: made.append(lane.key))
    captured = CapturedLanes(device=CPU)
    kinds = [trial(), trial(batch_size=32), trial(seed=5, lr=1e-3, schedule="cosine", epochs=9)]
    for config in kinds:
        captured.evict(captured.admit(config))
    # The second kind took the place of the first, so the third trial, of the first kind, needs a capture again.
    assert made == [capture_key(kinds[0]), capture_key(kinds[1]), capture_key(kinds[0])]
    for _ in range(3):
        captured.evict(captured.admit(kinds[2]))
    assert len(made) == 3


@pytest.mark.parametrize(
    ("changed", "is_same"),
    [
        ({"lr": 0.5, "schedule": "one_cycle", "epochs": 9, "warmup_epochs": 1.0, "checkpoint_epochs": 2}, True),
        ({"beta1": 0.5}, True),  # sgd does not read it
        ({"momentum": 0.5}, False),
        ({"weight_decay": 0.1}, False),
        ({"label_smoothing": 0.1}, False),
        ({"gradient_clip": 1.0}, False),
        ({"optimizer": "adam"}, False),
        ({"precision": "bf16"}, False),
        ({"tf32": True}, False),
        ({"ema": 0.9}, False),
    ],
)
def test_one_capture_serves_what_differs_in_no_constant_of_its_graphs(changed: dict[str, Any], is_same: bool) -> None:
    config = trial(optimizer="sgd", momentum=0.9)
    other = replace(config, seed=8, training=replace(config.training, **changed))
    assert (capture_key(config) == capture_key(other)) is is_same


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (trial(compile=True), "training.compile"),
        (trial(data={"augment": ["AugMix"]}), "data.augment draws on the host"),
        (trial(cutmix=1.0), "training.cutmix mix the images"),
        (trial(ema=0.9), "training.ema averages the weights"),
        (trial(gradient_accumulation=2), "training.gradient_accumulation trains a single network"),
        (trial(activation_checkpointing=True), "training.activation_checkpointing computes parts"),
        (trial(data={"placement": "stream"}), "its images are not on the device"),
        (trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "frozen"})), "not trained"),
        (trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "state"})), "get_extra_state"),
        (trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "torchscript"})), "TorchScript"),
        (trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "counter"})), "own attributes"),
        (trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "python_random"})), "on the host"),
        (trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "unused"})), "does not depend on"),
        (
            trial(
                model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "unused"}), optimizer="adagrad"
            ),
            "does not depend on",
        ),
    ],
    ids=[
        "compile",
        "augment",
        "cutmix",
        "ema",
        "accumulation",
        "recomputation",
        "stream",
        "frozen",
        "state",
        "torchscript",
        "counter",
        "random",
        "unused",
        "unused-rule",
    ],
)
def test_what_a_graph_would_lose_is_refused(config: TrialConfig, reason: str) -> None:
    with pytest.raises(NotCapturable, match=reason):
        CapturedLane(config, data=DatasetCache(device=CPU).get(config.data), device=CPU)


def test_fp16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "mixed_precision", lambda training, *, device: torch.float16)
    with pytest.raises(NotCapturable, match="in fp16 each trial skips steps of its own"):
        CapturedLane(trial(), data=DatasetCache(device=CPU).get(trial().data), device=CPU)


# In the engine of many lanes


CAPTURED_PLAN = LanePlan(device="the CPU", lanes=3, convolution=None, reason="agreed", is_captured=True)


def lane_engine() -> LaneEngine:
    return LaneEngine(device="cpu", get_or_set_plan=lambda device, measure: CAPTURED_PLAN)


def test_trials_of_several_kinds_train_at_once() -> None:
    configs = [trial(), trial(batch_size=32, optimizer="sgd"), trial(model=BATCH_NORM)]
    engine = lane_engine()
    lanes = [engine.admit(config) for config in configs]
    assert (engine.free_lanes, engine.is_interleaving, engine.next_lanes) == (0, False, lanes)
    for _ in range(EPOCHS):
        assert [result.lane for result in engine.run_epoch()] == lanes
    for lane, config in zip(lanes, configs, strict=True):
        assert_close(engine.checkpoint(lane), train(PlainEngine(device="cpu"), config))


def test_a_trial_that_cannot_be_captured_trains_alone_among_those_that_are(caplog: pytest.LogCaptureFixture) -> None:
    alone = trial(model=ModelConfig(name="own_lane_networks:doubtful", options={"kind": "frozen"}))
    engine = lane_engine()
    lanes = [engine.admit(config) for config in (trial(), alone, trial(seed=4))]
    assert "trains alone: it has parameters that are not trained" in caplog.text
    once = PlainEngine(device="cpu")
    once.admit(alone)
    once.run_epoch()
    turns = [[result.lane for result in engine.run_epoch()] for _ in range(2)]
    assert turns == [[lanes[0], lanes[2]], [lanes[1]]]
    assert_equal(engine.checkpoint(lanes[1]), once.checkpoint(0))


def test_an_error_in_captured_lanes_has_their_trials_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, config = lane_engine(), trial()
    lanes = [engine.admit(config), engine.admit(replace(config, seed=4))]
    monkeypatch.setattr(CapturedLane, "step", lambda lane: (_ for _ in ()).throw(ValueError("of a replay")))
    with pytest.raises(ValueError, match="of a replay"):
        engine.run_epoch()
    for lane in lanes:
        engine.evict(lane)
    lane = engine.admit(config)
    engine.run_epoch()  # by the plain engine
    engine.evict(lane)
    assert_equal(train(engine, config), train(PlainEngine(device="cpu"), config))


@pytest.mark.parametrize(
    "words", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", "CUDA out of memory"]
)
def test_running_out_of_memory_is_no_fault_of_the_kind(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, config = lane_engine(), trial()
    lane = engine.admit(config)
    with monkeypatch.context() as patch:
        patch.setattr(CapturedLane, "step", lambda lane: (_ for _ in ()).throw(RuntimeError(words)))
        with pytest.raises(RuntimeError, match=words[:12]):
            engine.run_epoch()
    engine.evict(lane)
    made = [engine.admit(config), engine.admit(replace(config, seed=4))]
    assert [result.lane for result in engine.run_epoch()] == made  # captured still, and together


def test_a_suspect_trains_in_no_captured_lane() -> None:
    engine = lane_engine()
    lanes = [engine.admit(trial()), engine.admit(trial(seed=4), may_share=False)]
    assert [[result.lane for result in engine.run_epoch()] for _ in range(2)] == [[lanes[0]], [lanes[1]]]
