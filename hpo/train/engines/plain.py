"""The Engine contract and the plain engine: one lane, torch.optim, meant to be read; other engines are held to it.

Shapes: B batch, C H W picture, L classes, S steps of an epoch.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.errors import UserError
from hpo.train.checkpoint import Checkpoint, config_digest, copied
from hpo.train.config import DataConfig, EpochResult, TrainingConfig, TrialConfig, derive_seed
from hpo.train.data.batches import Data, Part, batch_bounds, load_data
from hpo.train.engines.protocol import Stopped
from hpo.train.imports import describe
from hpo.train.models import build_model
from hpo.train.optim import build_optimizer, lr_factor

EVALUATION_PIXELS = 2**20  # of a batch without gradients: 1024 pictures of 32x32
SPREAD_PICTURES = 256  # that a network's outputs are compared over
# The largest output_spread of a network that gives every picture the same output. Measured with the article's network,
# batch 64, on 2,000 CIFAR-10 pictures (width 1) and on digits (width 0.25, 3 seeds), up to 5 epochs each:
#   as drawn, or Adam at 0         0.13 (CIFAR-10), 0.013 to 0.028 (digits), 0.0022 (digits, width 0.05)
#   slow: Adam 1e-5, SGD 1e-6      0.13 to 1.7,     0.013 to 0.074
#   learning: Adam 1e-4, 1e-3      1.1 to 1.9,      0.04 to 1.9
#   about to die: Adam 5e-3        0.0007 to 0.004, 0.001 to 0.16; NAdam 1e-2 0.0007
#   dead: Adam 5e-3 to 1           0, exactly; SGD at 10, RMSprop from 1e-2 and Adagrad at 1 likewise
# Rounding alone, seen in untrained networks of 20 to 40 layers that are as good as constant, gives 1e-7 to 5e-7.
SAME_OUTPUT = 1e-5


class DataSets:
    """The data set on a device: loaded once for the trials that share it, dropped where another one is needed."""

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._loaded: tuple[DataConfig, Data] | None = None

    def get(self, config: DataConfig) -> Data:
        if self._loaded is None or self._loaded[0] != config:
            self._loaded = None  # frees the device's memory before the next data set needs it
            seed_generators(config.split_seed, "data")  # a user's data set may draw from them
            self._loaded = (config, load_data(config, device=self._device))
        return self._loaded[1]


@dataclass(kw_only=True)
class Lane:
    """What every engine keeps of a trial in training."""

    config: TrialConfig
    data: Data
    network: Callable[[], nn.Module]  # as trained so far
    first_loss: float = math.nan  # of the trial's first step
    results: list[EpochResult] = field(default_factory=list)  # of the finished epochs

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return len(self.results)

    def lr_at(self, step: int, *, num_steps: int) -> float:
        """The learning rate of a step, counted from 0, of the epoch in progress, which has `num_steps`."""
        training = self.config.training
        assert training.lr is not None
        factor = lr_factor(
            training,
            epoch=self.epoch + step / num_steps,
            steps_per_epoch=num_steps,
            val_losses=[result.val_loss for result in self.results],
        )
        return training.lr * factor

    def finish_epoch(
        self,
        losses_S: Tensor,
        *,
        lane: int,
        hits: int,
        val: tuple[float, float],
        test_accuracy: float | None,
        seconds: float,
    ) -> EpochResult:
        """Records the epoch in progress: each step's loss (CPU), correct pictures, validation loss and accuracy."""
        training, num_pictures = self.config.training, len(self.data.train)
        sizes_S = torch.tensor([end - start for start, end in batch_bounds(num_pictures, training.batch_size)])
        if self.epoch == 0:
            self.first_loss = float(losses_S[0])
        result = EpochResult(
            lane=lane,
            epoch=self.epoch + 1,
            train_loss=float((losses_S.double() * sizes_S).sum()) / num_pictures,
            train_accuracy=hits / num_pictures,
            val_loss=val[0],
            val_accuracy=val[1],
            test_accuracy=test_accuracy,
            lr=self.lr_at(len(losses_S) - 1, num_steps=len(losses_S)),
            seconds=seconds,
            diverged=diverged(self, losses_S, val_loss=val[0], val_accuracy=val[1]),
        )
        self.results.append(result)
        return result


@dataclass(kw_only=True)
class PlainLane(Lane):
    """A trial that has its network and its optimizer to itself."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # the model, compiled where that was asked for
    optimizer: torch.optim.Optimizer
    amp_dtype: torch.dtype | None  # of automatic mixed precision; None: float32 throughout
    is_whole: bool = True  # between two epochs, not within one


class PlainEngine:
    """One lane on one device: as simple as a training loop can be, and the reference for every other engine."""

    def __init__(
        self, *, device: str, should_stop: Callable[[], bool] = lambda: False, data_sets: DataSets | None = None
    ) -> None:
        """`should_stop` is asked before each step, from the training thread, and has to be quick."""
        self.device = torch.device(device)
        self._should_stop = should_stop
        self._lane: PlainLane | None = None
        self._data_sets = data_sets or DataSets(device=self.device)

    @property
    def free_lanes(self) -> int:
        return 1 if self._lane is None else 0

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None) -> int:
        assert self._lane is None, "the plain engine has one lane, and it is taken"
        assert checkpoint is None or checkpoint.config_digest == config_digest(config), "another trial's checkpoint"
        lane = build_lane(config, data=self._data_sets.get(config.data), device=self.device)
        if checkpoint is not None:
            restore(lane, checkpoint)
        self._lane = lane
        return 0

    def evict(self, lane: int) -> None:
        assert self._lane is not None, "there is no trial in this lane"
        self._lane = None

    def checkpoint(self, lane: int) -> Checkpoint:
        assert self._lane is not None, "there is no trial in this lane"
        assert self._lane.is_whole, "the trial is in the middle of an epoch"
        trial = self._lane
        return make_checkpoint(trial, model=trial.model.state_dict(), optimizer=trial.optimizer.state_dict())

    def run_epoch(self) -> list[EpochResult]:
        assert self._lane is not None, "there is no trial to train"
        lane, data = self._lane, self._lane.data
        start_s = time.perf_counter()
        lane.is_whole = False
        losses_S, hits = self._train(lane)
        val = self._evaluate(lane, data.val)
        test_accuracy = None
        if lane.config.training.report_test_accuracy:
            assert data.test is not None
            test_accuracy = self._evaluate(lane, data.test)[1]
        seconds = time.perf_counter() - start_s
        result = lane.finish_epoch(losses_S, lane=0, hits=hits, val=val, test_accuracy=test_accuracy, seconds=seconds)
        lane.is_whole = True
        return [result]

    def test_accuracy(self, config: TrialConfig, checkpoint: Checkpoint) -> float:
        """The accuracy on the test set of a trial as its checkpoint has it; see `LaneEngine`."""
        lane = build_lane(config, data=self._data_sets.get(config.data), device=self.device)
        restore(lane, checkpoint)
        if lane.data.test is None:
            raise UserError(f"data.name = {config.data.name!r} has no test set")
        return self._evaluate(lane, lane.data.test)[1]

    def _train(self, lane: PlainLane) -> tuple[Tensor, int]:
        """One epoch: the loss of each step (S,), on the CPU, and how many pictures were classified correctly.

        The device is not waited for until the epoch ends: losses and hits stay on it.
        """
        training, data, seed = lane.config.training, lane.data, lane.config.seed
        num_steps = data.train.num_batches(training.batch_size)
        losses_S = torch.empty(num_steps, device=self.device)
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        seed_generators(seed, "epoch", lane.epoch)
        lane.model.train()
        batches = data.train.batches(training.batch_size, seed=seed, epoch=lane.epoch)
        for step, (images_BCHW, labels_B) in enumerate(batches):
            if self._should_stop():
                raise Stopped
            for group in lane.optimizer.param_groups:
                group["lr"] = lane.lr_at(step, num_steps=num_steps)
            losses_S[step], step_hits = self.step(lane, images_BCHW, labels_B)
            hits += step_hits
        return losses_S.cpu(), int(hits)

    def step(self, lane: PlainLane, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Trains on a batch; its mean loss and its correct pictures stay on the device."""
        training = lane.config.training
        with autocast(self.device, lane.amp_dtype):
            logits_BL = lane.forward(images_BCHW)
        loss = F.cross_entropy(logits_BL.float(), labels_B, label_smoothing=training.label_smoothing)
        lane.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if training.gradient_clip is not None:
            nn.utils.clip_grad_norm_(lane.model.parameters(), training.gradient_clip)
        lane.optimizer.step()
        return loss.detach(), (logits_BL.detach().argmax(1) == labels_B).sum()

    @torch.no_grad()
    def _evaluate(self, lane: PlainLane, part: Part) -> tuple[float, float]:
        """Mean loss and accuracy per picture, from float32 sums."""
        lane.model.eval()
        sums = torch.zeros(2, device=self.device)  # loss, hits
        for images_BCHW, labels_B in part.batches(evaluation_batch(lane)):
            with autocast(self.device, lane.amp_dtype):
                logits_BL = lane.model(images_BCHW).float()
            hits = (logits_BL.argmax(1) == labels_B).sum()
            sums += torch.stack([F.cross_entropy(logits_BL, labels_B, reduction="sum"), hits])
        loss, accuracy = (sums / len(part)).tolist()
        return loss, accuracy


def autocast(device: torch.device, amp_dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)


def evaluation_batch(lane: Lane) -> int:
    """How many pictures are validated at a time."""
    return max(lane.config.training.batch_size, EVALUATION_PIXELS // lane.data.image_size**2)


def build_lane(config: TrialConfig, *, data: Data, device: torch.device) -> PlainLane:
    """Set a trial up: its network, drawn from its seed, and its optimizer. Raises UserError for what cannot work."""
    check_test_set(config, data=data)
    amp_dtype = mixed_precision(config.training, device=device)
    model = initial_model(config, data=data, device=device)
    return PlainLane(
        config=config,
        data=data,
        network=lambda: model,
        model=model,
        forward=torch.compile(model) if config.training.compile else model,
        optimizer=build_optimizer(model.parameters(), config.training, device_type=device.type),
        amp_dtype=amp_dtype,
    )


def make_checkpoint(lane: Lane, *, model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a trial whose network and torch.optim optimizer have these states."""
    state = {"model": model, "optimizer": optimizer, "first_loss": lane.first_loss}
    return Checkpoint(
        config_digest=config_digest(lane.config),
        epoch=lane.epoch,
        state=copied(state, setting=f"model.name = {lane.config.model.name!r}"),
        results=tuple(lane.results),
    )


def restore(lane: PlainLane, checkpoint: Checkpoint) -> None:
    """Bring a trial just set up to where its checkpoint is; raises UserError where the network does not fit."""
    state = copied(checkpoint.state, setting="the checkpoint")  # an optimizer would train on the checkpoint's tensors
    optimizer = lane.optimizer
    try:
        lane.model.load_state_dict(state["model"])
        # The settings of the groups are those of this device, such as `fused`, which says where `step` is.
        groups = zip(optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"], strict=True)
        groups_here = [{**here, "lr": there["lr"]} for here, there in groups]
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups_here})
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a user's module does, beside torch's own checks
        raise UserError(
            f"model.name = {lane.config.model.name!r} must be the network that it was when its checkpoint of epoch "
            f"{checkpoint.epoch} was made; it raised {describe(error)}"
        ) from error
    for moments in optimizer.state.values():
        if "mu_product" in moments:  # NAdam's, which torch would leave on a GPU and wait for in each step
            moments["mu_product"] = moments["mu_product"].cpu()
    lane.first_loss = state["first_loss"]
    lane.results = [replace(result, lane=0) for result in checkpoint.results]


def seed_generators(*parts: int | str) -> None:
    """Seed every generator that a network may draw from: torch's on all devices, and those of `random` and `numpy`.

    It is done before a network is drawn and before each epoch, so that a trial's seed and the epoch are the state of
    its generators, and a checkpoint has no other to keep.
    """
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def check_test_set(config: TrialConfig, *, data: Data) -> None:
    """Raises UserError where the test accuracy is asked for and the data set has no test part; else it is read."""
    if config.training.report_test_accuracy and data.test is None:
        raise UserError(
            f"training.report_test_accuracy needs a test set, and data.name = {config.data.name!r} has none"
        )


def initial_model(config: TrialConfig, *, data: Data, device: torch.device) -> nn.Module:
    """The network as the trial's seed draws it, on the device."""
    seed_generators(config.seed, "init")
    model = build_model(config.model, channels=data.channels, num_classes=data.num_classes, image_size=data.image_size)
    return model.to(device).to(memory_format=torch.channels_last)


def mixed_precision(training: TrainingConfig, *, device: torch.device) -> torch.dtype | None:
    """The lower precision that a trial computes in, or None for float32. Raises UserError for bf16 without hardware."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if training.precision == "bf16" and not has_bf16:
        raise UserError(f"training.precision = 'bf16' needs a GPU that computes in bf16, got the device {device}")
    return torch.bfloat16 if has_bf16 and training.precision != "fp32" else None


def diverged(lane: Lane, losses_S: Tensor, *, val_loss: float, val_accuracy: float) -> str | None:
    """Why a trial cannot recover, judged at the end of an epoch from the loss of each step; None where it may."""
    if not (losses_S.isfinite().all() and math.isfinite(val_loss)):
        return "non-finite loss"
    if not is_guessing(lane.data.val, val_accuracy=val_accuracy):
        return None
    if is_exploding(losses_S, first_loss=lane.first_loss, num_classes=lane.data.num_classes):
        return "exploding loss"
    if is_collapsed(lane):
        return "collapsed: every input gets the same output"
    return None


def is_guessing(val: Part, *, val_accuracy: float) -> bool:
    """Whether the validation accuracy is no better than that of naming the largest class every time."""
    largest_class = int(torch.bincount(val.labels_N).max())
    return round(val_accuracy * len(val)) <= largest_class


def is_exploding(losses_S: Tensor, *, first_loss: float, num_classes: int) -> bool:
    """Whether the loss ended the epoch far above a guess, ln(classes), and above the trial's very first loss.

    A network with large initial weights starts far above a guess, and is a slow start while it stays below its start.
    """
    last = losses_S[-math.ceil(len(losses_S) / 4) :].mean()
    return bool(last > 10 * max(math.log(num_classes), first_loss))


def is_collapsed(lane: Lane) -> bool:
    """Whether training has killed a network that guesses: it gives every picture the same output.

    Its loss does not tell: it is ln(classes) for a slow start too, and far above after a leap. A network that could not
    tell pictures apart when it was drawn either, such as an MLP of 20 layers, has not been killed by its learning rate.
    """
    spread = output_spread(lane.network(), lane.data)
    if spread > SAME_OUTPUT:
        return False
    initial = output_spread(initial_model(lane.config, data=lane.data, device=lane.data.val.labels_N.device), lane.data)
    return initial > 10 * SAME_OUTPUT or initial == spread == 0  # 0 as drawn: a last layer that starts at zero


@torch.no_grad()
def output_spread(model: nn.Module, data: Data) -> float:
    """How much the outputs differ from picture to picture, relative to their size, in float32."""
    model.eval()
    images_BCHW, _ = next(data.val.batches(SPREAD_PICTURES))
    logits_BL = model(images_BCHW).float()
    return float((logits_BL.amax(0) - logits_BL.amin(0)).max() / logits_BL.abs().max().clamp(min=1e-30))


def free_memory() -> None:
    """Gives back what a device's allocator keeps and no tensor uses, to the other processes on it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
