"""The engine of many lanes on one device, by the plan that was measured for it.

Trials train in captured lanes (`captured_lanes.py`), or as one stack where they are of one kind (`stack.py`), and join
and leave between epochs. Plain engines train what can do neither, or gains nothing by it; these trials take turns of
one epoch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from hpo.train.checkpoint import Checkpoint
from hpo.train.config import EpochResult, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.captured import capture_key
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.captured_optimizers import NotCapturable
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.planning import MAX_LANES, LanePlan, device_kind, plan_lanes, plan_ranks
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.engines.ranks import DistributedEngine
from hpo.train.engines.stack import TrialStack, stack_key
from hpo.train.engines.stacked_network import NotStackable
from hpo.train.failures import is_out_of_memory
from hpo.train.snapshot import Snapshot

logger = logging.getLogger(__name__)


class LaneEngine(Engine):
    """An engine of many lanes; trials that can only be trained alone take turns, and the log says why."""

    def __init__(
        self,
        *,
        device: str,
        lanes: int | None = None,
        max_lanes: int = MAX_LANES,
        num_interleaved: int = 1,
        is_one_kind: bool = True,
        num_ranks: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
        get_or_set_plan: Callable[[str, Callable[[], LanePlan]], LanePlan] = lambda device, measure: measure(),
    ) -> None:
        """Make an engine that measures nothing until the first trial is admitted.

        Args:
            device: The device, as torch names it.
            lanes: The number of lanes. None: as many as are fastest, found with the first trial.
            max_lanes: The most lanes that are tried when `lanes` is None.
            num_interleaved: How many trials take turns where each trains alone.
            is_one_kind: Whether all trials can share a stack.
            num_ranks: How many devices train each trial; the others follow `device`.
            should_stop: Asked before each step, from the training thread; it has to be quick.
            get_or_set_plan: Called with the kind of device and a function that plans. Returns the plan of the
                others that train the same study on such a device, or plans to be the first. All need the same
                plan, because whether trials are stacked changes their last digits.
        """
        self.device = torch.device(device)
        self.plan: LanePlan | None = None
        self._num_lanes, self._max_lanes, self._num_interleaved = lanes, max_lanes, num_interleaved
        self._is_one_kind, self._num_ranks = is_one_kind, num_ranks
        self._should_stop, self._get_or_set_plan = should_stop, get_or_set_plan
        self._dataset_cache = DatasetCache(device=self.device)
        self._places: dict[int, tuple[Engine, int]] = {}  # by lane: the engine that trains it, and its lane in that one
        self._captured = CapturedLanes(device=self.device, dataset_cache=self._dataset_cache, should_stop=should_stop)
        self._stacks: dict[str, TrialStack] = {}  # by `stack_key`
        self._distributed: DistributedEngine | None = None
        if num_ranks > 1:
            self._distributed = DistributedEngine(
                device=device, num_ranks=num_ranks, should_stop=should_stop, dataset_cache=self._dataset_cache
            )
        self._alone_keys: set[str] = set()  # of the kinds that can only be trained alone
        self._queue: deque[Engine] = deque()  # the engines that have trials, in the order of their turns

    @property
    def free_lanes(self) -> int:
        """Return how many more trials can be admitted; 1 until the first one sets the plan."""
        return max(0, (self.plan.lanes if self.plan else 1) - len(self._places))

    @property
    def is_interleaving(self) -> bool:
        """Return whether several trials that each train alone take turns."""
        return self.plan is not None and not self.plan.is_at_once and self.plan.lanes > 1

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None, *, may_share: bool = True) -> int:
        """Set a trial up, as every engine does; without `may_share` it trains in an engine of its own.

        On a CPU that engine gives the trial the digits that it would have alongside others.
        """
        assert self.free_lanes > 0, "all lanes are taken"
        if self.plan is None:
            data = self._dataset_cache.for_trial(config)
            self.plan = self._get_or_set_plan(
                device_kind(self.device),
                lambda: (
                    plan_lanes(
                        config,
                        data=data,
                        captured=self._captured,
                        device=self.device,
                        lanes=self._num_lanes,
                        max_lanes=self._max_lanes,
                        num_interleaved=self._num_interleaved,
                        is_one_kind=self._is_one_kind,
                    )
                    if self._num_ranks == 1
                    else plan_ranks(self.device, num_ranks=self._num_ranks)
                ),
            )
            self._drop_spare_lanes()  # of the lanes that were measured, where another worker's plan holds
        engine, lane_there = self._admit(config, checkpoint, may_share=may_share)
        lane = next(number for number in range(self.plan.lanes) if number not in self._places)
        self._places[lane] = (engine, lane_there)
        if engine not in self._queue:
            self._queue.append(engine)
        return lane

    @property
    def next_lanes(self) -> list[int]:
        """Return the lanes that the next `run_epoch` trains: those of one engine, which may have one."""
        return [lane for lane, (engine, _) in self._places.items() if engine is self._queue[0]]

    def run_epoch(self) -> list[EpochResult]:
        """Train the lanes whose turn it is for one epoch; see `Engine`."""
        assert self._places, "there is no trial to train"
        engine = self._queue[0]
        lanes = {self._places[lane][1]: lane for lane in self.next_lanes}
        try:
            results = [replace(result, lane=lanes[result.lane]) for result in engine.run_epoch()]
        except Stopped:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # The cause may be the stack, whose check saw only one batch, or a capture.
            self._alone_keys |= {key for key, stack in self._stacks.items() if stack is engine}
            if engine is self._captured:
                self._alone_keys |= self._captured.keys
            raise
        self._queue.rotate(-1)
        return results

    def snapshot(self, lane: int) -> Snapshot:
        """Return the trial in a lane after its last epoch; see `Engine`."""
        engine, lane_there = self._places[lane]
        return engine.snapshot(lane_there)

    def test_metrics(self, config: TrialConfig, checkpoint: Checkpoint) -> dict[str, float]:
        """Return the accuracy, the loss and the trial's metric on the test set of the network in a checkpoint.

        Raises UserError where the dataset has no test images, or they cannot be read.
        """
        return self._plain_engine().test_metrics(config, checkpoint)

    def evict(self, lane: int) -> None:
        """Forget the trial in a lane and free its memory; see `Engine`."""
        engine, lane_there = self._places.pop(lane)
        engine.evict(lane_there)
        self._drop_spare_lanes()
        if all(other is not engine for other, _ in self._places.values()):
            self._queue.remove(engine)

    def close(self) -> None:
        """End the processes that have trained on the other devices."""
        if self._distributed is not None:
            self._distributed.close()

    def limit_lanes(self, lanes: int) -> None:
        """Have at most so many lanes from now on, because the device's memory ran out with more."""
        assert self.plan is not None
        self.plan = replace(self.plan, lanes=lanes)
        self._drop_spare_lanes()

    def _drop_spare_lanes(self) -> None:
        """Free the memory of captured lanes for which the plan has no trial."""
        assert self.plan is not None
        num_lanes = self.plan.lanes if self.plan.is_captured else 0
        self._captured.drop_idle(keep=max(0, num_lanes - len(self._captured)))

    def _admit(self, config: TrialConfig, checkpoint: Checkpoint | None, *, may_share: bool) -> tuple[Engine, int]:
        """Set a trial up in the engine that trains it; return that engine and the lane there."""
        assert self.plan is not None
        if not may_share:
            self._captured.drop_idle()  # the trial is to have the device's memory to itself
        try:
            if may_share and self.plan.is_captured and capture_key(config) not in self._alone_keys:
                return self._captured, self._captured.admit(config, checkpoint)
            keeps_digits = may_share or self.device.type == "cpu"
            if keeps_digits and self.plan.convolution is not None and stack_key(config) not in self._alone_keys:
                make = self._stack_for if may_share else self._make_stack
                stack = make(config, convolution=self.plan.convolution)
                return stack, stack.admit(config, checkpoint)
        except (NotCapturable, NotStackable) as error:
            logger.warning("a trial of %s trains alone: %s", config.model.name, error)
            self._alone_keys.add(capture_key(config) if self.plan.is_captured else stack_key(config))
        plain = self._distributed or self._plain_engine()
        return plain, plain.admit(config, checkpoint)

    def _stack_for(self, config: TrialConfig, *, convolution: str) -> TrialStack:
        """Return the stack of trials like this one. Raises NotStackable where there can be none."""
        key = stack_key(config)
        for other_key in [other for other, stack in self._stacks.items() if other != key and not len(stack)]:
            del self._stacks[other_key]  # frees its memory
        if key not in self._stacks:
            self._stacks[key] = self._make_stack(config, convolution=convolution)
        return self._stacks[key]

    def _make_stack(self, config: TrialConfig, *, convolution: str) -> TrialStack:
        return TrialStack(
            config,
            data=self._dataset_cache.for_trial(config),
            device=self.device,
            convolution=convolution,
            should_stop=self._should_stop,
        )

    def _plain_engine(self) -> PlainEngine:
        return PlainEngine(device=str(self.device), should_stop=self._should_stop, dataset_cache=self._dataset_cache)
