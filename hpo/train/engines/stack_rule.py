"""Whether trials train as one stack on a CPU: a rule from the network, its batches and their number, never a clock.

A stack has last digits of its own, so a measured choice would give the same study other digits each time. The rule's
limits were measured once (docs/results, "Trials in lanes, on a CPU"). What the rule allows is then checked: a trial
must get the same digits in every number of lanes, because kills and pruning change that number.
Shapes: N images of a split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hpo.train.checkpoint import Checkpoint
from hpo.train.config import TrialConfig
from hpo.train.data.batches import BatchLoader
from hpo.train.data.loading import SplitDataset
from hpo.train.data.sources import SMALL_BYTES, DeviceSource
from hpo.train.engines.lane_state import evaluation_batch_size, initial_model
from hpo.train.engines.stack import TrialStack
from hpo.train.engines.stacked_network import NotStackable

# Up to here at least 8 trials at once train at least 1.5 times as fast as one after another, in most networks tried.
MAX_FLOPS = 4_000_000  # of a forward pass of a batch
MAX_PARAMETERS = 50_000
MIN_STACKED = 8
MAX_STACKED = 16  # more gain little
CHECKED_LANES = (2, 3, 4, 7, 8, 13, 16)  # numbers of lanes in which a trial must have the same digits
CONVOLUTION = "grouped"  # products lose on CPUs


@dataclass(frozen=True)
class StepWork:
    """The work of a training step."""

    num_flops: int  # floating-point operations of a forward pass of a batch
    num_parameters: int

    def __str__(self) -> str:
        mega = round(self.num_flops / 1e6, 1)
        return f"a batch takes {mega:,.9g} MFLOP, the network has {self.num_parameters:,} parameters"

    @property
    def is_small(self) -> bool:
        """Return whether a stack is faster than one trial after another."""
        return self.num_flops <= MAX_FLOPS and self.num_parameters <= MAX_PARAMETERS


def check_rule(config: TrialConfig, *, data: SplitDataset, device: torch.device, lanes: int) -> str:
    """Return in words why trials like this one train in so many lanes on a CPU.

    Raises:
        NotStackable: They train one after another; the message says why.
    """
    if lanes < MIN_STACKED:
        raise NotStackable(f"fewer than {MIN_STACKED} trials gain nothing at once")
    work = _step_work(config, data=data, device=device)
    if not work.is_small:
        limits = f"{MAX_FLOPS / 1e6:g} MFLOP and {MAX_PARAMETERS:,} parameters"
        raise NotStackable(f"{work}, and trials at once gain up to {limits}")
    num_bytes = (len(data.train) + len(data.val)) * data.channels * data.image_size**2
    if num_bytes > SMALL_BYTES or not isinstance(data.train.source, DeviceSource):
        raise NotStackable(f"its images are streamed, or take more than {SMALL_BYTES / 2**20:g} MiB")
    _check_digits(config, data=data, device=device, lanes=lanes)
    return str(work)


def _step_work(config: TrialConfig, *, data: SplitDataset, device: torch.device) -> StepWork:
    model = initial_model(config, data=data, device=device).eval()
    images_BCHW, _ = next(data.train.batches(config.training.batch_size))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_BCHW)
    return StepWork(counter.get_total_flops(), sum(parameter.numel() for parameter in model.parameters()))


def _check_digits(config: TrialConfig, *, data: SplitDataset, device: torch.device, lanes: int) -> None:
    """Raise NotStackable where a trial's digits depend on how many lanes there are, as kernels chosen by groups do.

    It trains an epoch of one whole batch and the last one, and validates a batch, in CHECKED_LANES.
    """
    batch_size = config.training.batch_size
    config = replace(config, training=replace(config.training, report_test_accuracy=False))
    small = replace(
        data,
        train=_first(data.train, batch_size + len(data.train) % batch_size),
        val=_first(data.val, evaluation_batch_size(config, data=data)),
    )
    stack = TrialStack(config, data=small, device=device, convolution=CONVOLUTION)
    reference: Checkpoint | None = None
    for num_lanes in sorted({lanes, *(number for number in CHECKED_LANES if number < lanes)}):
        held = [stack.admit(config) for _ in range(num_lanes)]
        stack.run_epoch()
        for lane in held:
            trained = stack.snapshot(lane).checkpoint()
            stack.evict(lane)
            reference = reference or trained
            if not _are_equal(trained, reference):
                raise NotStackable("its last digits in a stack depend on the number of lanes")


def _first(loader: BatchLoader, num_images: int) -> BatchLoader:
    """Return a loader of the first images of a split that is on the device."""
    assert isinstance(loader.source, DeviceSource)
    images_NHWC = loader.source.images_NHWC[:num_images]
    return replace(loader, source=DeviceSource(images_NHWC), labels_N=loader.labels_N[:num_images])


def _are_equal(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two trials have the same weights and results, bit for bit."""
    results = [replace(checkpoint.results[-1], lane=0, seconds=0.0) for checkpoint in (one, other)]
    weights: list[dict[str, Tensor]] = [checkpoint.state["model"] for checkpoint in (one, other)]
    return results[0] == results[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
