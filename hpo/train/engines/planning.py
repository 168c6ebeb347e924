"""How many trials a device trains at once, and by which engine: found with the first trial of a study.

On a CPU, where digits are promised, a rule decides (`stack_rule.py`). On a GPU three ways are measured and compared
with one trial after another: captured lanes, and stacks with each way to compute convolutions. Whatever goes wrong
while many lanes are measured means that there is too little memory for them.
Shapes: K lanes, B batch, C H W image.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from hpo.errors import UserError
from hpo.train.config import TrialConfig
from hpo.train.data.loading import SplitDataset
from hpo.train.engines import stack_rule
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.captured_optimizers import NotCapturable
from hpo.train.engines.lane_state import numerics
from hpo.train.engines.plain import PlainEngine, build_lane
from hpo.train.engines.stack import TrialStack
from hpo.train.engines.stacked_network import NotStackable
from hpo.train.engines.vmap_ops import CONVOLUTIONS
from hpo.train.imports import describe_error

logger = logging.getLogger(__name__)
Made = TypeVar("Made")

MAX_LANES = 64
# How much faster lanes must be than one trial after another: trials that begin together know less of each other.
MIN_SPEEDUP = 1.5
MIN_GAIN_OF_DOUBLING = 1.15  # how much faster a number of lanes must be than half as many
# By a count of the memory that it moves, a GPU trains a stack at most so many times as fast as one trial after another,
# whatever its convolutions do. It is not tried where captured lanes are faster. No GPU has confirmed the count yet.
FASTEST_STACK = 4.0
MAX_MEMORY_FRACTION = 0.8  # of the device's memory, that a doubled number of lanes may take
# Of several looks the fastest counts, because other programs make steps slow: at least so many seconds and looks.
MIN_MEASURING_S, MIN_LOOKS = 0.25, 5
MAX_MEASURING_S = 2.0  # after which measuring ends, with fewer looks if need be
STEPS_PER_LOOK = 10  # on a GPU, which is waited for after each look; on a CPU a look is one step


@dataclass(frozen=True, kw_only=True)
class LanePlan:
    """How the trials of a study are trained on one kind of device, and why; studies store it under these names."""

    device: str  # the kind of device, by its name
    lanes: int
    convolution: str | None  # of the stacked network, one of CONVOLUTIONS; None: the trials are not stacked
    reason: str
    is_passing: bool = False  # it follows from the study as it is now and is not to be stored
    is_captured: bool = False  # the trials train in captured lanes

    @property
    def is_at_once(self) -> bool:
        """Return whether the trials train side by side; otherwise each trains alone, in turns."""
        return self.is_captured or self.convolution is not None


def plan_lanes(
    config: TrialConfig,
    *,
    data: SplitDataset,
    captured: CapturedLanes,
    device: torch.device,
    lanes: int | None = None,
    max_lanes: int = MAX_LANES,
    num_interleaved: int = 1,
    is_one_kind: bool = True,
) -> LanePlan:
    """Return how trials like this one are trained on this device: on a CPU, always the same way.

    Args:
        config: A trial; those to come differ from it in little.
        data: The dataset that it is trained on.
        captured: The engine of captured lanes, without a trial; it keeps the lanes that were measured.
        device: Where it is trained.
        lanes: How many lanes there have to be. None: as many as are fastest, by a rule or by measurement.
        max_lanes: The most lanes that are tried when `lanes` is None.
        num_interleaved: How many trials take turns where each trains alone.
        is_one_kind: Whether the trials to come can share a stack with this one; captured lanes take any. With a number
            of `lanes`, trials of each kind have a stack of their own.
    """
    kind = device_kind(device)
    if lanes == 1:
        return _plan_alone(kind, "engine.lanes = 1", lanes=1)
    if lanes is None and (max_lanes == 1 or not (is_one_kind or device.type == "cuda")):
        return _plan_alone(kind, "nothing to share, or only one trial", lanes=num_interleaved, is_passing=True)
    if lanes is None and _is_by_rule(device):
        return _plan_by_rule(config, data=data, device=device, max_lanes=max_lanes, num_interleaved=num_interleaved)
    counts = _doublings(max_lanes) if lanes is None else [lanes]
    has_stacks = is_one_kind or lanes is not None
    measured: list[Measured] = []
    refusals: list[str] = []
    with numerics(tf32=config.training.tf32):
        plain_rate = _plain_rate(config, data=data, device=device) if lanes is None else 0.0
        for make in _ways(config, data=data, captured=captured, device=device, has_stacks=has_stacks):
            if plain_rate and max((one.rate for one in measured), default=0.0) > FASTEST_STACK * plain_rate:
                break
            way = _made(make, refusals, device=device)
            if way is not None:
                measured += _measure(way, counts, device=device)
                best = max(measured, key=lambda one: one.rate)
                captured.drop_idle(keep=best.lanes if best.is_captured else 0)  # room for the next way
    if not measured:
        reason = f"its network cannot be stacked, {'; '.join(refusals)}"
        return _plan_alone(kind, reason, lanes=min(lanes or num_interleaved, num_interleaved))
    best = max(measured, key=lambda one: one.rate)
    reason = f"engine.lanes = {lanes}" if lanes else _speedups(measured, plain_rate)
    if best.rate <= MIN_SPEEDUP * plain_rate:
        captured.drop_idle()
        return _plan_alone(kind, reason + (", but they do not fit in memory" if lanes else ""), lanes=num_interleaved)
    return LanePlan(
        device=kind,
        lanes=best.lanes,
        convolution=best.convolution,
        reason=f"{best.lanes} trials at once on {kind}: {reason}",
        is_captured=best.is_captured,
    )


def plan_ranks(device: torch.device, *, num_ranks: int) -> LanePlan:
    """Return the plan of trials that so many devices like this one train together."""
    return _plan_alone(device_kind(device), f"engine.devices_per_trial = {num_ranks}", lanes=1)


def _is_by_rule(device: torch.device) -> bool:
    """Return whether digits are promised on this kind of device."""
    return device.type == "cpu"


def _plan_by_rule(
    config: TrialConfig, *, data: SplitDataset, device: torch.device, max_lanes: int, num_interleaved: int
) -> LanePlan:
    """Return the plan on a CPU, which needs no clock."""
    kind, lanes = device_kind(device), min(stack_rule.MAX_STACKED, max_lanes)
    refusals: list[str] = []
    reason = _made(
        partial(stack_rule.check_rule, config, data=data, device=device, lanes=lanes), refusals, device=device
    )
    if reason is None:
        return _plan_alone(kind, "; ".join(refusals), lanes=num_interleaved)
    reason = f"{lanes} trials at once on {kind}: {reason}"
    return LanePlan(device=kind, lanes=lanes, convolution=stack_rule.CONVOLUTION, reason=reason)


def device_kind(device: torch.device) -> str:
    """Return the name of the kind of device, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def free_memory() -> None:
    """Give memory that no tensor uses back from the allocator, to the other processes on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_gpu(device: torch.device) -> None:
    """Free the memory of a GPU; on a CPU nothing is short of memory yet, and looking through all objects takes long."""
    if device.type == "cuda":
        free_memory()


class Way(Protocol):
    """A way to train several trials at once."""

    name: str
    convolution: str | None
    is_captured: bool

    def fill(self, lanes: int) -> None:
        """Have so many lanes, all with the same trial: drawing a network for each would take the host long."""

    def step(self) -> int:
        """Issue a step of every lane, and return the number of images."""

    def clear(self) -> None:
        """Have no trial."""


class CapturedWay:
    """Captured lanes, which stay captured after they were measured."""

    name: str = "captured"
    convolution: str | None = None
    is_captured: bool = True

    def __init__(self, engine: CapturedLanes, config: TrialConfig) -> None:
        self._engine, self._config = engine, config
        self.fill(1)

    def fill(self, lanes: int) -> None:
        """Have so many lanes; see `Way`."""
        self._engine.fill(self._config, lanes)

    def step(self) -> int:
        """Issue a step of every lane; see `Way`."""
        return self._engine.issue_step()

    def clear(self) -> None:
        """Have no trial."""
        self._engine.clear()


class StackedWay:
    """A stack with one way to compute convolutions."""

    is_captured: bool = False

    def __init__(self, config: TrialConfig, *, data: SplitDataset, device: torch.device, convolution: str) -> None:
        self.name: str = convolution
        self.convolution: str | None = convolution
        self._stack = TrialStack(config, data=data, device=device, convolution=convolution)
        self._stack.admit(config)

    def fill(self, lanes: int) -> None:
        """Have so many lanes; see `Way`."""
        self._stack.repeat_first(lanes)
        self._batch, self._factors = next(self._stack.batches()), self._stack.factors(1)[0]

    def step(self) -> int:
        """Issue a step of every lane; see `Way`."""
        images_KBCHW, labels_KB = self._batch
        self._stack.step(images_KBCHW, labels_KB, self._factors)
        return labels_KB.numel()

    def clear(self) -> None:
        """Have no trial."""
        self._stack.evict(0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The images a second with so many lanes of one way."""

    rate: float
    lanes: int
    way: str
    convolution: str | None
    is_captured: bool


def _plan_alone(kind: str, reason: str, *, lanes: int, is_passing: bool = False) -> LanePlan:
    """Return the plan of trials that each train alone, so many of them in turns."""
    subject = "one trial at a time" if lanes == 1 else f"{lanes} trials in turns"
    return LanePlan(
        device=kind, lanes=lanes, convolution=None, reason=f"{subject} on {kind}: {reason}", is_passing=is_passing
    )


def _ways(
    config: TrialConfig, *, data: SplitDataset, captured: CapturedLanes, device: torch.device, has_stacks: bool
) -> list[Callable[[], Way]]:
    """Return what makes each way to train several trials at once on this device, the likely fastest first."""
    ways: list[Callable[[], Way]] = []
    if device.type == "cuda":
        ways.append(partial(CapturedWay, captured, config))
    if has_stacks:
        convolutions = list(CONVOLUTIONS) if device.type == "cuda" else list(CONVOLUTIONS)[:1]  # products lose on CPUs
        ways += [partial(StackedWay, config, data=data, device=device, convolution=name) for name in convolutions]
    return ways


def _made(make: Callable[[], Made], refusals: list[str], *, device: torch.device) -> Made | None:
    """Return what is made, or note why it cannot be."""
    try:
        return make()
    except UserError:
        raise
    except (NotCapturable, NotStackable) as error:
        refusals.append(str(error))
    except Exception as error:  # of libraries; what is the trial's own fault is raised again where it trains alone
        _raise_if_unusable(device)
        refusals.append(describe_error(error))
    _free_gpu(device)
    return None


def _measure(way: Way, counts: Iterable[int], *, device: torch.device) -> list[Measured]:
    """Return the rates with each number of lanes, until doubling gains little; leave the way without a trial."""
    measured: list[Measured] = []
    _free_gpu(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for lanes in counts:
        if measured and not _has_room(device):
            break
        rate = _rate(way, lanes, device=device)
        fastest = max((one.rate for one in measured), default=0.0)
        measured.append(
            Measured(rate=rate, lanes=lanes, way=way.name, convolution=way.convolution, is_captured=way.is_captured)
        )
        if rate < MIN_GAIN_OF_DOUBLING * fastest:
            break
    way.clear()
    _free_gpu(device)
    return measured


def _rate(way: Way, lanes: int, *, device: torch.device) -> float:
    """Return the images a second over all lanes; 0 where that many do not fit in memory, whatever says so.

    A GPU that lacks memory has many ways to say it; cuDNN, for one, is then "unable to find an engine".
    """
    try:
        way.fill(lanes)
        return _fastest_rate(way.step, device=device)
    except Exception as error:
        _raise_if_unusable(device)
        logger.warning("%d %s lanes do not fit: %s", lanes, way.name, describe_error(error))
        return 0.0


def _raise_if_unusable(device: torch.device) -> None:
    """Raise the device's error where one has made this process unusable: it says nothing of lanes or networks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _doublings(max_lanes: int) -> list[int]:
    """Return 2, 4, 8... up to the most lanes."""
    return [2**power for power in range(1, max_lanes.bit_length()) if 2**power <= max_lanes]


def _speedups(measured: Iterable[Measured], plain_rate: float) -> str:
    """Return how much faster each way is than one trial after another, in words."""
    measured = list(measured)
    has_several_ways = len({one.way for one in measured}) > 1
    figures = [
        f"{one.lanes} at once {one.rate / plain_rate:.1f}" + (f" ({one.way})" if has_several_ways else "")
        for one in measured
    ]
    return f"times as fast as one after another: {', '.join(figures)}"


def _plain_rate(config: TrialConfig, *, data: SplitDataset, device: torch.device) -> float:
    """Return the images a second of the plain engine."""
    engine = PlainEngine(device=str(device))
    lane = build_lane(config, data=data, device=device)
    images_BCHW, labels_B = next(data.train.batches(config.training.images_per_step))

    def step() -> int:
        engine.step(lane, images_BCHW, labels_B)
        return len(labels_B)

    return _fastest_rate(step, device=device)


def _fastest_rate(step: Callable[[], int], *, device: torch.device) -> float:
    """Return the most images a second that a look at a few steps has shown; `step` returns its number of images."""
    num_steps = STEPS_PER_LOOK if device.type == "cuda" else 1
    _look(step, num_steps=num_steps, device=device)  # warms up
    rates, seconds = list[float](), 0.0
    while not rates or (seconds < MAX_MEASURING_S and (seconds < MIN_MEASURING_S or len(rates) < MIN_LOOKS)):
        look_s, num_images = _look(step, num_steps=num_steps, device=device)
        rates.append(num_images / look_s)
        seconds += look_s
    return max(rates)


def _look(step: Callable[[], int], *, num_steps: int, device: torch.device) -> tuple[float, int]:
    """Return the seconds that a few steps took, and their number of images."""
    start_s = time.perf_counter()
    num_images = sum(step() for _ in range(num_steps))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s, num_images


def _has_room(device: torch.device) -> bool:
    """Return whether twice the lanes of now may fit into the memory that other processes leave."""
    if device.type != "cuda":
        return True
    ours_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return 2 * torch.cuda.max_memory_reserved(device) < MAX_MEMORY_FRACTION * ours_bytes
