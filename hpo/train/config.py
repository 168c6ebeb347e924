"""TrialConfig and EpochResult: the only types that cross between the search and the training.

Plain frozen dataclasses without torch or pydantic, so that either side can be used alone. They hold types and defaults;
the rules for the values (ranges, which key goes with which optimizer) live in `hpo/config/study_spec.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

TORCHVISION = "torchvision:"  # begins the name of a model of torchvision's, and of no module of a user's
# Settings that change no number of a trial: where its data and checkpoints are, and how often it is saved.
TRIAL_NEUTRAL_KEYS = frozenset({"data.root", "data.placement", "training.checkpoint_epochs"})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a built-in name, `torchvision:NAME` or `package.module:factory`; `options` go to its constructor."""

    name: str = "article_cnn"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures, how they are split and how they are augmented. `options` go to a user's own data factory."""

    name: str = "digits"
    root: str | None = None  # folder of the data set; None: $HPO_DATA, else ./data
    validation_fraction: float = 0.1  # of the training pictures, stratified by class
    split_seed: int = 0  # draws the validation pictures and the subset; one value, one split
    train_samples: int | None = None  # use this many training pictures; None: all that the validation split leaves
    train_fraction: float | None = None  # the same as a fraction of them
    image_size: int = 32  # pixels; pictures of an image_folder are resized to this square
    flip: bool = False  # mirror left-right at random
    crop: int = 0  # pixels of zero padding around a picture before a random crop; 0: off
    placement: Literal["auto", "device", "stream"] = "auto"  # where pictures live: on the device, or read in each epoch
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a network is trained. `lr` is the peak of the schedule; lengths named *_epochs are in epochs."""

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float | None = None  # None: the optimizer's own default
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_epochs: float = 0.0  # linear warm-up in front of the schedule
    step_epochs: int = 10  # step
    milestones: Sequence[int] = ()  # multistep: epochs
    gamma: float = 0.1  # step, multistep, exponential (per epoch), plateau
    restarts: int = 3  # cosine_restarts: number of equal cycles
    power: float = 1.0  # polynomial
    final_lr_fraction: float = 0.0  # cosine, cosine_restarts, polynomial: where the schedule ends, as a fraction of lr
    peak_fraction: float = 0.3  # one_cycle: share of the training before the peak
    initial_lr_fraction: float = 0.04  # one_cycle: where it starts, as a fraction of lr
    plateau_epochs: int = 3  # plateau: epochs without a lower validation loss before the rate falls
    gradient_clip: float | None = None  # largest global gradient norm; None: off
    label_smoothing: float = 0.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the GPU has it, else fp32
    compile: bool = False  # torch.compile
    checkpoint_epochs: int = 1  # a trial is saved every so many epochs, to be gone on with after an interruption
    report_test_accuracy: bool = False  # also measure the test set each epoch; never used to choose
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that one trial's training depends on. `seed` gives, with the epoch, every random draw of the trial."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    seed: int


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """One epoch of one lane. Losses are means per picture in nats, accuracies fractions in [0, 1], `seconds` wall time.

    `diverged` is None, or says in a few words why the trial cannot recover: that ends the trial.
    """

    lane: int
    epoch: int  # counted from 1
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    test_accuracy: float | None
    lr: float  # learning rate of the epoch's last step
    seconds: float
    diverged: str | None = None

    def metrics(self) -> dict[str, float]:
        """What is reported of an epoch, by name."""
        metrics = {
            "train_loss": self.train_loss,
            "train_accuracy": self.train_accuracy,
            "val_loss": self.val_loss,
            "val_accuracy": self.val_accuracy,
            "lr": self.lr,
            "seconds": self.seconds,
        }
        if self.test_accuracy is not None:
            metrics["test_accuracy"] = self.test_accuracy
        return metrics


def derive_seed(*parts: int | str) -> int:
    """One seed from several, such as a trial's seed and an epoch: the same on every machine, 0 to 2**31 - 1.

    31 bits because torch, numpy, Optuna and a signed database column all take them.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
