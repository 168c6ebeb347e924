"""Devices: what is listed, what "auto" takes, what a worker is pinned to; NVML is a fake, the processes are real."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TypeVar

import pytest

from hpo.errors import UserError
from hpo.system import devices
from hpo.system.devices import (
    Device,
    choose_devices,
    group_devices,
    list_devices,
    num_cores,
    threads_per_worker,
    torch_device,
    worker_environment,
)

GPUS = ["GPU-aaaa0000", "GPU-aaaa1111", "GPU-bbbb2222"]
MIG = "MIG-cccc3333"
INSTANCES = ["MIG-dddd4444", "MIG-dddd5555"]  # of the second GPU, where that is divided
INSTANCE_BYTES = 20 * 2**30
T = TypeVar("T")
MEMORY_BYTES = 80 * 2**30


class FakeNVML(ModuleType):
    """The part of pynvml that we call, for the machine of `GPUS`; a handle is a UUID, `pids` says who runs where."""

    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):
        pass

    class NVMLError_DriverNotLoaded(NVMLError):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    NVML_DEVICE_MIG_DISABLE, NVML_DEVICE_MIG_ENABLE = 0, 1

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.pids: dict[str, list[int]] = {}
        self.mps_pids: dict[str, list[int]] = {}
        self.names: dict[int, str | bytes] = {}  # of processes
        self.instances: dict[str, list[str]] = {}  # of each GPU in MIG mode
        self.refuses: dict[str, Exception] = {}
        self.num_open = 0

    def _answer(self, function: str, answer: T) -> T:
        if function in self.refuses:
            raise self.refuses[function]
        return answer

    def nvmlInit(self) -> None:
        self._answer("nvmlInit", None)
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self._answer("nvmlDeviceGetCount", len(GPUS))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return GPUS[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid in [*GPUS, MIG, *INSTANCES]
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H100 80GB HBM3" + (" MIG 2g.20gb" if handle in INSTANCES else "")

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        total = INSTANCE_BYTES if handle in INSTANCES else MEMORY_BYTES
        return self._answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(total=total))

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if handle == GPUS[0]:
            raise self.NVMLError("Not Supported")  # as GPUs before Ampere do
        return [int(handle in self.instances), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        instances = dict(enumerate(self.instances[handle], start=1))
        if index not in instances:
            raise self.NVMLError_NotFound("Not Found")
        return instances[index]

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        processes = [SimpleNamespace(pid=pid) for pid in self.mps_pids.get(handle, [])]
        return self._answer("nvmlDeviceGetMPSComputeRunningProcesses", processes)

    def nvmlSystemGetProcessName(self, pid: int) -> str | bytes:
        if pid not in self.names:
            raise self.NVMLError_NotFound("Not Found")
        return self.names[pid]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        processes = [SimpleNamespace(pid=pid) for pid in self.pids.get(handle, [])]
        return self._answer("nvmlDeviceGetComputeRunningProcesses", processes)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNVML]:
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_torch_cuda_devices", list)
    monkeypatch.setattr(devices, "_mps_devices", list)
    yield fake
    assert fake.num_open == 0, "NVML was left open"


@pytest.fixture
def no_driver(nvml: FakeNVML) -> FakeNVML:
    nvml.refuses["nvmlInit"] = nvml.NVMLError_LibraryNotFound("NVML Shared Library Not Found")
    return nvml


def stranger() -> int:
    """Return the pid of a process that is neither ours nor an ancestor: no process has one this high."""
    return 2**31 - 1


def names(chosen: list[devices.Device]) -> list[str]:
    return [device.name for device in chosen]


def test_every_gpu_is_listed_with_its_label_memory_and_uuid_and_the_cpu_comes_last(nvml: FakeNVML) -> None:
    listed = list_devices()
    assert names(listed) == ["cuda:0", "cuda:1", "cuda:2", "cpu"]
    assert [device.uuid for device in listed] == [*GPUS, None]
    assert {device.label for device in listed[:-1]} == {"NVIDIA H100 80GB HBM3"}
    assert {device.memory_bytes for device in listed[:-1]} == {MEMORY_BYTES}
    assert listed[-1].label
    assert listed[-1].memory_bytes


@pytest.mark.parametrize(
    ("variable", "visible"),
    [
        (None, GPUS),
        ("0,1,2", GPUS),
        ("2,0", [GPUS[2], GPUS[0]]),
        (" 1 , 0 ", [GPUS[1], GPUS[0]]),
        (GPUS[1], [GPUS[1]]),
        ("GPU-b", [GPUS[2]]),
        ("GPU-b,0", [GPUS[2], GPUS[0]]),
        (MIG, [MIG]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [GPUS[0]]),
        ("0,7,1", [GPUS[0]]),
        ("NoDevFiles", []),
        ("1,nonsense,2", [GPUS[1]]),
        ("GPU-aaaa", []),  # two begin so
        ("GPU-ffff,0", []),
        ("0,0", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch, variable: str | None, visible: list[str]
) -> None:
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    *cuda, cpu = list_devices()
    assert [device.uuid for device in cuda] == visible
    assert names(cuda) == [f"cuda:{index}" for index in range(len(visible))]
    assert cpu.kind == "cpu"


def test_auto_takes_the_free_gpus_and_says_which_it_passes_over(
    nvml: FakeNVML, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.pids = {GPUS[1]: [stranger()]}
    with caplog.at_level(logging.WARNING):
        assert names(choose_devices("auto")) == ["cuda:0", "cuda:2"]
    assert f"cuda:1 by pid {stranger()}" in caplog.text


def test_the_instances_of_a_divided_gpu_are_listed_each_with_its_own_memory(nvml: FakeNVML) -> None:
    nvml.instances = {GPUS[1]: INSTANCES}
    *cuda, _ = list_devices()
    assert names(cuda) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [device.uuid for device in cuda] == [GPUS[0], *INSTANCES, GPUS[2]]
    assert [device.memory_bytes for device in cuda] == [MEMORY_BYTES, INSTANCE_BYTES, INSTANCE_BYTES, MEMORY_BYTES]
    assert cuda[1].label == "NVIDIA H100 80GB HBM3 MIG 2g.20gb"
    assert worker_environment(cuda[2], threads=1)["CUDA_VISIBLE_DEVICES"] == INSTANCES[1]


def test_a_gpu_that_is_divided_into_nothing_cannot_be_trained_on(nvml: FakeNVML) -> None:
    nvml.instances = {GPUS[1]: []}
    assert [device.uuid for device in list_devices()] == [GPUS[0], GPUS[2], None]


@pytest.mark.parametrize(
    ("variable", "visible"),
    [
        ("1", INSTANCES[:1]),
        (GPUS[1], INSTANCES[:1]),
        (f"{INSTANCES[1]},{INSTANCES[0]}", [INSTANCES[1], INSTANCES[0]]),
        ("0,1,2", [GPUS[0], INSTANCES[0], GPUS[2]]),
    ],
)
def test_cuda_takes_the_first_instance_for_a_divided_gpu_that_is_named(
    nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch, variable: str, visible: list[str]
) -> None:
    nvml.instances = {GPUS[1]: INSTANCES}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [device.uuid for device in list_devices()] == [*visible, None]


@pytest.mark.parametrize("name", ["/usr/bin/nvidia-cuda-mps-server", b"nvidia-cuda-mps-server"])
def test_an_mps_server_occupies_no_gpu_and_its_clients_do(nvml: FakeNVML, name: str | bytes) -> None:
    server, client = stranger() - 1, stranger()
    nvml.names = {server: name, client: "python"}
    nvml.pids = {GPUS[0]: [server], GPUS[1]: [server]}
    nvml.mps_pids = {GPUS[1]: [client]}
    assert [device.occupied_by for device in list_devices()] == [(), (client,), (), ()]


def test_our_own_process_our_parents_and_our_children_do_not_occupy_a_gpu(nvml: FakeNVML) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        nvml.pids = dict(zip(GPUS, [[os.getpid()], [os.getppid()], [child.pid]], strict=True))
        assert names(choose_devices("auto")) == ["cuda:0", "cuda:1", "cuda:2"]
    finally:
        child.communicate(b"\n")


def test_where_every_gpu_is_occupied_auto_refuses_and_says_how_to_name_one(nvml: FakeNVML) -> None:
    nvml.pids = {uuid: [stranger()] for uuid in GPUS}
    with pytest.raises(UserError, match=rf"--devices auto .*all are occupied .*{stranger()}.*--devices cuda:0"):
        choose_devices("auto")
    assert names(choose_devices("cuda:1")) == ["cuda:1"]


def test_without_a_driver_auto_is_the_cpu_and_nothing_is_logged(
    no_driver: FakeNVML, caplog: pytest.LogCaptureFixture
) -> None:
    assert names(list_devices()) == names(choose_devices("auto")) == ["cpu"]
    assert not caplog.records


def test_auto_prefers_mps_to_the_cpu(no_driver: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    mps = devices.Device("mps", "mps", "Apple GPU", None)
    monkeypatch.setattr(devices, "_mps_devices", lambda: [mps])
    assert names(list_devices()) == ["mps", "cpu"]
    assert choose_devices("auto") == choose_devices("mps") == [mps]


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount"])
def test_where_nvml_breaks_torch_is_asked_and_the_reason_is_logged(
    nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    nvml.refuses[function] = nvml.NVMLError("Driver/library version mismatch")
    seen_by_torch = devices.Device("cuda:0", "cuda", "NVIDIA T4", MEMORY_BYTES, GPUS[0])
    monkeypatch.setattr(devices, "_torch_cuda_devices", lambda: [seen_by_torch])
    assert choose_devices("auto") == [seen_by_torch]
    assert "Driver/library version mismatch" in caplog.text


def test_a_driver_that_tells_neither_memory_nor_processes_still_gives_devices(nvml: FakeNVML) -> None:
    for function in (
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetMPSComputeRunningProcesses",
    ):
        nvml.refuses[function] = nvml.NVMLError("Not Supported")
    chosen = choose_devices("auto")
    assert names(chosen) == ["cuda:0", "cuda:1", "cuda:2"]
    assert {device.memory_bytes for device in chosen} == {None}


def test_torch_sees_the_gpus_that_nvml_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    properties = SimpleNamespace(name="NVIDIA T4", total_memory=MEMORY_BYTES, uuid="aaaa0000")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert devices._torch_cuda_devices() == [
        devices.Device("cuda:0", "cuda", "NVIDIA T4", MEMORY_BYTES, uuid="GPU-aaaa0000")
    ]


@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        ("cpu", ["cpu"]),
        ("cuda", ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:2, cuda:0", ["cuda:2", "cuda:0"]),
        ("cuda:1,cpu", ["cuda:1", "cpu"]),
    ],
)
def test_devices_are_chosen_in_the_order_they_are_named(nvml: FakeNVML, request_: str, chosen: list[str]) -> None:
    assert names(choose_devices(request_)) == chosen


@pytest.mark.parametrize("request_", ["cuda:3", "mps", "gpu", "", "cpu,", "cpu,cuda:9", "auto,cpu"])
def test_a_device_that_is_not_there_is_refused_and_those_that_are_listed(nvml: FakeNVML, request_: str) -> None:
    with pytest.raises(
        UserError, match=r"unknown device '.*' in --devices; available: auto, cpu, cuda, cuda:0, cuda:1, cuda:2$"
    ):
        choose_devices(request_)


@pytest.mark.parametrize("request_", ["cpu,cpu", "cuda:0,cuda:1,cuda:0", "cuda,cuda:1"])
def test_a_device_named_twice_is_refused(nvml: FakeNVML, request_: str) -> None:
    with pytest.raises(UserError, match=f"--devices must name each device once; .*'{request_}'"):
        choose_devices(request_)


def test_a_device_hidden_by_cuda_visible_devices_is_explained(nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match=r"device 'cuda:1' .*, cuda:0 \(CUDA_VISIBLE_DEVICES is '0'\)"):
        choose_devices("cuda:1")


def test_a_worker_is_pinned_by_uuid_and_sees_its_gpu_as_the_first(
    nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = choose_devices("cuda:2,cpu")
    environment = worker_environment(gpu, threads=3)
    assert environment == {
        "CUDA_VISIBLE_DEVICES": GPUS[2],
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        **devices.STREAMS_ENVIRONMENT,
    }
    assert torch_device(gpu) == "cuda:0"
    assert worker_environment(cpu, threads=1)["CUDA_VISIBLE_DEVICES"] == ""
    assert torch_device(cpu) == "cpu"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment["CUDA_VISIBLE_DEVICES"])
    assert [device.uuid for device in list_devices()] == [GPUS[2], None]


def test_a_worker_on_a_gpu_has_room_for_many_streams_unless_the_user_wants_it_otherwise(
    nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in devices.STREAMS_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    gpu, cpu = choose_devices("cuda:2,cpu")
    environment = worker_environment(gpu, threads=1)
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
    assert not devices.STREAMS_ENVIRONMENT.keys() & worker_environment(cpu, threads=1).keys()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert worker_environment(gpu, threads=1)["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class FakeCuda:
    """The part of torch.cuda that tells which devices this process sees: those visible when it was first asked."""

    def __init__(self, seen: list[str] | None = None) -> None:
        self.seen = seen  # UUIDs as torch gives them; None before the first use

    def is_initialized(self) -> bool:
        return self.seen is not None

    def init(self) -> None:
        if self.seen is None:
            self.seen = [os.environ["CUDA_VISIBLE_DEVICES"].partition("-")[2]]

    def device_count(self) -> int:
        assert self.seen is not None
        return len(self.seen)

    def get_device_properties(self, index: int) -> SimpleNamespace:
        assert self.seen is not None
        return SimpleNamespace(uuid=self.seen[index])


GPU = devices.Device("cuda:1", "cuda", "NVIDIA H100", None, uuid=GPUS[1])


def fake_cuda(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeCuda:
    torch = ModuleType("torch")
    torch.cuda = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    return cuda


@pytest.mark.parametrize("before", [None, "", "0,1"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_process_is_pinned_for_the_run_alone_where_cuda_was_not_used_yet(
    monkeypatch: pytest.MonkeyPatch, before: str | None, fails: bool
) -> None:
    fake_cuda(monkeypatch, FakeCuda())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with contextlib.suppress(ZeroDivisionError), devices.pinned_here(GPU) as place:
        assert (place, os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda:0", GPUS[1])
        assert 1 / (not fails)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_where_cuda_was_used_before_the_device_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    cuda = fake_cuda(monkeypatch, FakeCuda(["aaaa0000", "bbbb2222", "aaaa1111"]))
    with devices.pinned_here(GPU) as place:
        assert (place, os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda:2", "1,0")
    cuda.seen = ["bbbb2222"]
    with pytest.raises(UserError, match=r"--devices cuda:1 must name a device that this process sees.*GPU-aaaa1111"):
        devices.pinned_here(GPU).__enter__()


def test_what_the_driver_has_read_before_torch_was_initialised_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check it for torch.cuda.is_available(), which has the driver read the variable and leaves torch uninitialised."""
    cuda = fake_cuda(monkeypatch, FakeCuda())
    monkeypatch.setattr(cuda, "init", lambda: setattr(cuda, "seen", ["aaaa0000", "aaaa1111"]))
    with devices.pinned_here(GPU) as place:
        assert place == "cuda:1"


def test_a_process_needs_no_pinning_to_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with devices.pinned_here(devices.Device("cpu", "cpu", "a CPU", None)) as place:
        assert (place, "CUDA_VISIBLE_DEVICES" in os.environ) == ("cpu", False)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, []),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, []),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, [2]),
        (
            {
                "proc/self/cgroup": "1:cpu:/other\n0::/jobs/ours\n",
                "sys/fs/cgroup/jobs/ours/cpu.max": "max 100000\n",
                "sys/fs/cgroup/jobs/cpu.max": "400000 100000\n",
            },
            [4],
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, [1]),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, []),
    ],
    ids=["none", "v2-unlimited", "v2", "v2-outer-group", "v1", "v1-unlimited"],
)
def test_a_containers_cpu_quota_is_read(tmp_path: Path, files: dict[str, str], cores: list[int]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(devices._cgroup_cores(tmp_path)) == cores


@pytest.fixture
def no_threads_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_threads_asked_for")
def test_workers_share_the_cores_and_each_gets_at_least_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(devices, "num_cores", lambda: 8)
    assert [threads_per_worker(num_workers) for num_workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]


@pytest.mark.usefixtures("no_threads_asked_for")
@pytest.mark.parametrize("name", devices.THREAD_VARIABLES)
@pytest.mark.parametrize(
    ("value", "threads"),
    [("1", 1), ("3", 3), (" 2 ", 2), ("2,1", 2), ("", 4), ("0", 4), ("-1", 4), ("many", 4), ("99999", 4)],
)
def test_the_number_of_threads_that_the_environment_asks_for_is_kept(
    name: str, value: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "num_cores", lambda: 8)
    monkeypatch.setenv(name, value)
    assert threads_per_worker(2) == threads


def test_importing_devices_loads_neither_torch_nor_optuna() -> None:
    program = "import sys, hpo.system.devices; sys.exit(bool({'torch', 'optuna', 'pynvml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_gpus_are_grouped_for_trials_that_take_several() -> None:
    gpus = [Device(f"cuda:{index}", "cuda", "NVIDIA H100", 80, uuid=f"GPU-{index}") for index in range(5)]
    first, second = group_devices(gpus, 2)
    assert (first.name, first.label, first.uuid) == ("cuda:0+cuda:1", "2 x NVIDIA H100", "GPU-0,GPU-1")
    assert second.name == "cuda:2+cuda:3"
    assert worker_environment(first, threads=4)["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert torch_device(first) == "cuda:0"
    assert group_devices(gpus, 1) == gpus
    cpu = Device("cpu", "cpu", "a CPU", None)
    assert group_devices([cpu], 4) == [cpu]
    with pytest.raises(UserError, match=r"devices_per_trial = 6 needs as many CUDA devices, or the CPU; got cuda:0, "):
        group_devices(gpus, 6)
