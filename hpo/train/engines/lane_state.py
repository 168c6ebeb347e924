"""The state of one trial in training that every engine keeps, and what engines do alike with it.

Shapes: S steps of an epoch, B batch, C H W image, L classes.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpo.errors import UserError
from hpo.train.checkpoint import Checkpoint, config_digest, storable_copy
from hpo.train.config import EpochResult, TrainingConfig, TrialConfig
from hpo.train.data.labels import num_correct
from hpo.train.data.loading import SplitDataset
from hpo.train.data.mixing import Mix
from hpo.train.data.sources import batch_bounds
from hpo.train.engines.divergence import why_diverged
from hpo.train.engines.stacked_optimizers import nadam_momentum_product
from hpo.train.losses import TrialLoss, build_loss
from hpo.train.metrics import measure
from hpo.train.models import build_model, fit_memory_format
from hpo.train.optim import build_optimizer, set_lr, update_rule
from hpo.train.parameter_groups import Multipliers, parameter_groups
from hpo.train.recomputation import buffers_kept
from hpo.train.schedules import Schedule, find_schedule, lr_factor
from hpo.train.seeding import seed_generators
from hpo.train.snapshot import Packing, Snapshot

EVALUATION_PIXELS = 2**20  # of a batch without gradients: 1024 images of 32x32


@dataclass(kw_only=True)
class LaneState:
    """The state of the trial in a lane, between epochs."""

    config: TrialConfig
    data: SplitDataset
    network: Callable[[], nn.Module]  # as trained so far
    multipliers: Sequence[Multipliers]  # of each parameter of the network
    first_loss: float = math.nan  # of the trial's first step
    results: list[EpochResult] = field(default_factory=list)  # of the finished epochs
    config_digest: str = field(init=False)  # as the trial begins: the file of its weights may change later
    schedule: Schedule = field(init=False)
    loss: TrialLoss = field(init=False)

    def __post_init__(self) -> None:
        self.loss = build_loss(self.config.training, data=self.data)
        self.config_digest = config_digest(self.config)
        self.schedule = find_schedule(self.config.training.schedule)

    @property
    def epoch(self) -> int:
        """Return how many epochs are finished."""
        return len(self.results)

    def lr_at(self, step: int, *, num_steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of the epoch in progress, which has `num_steps`."""
        training = self.config.training
        assert training.lr is not None
        factor = lr_factor(
            training,
            epoch=self.epoch + step / num_steps,
            steps_per_epoch=num_steps,
            val_losses=[result.val_loss for result in self.results],
            schedule=self.schedule,
        )
        return training.lr * factor

    def finish_epoch(
        self,
        losses_S: Tensor,
        *,
        lane: int,
        hits: float,
        val: Evaluated,
        test_accuracy: float | None,
        seconds: float,
    ) -> EpochResult:
        """Record the epoch in progress and return its result.

        Args:
            losses_S: The mean loss of each step's images, on the CPU.
            lane: The number of the lane, for the result.
            hits: How many training images were classified correctly, as `num_correct` counts.
            val: What the validation images gave.
            test_accuracy: The test accuracy, a fraction, where it is measured.
            seconds: How long the epoch took.
        """
        training, num_images = self.config.training, len(self.data.train)
        sizes_S = torch.tensor([end - start for start, end in batch_bounds(num_images, training.images_per_step)])
        if self.epoch == 0:
            self.first_loss = float(losses_S[0])
        val_loss, val_accuracy = val.loss, val.accuracy
        result = EpochResult(
            lane=lane,
            epoch=self.epoch + 1,
            train_loss=float((losses_S.double() * sizes_S).sum()) / num_images,
            train_accuracy=hits / num_images,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            test_accuracy=test_accuracy,
            lr=self.lr_at(len(losses_S) - 1, num_steps=len(losses_S)),
            seconds=seconds,
            diverged=self.why_diverged(losses_S, val_loss=val_loss, val_accuracy=val_accuracy),
            measured=measure(training.metric, val.logits_NL, self.data.val.labels_N),
        )
        self.results.append(result)
        return result

    def why_diverged(self, losses_S: Tensor, *, val_loss: float, val_accuracy: float) -> str | None:
        """Return why the trial cannot recover after an epoch with these losses, or None where it may."""
        with numerics(tf32=self.config.training.tf32):
            return why_diverged(
                losses_S,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                first_loss=self.first_loss,
                guess_loss=lambda: self.loss.guess(self.data),
                data=self.data,
                network=self.network,
                initial_network=lambda: initial_model(
                    self.config, data=self.data, device=self.data.val.labels_N.device
                ),
            )


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What the images of a split gave: the mean loss, the accuracy, and all outputs where the metric asks for them."""

    loss: float
    accuracy: float
    logits_NL: Tensor | None = None  # float32, on the CPU


@dataclass(frozen=True)
class Rank:
    """One of the processes that train a trial together, each on its slice of every batch."""

    number: int
    of: int

    def slice_of(self, start: int, end: int) -> tuple[slice, float, bool]:
        """Return this rank's images of a batch, their weight in the mean over the ranks, and whether they count here.

        The gradients of all ranks are averaged. Where there are too few images for two in each slice, which batch norm
        needs, every rank has all of them.
        """
        size = end - start
        if size < 2 * self.of:
            return slice(start, end), 1.0, self.number == 0
        first, last = (start + size * number // self.of for number in (self.number, self.number + 1))
        return slice(first, last), (last - first) * self.of / size, True


ALONE = Rank(0, 1)


class StepOptimizer(Protocol):
    """An optimizer as `train_step` uses it; torch.optim's are."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def step(self) -> object:
        """Change the parameters by their gradients."""


def train_step(
    forward: Callable[[Tensor], Tensor],
    optimizer: StepOptimizer,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    parameters: Iterable[nn.Parameter],
    loss_function: TrialLoss,
    amp_dtype: torch.dtype | None,
    mix: Mix | None = None,
    scaler: torch.amp.GradScaler | None = None,
    recomputed: nn.Module | None = None,
    rank: Rank = ALONE,
) -> tuple[Tensor, Tensor]:
    """Train a network on the images of a step; return their mean loss and how many are correct, both on the device.

    The network is given `training.batch_size` of them at a time, and the gradients add up to that of the mean loss.
    Of images that were mixed, the one with the larger share says what is correct. A `scaler` leaves the parameters as
    they are where a gradient is not finite. `recomputed` is the network where the backward pass computes parts of it
    again. A `rank` of several takes its slice of each batch, and returns its part of the mean and of the number; its
    `forward` is a DistributedDataParallel.
    """
    training = loss_function.training
    optimizer.zero_grad(set_to_none=True)
    losses, hits = list[Tensor](), list[Tensor]()
    for start, end in batch_bounds(len(labels_B), training.batch_size):
        part, weight, is_counted = rank.slice_of(start, end)
        weight *= (end - start) / len(labels_B)
        if rank.of > 1:
            forward.require_backward_grad_sync = end == len(labels_B)  # type: ignore[attr-defined]
        with autocast(images_BCHW.device, amp_dtype):
            logits_BL = forward(images_BCHW[part])
        loss, correct_B = loss_function.mean(logits_BL.float(), labels_B[part]), labels_B[part]
        if mix is not None:
            other = loss_function.mean(logits_BL.float(), mix.labels_B[part])
            loss = mix.share * loss + (1 - mix.share) * other
            correct_B = correct_B if mix.share >= 1 / 2 else mix.labels_B[part]
        if weight != 1:
            loss = loss * weight
        with buffers_kept(recomputed):
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        step_hits = num_correct(logits_BL.detach(), correct_B)
        hits.append(step_hits if is_counted else torch.zeros_like(step_hits))
    take_step(optimizer, parameters, largest_norm=training.gradient_clip, scaler=scaler)
    return functools.reduce(operator.add, losses), functools.reduce(operator.add, hits)


def take_step(
    optimizer: StepOptimizer,
    parameters: Iterable[nn.Parameter],
    *,
    largest_norm: float | None,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Clip the gradients and change the parameters by them."""
    if scaler is None:
        _clip(parameters, largest_norm)
        optimizer.step()
        return
    assert isinstance(optimizer, torch.optim.Optimizer)
    scaler.unscale_(optimizer)
    _clip(parameters, largest_norm)
    scaler.step(optimizer)
    scaler.update()


def _clip(parameters: Iterable[nn.Parameter], largest_norm: float | None) -> None:
    if largest_norm is not None:
        nn.utils.clip_grad_norm_(parameters, largest_norm)


@torch.no_grad()
def evaluation_sums(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss_function: TrialLoss,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    outputs: list[Tensor] | None = None,
) -> Tensor:
    """Return the sum of the losses and the number of correct images over batches (2,), float32, on the device.

    The outputs of each batch are added to `outputs`.
    """
    model.eval()
    sums_2 = torch.zeros(2, device=device)
    for images_BCHW, labels_B in batches:
        with autocast(device, amp_dtype):
            logits_BL = model(images_BCHW).float()
        hits = num_correct(logits_BL, labels_B)
        sums_2 += torch.stack([loss_function.sum(logits_BL, labels_B), hits])
        if outputs is not None:
            outputs.append(logits_BL)
    return sums_2


def autocast(device: torch.device, amp_dtype: torch.dtype | None) -> torch.autocast:
    """Return a context that computes in `amp_dtype` where that is safe; None leaves float32 throughout."""
    return torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)


@contextmanager
def numerics(*, tf32: bool) -> Iterator[None]:
    """Let convolutions and products of float32 round their inputs to TF32 or not, and then restore what was set.

    The flags are the process's, concern CUDA GPUs alone, and count when a kernel is launched or captured. torch has two
    sets of names for them and raises where they disagree. The old ones alone leave a convolution to the general
    `torch.backends.fp32_precision`, and the new ones alone break whoever reads the old; so both are set.
    """
    cudnn: Any = torch.backends.cudnn
    products = torch.backends.cuda.matmul
    legacy = [(cudnn, "allow_tf32"), (products, "allow_tf32")]
    by_operation = [(operation, "fp32_precision") for operation in (cudnn.conv, cudnn.rnn, products)]
    found = [(owner, name, _flag(owner, name)) for owner, name in [*legacy, *by_operation]]
    try:
        for owner, name in legacy:
            setattr(owner, name, tf32)
        for owner, name in by_operation:
            setattr(owner, name, "tf32" if tf32 else "ieee")
        yield
    finally:
        for owner, name, value in found:
            if value is not None:
                setattr(owner, name, value)


def _flag(owner: Any, name: str) -> Any:
    """Return a flag of torch's, or None where the old name cannot say what the new ones are set to."""
    try:
        return getattr(owner, name)
    except RuntimeError:
        return None


def evaluation_batch_size(config: TrialConfig, *, data: SplitDataset) -> int:
    """Return how many images are evaluated at a time."""
    return max(config.training.batch_size, EVALUATION_PIXELS // data.image_size**2)


def take_snapshot(
    lane: LaneState,
    *,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    in_training: Mapping[str, Any] | None = None,
    scaler: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Return a snapshot of a trial whose network and torch.optim optimizer have these states.

    `model` is the network that is validated. Where that is an average, `in_training` is what the optimizer trains.
    """
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "first_loss": lane.first_loss,
        "data": lane.data.description(),  # for whoever uses the weights later
    }
    state |= {name: part for name, part in {"in_training": in_training, "scaler": scaler}.items() if part}
    packing = Packing(lane.data.val.labels_N.device)
    setting = f"model.name = {lane.config.model.name!r}"
    checkpoint = Checkpoint(
        config_digest=lane.config_digest,
        epoch=lane.epoch,
        state=storable_copy(state, setting=setting, copy_tensor=packing.add),
        results=tuple(lane.results),
    )
    return Snapshot(checkpoint, packing)


def optimizer_state_dict(
    lane: LaneState,
    model: nn.Module,
    moments: Callable[[Sequence[str]], Sequence[Mapping[str, Tensor]]],
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Return what torch.optim's optimizer of a trial would have as its state, between epochs.

    Args:
        lane: The trial.
        model: A network like its own.
        moments: Returns these moments, by name, of each parameter of the network, in their order.
        device: Where the trial is trained.
    """
    training = lane.config.training
    groups = parameter_groups(model, training, lane.multipliers)
    optimizer = build_optimizer(groups, training, device_type=device.type)
    if lane.epoch == 0:
        return optimizer.state_dict()
    set_lr(optimizer, lane.results[-1].lr)
    state_dict = optimizer.state_dict()
    in_groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {id(parameter): index for index, parameter in enumerate(in_groups)}
    steps = lane.epoch * lane.data.train.num_batches(training.images_per_step)
    common: dict[str, Tensor] = {}
    if training.optimizer != "sgd":
        common["step"] = torch.tensor(float(steps))
    if training.optimizer == "nadam":
        common["mu_product"] = torch.tensor(nadam_momentum_product(training.beta1, steps))
    kept = update_rule(training).moments
    names = [name for name in kept if name != "momentum_buffer" or training.momentum]
    states = {
        index_of[id(parameter)]: common | dict(of_one)
        for parameter, of_one in zip(model.parameters(), moments(names), strict=True)
    }
    state_dict["state"] = dict(sorted(states.items()))
    return state_dict


def check_test_set(config: TrialConfig, *, data: SplitDataset) -> None:
    """Read the test images where the trial reports a test accuracy; raise UserError where the dataset has none."""
    if config.training.report_test_accuracy and data.test is None:
        raise UserError(
            f"training.report_test_accuracy needs a test set, and data.name = {config.data.name!r} has none"
        )


def initial_model(config: TrialConfig, *, data: SplitDataset, device: torch.device) -> nn.Module:
    """Return the network as the trial's seed draws it, on the device."""
    seed_generators(config.seed, "init")
    model = build_model(config.model, channels=data.channels, num_classes=data.num_classes, image_size=data.image_size)
    return fit_memory_format(model.to(device), data.blank_images(device=device))


def why_plain(training: TrainingConfig, amp_dtype: torch.dtype | None = None) -> str | None:
    """Return in words what of a trial only the plain engine does, or None where every engine may train it."""
    if training.gradient_accumulation > 1:
        return "training.gradient_accumulation trains a single network, on a part of a step's images at a time"
    if training.activation_checkpointing:
        return "training.activation_checkpointing computes parts of a single network again"
    if amp_dtype == torch.float16:
        return "in fp16 each trial skips steps of its own, where its gradients are not finite"
    if training.mixup or training.cutmix:
        return "training.mixup and training.cutmix mix the images of each batch by a draw of its own"
    if training.ema is not None:
        return "training.ema averages the weights of a single network"
    return None


def mixed_precision(training: TrainingConfig, *, device: torch.device) -> torch.dtype | None:
    """Return the lower precision that a trial computes in, or None for float32 throughout.

    Raises UserError where the trial wants a precision that the device does not compute in.
    """
    precision, is_cuda = training.precision, device.type == "cuda"
    has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if (precision == "bf16" and not has_bf16) or (precision == "fp16" and not is_cuda):
        raise UserError(
            f"training.precision = {precision!r} needs a GPU that computes in {precision}, got the device {device}"
        )
    if precision == "fp32" or not is_cuda:
        return None
    return torch.bfloat16 if has_bf16 and precision != "fp16" else torch.float16
