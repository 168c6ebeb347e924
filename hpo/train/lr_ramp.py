"""The learning-rate range test: one ramp of the learning rate in less than an epoch, and where it breaks training.

Smith (Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186) raises the rate linearly over some epochs
and looks at the accuracy. Here it rises exponentially from step to step, and what is looked at is the loss of each
batch before its step, smoothed, and how far each step takes the weights, as in You et al. (arXiv 1708.03888): that is
seen also where less than an epoch is too short for the loss to move.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from hpo.train.config import TrialConfig
from hpo.train.data.batches import BatchLoader
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.plain import PlainEngine, PlainLaneState, build_lane
from hpo.train.seeding import seed_generators

MIN_LR, MAX_LR = 1e-7, 10.0  # learning rates that are tried at all
PROBE_LR = 1e-3  # the learning rate of the step that tells where the ramp begins
RAMP_DECADES = 4.0  # that a ramp spans
FIRST_CHANGE = 3e-4  # the share of the weights' norm that the first step of a ramp changes
MAX_EPOCH_FRACTION = 0.9  # of an epoch's pictures, that a ramp takes at most
MAX_STEPS = (
    250  # that a ramp should have; where an epoch has fewer of the study's batches, those of the ramp are smaller
)
MIN_BATCH_SIZE = 4  # pictures
MIN_STEPS = 16  # of a ramp over very few pictures, whatever share of an epoch that is
SMOOTHING_FRACTION = 1 / 16  # of the ramp's steps, over which losses are averaged
MAX_LOSS_RATIO = 3.0  # times the loss at the start, that one step counts with in an average
FALL_FRACTION = 0.05  # the share of the loss at the start by which it has begun to fall
RISE_FRACTION = (
    0.03  # the share of the loss at the start by which a loss that never fell is above it where training breaks
)
LOST_FRACTION = 0.5  # the share of its whole fall that a loss has lost again where training breaks
LEAP_CHANGE = 0.03  # the share of the weights' norm that steps change where they are leaps, whatever the loss does
ABORT_LOSS_RATIO = 10.0  # times the loss at the start, on average over a window: the ramp ends
# The range to search, from what was read; docs/results.md has how often it holds the best rate.
HIGH_OVER_DIVERGENCE = 6.0  # times above the edge the range ends
DIVERGENCE_OVER_LOW = 30.0  # times below the edge it begins at the latest
FALL_OVER_LOW = 3.0  # times below where the loss begins to fall it begins at the latest


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """A ramp as it went, and the range to search that follows from it.

    `losses[i]` is the loss in nats, smoothed, at the learning rate `lrs[i]`; inf where it was not finite. `falls` is
    the rate at which it has fallen by FALLEN of the loss at the start, None where a ramp as short did not show that;
    `lowest` is where it is lowest. `breaks` is the first rate at which it has lost half of what it had gained, or,
    where it had gained nothing, is above the start by RISEN, or is not finite; None where the ramp ended before.
    `leaps` is the first rate at which steps change more than LEAP of the weights: a network may be killed there
    without a sign of it in the loss. `edge` is the lower of the two or, where neither came, the rate at which steps
    were longest: those of a dead network no longer grow. `low` and `high` are the range to search around that; all
    three are None where the loss was not finite from the start.
    """

    lrs: Sequence[float]
    losses: Sequence[float]
    falls: float | None
    lowest: float | None
    breaks: float | None
    leaps: float | None
    edge: float | None
    low: float | None
    high: float | None
    batch_size: int = 0  # of the ramp
    epochs: float = 0.0  # the pictures it was trained on, as a share of an epoch's
    seconds: float = 0.0


def run_range_test(
    config: TrialConfig,
    *,
    device: str,
    dataset_cache: DatasetCache | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> RangeTest:
    """Ramps the learning rate of a fresh network of this configuration, whose own rate and schedule do not count.

    Takes less than an epoch. `progress(done, of)` is called after each step. Equal configurations give equal losses on
    a CPU, with the same number of threads. Raises UserError where a trial could not be trained.
    """
    began_s = time.perf_counter()
    engine = PlainEngine(device=device)
    data = (dataset_cache or DatasetCache(device=engine.device)).get(config.data)
    num_steps, batch_size = plan_ramp(len(data.train), batch_size=config.training.batch_size)
    config = replace(config, training=replace(config.training, batch_size=batch_size, lr=PROBE_LR, compile=False))
    # Every update rule's first step is as long as its learning rate is high.
    lane = build_lane(config, data=data, device=engine.device)
    probe = next(_batches(data.train, config))
    _, change = _ramp_step(engine, lane, probe, lr=PROBE_LR)
    first = min(max(FIRST_CHANGE / change * PROBE_LR, MIN_LR), MAX_LR / 10) if change > 0 else MIN_LR
    del lane
    lane = build_lane(config, data=data, device=engine.device)
    lrs: list[float] = []
    losses: list[float] = []
    changes: list[float] = []
    num_pictures = len(probe[1])
    window = _window(num_steps)
    seed_generators(config.seed, "range test")
    for step, batch in enumerate(itertools.islice(_batches(data.train, config), num_steps)):
        lr = min(first * 10 ** (RAMP_DECADES * step / (num_steps - 1)), MAX_LR)
        loss, change = _ramp_step(engine, lane, batch, lr=lr)
        lrs.append(lr)
        losses.append(loss)
        changes.append(change)
        num_pictures += len(batch[1])
        progress(step + 1, num_steps)
        if not (math.isfinite(loss) and math.isfinite(change)) or lr == MAX_LR:
            break
        if len(losses) > window and statistics.fmean(losses[-window:]) > ABORT_LOSS_RATIO * statistics.fmean(
            losses[:window]
        ):
            break
    found = read_ramp(lrs, losses, changes, num_steps=num_steps)
    seconds = time.perf_counter() - began_s
    return replace(found, batch_size=batch_size, epochs=num_pictures / len(data.train), seconds=seconds)


def plan_ramp(num_pictures: int, *, batch_size: int) -> tuple[int, int]:
    """How many steps a ramp over so many training pictures has, and of what batches, where trials have `batch_size`."""
    smaller = max(MIN_BATCH_SIZE, int(MAX_EPOCH_FRACTION * num_pictures) // MAX_STEPS)
    batch_size = min(batch_size, smaller) if MAX_EPOCH_FRACTION * num_pictures < MAX_STEPS * batch_size else batch_size
    return max(MIN_STEPS, min(MAX_STEPS, int(MAX_EPOCH_FRACTION * num_pictures) // batch_size)), batch_size


def read_ramp(
    lrs: Sequence[float], losses: Sequence[float], changes: Sequence[float], *, num_steps: int | None = None
) -> RangeTest:
    """What a ramp tells: of each step the learning rate, the loss before it, and the share of the weights it changed.

    Losses need not be finite. `num_steps` is what the ramp would have had, had it not ended early.
    """
    window = _window(num_steps or len(lrs))
    if len(losses) <= window or not all(map(math.isfinite, losses[:window])):  # broken from its first rate on
        smooth = _means(losses, window, highest=math.inf)
        return RangeTest(
            lrs=lrs, losses=smooth, falls=None, lowest=None, breaks=None, leaps=None, edge=None, low=None, high=None
        )
    start = statistics.fmean(losses[:window])
    smooth = _means(losses, window, highest=MAX_LOSS_RATIO * start)
    bottom = min(range(len(smooth)), key=smooth.__getitem__)
    falls = next((lr for lr, loss in zip(lrs, smooth, strict=True) if loss <= start * (1 - FALL_FRACTION)), None)
    after, too_high = 0, start * (1 + RISE_FRACTION)
    if falls is not None:
        after, too_high = bottom, smooth[bottom] + LOST_FRACTION * (start - smooth[bottom])
    breaks = next(
        (lr for lr, loss in itertools.islice(zip(lrs, smooth, strict=True), after, None) if loss > too_high), None
    )
    medians = [statistics.median(changes[max(0, index - 2) : index + 3]) for index in range(len(lrs))]
    leaps = next((lr for lr, change in zip(lrs, medians, strict=True) if change > LEAP_CHANGE), None)
    longest = lrs[max(range(len(lrs)), key=medians.__getitem__)]
    edge = min(lr for lr in (breaks, leaps or longest) if lr is not None)
    return RangeTest(
        lrs=lrs,
        losses=smooth,
        falls=falls,
        lowest=None if falls is None else lrs[bottom],
        breaks=breaks,
        leaps=leaps,
        edge=edge,
        low=min(edge / DIVERGENCE_OVER_LOW, falls / FALL_OVER_LOW if falls else math.inf),
        high=min(edge * HIGH_OVER_DIVERGENCE, MAX_LR),
    )


def _window(num_steps: int) -> int:
    return max(3, int(SMOOTHING_FRACTION * num_steps))


def _means(losses: Sequence[float], window: int, *, highest: float) -> list[float]:
    """The means around each loss, in which none counts with more than `highest`; inf where it is not finite itself."""
    half = window // 2
    kept = [min(loss, highest) if math.isfinite(loss) else highest for loss in losses]
    return [
        statistics.fmean(kept[max(0, index - half) : index + half + 1]) if math.isfinite(loss) else math.inf
        for index, loss in enumerate(losses)
    ]


def _batches(train: BatchLoader, config: TrialConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch after the other: very few pictures are shown more than once."""
    for epoch in itertools.count():
        yield from train.batches(config.training.batch_size, seed=config.seed, epoch=epoch)


def _ramp_step(
    engine: PlainEngine, lane: PlainLaneState, batch: tuple[Tensor, Tensor], *, lr: float
) -> tuple[float, float]:
    """One step at this rate: the loss before it, and what it changes of the weights, as a share of their norm."""
    for group in lane.optimizer.param_groups:
        group["lr"] = lr
    parameters = [parameter for parameter in lane.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    loss, _ = engine.step(lane, *batch)
    with torch.no_grad():
        moved = get_total_norm([now - then for now, then in zip(parameters, before, strict=True)])
        norm = get_total_norm(before)
    change = float(moved) / max(float(norm), torch.finfo(torch.float32).tiny)
    return float(loss), change if math.isfinite(change) else math.inf
