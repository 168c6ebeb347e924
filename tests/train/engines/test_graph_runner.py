"""How graphs are captured, without a GPU: torch.cuda's part is played by a fake that notes what it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hpo.errors import UserError
from hpo.train.engines.captured import _GraphRunner
from hpo.train.engines.captured_optimizers import NotCapturable
from tests.train.engines.trials import CPU


class FakeCuda:
    """Notes what torch.cuda is asked for; `is_waiting_allowed` is what its debug mode of waiting says."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.mode = 0
        self.error: Exception | None = None  # of the device

    @property
    def is_waiting_allowed(self) -> bool:
        return self.mode == 0

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = {"default": 0, "error": 2}.get(str(mode), 0)

    def synchronize(self, device: torch.device) -> None:
        self.events.append("wait for the device")
        if self.error is not None:
            raise self.error

    @contextlib.contextmanager
    def graph(self, graph: object, **options: Any) -> Iterator[None]:
        self.events.append("begin a capture")
        yield
        self.events.append("end a capture")


class Stream:
    def __init__(self, device: torch.device) -> None: ...

    def wait_stream(self, other: object) -> None: ...


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: fake.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", fake.set_sync_debug_mode)
    monkeypatch.setattr(_GraphRunner, "_drawing_from_own_generator", lambda runner: contextlib.nullcontext())
    return fake


def test_what_waits_for_the_device_is_refused_before_a_capture_begins(cuda: FakeCuda) -> None:
    """A capture that fails leaves torch's allocator in a state from which it does not recover."""

    def wait() -> None:
        if not cuda.is_waiting_allowed:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(NotCapturable, match="called a synchronizing CUDA operation"):
        _GraphRunner(CPU).capture({"step": lambda: None, "val": wait}, before_each=lambda: None)
    assert "begin a capture" not in cuda.events
    assert cuda.is_waiting_allowed


def test_a_capture_itself_may_wait_where_torch_does(cuda: FakeCuda) -> None:
    allowed: list[bool] = []
    _GraphRunner(CPU).capture({"step": lambda: allowed.append(cuda.is_waiting_allowed)}, before_each=lambda: None)
    assert allowed == [True, True, False, True]
    assert cuda.events == ["wait for the device", "begin a capture", "end a capture"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (NotCapturable("it has parameters that its output does not depend on"), NotCapturable),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (UserError("training.lr must be given"), UserError),
        (ValueError("of a user's network"), NotCapturable),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_whatever_is_raised_the_device_is_done_before_the_lanes_memory_is_freed(
    error: Exception, raised: type[Exception], cuda: FakeCuda
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(raised, match=str(error)):
        _GraphRunner(CPU).capture({"step": fail}, before_each=lambda: None)
    assert cuda.events == ["wait for the device"]


def test_an_error_after_which_nothing_computes_is_the_devices(cuda: FakeCuda) -> None:
    cuda.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def fail() -> None:
        raise ValueError("whatever came first")

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        _GraphRunner(CPU).capture({"step": fail}, before_each=lambda: None)
