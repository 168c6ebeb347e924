"""Divergence: judge at the end of an epoch whether a trial can still recover.

Shapes: B batch, C H W image, L classes, S steps of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hpo.train.data.batches import BatchLoader
from hpo.train.data.labels import num_correct_at_best
from hpo.train.data.loading import SplitDataset

NUM_SPREAD_IMAGES = 256  # validation images over which the outputs of a network are compared
# The largest output_spread of a network that gives every image the same output. Measured with the article's network,
# batch 64, on 2,000 CIFAR-10 images (width 1) and on digits (width 0.25, 3 seeds), up to 5 epochs each:
#   as drawn, or Adam at 0         0.13 (CIFAR-10), 0.013 to 0.028 (digits), 0.0022 (digits, width 0.05)
#   slow: Adam 1e-5, SGD 1e-6      0.13 to 1.7,     0.013 to 0.074
#   learning: Adam 1e-4, 1e-3      1.1 to 1.9,      0.04 to 1.9
#   about to die: Adam 5e-3        0.0007 to 0.004, 0.001 to 0.16; NAdam 1e-2 0.0007
#   dead: Adam 5e-3 to 1           0, exactly; SGD at 10, RMSprop from 1e-2 and Adagrad at 1 likewise
# Untrained networks of 20 to 40 layers that are as good as constant give 1e-7 to 5e-7, from rounding alone.
SAME_OUTPUT = 1e-5


def why_diverged(
    losses_S: Tensor,
    *,
    val_loss: float,
    val_accuracy: float,
    first_loss: float,
    guess_loss: Callable[[], float],
    data: SplitDataset,
    network: Callable[[], nn.Module],
    initial_network: Callable[[], nn.Module],
) -> str | None:
    """Return why a trial cannot recover, or None where it may.

    Args:
        losses_S: The loss of each step of the epoch (CPU).
        val_loss: The validation loss after the epoch.
        val_accuracy: The validation accuracy after the epoch, a fraction.
        first_loss: The loss of the trial's very first step.
        guess_loss: Returns the loss of a guess.
        data: The dataset that the trial is trained on.
        network: Returns the network as trained so far.
        initial_network: Returns the network as it was drawn, on the same device.
    """
    if not (losses_S.isfinite().all() and math.isfinite(val_loss)):
        return "non-finite loss"
    if not is_guessing(data.val, val_accuracy=val_accuracy):
        return None
    if is_exploding(losses_S, first_loss=first_loss, guess_loss=guess_loss()):
        return "exploding loss"
    if is_collapsed(network, initial_network, data=data):
        return "collapsed: every input gets the same output"
    return None


def is_guessing(val: BatchLoader, *, val_accuracy: float) -> bool:
    """Return whether the validation accuracy is no better than that of the best answer that is the same for all."""
    return val_accuracy * len(val) < num_correct_at_best(val.labels_N) + 0.5  # half an image more is rounding


def is_exploding(losses_S: Tensor, *, first_loss: float, guess_loss: float) -> bool:
    """Return whether the loss ended the epoch far above that of a guess, and above the trial's first loss.

    A network with large initial weights starts far above a guess. It counts as a slow start while it stays below the
    loss that it started with. The cross-entropy of a guess is ln(classes). A loss that a guess makes 0 or less is on no
    scale on which far has a meaning.
    """
    last = losses_S[-math.ceil(len(losses_S) / 4) :].mean()
    return guess_loss > 0 and bool(last > 10 * max(guess_loss, first_loss))


def is_collapsed(
    network: Callable[[], nn.Module], initial_network: Callable[[], nn.Module], *, data: SplitDataset
) -> bool:
    """Return whether training has killed a network that guesses, so that every image gets the same output.

    The loss does not show it: it is ln(classes) for a slow start too, and far above that after a leap. Some networks,
    such as an MLP of 20 layers, give every image the same output from the start. Their learning rate has not killed
    them.
    """
    spread = output_spread(network(), data)
    if spread > SAME_OUTPUT:
        return False
    initial = initial_network()
    initial_spread = output_spread(initial, data)
    # Both are exactly 0 where the last layer starts at zero, also as long as the scaler of fp16 skips the first steps.
    return initial_spread > 10 * SAME_OUTPUT or (initial_spread == spread == 0 and _has_moved(network(), initial))


def _has_moved(network: nn.Module, initial: nn.Module) -> bool:
    """Return whether a parameter is another one than at the start."""
    return not all(map(torch.equal, network.parameters(), initial.parameters()))


@torch.no_grad()
def output_spread(model: nn.Module, data: SplitDataset) -> float:
    """Return how much the outputs differ from image to image, relative to their size, in float32."""
    model.eval()
    images_BCHW, _ = next(data.val.batches(NUM_SPREAD_IMAGES))
    logits_BL = model(images_BCHW).float()
    return float((logits_BL.amax(0) - logits_BL.amin(0)).max() / logits_BL.abs().max().clamp(min=1e-30))
