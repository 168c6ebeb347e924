"""The flags of TF32 are a trial's while it trains, are evaluated and ramped, and afterwards what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines import lane_state
from hpo.train.engines.lane_state import numerics
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.stack import TrialStack, stack_key
from hpo.train.lr_ramp import run_range_test
from tests.train.engines import trials

CPU = torch.device("cpu")
CUDNN: Any = torch.backends.cudnn
OPERATIONS = [CUDNN.conv, CUDNN.rnn, torch.backends.cuda.matmul]


def test_a_network_that_calls_view_is_that_which_flattens() -> None:
    """`view` raises in channels_last; the order of its additions is all that may differ."""
    losses = []
    for how in ("view", "flatten"):
        options = {"how": how}
        model = ModelConfig(name="own_lane_networks:Viewing", options=options)
        for engine in (PlainEngine(device="cpu"), LaneEngine(device="cpu", lanes=2)):
            engine.admit(trials.trial(model=model))
            losses.append(engine.run_epoch()[0].val_loss)
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-4)


def by_operation() -> list[str]:
    return [operation.fp32_precision for operation in OPERATIONS]


def allowed() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def set_legacy(*, convolutions: bool, products: bool) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def set_by_operation(precision: str) -> None:
    for operation in OPERATIONS:
        operation.fp32_precision = precision


def set_general(precision: str) -> None:
    torch.backends.fp32_precision = precision  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    yield
    set_general("none")
    set_legacy(convolutions=True, products=False)  # torch's defaults


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: None,
        lambda: set_legacy(convolutions=False, products=False),
        lambda: set_legacy(convolutions=True, products=True),
        lambda: set_by_operation("ieee"),
        lambda: set_by_operation("tf32"),
        lambda: set_general("tf32"),
        lambda: set_general("ieee"),
    ],
    ids=["defaults", "none", "all", "new none", "new all", "general tf32", "general ieee"],
)
@pytest.mark.parametrize("tf32", [False, True])
def test_the_flags_are_set_and_given_back(prepare: Callable[[], None], tf32: bool) -> None:
    """Whichever of torch's two sets of names somebody used before, and though mixing them makes reading raise."""
    prepare()
    before = by_operation()
    with numerics(tf32=tf32):
        assert by_operation() == 3 * (["tf32"] if tf32 else ["ieee"])
        assert allowed() == (tf32, tf32)
        with numerics(tf32=not tf32):
            assert allowed() == (not tf32, not tf32)
        assert allowed() == (tf32, tf32)
    assert by_operation() == before


def test_the_old_names_are_given_back() -> None:
    for given in ((True, False), (False, True)):
        set_legacy(convolutions=given[0], products=given[1])
        with pytest.raises(ZeroDivisionError), numerics(tf32=True):
            raise ZeroDivisionError
        assert allowed() == given


def trial(*, tf32: bool) -> TrialConfig:
    training = TrainingConfig(lr=1e-3, batch_size=64, epochs=1, precision="fp32", tf32=tf32, report_test_accuracy=True)
    data = DataConfig(train_samples=150)
    return TrialConfig(model=ModelConfig(options={"width": 0.05}), data=data, training=training, seed=3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Return the flags of each convolution from here on, but for those that find a network's memory format."""
    monkeypatch.setattr(lane_state, "fit_memory_format", lambda model, _: model)
    flags: list[tuple[bool, bool]] = []
    convolve = torch.nn.Conv2d.forward

    def forward(self: torch.nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        flags.append(allowed())
        return convolve(self, images)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    return flags


@pytest.mark.parametrize("tf32", [False, True])
def test_a_trial_computes_as_it_says(tf32: bool, seen: list[tuple[bool, bool]]) -> None:
    config = trial(tf32=tf32)
    plain = PlainEngine(device="cpu")
    plain.admit(config)
    plain.run_epoch()
    plain.test_metrics(config, plain.checkpoint(0))
    run_range_test(config, device="cpu")
    assert set(seen) == {(tf32, tf32)}
    seen.clear()
    stack = TrialStack(config, data=DatasetCache(device=CPU).get(config.data), device=CPU, convolution="grouped")
    assert set(seen) == {(False, False)}  # the probe is strict
    stack.admit(config)
    seen.clear()
    stack.run_epoch()
    assert set(seen) == {(tf32, tf32)}


def test_trials_of_different_numerics_do_not_share_a_stack() -> None:
    assert stack_key(trial(tf32=False)) != stack_key(trial(tf32=True))
