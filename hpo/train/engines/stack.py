"""A stack of trials of one kind, trained as one stacked network.

Trials are of one kind if they share the network, the batch size, the optimizer and the data; what else differs, differs
by row. A trial does not notice its neighbours: on a CPU its digits are the same for every number of rows, and the plain
engine's up to rounding.
Shapes: K lanes, P parameters of a network, S steps of an epoch, B batch, C H W image, L classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpo.train.checkpoint import Checkpoint, config_digest
from hpo.train.config import EpochResult, TrialConfig, derive_seed
from hpo.train.data.batches import BatchLoader
from hpo.train.data.loading import SplitDataset
from hpo.train.data.sources import DeviceSource
from hpo.train.engines.lane_state import (
    Evaluated,
    LaneState,
    autocast,
    check_test_set,
    evaluation_batch_size,
    initial_model,
    mixed_precision,
    numerics,
    optimizer_state_dict,
    take_snapshot,
    why_plain,
)
from hpo.train.engines.plain import build_lane, restore
from hpo.train.engines.protocol import Engine, Stopped
from hpo.train.engines.stack_probe import check_stackable
from hpo.train.engines.stacked_network import NotStackable, StackedNetwork
from hpo.train.engines.stacked_numbers import StepNumbers
from hpo.train.engines.stacked_rows import StackedRows
from hpo.train.losses import is_plain_cross_entropy
from hpo.train.metrics import needs_outputs
from hpo.train.optim import build_optimizer, update_rule, why_no_rule
from hpo.train.snapshot import Snapshot


def stack_key(config: TrialConfig) -> str:
    """Return a key that is the same for trials of one kind: those whose networks, batches and update rules agree."""
    training = config.training
    agreeing = [config.model, config.data, training.batch_size, training.optimizer, training.optimizer_options]
    switches = [training.tf32, training.compile, training.report_test_accuracy, bool(training.freeze)]
    switches.append(is_plain_cross_entropy(training))
    agreeing += [training.precision, training.metric]
    return json.dumps([*map(repr, agreeing), *switches, why_plain(training)])


class TrialStack(Engine):
    """An engine of trials of one kind, with as many lanes as are admitted; each trial is a row of the tensors."""

    def __init__(
        self,
        config: TrialConfig,
        *,
        data: SplitDataset,
        device: torch.device,
        convolution: str,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make an empty stack for trials like `config`.

        Args:
            config: Any trial of the kind.
            data: The dataset of the trials.
            device: Where they are trained.
            convolution: How convolutions are computed, one of CONVOLUTIONS.
            should_stop: Asked before each step, from the training thread; it has to be quick.

        Raises:
            NotStackable: Trials of this kind cannot be trained in a stack.
            UserError: They cannot be trained as they are configured.
        """
        if config.training.compile:
            raise NotStackable("training.compile compiles a single network")
        if config.training.freeze:
            raise NotStackable("training.freeze leaves parameters untrained")
        self._amp_dtype = mixed_precision(config.training, device=device)
        if (reason := why_no_rule(config.training) or why_plain(config.training, self._amp_dtype)) is not None:
            raise NotStackable(reason)
        if not is_plain_cross_entropy(config.training):
            raise NotStackable("a stack has no loss but the cross-entropy without class weights")
        if not isinstance(data.train.source, DeviceSource):
            raise NotStackable("its images are not on the device")
        check_test_set(config, data=data)
        self.device, self.convolution = device, convolution
        self._data, self._should_stop = data, should_stop
        self._model = initial_model(config, data=data, device=device)  # takes the state of one lane at a time
        build_optimizer(self._model.parameters(), config.training, device_type=device.type)  # refuses wrong settings
        self._network = StackedNetwork(self._model, device=device, convolution=convolution)
        images_BCHW, _ = next(data.train.batches(config.training.batch_size))
        other = initial_model(replace(config, seed=config.seed + 1), data=data, device=device)
        check_stackable(self._network, other, images_BCHW, amp_dtype=self._amp_dtype)
        self._update = update_rule(config.training)
        self._lanes: list[LaneState | None] = []  # by lane; None where it is free
        self._row_lanes: list[int] = []  # the lane of each row
        self._tensors = StackedRows(self._model, self._update, device=device)
        self._is_whole = True
        # Whether a trial's digits must not depend on the number of rows: a lone row is then trained twice, because
        # kernels for one lane add in another order than those for two or more.
        self._keeps_digits = device.type == "cpu"

    def __len__(self) -> int:
        """Return the number of trials."""
        return len(self._row_lanes)

    @property
    def free_lanes(self) -> int:
        """Return 1: there is always another lane."""
        return 1

    def admit(self, config: TrialConfig, checkpoint: Checkpoint | None = None) -> int:
        """Set a trial up, ready for its next epoch; see `Engine`. Where memory runs out, the others stay whole."""
        assert checkpoint is None or checkpoint.config_digest == config_digest(config), "another trial's checkpoint"
        plain = build_lane(config, data=self._data, device=self.device)
        if checkpoint is not None:
            restore(plain, checkpoint)
        self._tensors.append(plain.model, plain.optimizer)
        if None not in self._lanes:
            self._lanes.append(None)
        number = self._lanes.index(None)
        self._row_lanes.append(number)
        self._lanes[number] = LaneState(
            config=config,
            data=self._data,
            network=lambda: self._load(number),
            multipliers=plain.multipliers,
            first_loss=plain.first_loss,
            results=plain.results,
        )
        return number

    def evict(self, lane: int) -> None:
        """Forget the trial in a lane; see `Engine`."""
        self._select([row for row, number in enumerate(self._row_lanes) if number != lane])
        self._lanes[lane] = None
        self._is_whole = self._is_whole or not self._row_lanes

    def repeat_first(self, lanes: int) -> None:
        """Train the first trial in so many rows, to measure how long they take; `evict` forgets all of them."""
        self._select([0] * lanes)

    def snapshot(self, lane: int) -> Snapshot:
        """Return the trial in a lane after its last epoch; see `Engine`."""
        assert self._is_whole, "the trials are in the middle of an epoch"
        trial = self._lanes[lane]
        assert trial is not None, "there is no trial in this lane"
        optimizer = optimizer_state_dict(
            trial,
            self._model,
            lambda names: self._tensors.moments_of(self._row_lanes.index(lane), names),
            device=self.device,
        )
        return take_snapshot(trial, model=self._load(lane).state_dict(), optimizer=optimizer)

    def run_epoch(self) -> list[EpochResult]:
        """Train every trial for one epoch; see `Engine`."""
        assert self._row_lanes, "there is no trial to train"
        start_s = time.perf_counter()
        self._is_whole = False
        is_doubled = len(self._row_lanes) == 1 and self._keeps_digits
        if is_doubled:
            self._select([0, 0])
        trials = self._trials()
        with numerics(tf32=trials[0].config.training.tf32):
            losses_KS, hits_K = self._train(trials)
            val_K = self._evaluate(trials, self._data.val)
            tests_K: list[float | None] = [None] * len(trials)
            if trials[0].config.training.report_test_accuracy:
                assert self._data.test is not None
                tests_K = [one.accuracy for one in self._evaluate(trials, self._data.test)]
        self._is_whole = True
        seconds = time.perf_counter() - start_s
        if is_doubled:
            self._select([0])
        return [
            trials[row].finish_epoch(
                losses_KS[row], lane=lane, hits=hits_K[row], val=val_K[row], test_accuracy=tests_K[row], seconds=seconds
            )
            for row, lane in enumerate(self._row_lanes)
        ]

    @property
    def num_steps(self) -> int:
        """Return the number of steps of an epoch."""
        return self._data.train.num_batches(self._trials()[0].config.training.batch_size)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Seed the lanes' generators, and return the batches (K, B, C, H, W) and (K, B) of the epoch of each lane."""
        trials = self._trials()
        self._network.generators.seed([derive_seed(trial.config.seed, "epoch", trial.epoch) for trial in trials])
        return self._data.train.stacked_batches(
            trials[0].config.training.batch_size, [(trial.config.seed, trial.epoch) for trial in trials]
        )

    def step(self, images_KBCHW: Tensor, labels_KB: Tensor, factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Train every lane on its batch; return losses (K,) and correct images (K,), both on the device.

        `factors` are one item of what `self.factors` returns: those of this step.
        """
        with self._autocast():
            logits_KBL = self._network(self._tensors.leaves, self._tensors.buffers, images_KBCHW, training=True)
        logs_KBL = logits_KBL.float().log_softmax(2)
        of_label_KB = logs_KBL.gather(2, labels_KB[:, :, None])[:, :, 0]
        smoothing = factors["label_smoothing"]
        # Where smoothing is off it must not turn -inf into nan.
        smooth_KB = torch.where(smoothing > 0, smoothing * logs_KBL.mean(2), 0.0)
        losses_KB = -((1 - smoothing) * of_label_KB + smooth_KB)
        losses_K = losses_KB.mean(1)
        gradients = torch.autograd.grad(losses_K.sum(), list(self._tensors.leaves.values()))
        gradients_KP = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        if "largest_norm" in factors:
            norms = gradients_KP.norm(dim=1, keepdim=True)
            shares = (factors["largest_norm"] / (norms + 1e-6)).clamp(max=1.0)
            gradients_KP *= torch.where(factors["largest_norm"].isfinite(), shares, 1.0)
        self._update.apply(self._tensors.params_KP, gradients_KP, self._tensors.moments, factors)
        return losses_K.detach(), (logits_KBL.detach().argmax(2) == labels_KB).sum(1)

    def factors(self, num_steps: int) -> StepNumbers:
        """Return for each step of the epoch every lane's numbers: of the update rule, the loss, the clipping."""
        sizes = [parameter.numel() for parameter in self._model.parameters()]
        return StepNumbers(self._trials(), self._update, num_steps=num_steps, sizes=sizes, device=self.device)

    def _train(self, trials: Sequence[LaneState]) -> tuple[Tensor, list[int]]:
        """Train an epoch of every lane; return the loss of each step (K, S), on the CPU, and the correct images."""
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
    def _evaluate(self, trials: Sequence[LaneState], loader: BatchLoader) -> list[Evaluated]:
        """Return for each lane what a split gives; the mean loss and the accuracy are from float32 sums."""
        sums_K2 = torch.zeros((len(trials), 2), device=self.device)
        keeps_outputs, outputs = needs_outputs(trials[0].config.training.metric), list[Tensor]()
        batch_size = evaluation_batch_size(trials[0].config, data=self._data)
        if self.device.type == "cuda":  # saves memory; on a CPU the size would show in the last digit
            batch_size = max(trials[0].config.training.batch_size, batch_size // len(trials))
        for images_BCHW, labels_B in loader.batches(batch_size):
            with self._autocast():
                logits_KBL = self._network(
                    self._tensors.leaves, self._tensors.buffers, images_BCHW, training=False
                ).float()
            labels_KB = labels_B.expand(len(trials), -1)
            losses_KB = F.cross_entropy(logits_KBL.mT, labels_KB, reduction="none")
            sums_K2 += torch.stack([losses_KB.sum(1), (logits_KBL.argmax(2) == labels_KB).sum(1)], dim=1)
            if keeps_outputs:
                outputs.append(logits_KBL)
        logits_KNL = torch.cat(outputs, dim=1).cpu() if keeps_outputs else [None] * len(trials)
        return [
            Evaluated(loss=loss, accuracy=accuracy, logits_NL=logits_NL)
            for (loss, accuracy), logits_NL in zip((sums_K2 / len(loader)).tolist(), logits_KNL, strict=True)
        ]

    def _trials(self) -> list[LaneState]:
        """Return the trial of each row."""
        return [trial for number in self._row_lanes if (trial := self._lanes[number]) is not None]

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self._amp_dtype)

    def _select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._tensors.select(rows)
        self._row_lanes = [self._row_lanes[row] for row in rows]

    def _load(self, lane: int) -> nn.Module:
        """Return the network of a lane; it holds until another lane's is asked for."""
        self._tensors.load(self._row_lanes.index(lane), self._model)
        return self._model
