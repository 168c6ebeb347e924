"""Snapshots are the trial bit for bit, whatever is trained meanwhile, and never keep the training thread waiting.

There is no GPU here. The CPU plays one, or the device "meta", whose tensors hold nothing: copying one to the CPU by any
operation but ours would raise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.train import snapshot as snapshots
from hpo.train.checkpoint import Checkpoint, storable_copy
from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.protocol import Engine
from hpo.train.engines.stack import TrialStack
from hpo.train.snapshot import Packing, Snapshot

CONFIG = TrialConfig(
    model=ModelConfig(options={"width": 0.05}),
    data=DataConfig(train_samples=100),
    training=TrainingConfig(lr=1e-2, epochs=3, batch_size=50),
    seed=1,
)
STATE: dict[str, Any] = {
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 2).t(),
    "expanded": torch.randn(3, 1).expand(3, 2),
    "half": torch.randn(5, dtype=torch.bfloat16),
    "double": torch.randn(5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
    "step": torch.tensor(3.0),
    "count": torch.tensor(2**40),
    "complex": torch.randn(3, dtype=torch.complex128),
    "nothing": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "sparse": torch.eye(3).to_sparse(),
    "groups": [{"lr": 0.1, "moments": (torch.randn(7), None)}],
}


class InstantCopy:
    """A copy that is made at once, or raises when it is waited for."""

    num_made = 0
    error: Exception | None = None

    def __init__(self, packed: Tensor) -> None:
        type(self).num_made += 1
        self._host = packed.clone()

    def wait(self) -> Tensor:
        if self.error is not None:
            raise self.error
        return self._host


@pytest.fixture
def cpu_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> type[InstantCopy]:
    monkeypatch.setattr(snapshots, "PACKED_DEVICES", {"cpu"})
    copies = type("Copies", (InstantCopy,), {})
    monkeypatch.setattr(snapshots, "HostCopy", copies)
    return copies


def snapshot_of(state: dict[str, Any], *, device: str = "cpu") -> Snapshot:
    packing = Packing(torch.device(device))
    copied = storable_copy(state, setting="model.name", copy_tensor=packing.add)
    return Snapshot(Checkpoint(config_digest="", epoch=2, state=copied, results=[]), packing)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert type(one) is Tensor
        assert (one.dtype, one.shape, one.layout, one.requires_grad) == (other.dtype, other.shape, other.layout, False)
        if one.layout == torch.strided:
            assert one.stride() == other.stride()
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
        assert torch.equal(one.to_dense(), other.to_dense())
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for item, its in zip(one, other, strict=True):
            assert_same(item, its)
    else:
        assert one == other


def test_a_packed_state_is_that_of_single_copies(cpu_is_a_gpu: type[InstantCopy]) -> None:
    taken = snapshot_of(STATE)
    assert (taken.epoch, taken.checkpoint().epoch) == (2, 2)
    assert_same(taken.checkpoint().state, storable_copy(STATE, setting="model.name"))
    assert cpu_is_a_gpu.num_made == 1


def engines() -> Iterator[Engine]:
    plain = PlainEngine(device="cpu")
    yield plain
    plain.admit(CONFIG)
    assert plain._lane is not None
    yield TrialStack(CONFIG, data=plain._lane.data, device=torch.device("cpu"), convolution="grouped")


def test_later_training_does_not_change_a_snapshot(cpu_is_a_gpu: type[InstantCopy]) -> None:
    for engine in engines():
        lane = engine.admit(CONFIG)
        engine.run_epoch()
        taken, expected = engine.snapshot(lane), engine.checkpoint(lane)
        engine.run_epoch()
        assert_same(taken.checkpoint().state, expected.state)
        with pytest.raises(AssertionError):
            assert_same(engine.checkpoint(lane).state, expected.state)
        engine.evict(lane)
        assert replace(taken.checkpoint(), state={}) == replace(expected, state={})


def test_what_the_copy_raises_reaches_whoever_waits_for_it(cpu_is_a_gpu: type[InstantCopy]) -> None:
    cpu_is_a_gpu.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    taken = snapshot_of(STATE)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        taken.checkpoint()


def test_a_device_without_room_for_the_buffer_is_copied_from_tensor_by_tensor(
    cpu_is_a_gpu: type[InstantCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        taken = snapshot_of(STATE)
    assert_same(taken.checkpoint().state, storable_copy(STATE, setting="model.name"))
    assert cpu_is_a_gpu.num_made == 0


def test_a_host_that_pins_no_more_memory_costs_time_and_not_the_trial(
    cpu_is_a_gpu: type[InstantCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(packed: Tensor) -> InstantCopy:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(snapshots, "HostCopy", full)
    assert_same(snapshot_of(STATE).checkpoint().state, storable_copy(STATE, setting="model.name"))


# What the training thread asks of a GPU


class FakeGPU(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The device "meta", which notes what it is asked for and does no copies that leave it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, dict(kwargs or {})
        on_device = [argument.device.type == "meta" for argument in args if isinstance(argument, Tensor)]
        if kwargs.pop("pin_memory", False):
            self.events.append("pin memory")
        elif name == "copy_" and on_device == [False, True]:
            self.events.append("copy to the host" if args[2:] == (True,) else "copy to the host and wait")
            return args[0]
        elif name == "copy_" and on_device == [True, True]:
            self.events.append("copy on the device")
        return function(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    """Have tensors on "meta" and torch.cuda's streams and events be those of a GPU that notes what it does."""
    fake = FakeGPU()
    note = fake.events.append

    class Stream:
        def __init__(self, device: torch.device, priority: int) -> None:
            assert priority < 0

        def wait_stream(self, other: object) -> None:
            assert other == "the training's stream"
            note("the side stream waits for training")

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking

        def record(self, stream: Stream) -> None:
            note("record the event")

        def synchronize(self) -> None:
            note("wait for the event")

    @contextlib.contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        note("enter the side stream")
        yield
        note("leave the side stream")

    monkeypatch.setattr(snapshots, "PACKED_DEVICES", {"meta"})
    snapshots._side_stream.cache_clear()
    monkeypatch.setattr(Tensor, "record_stream", lambda packed, stream: note("keep the buffer"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the training's stream")
    return fake


def test_the_training_thread_launches_one_copy_to_the_host_and_waits_for_nothing(gpu: FakeGPU) -> None:
    state = {name: torch.empty(3, 4, device="meta") for name in ("weight", "exp_avg", "exp_avg_sq")}
    with gpu:
        taken = snapshot_of(state | {"step": torch.tensor(1.0)}, device="meta")
        assert gpu.events == [
            *["copy on the device"] * 3,
            "pin memory",
            "the side stream waits for training",
            "enter the side stream",
            "copy to the host",
            "record the event",
            "leave the side stream",
            "keep the buffer",
        ]
        gpu.events.clear()
        checkpoint = taken.checkpoint()
    assert gpu.events == ["wait for the event"]
    assert all(tensor.device.type == "cpu" for tensor in checkpoint.state.values())
    snapshots._side_stream.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_a_packed_state_is_that_of_single_copies() -> None:
    state = {name: value.cuda() for name, value in STATE.items() if isinstance(value, Tensor)}
    taken = snapshot_of(state, device="cuda:0")
    expected = storable_copy(state, setting="model.name")
    for tensor in state.values():
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # what shares its memory with itself
            tensor.zero_()
    assert_same(taken.checkpoint().state, expected)
