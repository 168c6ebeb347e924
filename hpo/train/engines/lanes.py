"""The engine of many lanes on one device; it measures how many lanes are fastest there.

Trials of one kind are trained as one stack (`stack.py`) and join and leave between epochs. Plain engines train what
cannot be stacked, or gains nothing by it; these trials take turns of one epoch.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from hpo.train.checkpoint import Checkpoint
from hpo.train.config import EpochResult, TrialConfig
from hpo.train.data.loading import DatasetCache, SplitDataset
from hpo.train.engines.plain import PlainEngine, build_lane
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.engines.stack import TrialStack, stack_key
from hpo.train.engines.stacked_network import NotStackable
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from hpo.train.snapshot import Snapshot

logger = logging.getLogger(__name__)

MAX_LANES = 64
# How much faster lanes must be than one trial after another: trials that begin together know less of each other.
MIN_SPEEDUP = 1.5
MIN_GAIN_OF_DOUBLING = 1.15  # how much faster a number of lanes must be than half as many
MAX_MEMORY_FRACTION = 0.8  # of the device's memory, that a doubled number of lanes may take
# Of several steps the fastest counts, because other programs make steps slow: at least so many seconds and steps.
MIN_MEASURING_S, MIN_MEASURED_STEPS = 0.25, 5
MAX_MEASURING_S = 2.0  # after which measuring ends, with fewer steps if need be


@dataclass(frozen=True, kw_only=True)
class LanePlan:
    """How the trials of a study are trained on one kind of device, and why; studies store it under these names."""

    device: str  # the kind of device, by its name
    lanes: int
    convolution: str | None  # of the stacked network, one of CONVOLUTIONS; None: each trial trains alone, in turns
    reason: str
    is_passing: bool = False  # it follows from the study as it is now and is not to be stored


class LaneEngine(Engine):
    """An engine of many lanes; trials that cannot be stacked take turns in theirs, and the log says why."""

    def __init__(
        self,
        *,
        device: str,
        lanes: int | None = None,
        max_lanes: int = MAX_LANES,
        num_interleaved: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
        get_or_set_plan: Callable[[str, Callable[[], LanePlan]], LanePlan] = lambda device, measure: measure(),
    ) -> None:
        """Make an engine that measures nothing until the first trial is admitted.

        Args:
            device: The device, as torch names it.
            lanes: The number of lanes. None: as many as are fastest, measured with the first trial.
            max_lanes: The most lanes that are tried when `lanes` is None.
            num_interleaved: How many trials take turns where each trains alone.
            should_stop: Asked before each step, from the training thread; it has to be quick.
            get_or_set_plan: Called with the kind of device and a function that measures. Returns the plan of the
                others that train the same study on such a device, or measures to be the first. All need the same
                plan, because whether trials are stacked changes their last digits.
        """
        self.device = torch.device(device)
        self.plan: LanePlan | None = None
        self._num_lanes, self._max_lanes, self._num_interleaved = lanes, max_lanes, num_interleaved
        self._should_stop, self._get_or_set_plan = should_stop, get_or_set_plan
        self._dataset_cache = DatasetCache(device=self.device)
        self._places: dict[int, tuple[Engine, int]] = {}  # by lane: the engine that trains it, and its lane in that one
        self._stacks: dict[str, TrialStack] = {}  # by `stack_key`
        self._unstackable_keys: set[str] = set()
        self._queue: deque[Engine] = deque()  # the engines that have trials, in the order of their turns

    @property
    def free_lanes(self) -> int:
        """Return how many more trials can be admitted; 1 until the first one sets the plan."""
        return max(0, (self.plan.lanes if self.plan else 1) - len(self._places))

    @property
    def is_interleaving(self) -> bool:
        """Return whether several trials that each train alone take turns."""
        return self.plan is not None and self.plan.convolution is None and self.plan.lanes > 1

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None, *, may_stack: bool = True) -> int:
        """Set a trial up, as every engine does; without `may_stack` it shares the device but no stack."""
        assert self.free_lanes > 0, "all lanes are taken"
        if self.plan is None:
            data = self._dataset_cache.get(config.data)
            self.plan = self._get_or_set_plan(
                device_kind(self.device),
                lambda: plan_lanes(
                    config,
                    data=data,
                    device=self.device,
                    lanes=self._num_lanes,
                    max_lanes=self._max_lanes,
                    num_interleaved=self._num_interleaved,
                ),
            )
        engine = self._engine_for(config) if may_stack else self._plain_engine()
        lane = next(number for number in range(self.plan.lanes) if number not in self._places)
        self._places[lane] = (engine, engine.admit(config, checkpoint))
        if engine not in self._queue:
            self._queue.append(engine)
        return lane

    @property
    def next_lanes(self) -> list[int]:
        """Return the lanes that the next `run_epoch` trains: those of one stack, or one whose trial trains alone."""
        return [lane for lane, (engine, _) in self._places.items() if engine is self._queue[0]]

    def run_epoch(self) -> list[EpochResult]:
        """Train the lanes whose turn it is for one epoch; see `Engine`."""
        assert self._places, "there is no trial to train"
        engine = self._queue[0]
        lanes = {self._places[lane][1]: lane for lane in self.next_lanes}
        try:
            results = [replace(result, lane=lanes[result.lane]) for result in engine.run_epoch()]
        except (Stopped, torch.OutOfMemoryError):
            raise
        except Exception:
            # The cause may be the stack, whose check saw only one batch.
            self._unstackable_keys |= {key for key, stack in self._stacks.items() if stack is engine}
            raise
        self._queue.rotate(-1)
        return results

    def snapshot(self, lane: int) -> Snapshot:
        """Return the trial in a lane after its last epoch; see `Engine`."""
        engine, lane_there = self._places[lane]
        return engine.snapshot(lane_there)

    def test_accuracy(self, config: TrialConfig, checkpoint: Checkpoint) -> float:
        """Return the test accuracy, a fraction, of the network in a checkpoint.

        Raises UserError where the dataset has no test images, or they cannot be read.
        """
        return self._plain_engine().test_accuracy(config, checkpoint)

    def evict(self, lane: int) -> None:
        """Forget the trial in a lane and free its memory; see `Engine`."""
        engine, lane_there = self._places.pop(lane)
        engine.evict(lane_there)
        if all(other is not engine for other, _ in self._places.values()):
            self._queue.remove(engine)

    def limit_lanes(self, lanes: int) -> None:
        """Have at most so many lanes from now on, because the device's memory ran out with more."""
        assert self.plan is not None
        self.plan = replace(self.plan, lanes=lanes)

    def _engine_for(self, config: TrialConfig) -> Engine:
        assert self.plan is not None
        key = stack_key(config)
        if self.plan.convolution is None or key in self._unstackable_keys:
            return self._plain_engine()
        for other_key in [other for other, stack in self._stacks.items() if other != key and not len(stack)]:
            del self._stacks[other_key]  # frees its memory
        if key not in self._stacks:
            try:
                self._stacks[key] = TrialStack(
                    config,
                    data=self._dataset_cache.get(config.data),
                    device=self.device,
                    convolution=self.plan.convolution,
                    should_stop=self._should_stop,
                )
            except NotStackable as error:
                logger.warning("a trial of %s cannot share a stack: %s", config.model.name, error)
                self._unstackable_keys.add(key)
                return self._plain_engine()
        return self._stacks[key]

    def _plain_engine(self) -> PlainEngine:
        return PlainEngine(device=str(self.device), should_stop=self._should_stop, dataset_cache=self._dataset_cache)


def plan_lanes(
    config: TrialConfig,
    *,
    data: SplitDataset,
    device: torch.device,
    lanes: int | None = None,
    max_lanes: int = MAX_LANES,
    num_interleaved: int = 1,
) -> LanePlan:
    """Return how trials like this one are trained fastest on this device.

    Args:
        config: A trial; those to come differ from it in little.
        data: The dataset that it is trained on.
        device: Where it is trained.
        lanes: How many lanes there have to be. None: as many as are fastest, by measurement.
        max_lanes: The most lanes that are tried when `lanes` is None.
        num_interleaved: How many trials take turns where each trains alone.
    """

    def plan(
        reason: str, *, lanes: int = num_interleaved, convolution: str | None = None, is_passing: bool = False
    ) -> LanePlan:
        kind = device_kind(device)
        how = "at once" if convolution else "in turns"
        subject = "one trial at a time" if lanes == 1 else f"{lanes} trials {how}"
        reason = f"{subject} on {kind}: {reason}"
        return LanePlan(device=kind, lanes=lanes, convolution=convolution, reason=reason, is_passing=is_passing)

    if lanes == 1:
        return plan("engine.lanes = 1", lanes=1)
    if lanes is None and max_lanes == 1:
        return plan("they have nothing to share, or there is but one", is_passing=True)
    try:
        methods = list(CONVOLUTIONS)
        if device.type != "cuda":
            methods = methods[:1]  # products lose on every CPU tried
        stacks = [TrialStack(config, data=data, device=device, convolution=method) for method in methods]
    except NotStackable as error:
        return plan(f"its network trains alone, {error}", lanes=min(lanes or num_interleaved, num_interleaved))
    if lanes is not None:
        best = stacks[0].convolution
        if len(stacks) > 1:
            _, best = max((_stacked_rate(stack, config, lanes), stack.convolution) for stack in stacks)
        return plan(f"engine.lanes = {lanes}", lanes=lanes, convolution=best)
    plain_rate = _plain_rate(config, data=data, device=device)
    measured = [
        (rate, count, stack.convolution)
        for stack in stacks
        for rate, count in _rates_by_lanes(stack, config, max_lanes=max_lanes)
    ]
    alone = (MIN_SPEEDUP * plain_rate, num_interleaved, None)
    _, count, convolution = max([alone, *measured], key=lambda option: option[0])
    figures = ", ".join(f"{count} at once {rate / plain_rate:.1f}" for rate, count, _ in measured)
    return plan(f"times as fast as one after another: {figures}", lanes=count, convolution=convolution)


def device_kind(device: torch.device) -> str:
    """Return the name of the kind of device, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def free_memory() -> None:
    """Give memory that no tensor uses back from the allocator, to the other processes on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rates_by_lanes(stack: TrialStack, config: TrialConfig, *, max_lanes: int) -> Iterator[tuple[float, int]]:
    """Yield the images a second with 2 lanes, 4, 8..., until that gains little; leave the stack empty."""
    fastest, lanes = 0.0, 2
    while lanes <= max_lanes and _has_room(stack.device):
        rate = _stacked_rate(stack, config, lanes)
        yield rate, lanes
        if rate < MIN_GAIN_OF_DOUBLING * fastest:
            break
        fastest, lanes = rate, 2 * lanes
    while len(stack):
        stack.evict(len(stack) - 1)


def _plain_rate(config: TrialConfig, *, data: SplitDataset, device: torch.device) -> float:
    """Return the images a second of the plain engine."""
    engine = PlainEngine(device=str(device))
    lane = build_lane(config, data=data, device=device)
    images_BCHW, labels_B = next(data.train.batches(config.training.batch_size))
    return len(labels_B) / _fastest_step_s(lambda: engine.step(lane, images_BCHW, labels_B), device=device)


def _stacked_rate(stack: TrialStack, config: TrialConfig, lanes: int) -> float:
    """Return the images a second over all lanes; 0 where the device's memory runs out."""
    try:
        while len(stack) < lanes:
            stack.admit(replace(config, seed=len(stack)))
        images_KBCHW, labels_KB = next(stack.batches())
        factors = stack.factors(1)[0]
        step_s = _fastest_step_s(lambda: stack.step(images_KBCHW, labels_KB, factors), device=stack.device)
    except torch.OutOfMemoryError:
        return 0.0
    return labels_KB.numel() / step_s


def _fastest_step_s(step: Callable[[], object], *, device: torch.device) -> float:
    """Return the least time in seconds that a step took."""
    times = [_step_s(step, device=device) for _ in range(2)][1:]  # the first one warms up
    while sum(times) < MAX_MEASURING_S and (sum(times) < MIN_MEASURING_S or len(times) < MIN_MEASURED_STEPS):
        times.append(_step_s(step, device=device))
    return min(times)


def _step_s(step: Callable[[], object], *, device: torch.device) -> float:
    start_s = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def _has_room(device: torch.device) -> bool:
    """Return whether twice the lanes of now may fit into the memory that other processes leave."""
    if device.type != "cuda":
        return True
    ours_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return 2 * torch.cuda.max_memory_allocated(device) < MAX_MEMORY_FRACTION * ours_bytes
