"""The branches of the GPU day's sections that only a GPU takes, on a pretended one.

Here torch's CUDA functions are stand-ins that take what the real ones take, and the device is still the CPU. So
names and arguments are checked, and what a GPU computes is not.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Self
from unittest import mock

import pytest
import torch

from hpo.system import devices
from hpo.train.data.datasets import DATASETS
from tests.rows import slow_except

REPOSITORY = Path(__file__).parents[2]
FUNCTIONS = {
    "synchronize": None,
    "empty_cache": None,
    "set_sync_debug_mode": None,
    "get_device_name": "a pretended GPU",
    "get_device_capability": (9, 0),
    "is_bf16_supported": True,
    "mem_get_info": (3_000_000_000, 8_000_000_000),
    "max_memory_allocated": 1_000_000,
    "reset_peak_memory_stats": None,
    "set_per_process_memory_fraction": None,
    "device_count": 1,
}
# Not those that only start processes, and not the profiler, whose CUDA part is no function of torch.cuda's.
SECTIONS = ["facts", "proof", "waits", "plain", "captured", "rates", "article", "resume", "probe", "memory"]
SECTIONS += ["checkpoints", "pinning", "convolutions", "queues"]
ONLY_ON_A_GPU = {
    "facts": {"cuda", "copy_bytes_per_s", "launch_us", "graph_kernel_us"},
    "proof": {"hidden"},
    "rates": {"plain_benchmark", "captured_benchmark.16"},
    "memory": {"plan.600_mb", "step.80_mb", "first_use.product", "first_use.capture", "limit", "pinned"},
    "pinning": {"worker"},
    "queues": {"8", "32"},
}
GPU = devices.Device("cuda:0", "cuda", "a pretended GPU", 8_000_000_000, "GPU-0")


class Pretended:
    """A stand-in for a class of torch.cuda: it takes what the real one takes."""

    def __init__(self, real: type) -> None:
        self.real = real
        self._start_s = time.perf_counter()

    def __call__(self, *arguments: Any, **keywords: Any) -> Self:
        maker = vars(self.real).get("__new__") or vars(self.real)["__init__"]
        inspect.signature(maker).bind(self.real, *arguments, **keywords)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.real, name)  # AttributeError where the real class has none

        def call(*arguments: Any) -> float:
            inspect.signature(method).bind(self, *arguments)
            return 1e3 * (time.perf_counter() - self._start_s)  # of elapsed_time, in milliseconds

        return call


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Return a function that imports a section, with a GPU that is not there."""
    monkeypatch.syspath_prepend(REPOSITORY)
    for name, value in FUNCTIONS.items():
        real = getattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(real, return_value=value))
    for name in ("Stream", "Event", "CUDAGraph", "graph", "stream"):
        real = getattr(torch.cuda, name)
        stand_in = Pretended(torch.cuda.StreamContext if name == "stream" else real)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: torch.cuda.Stream)
    properties = mock.Mock(uuid="0", total_memory=8_000_000_000)
    properties.name = "a pretended GPU"
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        mock.create_autospec(torch.cuda.get_device_properties, return_value=properties),
    )
    empty = torch.empty

    def empty_unpinned(*shape: int, pin_memory: bool = False, **keywords: Any) -> torch.Tensor:
        return empty(*shape, **keywords)

    monkeypatch.setattr(torch, "empty", empty_unpinned)
    common = import_module("scripts.gpu_day.common")

    def here(function: Callable[..., Any], *arguments: Any, timeout_s: float, environment: Any = None) -> Any:
        return function(*arguments)

    stand_ins = {"on_gpu": lambda: True, "device": lambda: torch.device("cpu"), "in_child": here}

    def prepared(name: str) -> Any:
        section = import_module(f"scripts.gpu_day.sections.{name}")
        for module in (common, section, import_module("scripts.gpu_day.sections.rates")):
            monkeypatch.setattr(devices, "_torch_cuda_devices", lambda: [GPU])
            for attribute, stand_in in stand_ins.items():
                if hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, stand_in)
        return section

    with mock.patch.dict(DATASETS):  # a section adds its own
        yield prepared
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("name", slow_except(SECTIONS, "facts", "convolutions"))
def test_what_only_a_gpu_takes_runs(name: str, pretended_gpu: Callable[[str], Any], tmp_path: Path) -> None:
    module = pretended_gpu(name)
    common, figures = import_module("scripts.gpu_day.common"), import_module("scripts.gpu_day.figures")
    section = common.Section(
        figures=figures.Figures(tmp_path, name),
        is_tiny=True,
        folder=tmp_path,
        packages=None,
        started_at=time.time(),
        limit_s=600.0,
    )
    module.run(section)
    found = figures.read_figures(tmp_path)
    assert {key: value for key, value in found.items() if key.endswith(".error")} == {}
    assert {f"{name}.{key}" for key in ONLY_ON_A_GPU.get(name, ())} <= found.keys()
    assert "nothing to do on a CPU" not in found.values()
