"""Trials of one kind, trained as one stacked network: each is a row of the tensors that are trained.

The same network, batch size, optimizer and data make a kind; what else differs, differs by row. A trial does not notice
its neighbours: on a CPU its digits are the same for every number of rows, and the plain engine's up to rounding.
Shapes: K lanes, P parameters of a network, S steps of an epoch, B batch, C H W picture, L classes.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.train.checkpoint import Checkpoint, config_digest
from hpo.train.config import EpochResult, TrainingConfig, TrialConfig, derive_seed
from hpo.train.data.batches import BatchLoader
from hpo.train.data.loading import SplitDataset
from hpo.train.data.sources import DeviceSource
from hpo.train.engines.lane_state import (
    LaneState,
    autocast,
    check_test_set,
    evaluation_batch_size,
    initial_model,
    make_checkpoint,
    mixed_precision,
)
from hpo.train.engines.plain import build_lane, restore
from hpo.train.engines.protocol import Stopped
from hpo.train.engines.stacked_network import NotStackable, StackedNetwork
from hpo.train.engines.stacked_optimizers import nadam_momentum_product
from hpo.train.optim import OPTIMIZERS, build_optimizer


def stack_key(config: TrialConfig) -> str:
    """The same for two trials that may be stacked: their networks, batches and update rules agree."""
    training = config.training
    agreeing = [config.model, config.data, training.batch_size, training.optimizer, training.precision]
    return json.dumps([*map(repr, agreeing), training.compile, training.report_test_accuracy])


class TrialStack:
    """Trials of one kind, each a row of the tensors that are trained; an engine of as many lanes as are admitted."""

    def __init__(
        self,
        config: TrialConfig,
        *,
        data: SplitDataset,
        device: torch.device,
        convolution: str,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises NotStackable where trials of this kind cannot be trained so."""
        if config.training.compile:
            raise NotStackable("training.compile compiles a single network")
        if not isinstance(data.train.source, DeviceSource):
            raise NotStackable("its pictures do not lie on the device")
        check_test_set(config, data=data)
        self.device, self.convolution = device, convolution
        self._data, self._should_stop = data, should_stop
        self._amp_dtype = mixed_precision(config.training, device=device)
        self._model = initial_model(config, data=data, device=device)  # takes the state of any lane, one at a time
        build_optimizer(self._model.parameters(), config.training, device_type=device.type)  # refuses wrong settings
        self._network = StackedNetwork(self._model, device=device, convolution=convolution)
        images_BCHW, _ = next(data.train.batches(config.training.batch_size))
        other = initial_model(replace(config, seed=config.seed + 1), data=data, device=device)
        self._network.check(other, images_BCHW, autocast=self._autocast)
        self._update = OPTIMIZERS[config.training.optimizer].update
        self._lanes: list[LaneState | None] = []  # by lane; None where it is free
        self._rows: list[int] = []  # the lane of each row
        num_params = sum(parameter.numel() for parameter in self._model.parameters())
        self._params_KP = torch.empty((0, num_params), device=device)
        self._moments = {name: torch.empty((0, num_params), device=device) for name in self._update.moments}
        self._buffers = {name: buffer[None][:0] for name, buffer in self._model.named_buffers()}
        self._leaves: dict[str, Tensor] = {}
        self._is_whole = True

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free_lanes(self) -> int:
        return 1  # always another one

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None) -> int:
        assert checkpoint is None or checkpoint.config_digest == config_digest(config), "another trial's checkpoint"
        plain = build_lane(config, data=self._data, device=self.device)
        if checkpoint is not None:
            restore(plain, checkpoint)
        parameters = list(plain.model.parameters())
        state = [plain.optimizer.state.get(parameter, {}) for parameter in parameters]
        moments = {
            name: [
                _moment_or_zeros(of_one.get(name), parameter)
                for of_one, parameter in zip(state, parameters, strict=True)
            ]
            for name in self._moments
        }
        # All of it or, where memory runs out, nothing: the others go on.
        grown_params = torch.cat([self._params_KP, _flat_row(parameters)])
        grown_moments = {name: torch.cat([self._moments[name], _flat_row(given)]) for name, given in moments.items()}
        grown_buffers = {
            name: torch.cat([self._buffers[name], buffer[None]]) for name, buffer in plain.model.named_buffers()
        }
        self._params_KP, self._moments, self._buffers = grown_params, grown_moments, grown_buffers
        if None not in self._lanes:
            self._lanes.append(None)
        number = self._lanes.index(None)
        self._rows.append(number)
        self._lanes[number] = LaneState(
            config=config,
            data=self._data,
            network=lambda: self._load(number),
            first_loss=plain.first_loss,
            results=plain.results,
        )
        self._cut_leaves()
        return number

    def evict(self, lane: int) -> None:
        self._select([row for row, number in enumerate(self._rows) if number != lane])
        self._lanes[lane] = None
        self._is_whole = self._is_whole or not self._rows

    def checkpoint(self, lane: int) -> Checkpoint:
        assert self._is_whole, "the trials are in the middle of an epoch"
        trial = self._lanes[lane]
        assert trial is not None, "there is no trial in this lane"
        training = trial.config.training
        optimizer = build_optimizer(self._model.parameters(), training, device_type=self.device.type).state_dict()
        if trial.epoch:
            for group in optimizer["param_groups"]:
                group["lr"] = trial.results[-1].lr
            optimizer["state"] = self._optimizer_state(lane, trial)
        return make_checkpoint(trial, model=self._load(lane).state_dict(), optimizer=optimizer)

    def run_epoch(self) -> list[EpochResult]:
        assert self._rows, "there is no trial to train"
        start_s = time.perf_counter()
        self._is_whole = False
        if len(self._rows) == 1:  # kernels for one lane add in another order than those for two or more
            self._select([0, 0])
        trials = self._trials()
        losses_KS, hits_K = self._train(trials)
        val_K = self._evaluate(trials, self._data.val)
        tests_K: list[float | None] = [None] * len(trials)
        if trials[0].config.training.report_test_accuracy:
            assert self._data.test is not None
            tests_K = [accuracy for _, accuracy in self._evaluate(trials, self._data.test)]
        self._is_whole = True
        seconds = time.perf_counter() - start_s
        if self._rows[0] == self._rows[-1]:
            self._select([0])
        return [
            trials[row].finish_epoch(
                losses_KS[row], lane=lane, hits=hits_K[row], val=val_K[row], test_accuracy=tests_K[row], seconds=seconds
            )
            for row, lane in enumerate(self._rows)
        ]

    @property
    def num_steps(self) -> int:
        """Of an epoch."""
        return self._data.train.num_batches(self._trials()[0].config.training.batch_size)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch that every lane is in, (K, B, C, H, W) and (K, B); their random streams begin."""
        trials = self._trials()
        self._network.streams.seed([derive_seed(trial.config.seed, "epoch", trial.epoch) for trial in trials])
        return self._data.train.stacked_batches(
            trials[0].config.training.batch_size, [(trial.config.seed, trial.epoch) for trial in trials]
        )

    def step(self, images_KBCHW: Tensor, labels_KB: Tensor, factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Trains every lane on its batch; losses (K,) and correct pictures (K,) stay on the device.

        `factors` are those of the update rule for this step, and what `factors` adds to them.
        """
        with self._autocast():
            logits_KBL = self._network(self._leaves, self._buffers, images_KBCHW, training=True)
        logs_KBL = logits_KBL.float().log_softmax(2)
        of_label_KB = logs_KBL.gather(2, labels_KB[:, :, None])[:, :, 0]
        smoothing = factors["label_smoothing"]
        smooth_KB = torch.where(smoothing > 0, smoothing * logs_KBL.mean(2), 0.0)  # of -inf nothing where that is off
        losses_KB = -((1 - smoothing) * of_label_KB + smooth_KB)
        losses_K = losses_KB.mean(1)
        gradients = torch.autograd.grad(losses_K.sum(), list(self._leaves.values()))
        gradients_KP = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        if "largest_norm" in factors:
            norms = gradients_KP.norm(dim=1, keepdim=True)
            shares = (factors["largest_norm"] / (norms + 1e-6)).clamp(max=1.0)
            gradients_KP *= torch.where(factors["largest_norm"].isfinite(), shares, 1.0)
        self._update.apply(self._params_KP, gradients_KP, self._moments, factors)
        return losses_K.detach(), (logits_KBL.detach().argmax(2) == labels_KB).sum(1)

    def factors(self, num_steps: int) -> list[dict[str, Tensor]]:
        """For each step of the epoch every lane's numbers (K, 1): of the update rule, the loss and the clipping."""
        by_step: list[list[dict[str, float]]] = []
        trials = self._trials()
        clips = any(trial.config.training.gradient_clip is not None for trial in trials)
        for trial in trials:
            training = with_eps(trial.config.training)
            fixed = {"label_smoothing": training.label_smoothing}
            if clips:
                fixed["largest_norm"] = torch.inf if training.gradient_clip is None else training.gradient_clip
            done = trial.epoch * num_steps
            by_step.append(
                [
                    self._update.factors(training, trial.lr_at(step, num_steps=num_steps), done + step + 1) | fixed
                    for step in range(num_steps)
                ]
            )
        names = list(by_step[0][0])
        numbers = [[[of_step[name] for name in names] for of_step in of_lane] for of_lane in by_step]
        on_device = torch.tensor(numbers, dtype=torch.float64).float().to(self.device)  # K S names
        return [
            dict(zip(names, of_step.unsqueeze(-1).unbind(1), strict=True)) for of_step in on_device.unbind(1)
        ]  # fmt: skip

    def _train(self, trials: Sequence[LaneState]) -> tuple[Tensor, list[int]]:
        """An epoch of every lane: the loss of each step (K, S), on the CPU, and how many pictures were correct."""
        num_steps = self.num_steps
        losses_KS = torch.empty((len(trials), num_steps), device=self.device)
        hits_K = torch.zeros(len(trials), dtype=torch.int64, device=self.device)
        factors_S = self.factors(num_steps)
        for step, (images_KBCHW, labels_KB) in enumerate(self.batches()):
            if self._should_stop():
                raise Stopped
            losses_KS[:, step], step_hits_K = self.step(images_KBCHW, labels_KB, factors_S[step])
            hits_K += step_hits_K
        return losses_KS.cpu(), hits_K.tolist()

    @torch.no_grad()
    def _evaluate(self, trials: Sequence[LaneState], part: BatchLoader) -> list[tuple[float, float]]:
        """For each lane the mean loss and the accuracy per picture, from float32 sums."""
        sums_K2 = torch.zeros((len(trials), 2), device=self.device)
        batch_size = evaluation_batch_size(trials[0])
        if self.device.type == "cuda":  # memory; on a CPU the size would show in the last digit
            batch_size = max(trials[0].config.training.batch_size, batch_size // len(trials))
        for images_BCHW, labels_B in part.batches(batch_size):
            with self._autocast():
                logits_KBL = self._network(self._leaves, self._buffers, images_BCHW, training=False).float()
            labels_KB = labels_B.expand(len(trials), -1)
            losses_KB = F.cross_entropy(logits_KBL.mT, labels_KB, reduction="none")
            sums_K2 += torch.stack([losses_KB.sum(1), (logits_KBL.argmax(2) == labels_KB).sum(1)], dim=1)
        return [(loss, accuracy) for loss, accuracy in (sums_K2 / len(part)).tolist()]

    def _trials(self) -> list[LaneState]:
        return [trial for number in self._rows if (trial := self._lanes[number]) is not None]

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self._amp_dtype)

    def _select(self, rows: list[int]) -> None:
        """Keeps these rows, in this order."""
        params_KP = self._params_KP[rows]
        moments = {name: tensor[rows] for name, tensor in self._moments.items()}
        self._buffers = {name: tensor[rows] for name, tensor in self._buffers.items()}
        self._params_KP, self._moments = params_KP, moments
        self._rows = [self._rows[row] for row in rows]
        self._cut_leaves()

    def _cut_leaves(self) -> None:
        """The parameters as the network knows them, each (K, ...): views of the rows, which steps change in place."""
        self._leaves = {
            name: columns.view(len(columns), *parameter.shape).detach().requires_grad_()
            for (name, parameter), columns in zip(
                self._model.named_parameters(), self._split(self._params_KP), strict=True
            )
        }

    def _split(self, rows: Tensor) -> Sequence[Tensor]:
        return torch.split(rows, [parameter.numel() for parameter in self._model.parameters()], dim=-1)

    @torch.no_grad()
    def _load(self, lane: int) -> nn.Module:
        """The network of a lane, until another one's is asked for."""
        row = self._rows.index(lane)
        for parameter, values in zip(self._model.parameters(), self._split(self._params_KP[row]), strict=True):
            parameter.copy_(values.view(parameter.shape))
        for name, buffer in self._model.named_buffers():
            buffer.copy_(self._buffers[name][row])
        return self._model

    def _optimizer_state(self, lane: int, trial: LaneState) -> dict[int, dict[str, Any]]:
        """What torch.optim's optimizer of this trial would have in its state."""
        row, training = self._rows.index(lane), trial.config.training
        steps = trial.epoch * self.num_steps
        common: dict[str, Tensor] = {} if training.optimizer == "sgd" else {"step": torch.tensor(float(steps))}
        if training.optimizer == "nadam":
            common["mu_product"] = torch.tensor(nadam_momentum_product(training.beta1, steps))
        kept = [name for name in self._moments if name != "momentum_buffer" or training.momentum]
        parameters = list(self._model.parameters())
        moments = {name: self._split(self._moments[name][row]) for name in kept}
        return {
            index: common | {name: columns[index].view(parameter.shape) for name, columns in moments.items()}
            for index, parameter in enumerate(parameters)
        }


def with_eps(training: TrainingConfig) -> TrainingConfig:
    """The same settings with the optimizer's own eps where none is given."""
    if training.eps is not None:
        return training
    parameters = inspect.signature(getattr(torch.optim, OPTIMIZERS[training.optimizer].torch_class)).parameters
    return replace(training, eps=parameters["eps"].default if "eps" in parameters else 0.0)


def _flat_row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])[None]


def _moment_or_zeros(moment: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if moment is None else moment
