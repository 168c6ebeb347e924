"""Losses: the table of those with a name, class weights, and functions of users' own.

A loss gives a number for each image; its mean over a batch is trained on, its mean over a split is the split's loss.
torch is imported only to compute one, because reading a study file needs the table without it.
Shapes: B batch, L classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError, unknown_name
from hpo.train.config import TrainingConfig
from hpo.train.imports import describe_error, import_object, is_import_path

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.train.data.loading import SplitDataset

# Of outputs (B, L), labels (B,), settings, and a reduction as torch names it: the loss without class weights. `none`
# gives that of each image (B,).
Compute = Callable[["Tensor", "Tensor", TrainingConfig, str], "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """An entry of LOSSES; `keys` are the keys of [training] that it reads."""

    compute: Compute
    keys: frozenset[str]
    takes_several_labels: bool = False  # of an image
    about: str = ""  # in the reference


@dataclass(frozen=True, kw_only=True)
class TrialLoss:
    """The loss of one trial."""

    training: TrainingConfig
    compute: Compute
    weights_L: Tensor | None = None  # of the classes, with a mean of 1 over the training images
    label_weights_2L: Tensor | None = None  # of the labels 0 and 1 of each class, which `compute` applies
    evaluated: TrainingConfig = field(init=False)  # the settings without what only training has

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluated", replace(self.training, label_smoothing=0.0))

    def mean(self, logits_BL: Tensor, labels_B: Tensor) -> Tensor:
        """Return the mean over a batch, to train on."""
        return self._reduced(logits_BL, labels_B, self.training, "mean")

    def sum(self, logits_BL: Tensor, labels_B: Tensor) -> Tensor:
        """Return the sum over a batch, without label smoothing."""
        return self._reduced(logits_BL, labels_B, self.evaluated, "sum")

    def guess(self, data: SplitDataset) -> float:
        """Return what a guess is worth: the mean over the validation images where no class is preferred."""
        labels_B = data.val.labels_N
        logits_BL = labels_B.new_zeros((len(labels_B), data.num_classes), dtype=labels_B.new_zeros(()).float().dtype)
        return float(self.sum(logits_BL, labels_B)) / len(labels_B)

    def best_constant(self, data: SplitDataset) -> float:
        """Return the mean over the validation images of the best answer that is the same for all of them.

        It is no preference, or the shares of the classes in training, of all classes together or of each alone.
        """
        import torch

        labels_B, shares_L = data.val.labels_N, class_shares(data).clamp(1e-6, 1 - 1e-6)
        answers = [torch.zeros_like(shares_L), shares_L.log(), shares_L.logit()]
        if self.label_weights_2L is not None:
            answers.append(answers[-1] + _odds(self.label_weights_2L).clamp(min=1e-6).log())
        sums = [self.sum(answer_L.expand(len(labels_B), -1), labels_B) for answer_L in answers]
        return float(min(sums)) / len(labels_B)

    def _reduced(self, logits_BL: Tensor, labels_B: Tensor, training: TrainingConfig, reduction: str) -> Tensor:
        if self.weights_L is None:
            return self.compute(logits_BL, labels_B, training, reduction)
        losses_B = self.compute(logits_BL, labels_B, training, "none") * self.weights_L[labels_B]
        return _reduce(losses_B, reduction)


def build_loss(training: TrainingConfig, *, data: SplitDataset) -> TrialLoss:
    """Return the loss of a trial on its data's device.

    Raises UserError for an unknown loss, and class weights that are not as many as the classes.
    """
    name = training.loss
    if data.has_several_labels and name in LOSSES and not LOSSES[name].takes_several_labels:
        raise UserError(
            "training.loss must be 'bce', or a function of your own, where images have a label for each class; "
            f"got {name!r}"
        )
    if is_import_path(name):
        compute = _own_loss(import_object(name, setting="training.loss"), name)
    elif name in LOSSES:
        compute = LOSSES[name].compute
    else:
        raise unknown_name("training.loss", name, LOSSES)
    if not training.class_weights:
        return TrialLoss(training=training, compute=compute)
    if data.has_several_labels:
        weights_2L = _label_weights(training, data=data)
        compute = partial(_bce, weights_2L=weights_2L)  # config refuses weights of a function
        return TrialLoss(training=training, compute=compute, label_weights_2L=weights_2L)
    return TrialLoss(training=training, compute=compute, weights_L=_class_weights(training, data=data))


def class_shares(data: SplitDataset) -> Tensor:
    """Return the share of each class in the training images (L,), float32."""
    from hpo.train.data.labels import class_sizes

    return class_sizes(data.train.labels_N, data.num_classes).float() / len(data.train)


def is_plain_cross_entropy(training: TrainingConfig) -> bool:
    """Return whether the loss is the cross-entropy, each class with the same weight."""
    return training.loss == "cross_entropy" and not training.class_weights


def check_own_loss(training: TrainingConfig, *, data: SplitDataset) -> None:
    """Refuse a user's own loss that gives no number for an image, another one alone than in a batch, or no gradient."""
    import torch

    loss, setting = build_loss(training, data=data), f"training.loss = {training.loss!r}"
    labels_B = data.train.labels_N[:8]
    generator = torch.Generator().manual_seed(0)
    logits_BL = torch.randn((len(labels_B), data.num_classes), generator=generator).to(labels_B.device).requires_grad_()
    total, alone = loss.sum(logits_BL, labels_B), loss.sum(logits_BL[:1], labels_B[:1])
    if not total.requires_grad:
        raise UserError(f"{setting} must be computed from the outputs by torch, so that they have a gradient")
    total.backward()  # type: ignore[no-untyped-call]
    if not (total.isfinite() and logits_BL.grad is not None and logits_BL.grad.isfinite().all()):
        raise UserError(f"{setting} must be finite, with a finite gradient; for outputs of about 1 it is not")
    first = loss.compute(logits_BL, labels_B, training, "none")[0]
    if not torch.allclose(first, alone, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"{setting} must give an image the same loss in every batch; alone it is {alone.item():g}, and "
            f"{first.item():g} in a batch of {len(labels_B)}"
        )


def _class_weights(training: TrainingConfig, *, data: SplitDataset) -> Tensor:
    """Return the weight of each class (L,), float32."""
    from hpo.train.data.labels import class_sizes

    sizes_L = class_sizes(data.train.labels_N, data.num_classes).double()
    balanced = training.class_weights == "balanced"
    return _scaled(1 / sizes_L.clamp(min=1) if balanced else _listed_weights(training, data=data), sizes_L)


def _label_weights(training: TrainingConfig, *, data: SplitDataset) -> Tensor:
    """Return the weights of the labels 0 and 1 of each class (2, L), float32, where images have several labels.

    Balanced, the labels 0 and the labels 1 of a class have the same total weight. A list has the weights of the labels
    1; labels 0 weigh 1.
    """
    import torch

    from hpo.train.data.labels import class_sizes

    ones_L = class_sizes(data.train.labels_N, data.num_classes).double()
    sizes_2L = torch.stack([len(data.train) - ones_L, ones_L])
    if training.class_weights == "balanced":
        return _scaled(1 / sizes_2L.clamp(min=1), sizes_2L)
    weights_L = _listed_weights(training, data=data)
    return _scaled(torch.stack([torch.ones_like(weights_L), weights_L]), sizes_2L)


def _listed_weights(training: TrainingConfig, *, data: SplitDataset) -> Tensor:
    import torch

    assert training.class_weights, "there are no weights"
    if len(training.class_weights) != data.num_classes:
        raise UserError(
            f"training.class_weights must have one number for each of the {data.num_classes} classes, got "
            f"{len(training.class_weights)}"
        )
    return torch.tensor(training.class_weights, dtype=torch.float64, device=data.train.labels_N.device)


def _scaled(weights: Tensor, sizes: Tensor) -> Tensor:
    """Return weights with a mean of 1 over the training images, of which so many have each."""
    mean = (weights * sizes).sum() / sizes.sum()
    if not mean > 0:
        raise UserError("training.class_weights must be greater than 0 for a class that is trained on; all are 0")
    return (weights / mean).float()


def _odds(weights_2L: Tensor) -> Tensor:
    """Return how much more a label 1 of each class weighs than a label 0 (L,)."""
    return weights_2L[1] / weights_2L[0]


def _reduce(losses_B: Tensor, reduction: str) -> Tensor:
    return losses_B if reduction == "none" else {"mean": losses_B.mean, "sum": losses_B.sum}[reduction]()


def _own_loss(function: Callable[..., Any], name: str) -> Compute:
    """Return a user's own function as a loss; it raises UserError for what is no loss of each image."""

    def compute(logits_BL: Tensor, labels_B: Tensor, training: TrainingConfig, reduction: str) -> Tensor:
        import torch

        try:
            losses_B = function(logits_BL, labels_B)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the user's function raises
            raise UserError(f"training.loss = {name!r} failed: {describe_error(error)}") from error
        if not isinstance(losses_B, torch.Tensor) or losses_B.shape != labels_B.shape[:1]:
            got = tuple(losses_B.shape) if isinstance(losses_B, torch.Tensor) else type(losses_B).__name__
            raise UserError(
                f"training.loss = {name!r} must return a tensor with the loss of each image, of shape "
                f"{tuple(labels_B.shape[:1])}; got {got}"
            )
        return _reduce(losses_B, reduction)

    return compute


def _cross_entropy(logits_BL: Tensor, labels_B: Tensor, training: TrainingConfig, reduction: str) -> Tensor:
    from torch.nn import functional

    smoothing = training.label_smoothing
    return functional.cross_entropy(logits_BL, labels_B, label_smoothing=smoothing, reduction=reduction)


def _bce(
    logits_BL: Tensor,
    labels_B: Tensor,
    training: TrainingConfig,
    reduction: str,
    *,
    weights_2L: Tensor | None = None,
) -> Tensor:
    """Return the mean over the classes of the binary cross-entropy: is it this class or not (arXiv 2110.00476).

    `weights_2L` are those of the labels 0 and 1 of each class.
    """
    from torch.nn import functional

    num_classes = logits_BL.shape[1]
    is_one_hot = labels_B.dim() == 1  # else there is a label for each class, which is smoothed towards a half
    targets_BL = functional.one_hot(labels_B, num_classes).to(logits_BL.dtype) if is_one_hot else labels_B
    num_answers = num_classes if is_one_hot else 2
    targets_BL = targets_BL * (1 - training.label_smoothing) + training.label_smoothing / num_answers
    zeros_L, odds_L = (None, None) if weights_2L is None else (weights_2L[0], _odds(weights_2L))
    losses_BL = functional.binary_cross_entropy_with_logits(
        logits_BL, targets_BL, weight=zeros_L, pos_weight=odds_L, reduction="none"
    )
    return _reduce(losses_BL.mean(1), reduction)


def _focal(logits_BL: Tensor, labels_B: Tensor, training: TrainingConfig, reduction: str) -> Tensor:
    """Weigh the cross-entropy down where the network is sure and right (Lin et al., arXiv 1708.02002)."""
    from torch.nn import functional

    losses_B = functional.cross_entropy(logits_BL, labels_B, reduction="none")
    return _reduce((1 - (-losses_B).exp()).clamp(min=0) ** training.focal_gamma * losses_B, reduction)


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        compute=_cross_entropy,
        keys=frozenset({"label_smoothing", "class_weights"}),
        about="the cross-entropy",
    ),
    "bce": Loss(
        compute=_bce,
        keys=frozenset({"label_smoothing", "class_weights"}),
        takes_several_labels=True,
        about="the binary cross-entropy of each class against the rest, averaged over the classes",
    ),
    "focal": Loss(
        compute=_focal,
        keys=frozenset({"focal_gamma", "class_weights"}),
        about="the cross-entropy times (1 - p) to the power of focal_gamma; p is the output for the right class",
    ),
}
