"""A trial on several devices: a process for each, its *rank*, with the same network and a slice of each batch.

The gradients are averaged by torch's DistributedDataParallel (Li et al., arXiv 2006.15704). Rank 0 is the engine of a
worker; it starts the others, tells them what to train, and alone evaluates and reports. Whatever ends an epoch early
ends the others, too: they are started anew for the next trial. Each has the data set for itself, draws the dropout of
its own slice, and normalises it by its own statistics where there is batch norm, of which rank 0's are kept.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hpo.errors import UserError
from hpo.system.safe_path import SAFE_PATH
from hpo.train.checkpoint import Checkpoint
from hpo.train.config import EpochResult, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.lane_state import ALONE, Rank, numerics
from hpo.train.engines.plain import PlainEngine, PlainLaneState
from hpo.train.engines.protocol import Stopped
from hpo.train.imports import open_allowlists
from hpo.train.seeding import seed_generators

logger = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
WAIT_S = 10.0  # for a rank that was told to end, or that has failed, until it is killed; and for torch to notice that
LOOK_S = 1.0


class RankEngine(PlainEngine):
    """The plain engine in one of several processes, which train the trial's epochs at the same time."""

    def __init__(self, rank: Rank, *, device: str, **options: Any) -> None:
        """Make an engine without a trial; `options` are the plain engine's."""
        super().__init__(device=_device_of(device, rank), **options)
        self._rank = rank

    def join(self, store: Any) -> None:
        """Meet the other ranks, which all call this, with what `meeting_place` returns."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        distributed.init_process_group(backend, store=store, rank=self._rank.number, world_size=self._rank.of)

    def follow(self, results: list[EpochResult]) -> None:
        """Train the next epoch as rank 0 does, after these ones."""
        assert self._lane is not None, "there is no trial to train"
        self._lane.results = results
        with numerics(tf32=self._lane.config.training.tf32):
            self._train(self._lane)
        self._lane.begin_evaluation()  # as on rank 0: an optimizer may move the weights by rounding

    def _train(self, lane: PlainLaneState) -> tuple[Tensor, float]:
        """Train an epoch; return the loss of each step and the correct images of all ranks."""
        lane.begin_training()  # what is frozen now is not averaged
        forward, lane.rank = lane.forward, self._rank
        assert isinstance(forward, nn.Module)
        # Made anew for each epoch, so that one which follows a checkpoint adds in the same order as any other. To look
        # for unused parameters keeps torch from another order after the first step, and lets there be some.
        lane.forward = DistributedDataParallel(forward, find_unused_parameters=True)
        try:
            losses_S, hits = super()._train(lane)
        finally:
            lane.forward, lane.rank = forward, ALONE
        sums = torch.cat([losses_S.double() / self._rank.of, torch.tensor([float(hits)])]).to(self.device)
        distributed.all_reduce(sums)
        return sums[:-1].float().cpu(), sums[-1].item()

    def _seed_epoch(self, lane: PlainLaneState) -> None:
        own = [self._rank.number] if self._rank.number else []
        seed_generators(lane.config.seed, "epoch", lane.epoch, *own)


class DistributedEngine(RankEngine):
    """Rank 0: an engine of one lane, whose trial trains on several devices. Call `close` where it is no longer used."""

    def __init__(
        self,
        *,
        device: str,
        num_ranks: int,
        should_stop: Callable[[], bool] = lambda: False,
        dataset_cache: DatasetCache | None = None,
    ) -> None:
        """Make an engine without a trial.

        Args:
            device: The device, as torch names it: "cpu", whose threads the ranks share, or the first of the GPUs.
            num_ranks: How many processes train each trial.
            should_stop: Asked before each step, from the training thread; it has to be quick.
            dataset_cache: Where datasets on this device are kept; None: a cache of its own.
        """
        rank = Rank(0, num_ranks)
        super().__init__(rank, device=device, should_stop=should_stop, dataset_cache=dataset_cache)
        self._device_name = device
        self._threads = max(1, torch.get_num_threads() // num_ranks) if device == "cpu" else torch.get_num_threads()
        self._others: list[OtherRank] = []

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None) -> int:
        """Set a trial up in all ranks; see `Engine`."""
        torch.set_num_threads(self._threads)
        with self._ending_others_on_error():
            if not self._others:
                self._start_others()
            for other in self._others:
                other.tell("admit", config, checkpoint)
            lane = super().admit(config, checkpoint)
            try:
                for other in self._others:
                    other.wait()
            except BaseException:
                super().evict(lane)
                raise
        return lane

    def run_epoch(self) -> list[EpochResult]:
        """Train the trial for one epoch in all ranks; see `Engine`."""
        assert self._lane is not None, "there is no trial to train"
        with self._ending_others_on_error():
            for other in self._others:
                other.tell("follow", list(self._lane.results))
            results = super().run_epoch()
            for other in self._others:
                other.wait()
        return results

    def evict(self, lane: int) -> None:
        """Forget the trial in all ranks; see `Engine`."""
        with self._ending_others_on_error():
            for other in self._others:
                other.tell("evict", 0)
                other.wait()
        super().evict(lane)

    def close(self) -> None:
        """End the other ranks."""
        for other in self._others:
            other.end()
        self._others.clear()
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def _train(self, lane: PlainLaneState) -> tuple[Tensor, float]:
        with self._ending_with_a_dead_rank():
            return super()._train(lane)

    def _start_others(self) -> None:
        store = meeting_place(self._rank)
        task = (self._device_name, store.port, self._threads, open_allowlists())
        self._others = [OtherRank(Rank(number, self._rank.of), task) for number in range(1, self._rank.of)]
        for other in self._others:
            other.wait()  # until it has loaded torch
        for other in self._others:
            other.tell("join")
        with self._ending_with_a_dead_rank():
            self.join(store)
        for other in self._others:
            other.wait()

    @contextmanager
    def _ending_with_a_dead_rank(self) -> Iterator[None]:
        """End this process, the worker, where another rank has ended and torch waits for it all the same.

        NCCL notices no death, and gloo none of a rank whose children hold its connections: they wait for 10 and 30
        minutes, and nothing in this process can end that. The trial resumes in a new worker.
        """
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(LOOK_S):
                ended = next((other for other in self._others if not other.is_alive), None)
                if ended is not None and not is_over.wait(WAIT_S):
                    logger.error("%s; torch would wait for it forever, so the worker ends", ended.problem())
                    os._exit(1)

        threading.Thread(target=watch, daemon=True, name="ranks").start()
        try:
            yield
        finally:
            is_over.set()

    @contextmanager
    def _ending_others_on_error(self) -> Iterator[None]:
        """End the other ranks on any exception; raise what has gone wrong in one of them in its place."""
        try:
            yield
        except (RankFailed, Stopped, UserError):
            self.close()
            raise
        except BaseException as error:
            problem = next((problem for other in self._others if (problem := other.problem())), None)
            self.close()
            if problem is not None:
                raise RankFailed(problem) from error
            raise


class RankFailed(RuntimeError):
    """A process other than rank 0 has failed or ended; the message says why."""


class OtherRank:
    """Another rank, as rank 0 sees it: a process that does what it is told, and answers each time."""

    def __init__(self, rank: Rank, task: tuple[Any, ...]) -> None:
        self._rank = rank
        self._connection, theirs = Pipe()
        command = [sys.executable, *SAFE_PATH, "-m", "hpo.train.engines.other_rank", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._send((rank, *task))

    def tell(self, method: str, *arguments: Any) -> None:
        """Have it call a method of its engine."""
        self._send((method, arguments))

    def wait(self) -> None:
        """Wait until it has done what it was told, or raise what has gone wrong there."""
        if (problem := self._receive()) is not None:
            raise RankFailed(problem)

    def problem(self) -> str | None:
        """Return what has gone wrong there, or None where nothing has, as far as it shows in a moment."""
        with suppress(OSError):
            if self._connection.poll(WAIT_S if self.is_alive else 0):
                return self._receive()
        return None if self.is_alive else self._end_text()

    @property
    def is_alive(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _send(self, value: object) -> None:
        try:
            self._connection.send_bytes(pickle.dumps(value))
        except OSError as error:
            raise RankFailed(self._end_text()) from error

    def _receive(self) -> str | None:
        try:
            while not self._connection.poll(LOOK_S):  # no end of file where a child of a dead rank holds the connection
                if not self.is_alive and not self._connection.poll():
                    return self._end_text()
            answer: str | None = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return self._end_text()
        return None if answer is None else f"rank {self._rank.number} of {self._rank.of} failed: {answer}"

    def _end_text(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(WAIT_S)
        return f"rank {self._rank.number} of {self._rank.of} has ended, with code {self._process.poll()}"


def meeting_place(rank: Rank, *, port: int = 0) -> Any:
    """Return torch's store where the ranks meet: rank 0 keeps it, on a free port, which the others are told."""
    return distributed.TCPStore(  # type: ignore[attr-defined]
        LOCALHOST, port, rank.of, is_master=rank.number == 0, wait_for_workers=False
    )


def _device_of(device: str, rank: Rank) -> str:
    """Return the device of a rank: the worker sees as many GPUs as there are ranks, and no others."""
    return f"cuda:{rank.number}" if device.startswith("cuda") else device
