"""What a study's [model], [data] and [training] give to a training loop of a user's own.

Shapes: B batch, C H W image, L classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import UserError
from hpo.train.checkpoint import CheckpointFolder
from hpo.train.config import TrialConfig
from hpo.train.data.loading import DatasetCache, SplitDataset
from hpo.train.engines.lane_state import autocast, numerics, take_step
from hpo.train.engines.plain import build_lane, evaluate_lane, restore, snapshot_lane
from hpo.train.optim import set_lr
from hpo.train.recomputation import buffers_kept
from hpo.train.seeding import seed_generators


class Recipe:
    """The images, the network and the optimizer of a trial, for a loop of your own that makes the steps.

    A loop that trains on `loss(outputs(images), labels)` trains as hpo does without it: bit for bit on a CPU. A trial
    that was interrupted is as it was saved.
    """

    def __init__(self, config: TrialConfig, *, device: str, folder: Path, datasets: DatasetCache) -> None:
        """Set a trial up, or resume it from the checkpoint in its folder.

        Args:
            config: The trial.
            device: Where it trains.
            folder: Its folder.
            datasets: Where the images are kept from trial to trial.
        """
        self._device = torch.device(device)
        self._folder = CheckpointFolder(str(folder / "recipe"), identity={})
        self._lane = build_lane(config, data=datasets.for_trial(config), device=self._device)
        self._losses: list[Tensor] = []  # of the epoch's steps, on the device
        self._start_s = time.perf_counter()
        checkpoint, _ = self._folder.load(config)
        if checkpoint is not None:
            restore(self._lane, checkpoint)

    @property
    def config(self) -> TrialConfig:
        """Return the settings of the trial, with its values."""
        return self._lane.config

    @property
    def data(self) -> SplitDataset:
        """Return the images on the device, split, augmented and normalised."""
        return self._lane.data

    @property
    def model(self) -> nn.Module:
        """Return the network that is trained."""
        return self._lane.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return its optimizer."""
        return self._lane.optimizer

    @property
    def epoch(self) -> int:
        """Return how many epochs are finished."""
        return self._lane.epoch

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images (B, C, H, W) and the labels (B,) of each step of the next epoch.

        The optimizer has the learning rate of the step then, and every generator is seeded from the trial and the
        epoch.
        """
        lane, training = self._lane, self.config.training
        num_steps = lane.data.train.num_batches(training.batch_size)
        self._losses, self._start_s = [], time.perf_counter()
        seed_generators(self.config.seed, "epoch", lane.epoch)
        lane.begin_training()
        batches = lane.data.train.batches(training.batch_size, seed=self.config.seed, epoch=lane.epoch)
        with numerics(tf32=training.tf32):
            for step, (images_BCHW, labels_B) in enumerate(batches):
                set_lr(lane.optimizer, lane.lr_at(step, num_steps=num_steps))
                yield images_BCHW, labels_B

    def outputs(self, images_BCHW: Tensor) -> Tensor:
        """Return the network's outputs (B, L) in float32, computed in the precision of the trial.

        Args:
            images_BCHW: Images on the device.
        """
        with autocast(self._device, self._lane.amp_dtype):
            logits_BL = self._lane.forward(images_BCHW)
        return logits_BL.float()

    def loss(self, outputs_BL: Tensor, labels_B: Tensor) -> Tensor:
        """Return the mean of `training.loss` over a batch.

        Args:
            outputs_BL: The outputs of the network.
            labels_B: The labels.
        """
        return self._lane.loss.mean(outputs_BL, labels_B)

    def step(self, loss: Tensor) -> None:
        """Change the network by the gradients of a loss; call this once for each batch.

        Args:
            loss: A number to minimize, such as `loss(...)` with terms of your own.
        """
        lane, training = self._lane, self.config.training
        lane.optimizer.zero_grad(set_to_none=True)
        with buffers_kept(lane.model if training.activation_checkpointing else None):
            (loss if lane.scaler is None else lane.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        parameters = lane.model.parameters()
        take_step(lane.optimizer, parameters, largest_norm=training.gradient_clip, scaler=lane.scaler)
        if lane.average is not None:
            num_steps = lane.data.train.num_batches(training.batch_size)
            lane.average.update(lane.model, step=lane.epoch * num_steps + len(self._losses))
        self._losses.append(loss.detach())

    def finish_epoch(self) -> dict[str, Any]:
        """Validate the network and judge whether it has diverged.

        Returns:
            What `hpo.Trial.report` takes: `train_loss`, `val_loss`, `val_accuracy`, a metric of another name that
            `training.metric` asks for, `lr`, `seconds`, and `diverged`, a reason, where training cannot recover.

        Raises:
            UserError: `step` was not called once for each batch.
        """
        lane, training = self._lane, self.config.training
        if len(self._losses) != (num_steps := lane.data.train.num_batches(training.batch_size)):
            raise UserError(
                f"recipe.step must be called once for each of the {num_steps} batches of an epoch, got "
                f"{len(self._losses)} calls"
            )
        losses_S = torch.stack(self._losses).float().cpu()
        with numerics(tf32=training.tf32):
            val = evaluate_lane(lane, lane.data.val)
        seconds = time.perf_counter() - self._start_s
        result = lane.finish_epoch(losses_S, lane=0, hits=0, val=val, test_accuracy=None, seconds=seconds)
        metrics: dict[str, Any] = result.metrics()
        del metrics["train_accuracy"]  # is not known: the outputs are the loop's
        return metrics | ({} if result.diverged is None else {"diverged": result.diverged})

    def test_accuracy(self) -> float:
        """Return the accuracy on the test set, a fraction.

        Raises:
            UserError: There is no test set.
        """
        if self.data.test is None:
            raise UserError(f"data.name = {self.config.data.name!r} has no test set")
        with numerics(tf32=self.config.training.tf32):
            return evaluate_lane(self._lane, self.data.test).accuracy

    def save(self) -> None:
        """Save the trial, whole or not at all, after `finish_epoch`; the next attempt resumes from there."""
        self._folder.save(snapshot_lane(self._lane).checkpoint())
