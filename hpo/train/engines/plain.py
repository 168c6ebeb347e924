"""The plain engine: one lane and torch.optim, meant to be read; other engines are held to its results.

Shapes: B batch, C H W image, S steps of an epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hpo.errors import UserError
from hpo.train.checkpoint import Checkpoint, config_digest, storable_copy
from hpo.train.config import EpochResult, TrialConfig, name_on_test_set
from hpo.train.data.batches import BatchLoader
from hpo.train.data.loading import DatasetCache, SplitDataset
from hpo.train.data.mixing import Mix, mix_batch
from hpo.train.engines.lane_state import (
    ALONE,
    Evaluated,
    LaneState,
    Rank,
    check_test_set,
    evaluation_batch_size,
    evaluation_sums,
    initial_model,
    mixed_precision,
    numerics,
    take_snapshot,
    train_step,
)
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.engines.weight_average import WeightAverage
from hpo.train.imports import describe_error
from hpo.train.metrics import measure, needs_outputs
from hpo.train.optim import NOT_OPTIONS, build_optimizer, set_lr, set_optimizer_mode
from hpo.train.parameter_groups import multipliers_of, parameter_groups, set_trained
from hpo.train.recomputation import recompute_activations
from hpo.train.seeding import seed_generators
from hpo.train.snapshot import Snapshot

# The scaler of fp16 begins at 2^16 and is halved with each step that it skips. Where it is as far below 1, no gradient
# is finite however it is scaled, and the trial would stay as it is for good.
MIN_SCALE = 2.0**-16


@dataclass(kw_only=True)
class PlainLaneState(LaneState):
    """The state of a trial that has its network and its optimizer to itself."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # the model, compiled where that was asked for
    optimizer: torch.optim.Optimizer
    amp_dtype: torch.dtype | None  # of automatic mixed precision; None: float32 throughout
    scaler: torch.amp.GradScaler | None = None  # of the gradients, in fp16
    rank: Rank = ALONE  # of the processes that train it
    average: WeightAverage | None = None  # of the model's weights, where it is validated in their place
    is_whole: bool = True  # between two epochs, not within one

    @property
    def validated(self) -> nn.Module:
        """Return the network that is validated: the model, or the average of its weights."""
        return self.model if self.average is None else self.average.network

    def why_diverged(self, losses_S: Tensor, *, val_loss: float, val_accuracy: float) -> str | None:
        """Return why the trial cannot recover, which in fp16 may be that none of its gradients is finite any more."""
        if self.scaler is not None and self.scaler.get_scale() < MIN_SCALE:
            return "non-finite gradients"
        return super().why_diverged(losses_S, val_loss=val_loss, val_accuracy=val_accuracy)

    def begin_training(self) -> None:
        """Have the network, but what is frozen in the epoch in progress, and the optimizer train."""
        set_trained(self.model, self.config.training, epoch=self.epoch, num_classes=self.data.num_classes)
        set_optimizer_mode(self.optimizer, training=True)

    def begin_evaluation(self) -> None:
        """Have the network and the optimizer ready for an evaluation."""
        self.model.eval()
        set_optimizer_mode(self.optimizer, training=False)


class PlainEngine(Engine):
    """An engine of one lane: as simple as a training loop can be, and the reference for every other engine."""

    def __init__(
        self, *, device: str, should_stop: Callable[[], bool] = lambda: False, dataset_cache: DatasetCache | None = None
    ) -> None:
        """Make an engine without a trial.

        Args:
            device: The device, as torch names it.
            should_stop: Asked before each step, from the training thread; it has to be quick.
            dataset_cache: Where datasets on this device are kept; None: a cache of its own.
        """
        self.device = torch.device(device)
        self._should_stop = should_stop
        self._lane: PlainLaneState | None = None
        self._dataset_cache = dataset_cache or DatasetCache(device=self.device)

    @property
    def free_lanes(self) -> int:
        """Return 1, or 0 while there is a trial."""
        return 1 if self._lane is None else 0

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None) -> int:
        """Set a trial up, ready for its next epoch; see `Engine`."""
        assert self._lane is None, "the plain engine has one lane, and it is taken"
        assert checkpoint is None or checkpoint.config_digest == config_digest(config), "another trial's checkpoint"
        lane = build_lane(config, data=self._dataset_cache.for_trial(config), device=self.device)
        if checkpoint is not None:
            restore(lane, checkpoint)
        self._lane = lane
        return 0

    def evict(self, lane: int) -> None:
        """Forget the trial; see `Engine`."""
        assert self._lane is not None, "there is no trial in this lane"
        self._lane = None

    def snapshot(self, lane: int) -> Snapshot:
        """Return the trial after its last epoch; see `Engine`."""
        assert self._lane is not None, "there is no trial in this lane"
        assert self._lane.is_whole, "the trial is in the middle of an epoch"
        return snapshot_lane(self._lane)

    def run_epoch(self) -> list[EpochResult]:
        """Train the trial for one epoch; see `Engine`."""
        assert self._lane is not None, "there is no trial to train"
        lane, data = self._lane, self._lane.data
        start_s = time.perf_counter()
        lane.is_whole = False
        with numerics(tf32=lane.config.training.tf32):
            losses_S, hits = self._train(lane)
            val = evaluate_lane(lane, data.val)
            test_accuracy = None
            if lane.config.training.report_test_accuracy:
                assert data.test is not None
                test_accuracy = evaluate_lane(lane, data.test).accuracy
        seconds = time.perf_counter() - start_s
        result = lane.finish_epoch(losses_S, lane=0, hits=hits, val=val, test_accuracy=test_accuracy, seconds=seconds)
        lane.is_whole = True
        return [result]

    def test_metrics(self, config: TrialConfig, checkpoint: Checkpoint) -> dict[str, float]:
        """Return what the test set says of the network in a checkpoint; see `LaneEngine`."""
        lane = build_lane(config, data=self._dataset_cache.for_trial(config), device=self.device)
        restore(lane, checkpoint)
        if lane.data.test is None:
            raise UserError(f"data.name = {config.data.name!r} has no test set")
        with numerics(tf32=config.training.tf32):
            found = evaluate_lane(lane, lane.data.test)
        measured = measure(config.training.metric, found.logits_NL, lane.data.test.labels_N)
        measured |= {"val_loss": found.loss, "val_accuracy": found.accuracy}
        return {name_on_test_set(name): value for name, value in measured.items()}

    def _train(self, lane: PlainLaneState) -> tuple[Tensor, float]:
        """Train one epoch; return the loss of each step (S,), on the CPU, and how many images were correct.

        Losses and hits stay on the device until the epoch ends, so that no step waits for it.
        """
        training, data, seed = lane.config.training, lane.data, lane.config.seed
        num_steps = data.train.num_batches(training.images_per_step)
        losses_S = torch.empty(num_steps, device=self.device)
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self._seed_epoch(lane)
        lane.begin_training()
        batches = data.train.batches(training.images_per_step, seed=seed, epoch=lane.epoch)
        for step, (images_BCHW, labels_B) in enumerate(batches):
            if self._should_stop():
                raise Stopped
            set_lr(lane.optimizer, lane.lr_at(step, num_steps=num_steps))
            images, mix = mix_batch(images_BCHW, labels_B, training, seed=seed, epoch=lane.epoch, step=step)
            losses_S[step], step_hits = self.step(lane, images, labels_B, mix=mix)
            hits = hits + step_hits
            if lane.average is not None:
                lane.average.update(lane.model, step=lane.epoch * num_steps + step)
        return losses_S.cpu(), hits.item()

    def _seed_epoch(self, lane: PlainLaneState) -> None:
        seed_generators(lane.config.seed, "epoch", lane.epoch)

    def step(
        self, lane: PlainLaneState, images_BCHW: Tensor, labels_B: Tensor, *, mix: Mix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Train on the images of a step; return their mean loss and how many are correct, both on the device."""
        return train_step(
            lane.forward,
            lane.optimizer,
            images_BCHW,
            labels_B,
            parameters=lane.model.parameters(),
            loss_function=lane.loss,
            amp_dtype=lane.amp_dtype,
            mix=mix,
            scaler=lane.scaler,
            recomputed=lane.model if lane.config.training.activation_checkpointing else None,
            rank=lane.rank,
        )


def build_lane(config: TrialConfig, *, data: SplitDataset, device: torch.device) -> PlainLaneState:
    """Set a trial up: its network, drawn from its seed, and its optimizer. Raises UserError for what cannot work."""
    check_test_set(config, data=data)
    amp_dtype = mixed_precision(config.training, device=device)
    model = initial_model(config, data=data, device=device)
    if config.training.activation_checkpointing:
        recompute_activations(model, name=config.model.name)
    multipliers = multipliers_of(model, config.training, num_classes=data.num_classes)
    groups = parameter_groups(model, config.training, multipliers)
    average = None
    if config.training.ema is not None:
        average = WeightAverage(initial_model(config, data=data, device=device), decay=config.training.ema)
    lane = PlainLaneState(
        config=config,
        data=data,
        average=average,
        network=lambda: model if average is None else average.network,
        model=model,
        forward=torch.compile(model) if config.training.compile else model,
        multipliers=multipliers,
        optimizer=build_optimizer(groups, config.training, device_type=device.type),
        amp_dtype=amp_dtype,
        scaler=torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None,
    )
    lane.begin_training()
    return lane


def evaluate_lane(lane: PlainLaneState, loader: BatchLoader) -> Evaluated:
    """Return what a split gives; the mean loss and the accuracy are from float32 sums."""
    lane.begin_evaluation()
    batches = loader.batches(evaluation_batch_size(lane.config, data=lane.data))
    outputs: list[Tensor] | None = [] if needs_outputs(lane.config.training.metric) else None
    sums_2 = evaluation_sums(
        lane.validated,
        batches,
        loss_function=lane.loss,
        device=loader.labels_N.device,
        amp_dtype=lane.amp_dtype,
        outputs=outputs,
    )
    loss, accuracy = (sums_2 / len(loader)).tolist()
    return Evaluated(loss=loss, accuracy=accuracy, logits_NL=torch.cat(outputs).cpu() if outputs else None)


def snapshot_lane(lane: PlainLaneState) -> Snapshot:
    """Return a snapshot of a trial between two epochs."""
    return take_snapshot(
        lane,
        model=lane.validated.state_dict(),
        optimizer=lane.optimizer.state_dict(),
        in_training=None if lane.average is None else lane.model.state_dict(),
        scaler=None if lane.scaler is None else lane.scaler.state_dict(),
    )


def restore(lane: PlainLaneState, checkpoint: Checkpoint) -> None:
    """Bring a trial that was just set up to its checkpoint; raise UserError where the network does not fit."""
    # A copy, because the optimizer would train on the checkpoint's own tensors.
    state = storable_copy(checkpoint.state, setting="the checkpoint")
    optimizer = lane.optimizer
    try:
        lane.validated.load_state_dict(state["model"])
        if lane.average is not None:
            lane.model.load_state_dict(state["in_training"])
        # A group may keep numbers of its own, as Prodigy's do, and keeps how steps are computed on this device, such as
        # `fused`, which decides where `step` is stored.
        ours, saved = optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"]
        new_groups = [
            group | of_trial | {key: group[key] for key in NOT_OPTIONS & group.keys()}
            for group, of_trial in zip(ours, saved, strict=True)
        ]
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": new_groups})
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a user's module raises, besides torch's own checks
        raise UserError(
            f"model.name = {lane.config.model.name!r} must be the network that it was when its checkpoint of epoch "
            f"{checkpoint.epoch} was made; it raised {describe_error(error)}"
        ) from error
    for moments in optimizer.state.values():
        if "mu_product" in moments:  # NAdam's; torch would leave it on a GPU and wait for it in each step
            moments["mu_product"] = moments["mu_product"].cpu()
    if lane.scaler is not None and "scaler" in state:  # not of a trial that began on a device with bf16
        lane.scaler.load_state_dict(state["scaler"])
    lane.first_loss = state["first_loss"]
    lane.results = [replace(result, lane=0) for result in checkpoint.results]
