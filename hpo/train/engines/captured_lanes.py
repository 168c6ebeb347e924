"""The engine of captured lanes: trials of any kinds side by side on one device, each by its own CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hpo.train.checkpoint import Checkpoint, config_digest
from hpo.train.config import EpochResult, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.captured import CapturedLane, capture_key
from hpo.train.engines.plain import PlainLaneState, build_lane, restore
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.snapshot import Snapshot

# Steps that a lane is given before the next lane's turn: few enough for all lanes to be busy soon after an epoch
# begins, and for the device's queues (about 1,000 launches a stream) not to keep the host waiting.
STEPS_PER_TURN = 32


class CapturedLanes(Engine):
    """An engine of captured lanes; there is always another one."""

    def __init__(
        self,
        *,
        device: torch.device,
        dataset_cache: DatasetCache | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make an engine without a lane.

        Args:
            device: Where the trials are trained.
            dataset_cache: Where datasets on this device are kept; None: a cache of its own.
            should_stop: Asked before each step, from the training thread; it has to be quick.
        """
        self._device, self._should_stop = device, should_stop
        self._dataset_cache = dataset_cache or DatasetCache(device=device)
        self._lanes: dict[int, CapturedLane] = {}  # those with a trial, by number
        self._idle: list[CapturedLane] = []  # captured, and ready for another trial of their kind
        self._is_whole = True  # between two epochs, not within one

    def __len__(self) -> int:
        """Return the number of trials."""
        return len(self._lanes)

    @property
    def free_lanes(self) -> int:
        """Return 1: there is always another lane."""
        return 1

    @property
    def keys(self) -> set[str]:
        """Return the kinds of the trials, as `capture_key` gives them."""
        return {lane.key for lane in self._lanes.values()}

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None) -> int:
        """Set a trial up, ready for its next epoch; see `Engine`. Raises NotCapturable where it cannot be captured."""
        assert checkpoint is None or checkpoint.config_digest == config_digest(config), "another trial's checkpoint"
        plain = self._build_plain(config)
        if checkpoint is not None:
            restore(plain, checkpoint)
        return self._load(plain)

    def fill(self, config: TrialConfig, lanes: int) -> None:
        """Train one trial in so many lanes, to measure how long they take; `clear` forgets all of them."""
        plain = self._build_plain(config)
        while len(self._lanes) < lanes:
            self._load(plain)

    def issue_step(self) -> int:
        """Issue a step of every lane, in epochs without end, and return the number of images."""
        num_images = 0
        for lane in self._lanes.values():
            if lane.is_at_end:
                lane.begin_epoch()
            num_images += lane.step()
        return num_images

    def clear(self) -> None:
        """Forget all trials."""
        for lane in list(self._lanes):
            self.evict(lane)

    def evict(self, lane: int) -> None:
        """Forget the trial in a lane, whose graphs wait for another one; see `Engine`."""
        evicted = self._lanes.pop(lane)
        evicted.trial = None
        self._idle.append(evicted)
        self._is_whole = self._is_whole or not self._lanes

    def snapshot(self, lane: int) -> Snapshot:
        """Return the trial in a lane after its last epoch; see `Engine`."""
        assert self._is_whole, "the trials are in the middle of an epoch"
        return self._lanes[lane].snapshot()

    def run_epoch(self) -> list[EpochResult]:
        """Train every trial for one epoch; see `Engine`."""
        assert self._lanes, "there is no trial to train"
        start_s = time.perf_counter()
        self._is_whole = False
        waiting, training = list(self._lanes.values()), list[CapturedLane]()
        while waiting or training:
            if waiting:  # its epoch is drawn while the lanes before it train
                lane = waiting.pop(0)
                lane.begin_epoch()
                training.append(lane)
            for lane in training:
                self._issue_steps(lane)
            training = [lane for lane in training if not lane.is_at_end]
        seconds = time.perf_counter() - start_s
        results = [lane.finish_epoch(lane=number, seconds=seconds) for number, lane in self._lanes.items()]
        self._is_whole = True
        return results

    def drop_idle(self, *, keep: int = 0) -> None:
        """Free the memory of lanes without a trial, but for so many."""
        while len(self._idle) > keep:
            self._idle.pop().close()

    def _issue_steps(self, lane: CapturedLane) -> None:
        """Issue a lane's next steps, and its evaluation after the last one."""
        for _ in range(STEPS_PER_TURN):
            if lane.is_at_end:
                break
            if self._should_stop():
                raise Stopped
            lane.step()
        if lane.is_at_end:
            lane.evaluate()

    def _build_plain(self, config: TrialConfig) -> PlainLaneState:
        for lane in [lane for lane in self._idle if lane.config.data != config.data]:  # they hold another dataset
            self._idle.remove(lane)
            lane.close()
        return build_lane(config, data=self._dataset_cache.for_trial(config), device=self._device)

    def _load(self, plain: PlainLaneState) -> int:
        lane = self._take_lane(plain.config)
        lane.load(plain)
        number = next(number for number in range(len(self._lanes) + 1) if number not in self._lanes)
        self._lanes[number] = lane
        return number

    def _take_lane(self, config: TrialConfig) -> CapturedLane:
        """Return a lane for trials of this kind: an idle one, or a new one, in whose place an idle one is dropped."""
        key = capture_key(config)
        for lane in self._idle:
            if lane.key == key:
                self._idle.remove(lane)
                return lane
        if self._idle:
            self._idle.pop(0).close()
        like = next((lane for lane in self._lanes.values() if lane.key == key), None)
        data = self._dataset_cache.for_trial(config)
        return CapturedLane(config, data=data, device=self._device, like=like)
