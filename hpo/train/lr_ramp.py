"""The learning-rate range test: one ramp of the learning rate in less than an epoch, and where it breaks training.

Smith (Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186) raises the rate linearly over some epochs
and looks at the accuracy. Here the rate rises exponentially from step to step. The test looks at the smoothed loss of
each batch before its step and at how far each step moves the weights, as in You et al. (arXiv 1708.03888). The second
shows something even where less than an epoch is too short for the loss to move.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hpo.train.config import TrialConfig
from hpo.train.data.batches import BatchLoader
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.lane_state import numerics
from hpo.train.engines.plain import MIN_SCALE, PlainEngine, PlainLaneState, build_lane
from hpo.train.modules import head_of, is_inside, named_network
from hpo.train.optim import set_lr
from hpo.train.seeding import seed_generators

MIN_LR, MAX_LR = 1e-7, 10.0  # the learning rates that are tried at all
PROBE_LR = 1e-3  # the learning rate of the one step that shows where the ramp has to begin
RAMP_DECADES = 4.0  # that a ramp spans
FIRST_CHANGE = 3e-4  # the share of the weights' norm that the first step of a ramp changes
MAX_EPOCH_FRACTION = 0.9  # of an epoch's images, that a ramp takes
MAX_STEPS = 250  # of a ramp; where an epoch has fewer of the study's batches, the ramp uses smaller ones
MIN_BATCH_SIZE = 4  # images
MIN_STEPS = 16  # of a ramp over very few images, whatever share of an epoch that is
SMOOTHING_FRACTION = 1 / 16  # of the ramp's steps, over which losses are averaged
MAX_LOSS_RATIO = 3.0  # times the loss at the start: the most that one step counts in an average
FALL_FRACTION = 0.05  # of the loss at the start: when it is lower by this much, it has begun to fall
RISE_FRACTION = 0.03  # of the loss at the start: when a loss that never fell is higher by this much, training breaks
LOST_FRACTION = 0.5  # of its whole fall: when a loss has risen by this much again, training breaks
# Weights that start this much smaller than torch's layers draw them, as a head of zeros on a frozen body does, are no
# measure of a step: any step is a large share of them. Steps are then compared with the usual weights and are no leaps.
ZERO_START = 0.2
USUAL_BIAS = 0.1  # of what is no matrix: a bias or a scale, whose usual size does not follow from its shape
LEAP_CHANGE = 0.03  # the share of the weights' norm that steps change where they are leaps, whatever the loss does
ABORT_LOSS_RATIO = 10.0  # times the loss at the start, on average over a window: the ramp ends
# The range to search, relative to what the ramp shows; docs/results/index.md has how often it holds the best rate.
HIGH_OVER_DIVERGENCE = 6.0  # the end of the range, relative to the rate at which training diverges
DIVERGENCE_OVER_LOW = 30.0  # that rate relative to the beginning of the range, at least
FALL_OVER_LOW = 3.0  # the rate at which the loss begins to fall, relative to the beginning of the range, at least
# The same where the last layer alone is trained: its loss is convex, so no step kills it, and the noise of the ramp's
# small batches breaks it at rates well below the best ones of whole trainings.
LINEAR_HIGH_OVER_DIVERGENCE = 20.0
HIGH_OVER_FALL = 1.5  # the end of the range relative to that rate, at least


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The ramp of a range test, and the range to search that follows from it.

    Studies store these fields, and `--json` prints them, under these names.

    Attributes:
        lrs: The learning rate of each step.
        losses: The smoothed loss of each step in nats; inf where it was not finite (None in JSON).
        falls: The rate at which the loss has fallen by 5 % of the loss at the start; None where so short a ramp did
            not show that.
        lowest: The rate at which the loss is lowest; None where `falls` is.
        breaks: The first rate at which the loss has lost half of what it had gained. Where it had gained nothing, the
            first rate at which it is above the start by 3 % or not finite. None where the ramp ended before.
        leaps: The first rate at which steps change more than 3 % of the weights. They may kill a network
            without a sign of it in the loss. None where the weights start at almost nothing, or are one layer's.
        edge: The rate at which training diverges: the lower one of `breaks` and `leaps`. Where neither was reached, the
            rate at which steps were longest, because those of a dead network no longer grow.
        low: The lower end of the range to search.
        high: The upper end. `edge`, `low` and `high` are None where the loss was not finite from the start.
        batch_size: The number of images in a step of the ramp.
        epochs: The images that the ramp was trained on, as a share of an epoch's.
        seconds: How long the test took.
        from_zero: Whether the weights start at almost nothing, so that only the loss tells where training diverges.
        is_linear: Whether the last layer alone is trained, on a frozen body; then, too, only the loss tells that.
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
    batch_size: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    from_zero: bool = False
    is_linear: bool = False


def run_range_test(
    config: TrialConfig,
    *,
    device: str,
    dataset_cache: DatasetCache | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> RangeTest:
    """Ramp the learning rate of a fresh network, in less than an epoch, and return what that shows.

    What is frozen for some epochs only is trained in the ramp: the rates must suit the whole network. Equal
    configurations give equal losses on a CPU, with the same number of threads.

    Args:
        config: The trial to test; its learning rate and its schedule do not count.
        device: The device, as torch names it.
        dataset_cache: Where datasets on this device are kept; None: a cache of its own.
        progress: Called after each step with the steps done and the steps of the ramp.

    Raises:
        UserError: A trial of this configuration could not be trained.
    """
    began_s = time.perf_counter()
    engine = PlainEngine(device=device)
    data = (dataset_cache or DatasetCache(device=engine.device)).for_trial(config)
    num_steps, batch_size = plan_ramp(len(data.train), batch_size=config.training.images_per_step)
    config = _ramp_config(config, batch_size=batch_size)
    lane = build_lane(config, data=data, device=engine.device)
    batches = partial(_batches, data.train, batch_size, seed=config.seed)
    probe = next(batches())
    trained = [parameter for parameter in lane.model.parameters() if parameter.requires_grad]
    usual_norm = _usual_norm(trained)
    from_zero = float(get_total_norm([weights.detach() for weights in trained])) < ZERO_START * usual_norm
    least_norm = usual_norm if from_zero else 0.0
    is_linear = _is_linear(lane.model, num_classes=data.num_classes)
    first_lr = _first_lr(engine, lane, probe, least_norm=least_norm)
    scaler = lane.scaler
    del lane, trained
    lane = build_lane(config, data=data, device=engine.device)
    lane.scaler = scaler
    lrs, losses, changes = list[float](), list[float](), list[float]()
    num_images = len(probe[1])
    window = _window(num_steps)
    seed_generators(config.seed, "range test")
    for step, batch in enumerate(itertools.islice(batches(), num_steps)):
        lr = min(first_lr * 10 ** (RAMP_DECADES * step / (num_steps - 1)), MAX_LR)
        loss, change = _ramp_step(engine, lane, batch, lr=lr, least_norm=least_norm)
        lrs.append(lr)
        losses.append(loss)
        changes.append(change)
        num_images += len(batch[1])
        progress(step + 1, num_steps)
        if not (math.isfinite(loss) and math.isfinite(change)) or lr == MAX_LR:
            break
        first_losses, last_losses = losses[:window], losses[-window:]
        if len(losses) > window and statistics.fmean(last_losses) > ABORT_LOSS_RATIO * statistics.fmean(first_losses):
            break
    test = read_ramp(lrs, losses, changes, num_steps=num_steps, from_zero=from_zero, is_linear=is_linear)
    seconds = time.perf_counter() - began_s
    return replace(test, batch_size=batch_size, epochs=num_images / len(data.train), seconds=seconds)


def _ramp_config(config: TrialConfig, *, batch_size: int) -> TrialConfig:
    """Return the trial as the ramp trains it."""
    batch_size = min(batch_size, config.training.batch_size)  # that the network is given at a time
    training = replace(config.training, batch_size=batch_size, lr=PROBE_LR, compile=False)
    if training.freeze_epochs is not None:
        training = replace(training, freeze=(), freeze_epochs=None)
    return replace(config, training=training)


def plan_ramp(num_images: int, *, batch_size: int) -> tuple[int, int]:
    """Return the number of steps and the images of each, of a ramp for trials whose steps have `batch_size` images."""
    max_images = int(MAX_EPOCH_FRACTION * num_images)
    if MAX_EPOCH_FRACTION * num_images < MAX_STEPS * batch_size:
        batch_size = min(batch_size, max(MIN_BATCH_SIZE, max_images // MAX_STEPS))
    return max(MIN_STEPS, min(MAX_STEPS, max_images // batch_size)), batch_size


def read_ramp(
    lrs: Sequence[float],
    losses: Sequence[float],
    changes: Sequence[float],
    *,
    num_steps: int | None = None,
    from_zero: bool = False,
    is_linear: bool = False,
) -> RangeTest:
    """Return what a ramp shows.

    Args:
        lrs: The learning rate of each step.
        losses: The loss before each step; it need not be finite.
        changes: The share of the weights' norm that each step changed.
        num_steps: How many steps the ramp was to have; None: as many as it had.
        from_zero: Whether the weights start at almost nothing, so that no step counts as a leap.
        is_linear: Whether the last layer alone is trained, so that none does either.
    """
    window = _window(num_steps or len(lrs))
    if len(losses) <= window or not all(map(math.isfinite, losses[:window])):  # broken from its first rate on
        smooth = _moving_means(losses, window, max_loss=math.inf)
        return RangeTest(
            lrs=lrs, losses=smooth, falls=None, lowest=None, breaks=None, leaps=None, edge=None, low=None, high=None
        )
    start = statistics.fmean(losses[:window])
    smooth = _moving_means(losses, window, max_loss=MAX_LOSS_RATIO * start)
    bottom = min(range(len(smooth)), key=smooth.__getitem__)
    falls = next((lr for lr, loss in zip(lrs, smooth, strict=True) if loss <= start * (1 - FALL_FRACTION)), None)
    first_step, max_loss = 0, start * (1 + RISE_FRACTION)
    if falls is not None:
        first_step, max_loss = bottom, smooth[bottom] + LOST_FRACTION * (start - smooth[bottom])
    breaks = next((lr for lr, loss in zip(lrs[first_step:], smooth[first_step:], strict=True) if loss > max_loss), None)
    medians = [statistics.median(changes[max(0, index - 2) : index + 3]) for index in range(len(lrs))]
    has_leaps = not (from_zero or is_linear)
    leaps = next((lr for lr, change in zip(lrs, medians, strict=True) if has_leaps and change > LEAP_CHANGE), None)
    longest = lrs[max(range(len(lrs)), key=medians.__getitem__)]
    divergence_lr = min(lr for lr in (breaks, leaps or longest) if lr is not None)
    high = divergence_lr * (LINEAR_HIGH_OVER_DIVERGENCE if is_linear else HIGH_OVER_DIVERGENCE)
    return RangeTest(
        lrs=lrs,
        losses=smooth,
        falls=falls,
        lowest=None if falls is None else lrs[bottom],
        breaks=breaks,
        leaps=leaps,
        edge=divergence_lr,
        low=min(divergence_lr / DIVERGENCE_OVER_LOW, falls / FALL_OVER_LOW if falls else math.inf),
        high=min(max(high, (falls or 0.0) * HIGH_OVER_FALL), MAX_LR),
        from_zero=from_zero,
        is_linear=is_linear,
    )


def _is_linear(model: nn.Module, *, num_classes: int) -> bool:
    """Return whether all weights that are trained are those of the last layer."""
    network = named_network(model)
    head = head_of(network, num_classes=num_classes)
    return all(is_inside(name, head) for name, weights in network.named_parameters() if weights.requires_grad)


def _usual_norm(parameters: Sequence[Tensor]) -> float:
    """Return the norm of weights as torch's layers draw them, with variance 1 / (3 * inputs) in a matrix."""
    matrices = sum(weights.shape[0] / 3 for weights in parameters if weights.dim() > 1)
    return math.sqrt(matrices + sum(USUAL_BIAS**2 * weights.numel() for weights in parameters if weights.dim() <= 1))


def _window(num_steps: int) -> int:
    """Return the number of steps over which losses are averaged."""
    return max(3, int(SMOOTHING_FRACTION * num_steps))


def _moving_means(losses: Sequence[float], window: int, *, max_loss: float) -> list[float]:
    """Return the mean around each loss, where none counts more than `max_loss`; inf where the loss is not finite."""
    half = window // 2
    kept = [min(loss, max_loss) if math.isfinite(loss) else max_loss for loss in losses]
    return [
        statistics.fmean(kept[max(0, index - half) : index + half + 1]) if math.isfinite(loss) else math.inf
        for index, loss in enumerate(losses)
    ]


def _batches(train: BatchLoader, batch_size: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch after another: a ramp over very few images takes them more than once."""
    for epoch in itertools.count():
        yield from train.batches(batch_size, seed=seed, epoch=epoch)


def _first_lr(engine: PlainEngine, lane: PlainLaneState, batch: tuple[Tensor, Tensor], *, least_norm: float) -> float:
    """Return where a ramp has to begin, as a step shows: the first one that the scaler of fp16 does not skip."""
    while True:
        scale = lane.scaler.get_scale() if lane.scaler else MIN_SCALE
        _, change = _ramp_step(engine, lane, batch, lr=PROBE_LR, least_norm=least_norm)
        if lane.scaler is None or not MIN_SCALE < lane.scaler.get_scale() < scale:
            break
    # The first step of every update rule is proportional to the learning rate.
    return min(max(FIRST_CHANGE / change * PROBE_LR, MIN_LR), MAX_LR / 10) if change > 0 else MIN_LR


def _ramp_step(
    engine: PlainEngine, lane: PlainLaneState, batch: tuple[Tensor, Tensor], *, lr: float, least_norm: float
) -> tuple[float, float]:
    """Make one step at this rate; return the loss before it, and its change of the weights as a share of their norm.

    The norm counts as at least `least_norm`.
    """
    set_lr(lane.optimizer, lr)
    parameters = [parameter for parameter in lane.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    with numerics(tf32=lane.config.training.tf32):
        loss, _ = engine.step(lane, *batch)
    with torch.no_grad():
        moved = get_total_norm([after - then for after, then in zip(parameters, before, strict=True)])
        norm = get_total_norm(before)
    change = float(moved) / max(float(norm), least_norm, torch.finfo(torch.float32).tiny)
    return float(loss), change if math.isfinite(change) else math.inf
