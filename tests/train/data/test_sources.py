"""The processes that read images stay from one epoch to the next, show in no digit, and end when nobody needs them."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.data.images import LabeledImages
from hpo.train.data.sources import StreamSource, batch_bounds
from tests.rows import slow_except
from tests.train.data.datasets_under_test import epoch, load

NUM_IMAGES, BATCH_SIZE, NUM_PROCESSES = 12, 2, 2


class Images(LabeledImages):
    """Images whose pixels are what `pixel` makes of their index."""

    def __init__(self, pixel: Callable[[int], int]) -> None:
        self.labels_N = torch.zeros(NUM_IMAGES, dtype=torch.int64)
        self._pixel = pixel

    def read(self, indices_B: Tensor) -> Tensor:
        pixels = [self._pixel(int(index)) for index in indices_B]
        return torch.tensor(pixels, dtype=torch.uint8)[:, None, None, None]


def source(pixel: Callable[[int], int]) -> StreamSource:
    return StreamSource(Images(pixel), torch.arange(NUM_IMAGES), device=torch.device("cpu"))


def batches(*, seed: int = 0) -> list[Tensor]:
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(seed))
    return [order[start:end] for start, end in batch_bounds(NUM_IMAGES, BATCH_SIZE)]


def positions(*, seed: int = 0) -> list[int]:
    return torch.cat(batches(seed=seed)).tolist()


def read(stream: StreamSource, *, seed: int = 0) -> list[int]:
    return torch.cat(list(stream.read(batches(seed=seed)))).flatten().tolist()


def children() -> set[int]:
    """Return the processes that this one has started and that still run."""
    running = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                running.add(child.pid)
    return running


@pytest.fixture(autouse=True)
def new_children() -> Iterator[Callable[[], set[int]]]:
    """Return a function that returns the processes that this test has started; none must be left after it."""
    before = children()
    yield lambda: children() - before
    gc.collect()  # an exception that was raised keeps what its frames had, until then
    assert children() <= before


def test_each_split_keeps_its_processes_from_epoch_to_epoch(
    image_folder_root: Path, new_children: Callable[[], set[int]]
) -> None:
    data = load("image_folder", root=str(image_folder_root), placement="stream")
    assert data.test is not None
    seen = []
    for number in range(3):
        epoch(data, number=number, batch_size=8)
        for loader in (data.val, data.test):
            assert len(list(loader.batches(1))) == len(loader)
        seen.append(new_children())
    assert len(seen[0]) == 3 * NUM_PROCESSES
    assert seen[1:] == seen[:1] * 2


def test_an_epoch_that_was_left_in_its_middle_leaves_nothing_to_the_next(new_children: Callable[[], set[int]]) -> None:
    stream = source(lambda index: index)
    assert read(stream, seed=1) == positions(seed=1)
    processes = new_children()
    for num_read in range(4):
        left = stream.read(batches(seed=2))
        for _ in range(num_read):
            next(left)
        left.close()  # type: ignore[attr-defined]
        assert read(stream, seed=3) == positions(seed=3)
    assert new_children() == processes


def test_readers_at_the_same_time_get_their_own_batches() -> None:
    stream = source(lambda index: index)
    both = zip(stream.read(batches(seed=1)), stream.read(batches(seed=2)), strict=True)
    one, other = zip(*both, strict=True)
    assert torch.cat(one).flatten().tolist() == positions(seed=1)
    assert torch.cat(other).flatten().tolist() == positions(seed=2)


def test_processes_end_with_their_source(new_children: Callable[[], set[int]]) -> None:
    stream = source(lambda index: index)
    read(stream)
    assert len(new_children()) == NUM_PROCESSES
    del stream
    assert new_children() == set()


def test_another_number_of_batches_may_need_another_number_of_processes(
    new_children: Callable[[], set[int]],
) -> None:
    stream = source(lambda index: index)
    whole = [torch.arange(NUM_IMAGES)]
    for _ in range(2):
        assert len(list(stream.read(whole))) == 1
        assert len(new_children()) == 1
        assert read(stream) == positions()
        assert len(new_children()) == NUM_PROCESSES


def test_an_image_that_cannot_be_read_costs_its_epoch_alone(
    tmp_path: Path, new_children: Callable[[], set[int]]
) -> None:
    is_damaged = tmp_path / "damaged"

    def pixel(index: int) -> int:
        if index == 5 and is_damaged.exists():
            raise UserError("image 5 is damaged")
        return index

    stream = source(pixel)
    read(stream)
    processes = new_children()
    is_damaged.touch()
    with pytest.raises(UserError, match=r"^image 5 is damaged$"):
        read(stream)
    is_damaged.unlink()
    assert read(stream, seed=4) == positions(seed=4)
    assert new_children() == processes


def test_after_the_death_of_a_process_others_take_its_place(new_children: Callable[[], set[int]]) -> None:
    stream = source(lambda index: index)
    read(stream)
    dead = min(new_children())

    def read_without() -> None:
        os.kill(dead, signal.SIGKILL)
        read(stream)

    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        read_without()
    assert read(stream) == positions()
    assert dead not in new_children()


def test_ctrl_c_leaves_the_epoch_in_training_its_images(new_children: Callable[[], set[int]]) -> None:
    stream = source(lambda index: index)
    read(stream)
    processes = new_children()
    for pid in processes:
        os.kill(pid, signal.SIGINT)  # a terminal sends it to all processes of the command
    assert read(stream, seed=1) == positions(seed=1)
    assert new_children() == processes


def test_what_a_dataset_draws_does_not_depend_on_the_epochs_before() -> None:
    import random

    import numpy

    def drawn(index: int) -> int:
        return (int(torch.randint(64, ())) + random.randrange(64) + int(numpy.random.randint(64))) % 256

    stream = source(drawn)
    draws = read(stream)
    assert len(set(draws)) > 2
    assert read(stream) == draws
    next(stream.read(batches()))
    assert read(stream) == draws
    assert read(source(drawn)) == draws


def test_a_forked_process_leaves_its_parents_processes_alone(new_children: Callable[[], set[int]]) -> None:
    stream = source(lambda index: index)
    read(stream)
    processes = new_children()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            status = 0 if read(stream, seed=1) == positions(seed=1) else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(stream, seed=2) == positions(seed=2)
    assert new_children() == processes


READER = """
import sys, time, psutil, torch
from hpo.train.config import DataConfig
from hpo.train.data.loading import load_data

torch.set_num_threads(2)
data = load_data(DataConfig(name="image_folder", root=sys.argv[1], placement="stream"), device="cpu")
list(data.train.batches(8, seed=0))
print(*[child.pid for child in psutil.Process().children()], flush=True)
if sys.argv[2] == "killed":
    time.sleep(1e6)
"""


@pytest.mark.parametrize("end", slow_except(["returns", "killed"], "killed"))
def test_processes_end_with_the_process_that_started_them(
    end: str, image_folder_root: Path, wait_for: Callable[..., Any]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(image_folder_root), end], text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) >= NUM_PROCESSES
        if end == "killed":
            process.kill()
        assert process.wait() == (0 if end == "returns" else -signal.SIGKILL)
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def test_where_shared_memory_cannot_be_written_images_are_read_without_processes(
    monkeypatch: pytest.MonkeyPatch, new_children: Callable[[], set[int]]
) -> None:
    def read_only() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("hpo.train.data.sources.multiprocessing.Lock", read_only)
    assert read(source(lambda index: index)) == positions()
    assert not new_children()


@pytest.mark.parametrize("free", [0, 10**9])
def test_where_shared_memory_is_small_batches_take_another_way(
    free: int, monkeypatch: pytest.MonkeyPatch, new_children: Callable[[], set[int]]
) -> None:
    monkeypatch.setattr("hpo.train.data.sources.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    stream = StreamSource(
        Images(lambda index: index), torch.arange(NUM_IMAGES), device=torch.device("cpu"), bytes_per_image=1
    )
    assert read(stream) == positions()
    assert new_children()
    (loader,) = stream._idle
    assert loader.dataset.by_value == (free == 0)  # type: ignore[attr-defined]
