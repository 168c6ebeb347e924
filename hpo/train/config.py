"""TrialConfig and EpochResult: the only types that cross between the search and the training.

Plain frozen dataclasses without torch or pydantic, so that either side can be used alone. Each field has its type, its
default, its bounds (as `annotated_types` has them) and its description. The study file's reader enforces the bounds;
rules between fields, such as which key goes with which optimizer, live in `hpo/config/checks.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate

from hpo.errors import Rule

TORCHVISION = "torchvision:"  # begins the name of a model of torchvision's, and of no module of a user's
TIMM = "timm:"  # the same for models and optimizers of timm's
WEIGHTS_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Settings that earlier checkpoints do not know; where they have their default, they do not count.
LATER_KEYS = (
    "model.weights",
    "data.groups",
    "data.resize",
    "data.bits",
    "data.augment",
    "training.mixup",
    "training.cutmix",
    "training.ema",
    "training.tf32",
    "training.decay_fraction",
    "training.timescale_epochs",
    "training.groups",
    "training.layer_decay",
    "training.no_decay",
    "training.freeze",
    "training.freeze_epochs",
    "training.optimizer_options",
    "training.loss",
    "training.class_weights",
    "training.focal_gamma",
    "training.metric",
    "training.metric_direction",
    "training.gradient_accumulation",
    "training.activation_checkpointing",
)
# How studies read the images of folders whose spec names no data.resize, because it was stored before that was a key.
EARLIER_RESIZE, DEFAULT_RESIZE = "squash", "crop"
IMAGE_FOLDER = "image_folder"
DEFAULT_VALIDATION_FRACTION = 0.1
# Settings that change no number of a trial: where its data and checkpoints are, and how often it is saved.
TRIAL_NEUTRAL_KEYS = frozenset({"data.root", "data.placement", "training.checkpoint_epochs"})


@dataclass(frozen=True)
class Doc:
    """A field's description, for people and for the JSON schema of study files."""

    text: str

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Return the field's JSON schema with the description; pydantic calls this, we need not import it."""
        return {**handler(core_schema), "description": self.text}


def _is_rising(epochs: Sequence[int]) -> bool:
    return list(epochs) == sorted(set(epochs)) and all(epoch >= 1 for epoch in epochs)


def _are_weights(weights: str | Sequence[float] | None) -> bool:
    if weights is None or isinstance(weights, str):
        return True
    return bool(weights) and all(math.isfinite(one) and one >= 0 for one in weights)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a built-in name, `torchvision:NAME` or `package.module:factory`."""

    name: Annotated[
        str, Doc("The network: article_cnn, torchvision:NAME, timm:NAME, or package.module:factory of your own.")
    ] = "article_cnn"
    weights: Annotated[
        str | None,
        Doc(
            "Weights to start from: a file, or the name that the library has for them, such as DEFAULT. By default "
            "they are drawn from the trial's seed."
        ),
    ] = None
    options: Annotated[Mapping[str, Any], Doc("Further keys, which go to the network's constructor.")] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, how they are split and how they are augmented."""

    name: Annotated[str, Doc("The data set: a built-in name, or package.module:factory of your own.")] = "digits"
    root: Annotated[
        str | None,
        Doc(
            "Folder of the data, relative to the study file. By default $HPO_DATA, else data/. Data sets that are not "
            "there are downloaded into it."
        ),
    ] = None
    validation_fraction: Annotated[
        float | None,
        Gt(0),
        Lt(1),
        Doc(
            "Fraction of the training images to validate on, stratified by class. By default the data's own "
            "validation images, such as those of a folder val/, else 0.1."
        ),
    ] = None
    split_seed: Annotated[int, Ge(0), Doc("Draws the validation images and the subset; one value, one split.")] = 0
    groups: Annotated[
        str | None,
        Doc(
            "Images of one group, such as a patient's, are all trained on or all validated on. A regular expression "
            "on the path below train/, a CSV file with the columns path (or index) and group, or "
            "package.module:function of that path or index."
        ),
    ] = None
    train_samples: Annotated[
        int | None, Ge(1), Doc("Train on this many images only. By default on all that are not for validation.")
    ] = None
    train_fraction: Annotated[float | None, Gt(0), Le(1), Doc("The same as train_samples, as a fraction.")] = None
    image_size: Annotated[
        int, Ge(8), Le(4096), Doc("Side in pixels of the square to which images of an image_folder are resized.")
    ] = 32
    resize: Annotated[
        Literal["crop", "squash"] | None,
        Doc(
            "image_folder: crop (the default) scales the short side and cuts out the centre. squash stretches what the "
            "file stores and ignores its EXIF rotation, as earlier versions did."
        ),
    ] = None
    bits: Annotated[
        int,
        Ge(9),
        Le(16),
        Doc("image_folder: bits of white in image files of 16 bits; 12 for many cameras and scanners."),
    ] = 16
    flip: Annotated[bool, Doc("Mirror images left-right at random.")] = False
    crop: Annotated[int, Ge(0), Le(64), Doc("Pixels of zero padding before a random crop; 0: no crop.")] = 0
    augment: Annotated[
        Sequence[Any],
        Doc(
            "Random changes of training images after flip and crop: names of torchvision.transforms.v2 or "
            "package.module:function, or tables { name, options }."
        ),
    ] = ()
    placement: Annotated[
        Literal["auto", "device", "stream"],
        Doc("device keeps all images on the device, stream reads them in each epoch. The results are the same."),
    ] = "auto"
    options: Annotated[Mapping[str, Any], Doc("Further keys, which go to your own data factory.")] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a network is trained. Lengths named *_epochs are in epochs."""

    epochs: Annotated[int, Ge(1), Doc("Number of epochs of a trial.")] = 10
    batch_size: Annotated[
        int,
        Ge(1),
        Doc("Images that the network is given at a time. A step has gradient_accumulation times as many."),
    ] = 128
    gradient_accumulation: Annotated[
        int,
        Ge(1),
        Doc(
            "Batches whose gradients are added up for one step of the optimizer, to save memory. lr and the schedule "
            "hold for a step, which has batch_size times as many images."
        ),
    ] = 1
    optimizer: Annotated[
        str, Doc("The optimizer: a name of torch.optim in lower case, muon, timm:NAME, or package.module:Class.")
    ] = "adam"
    optimizer_options: Annotated[
        Mapping[str, Any], Doc("Further arguments of the optimizer's class, by name, such as amsgrad = true.")
    ] = field(default_factory=dict)
    lr: Annotated[float | None, Gt(0), Doc("Learning rate, the peak of the schedule. Leave it out to search it.")] = (
        None
    )
    momentum: Annotated[float, Ge(0), Lt(1), Doc("sgd, rmsprop: momentum.")] = 0.0
    nesterov: Annotated[bool, Doc("sgd: Nesterov momentum.")] = False
    beta1: Annotated[float, Ge(0), Lt(1), Doc("The adam family: decay of the gradient's running mean.")] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1), Doc("The adam family: decay of the squared gradient's running mean.")] = 0.999
    eps: Annotated[float | None, Gt(0), Doc("Added to the denominator. By default the optimizer's own value.")] = None
    weight_decay: Annotated[float, Ge(0), Doc("Weight decay of the optimizer.")] = 0.0
    schedule: Annotated[
        str, Doc("The schedule of the learning rate: a name, or package.module:function of the progress, from 0 to 1.")
    ] = "constant"
    warmup_epochs: Annotated[float, Ge(0), Doc("Linear warm-up in front of any schedule, in epochs.")] = 0.0
    step_epochs: Annotated[int, Ge(1), Doc("step: epochs between two drops.")] = 10
    milestones: Annotated[
        Sequence[int],
        Predicate(_is_rising),
        Rule("rising epochs of at least 1"),
        Doc("multistep: the epochs of the drops."),
    ] = ()
    gamma: Annotated[float, Gt(0), Le(1), Doc("step, multistep, exponential, plateau: factor of each drop.")] = 0.1
    restarts: Annotated[int, Ge(1), Doc("cosine_restarts: number of equal cycles.")] = 3
    power: Annotated[float, Gt(0), Doc("polynomial: its exponent.")] = 1.0
    final_lr_fraction: Annotated[
        float,
        Ge(0),
        Le(1),
        Doc("cosine, cosine_restarts, polynomial, linear, wsd: where the schedule ends, as a fraction of lr."),
    ] = 0.0
    decay_fraction: Annotated[float, Gt(0), Le(1), Doc("wsd: fraction of the training in which the rate falls.")] = 0.2
    timescale_epochs: Annotated[
        float, Gt(0), Doc("inverse_sqrt: epochs after the warm-up until lr has fallen by the square root of 2.")
    ] = 1.0
    peak_fraction: Annotated[float, Gt(0), Lt(1), Doc("one_cycle: fraction of the training before the peak.")] = 0.3
    initial_lr_fraction: Annotated[
        float, Gt(0), Le(1), Doc("one_cycle: where the schedule starts, as a fraction of lr.")
    ] = 0.04
    plateau_epochs: Annotated[
        int, Ge(0), Doc("plateau: epochs without a lower validation loss before the learning rate drops.")
    ] = 3
    groups: Annotated[
        Mapping[str, Mapping[str, float]],
        Doc("Multipliers of lr and weight_decay by module or pattern, such as head = { lr = 10.0 }."),
    ] = field(default_factory=dict)
    layer_decay: Annotated[
        float, Gt(0), Le(1), Doc("Multiplier of the learning rate from each layer to the one before it.")
    ] = 1.0
    no_decay: Annotated[Literal["none", "auto"], Doc("auto: no weight decay of biases and norms.")] = "none"
    freeze: Annotated[Sequence[str], Doc("Modules or patterns that are not trained; body: all but the head.")] = ()
    freeze_epochs: Annotated[
        int | None, Ge(1), Doc("Epochs until what is frozen trains, too. By default it is never trained.")
    ] = None
    gradient_clip: Annotated[float | None, Gt(0), Doc("Largest global gradient norm. By default no clipping.")] = None
    loss: Annotated[
        str, Doc("The loss: cross_entropy, bce, focal, or package.module:function of outputs and labels.")
    ] = "cross_entropy"
    label_smoothing: Annotated[
        float, Ge(0), Lt(1), Doc("cross_entropy, bce: label smoothing of the training loss.")
    ] = 0.0
    class_weights: Annotated[
        Literal["balanced"] | Sequence[float] | None,
        Predicate(_are_weights),
        Rule("'balanced' or a list of numbers of at least 0"),
        Doc(
            "Weight of each class in the loss. balanced gives all classes the same total weight. By default all are 1."
        ),
    ] = None
    focal_gamma: Annotated[float, Ge(0), Doc("focal: how much less an image counts if the network is sure of it.")] = (
        2.0
    )
    metric: Annotated[
        str,
        Doc(
            "What is optimized: val_accuracy, val_loss, top5, macro_f1, balanced_accuracy, auroc, average_precision, "
            "or a function."
        ),
    ] = "val_accuracy"
    metric_direction: Annotated[
        Literal["maximize", "minimize"], Doc("Whether more or less is better, of a metric of your own.")
    ] = "maximize"
    mixup: Annotated[
        float, Ge(0), Doc("Mix the images of a batch in pairs, by shares from Beta(mixup, mixup). 0 turns it off.")
    ] = 0.0
    cutmix: Annotated[
        float,
        Ge(0),
        Doc("Paste a rectangle of one image into another, its area from Beta(cutmix, cutmix). 0 turns it off."),
    ] = 0.0
    ema: Annotated[
        float | None,
        Gt(0),
        Lt(1),
        Doc("Decay of a moving average of the weights, which is validated and kept in their place. By default none."),
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Doc(
            "auto: bf16 on CUDA GPUs that have it, fp16 on those that do not, and fp32 on other devices. fp16 scales "
            "the gradients, and such trials train one at a time."
        ),
    ] = "auto"
    tf32: Annotated[
        bool,
        Doc(
            "With precision = 'fp32', on NVIDIA GPUs since Ampere: round the inputs of convolutions and of matrix "
            "products to 10 bits (TF32), which is faster. Elsewhere it changes nothing."
        ),
    ] = False
    activation_checkpointing: Annotated[
        bool,
        Doc(
            "Compute activations again in the backward pass instead of keeping them: less memory, more time, and the "
            "same numbers."
        ),
    ] = False
    compile: Annotated[bool, Doc("Compile the network with torch.compile.")] = False
    checkpoint_epochs: Annotated[
        Literal["auto"] | Annotated[int, Ge(1)],
        Rule("'auto' or an integer of at least 1"),
        Doc(
            "Save a trial in training every N epochs. auto: so that saving takes at most 5 % of its time, and "
            "at each rung of the pruner. A worker that is told to stop saves its trials in any case."
        ),
    ] = "auto"
    report_test_accuracy: Annotated[
        bool, Doc("Also measure the test accuracy of each epoch. It is never used to choose.")
    ] = False
    seed: Annotated[
        int, Ge(0), Doc("With a trial's number this gives the trial's own seed; searched, it is the trial's seed.")
    ] = 0

    @property
    def images_per_step(self) -> int:
        """Return the number of images in a step of the optimizer."""
        return self.batch_size * self.gradient_accumulation


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that one trial's training depends on. `seed` gives, with the epoch, every random draw of the trial."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    seed: int


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """One epoch of one lane.

    Losses are means per image in nats, accuracies fractions in [0, 1], `seconds` wall time. `diverged` is None, or says
    in a few words why the trial cannot recover; that ends the trial.
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
    measured: Mapping[str, float] = field(default_factory=dict)  # the trial's metric, where it is none of the above

    def value_of(self, metric: str) -> float:
        """Return the value of what training.metric names."""
        return self.metrics()[metric_name(metric)]

    def metrics(self) -> dict[str, float]:
        """Return what is reported of an epoch, by name."""
        metrics = {
            "train_loss": self.train_loss,
            "train_accuracy": self.train_accuracy,
            "val_loss": self.val_loss,
            "val_accuracy": self.val_accuracy,
            "lr": self.lr,
            "seconds": self.seconds,
            **self.measured,
        }
        if self.test_accuracy is not None:
            metrics["test_accuracy"] = self.test_accuracy
        return metrics


def is_weights_file(weights: str) -> bool:
    """Return whether a value of model.weights is the path of a file, not the name of weights that a library has."""
    return weights.endswith(WEIGHTS_ENDINGS) or "/" in weights


def metric_name(metric: str) -> str:
    """Return the name under which a metric is reported: that of the function where it is a user's own."""
    return metric.rpartition(":")[2]


def name_on_test_set(metric: str) -> str:
    """Return the name under which a metric of the test set is reported: `test_accuracy`, `test_loss`, `test_top5`..."""
    return f"test_{metric_name(metric).removeprefix('val_')}"


def derive_seed(*parts: int | str) -> int:
    """Return one seed from several parts, such as a trial's seed and an epoch: from 0 to 2**31 - 1, on every machine.

    The seed has 31 bits because torch, numpy, Optuna and a signed database column all take them.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
