"""An engine of many lanes on one device; how many, and whether that pays, is measured there.

Trials of one kind are trained as one (`stack.py`); they join and leave between epochs. What cannot be stacked,
or gains nothing by it, is trained by plain engines, which take turns of an epoch.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from hpo.train.checkpoint import Checkpoint
from hpo.train.config import EpochResult, TrialConfig
from hpo.train.data.batches import Data
from hpo.train.engines.plain import DataSets, PlainEngine, build_lane
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.engines.stack import TrialStack, kind_of
from hpo.train.engines.vmap_ops import CONVOLUTIONS, NotStackable

logger = logging.getLogger(__name__)

MOST_LANES = 64
# How much faster than one trial after another lanes must be: trials that begin together know less of each other.
WORTH_IT = 1.5
WORTH_MORE = 1.15  # and how much faster than half as many lanes
LARGEST_SHARE_OF_MEMORY = 0.8  # of the device's, when the number of lanes is doubled
MEASURED_S, MEASURED_STEPS = 0.25, 5  # the least of which the fastest is taken: other programs make steps slow
LONGEST_S = 2.0  # unless steps take so long


@dataclass(frozen=True, kw_only=True)
class LanePlan:
    """How the trials of a study are trained on a kind of device, and why."""

    device: str  # the kind of device, by its name
    lanes: int
    convolution: str | None  # of the stacked network, one of CONVOLUTIONS; None: trials are trained alone, in turns
    reason: str
    is_passing: bool = False  # it follows from what the study is now, and need not hold for others


class LaneEngine:
    """An engine of many lanes; trials that cannot be stacked take turns in theirs, with the reason logged."""

    def __init__(
        self,
        *,
        device: str,
        lanes: int | None = None,
        most: int = MOST_LANES,
        turns: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
        agree: Callable[[str, Callable[[], LanePlan]], LanePlan] = lambda device, measure: measure(),
    ) -> None:
        """`lanes` None: as many as are fastest, up to `most`, measured with the first trial that is admitted.

        `agree(device, measure)` says what others that train the same study on a device of that name do, or calls
        `measure` to be the first: whether trials are stacked changes their last digits.
        """
        self.device = torch.device(device)
        self.choice: LanePlan | None = None
        self._wanted, self._most, self._turns = lanes, most, turns
        self._should_stop, self._agree = should_stop, agree
        self._data_sets = DataSets(device=self.device)
        self._places: dict[int, tuple[Engine, int]] = {}  # by lane: the engine that trains it, and its lane there
        self._groups: dict[str, TrialStack] = {}  # by kind
        self._unstackable: set[str] = set()
        self._queue: deque[Engine] = deque()  # those that have trials, the next to train first

    @property
    def free_lanes(self) -> int:
        return max(0, (self.choice.lanes if self.choice else 1) - len(self._places))

    @property
    def takes_turns(self) -> bool:
        return self.choice is not None and self.choice.convolution is None and self.choice.lanes > 1

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None, *, alone: bool = False) -> int:
        """As every engine does; `alone`: the trial shares its device but is not stacked with others."""
        assert self.free_lanes > 0, "all lanes are taken"
        if self.choice is None:
            data = self._data_sets.get(config.data)
            self.choice = self._agree(
                name_of(self.device),
                lambda: plan_lanes(
                    config, data=data, device=self.device, lanes=self._wanted, most=self._most, turns=self._turns
                ),
            )
        engine = self._plain_engine() if alone else self._engine_for(config)
        lane = next(number for number in range(self.choice.lanes) if number not in self._places)
        self._places[lane] = (engine, engine.admit(config, checkpoint))
        if engine not in self._queue:
            self._queue.append(engine)
        return lane

    @property
    def turn(self) -> list[int]:
        """The lanes that the next `run_epoch` trains: those of one stack, or the one of a trial that trains alone."""
        return [lane for lane, (engine, _) in self._places.items() if engine is self._queue[0]]

    def run_epoch(self) -> list[EpochResult]:
        assert self._places, "there is no trial to train"
        engine = self._queue[0]
        lanes = {self._places[lane][1]: lane for lane in self.turn}
        try:
            results = [replace(result, lane=lanes[result.lane]) for result in engine.run_epoch()]
        except (Stopped, torch.OutOfMemoryError):
            raise
        except Exception:
            # It may be that of the stack, of which the probe saw only one batch.
            self._unstackable |= {kind for kind, group in self._groups.items() if group is engine}
            raise
        self._queue.rotate(-1)
        return results

    def checkpoint(self, lane: int) -> Checkpoint:
        engine, there = self._places[lane]
        return engine.checkpoint(there)

    def test_accuracy(self, config: TrialConfig, checkpoint: Checkpoint) -> float:
        """The share of the test pictures that a trial's network, as its checkpoint has it, names rightly.

        Raises UserError where the data set has no test part, or it cannot be read.
        """
        return self._plain_engine().test_accuracy(config, checkpoint)

    def evict(self, lane: int) -> None:
        engine, there = self._places.pop(lane)
        engine.evict(there)
        if all(other is not engine for other, _ in self._places.values()):
            self._queue.remove(engine)

    def limit(self, lanes: int) -> None:
        """Have at most so many lanes from now on, because the device's memory ran out with more."""
        assert self.choice is not None
        self.choice = replace(self.choice, lanes=lanes)

    def _engine_for(self, config: TrialConfig) -> Engine:
        assert self.choice is not None
        kind = kind_of(config)
        if self.choice.convolution is not None and kind not in self._unstackable:
            for other in [key for key, group in self._groups.items() if key != kind and not len(group)]:
                del self._groups[other]  # and its memory
            if kind in self._groups:
                return self._groups[kind]
            try:
                group = self._groups[kind] = TrialStack(
                    config,
                    data=self._data_sets.get(config.data),
                    device=self.device,
                    convolution=self.choice.convolution,
                    should_stop=self._should_stop,
                )
            except NotStackable as error:
                logger.warning("a trial of %s cannot share a stack: %s", config.model.name, error)
                self._unstackable.add(kind)
            else:
                return group
        return self._plain_engine()

    def _plain_engine(self) -> PlainEngine:
        return PlainEngine(device=str(self.device), should_stop=self._should_stop, data_sets=self._data_sets)


# How many lanes


def plan_lanes(
    config: TrialConfig,
    *,
    data: Data,
    device: torch.device,
    lanes: int | None = None,
    most: int = MOST_LANES,
    turns: int = 1,
) -> LanePlan:
    """How trials like this one are trained fastest on this device: in `lanes` lanes, or in as many as that takes.

    Where they are trained alone all the same, `turns` of them take turns.
    """
    name = name_of(device)

    def choice(
        reason: str, *, lanes: int = turns, convolution: str | None = None, is_passing: bool = False
    ) -> LanePlan:  # fmt: skip
        how = "at once" if convolution else "in turns"
        subject = "one trial at a time" if lanes == 1 else f"{lanes} trials {how}"
        return LanePlan(
            device=name,
            lanes=lanes,
            convolution=convolution,
            reason=f"{subject} on {name}: {reason}",
            is_passing=is_passing,
        )

    if lanes == 1:
        return choice("engine.lanes = 1", lanes=1)
    if lanes is None and most == 1:
        return choice("they have nothing to share, or there is but one", is_passing=True)
    try:
        methods = CONVOLUTIONS if device.type == "cuda" else CONVOLUTIONS[:1]  # products lose on every CPU tried
        groups = [TrialStack(config, data=data, device=device, convolution=method) for method in methods]
    except NotStackable as error:
        return choice(f"its network trains alone, {error}", lanes=min(lanes or turns, turns))
    if lanes is not None:
        best = groups[0].convolution
        if len(groups) > 1:
            _, best = max((_rate(group, config, lanes), group.convolution) for group in groups)
        return choice(f"engine.lanes = {lanes}", lanes=lanes, convolution=best)
    alone = _rate_alone(config, data=data, device=device)
    measured = [(rate, count, group.convolution) for group in groups for rate, count in _rates(group, config, most)]
    _, count, convolution = max([(WORTH_IT * alone, turns, None), *measured], key=lambda one: one[0])
    figures = ", ".join(f"{count} at once {rate / alone:.1f}" for rate, count, _ in measured)
    return choice(f"times as fast as one after another: {figures}", lanes=count, convolution=convolution)


def name_of(device: torch.device) -> str:
    """The kind of device, as people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _rates(group: TrialStack, config: TrialConfig, most: int) -> Iterator[tuple[float, int]]:
    """Pictures a second with 2 lanes, 4, 8..., until that gains little; leaves the group empty."""
    fastest, lanes = 0.0, 2
    while lanes <= most and _has_room(group.device):
        rate = _rate(group, config, lanes)
        yield rate, lanes
        if rate < WORTH_MORE * fastest:
            break
        fastest, lanes = rate, 2 * lanes
    while len(group):
        group.evict(len(group) - 1)


def _rate_alone(config: TrialConfig, *, data: Data, device: torch.device) -> float:
    """Pictures a second of the plain engine."""
    engine = PlainEngine(device=str(device))
    lane = build_lane(config, data=data, device=device)
    images_BCHW, labels_B = next(data.train.batches(config.training.batch_size))
    return len(labels_B) / _seconds(lambda: engine.step(lane, images_BCHW, labels_B), device=device)


def _rate(group: TrialStack, config: TrialConfig, lanes: int) -> float:
    """Pictures a second over all lanes; 0 where the device's memory runs out."""
    try:
        while len(group) < lanes:
            group.admit(replace(config, seed=len(group)))
        images_KBCHW, labels_KB = next(group.batches())
        factors = group.factors(1)[0]
        seconds = _seconds(lambda: group.step(images_KBCHW, labels_KB, factors), device=group.device)
    except torch.OutOfMemoryError:
        return 0.0
    return labels_KB.numel() / seconds


def _seconds(step: Callable[[], object], *, device: torch.device) -> float:
    """The least time that a step took."""
    times = [_timed(step, device=device) for _ in range(2)][1:]  # the first one warms up
    while sum(times) < LONGEST_S and (sum(times) < MEASURED_S or len(times) < MEASURED_STEPS):
        times.append(_timed(step, device=device))
    return min(times)


def _timed(step: Callable[[], object], *, device: torch.device) -> float:
    start_s = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def _has_room(device: torch.device) -> bool:
    """Whether twice as many lanes as there are may fit into the device's memory, beside what others have there."""
    if device.type != "cuda":
        return True
    ours = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return 2 * torch.cuda.max_memory_allocated(device) < LARGEST_SHARE_OF_MEMORY * ours
