"""Labels: the class of each image, int64 (N,), or a 0 or 1 for each image and class, float32 (N, L).

What training and splits ask of labels of either kind is here; all else takes both alike.
Shapes: N images, B batch, L classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stored_labels(labels: Tensor) -> Tensor:
    """Return labels in the type that either kind is kept in."""
    return labels.long() if labels.dim() == 1 else labels.float()


def has_several(labels_N: Tensor) -> bool:
    """Return whether an image may be of several classes, or of none."""
    return labels_N.dim() == 2


def class_sizes(labels_N: Tensor, num_classes: int) -> Tensor:
    """Return how many images are of each class (L,), int64."""
    if has_several(labels_N):
        return labels_N.sum(0).long()
    return torch.bincount(labels_N, minlength=num_classes)


def strata(labels_N: Tensor) -> Tensor:
    """Return the stratum of each image (N,), int64: its class, or of several the one that has the fewest images."""
    if not has_several(labels_N):
        return labels_N
    sizes_L = labels_N.sum(0)
    rarest_N = torch.where(labels_N > 0, sizes_L, torch.inf).argmin(1)
    rarest_N[labels_N.sum(1) == 0] = len(sizes_L)
    strata_N: Tensor = torch.unique(rarest_N, return_inverse=True)[1]
    return strata_N


def num_correct(logits_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Return how many images are classified correctly; of several labels an image counts with the share that is right.

    A class is named where its output is above 0.
    """
    if not has_several(labels_B):
        return (logits_BL.argmax(1) == labels_B).sum()
    return ((logits_BL > 0) == (labels_B > 0)).float().mean(1).sum()


def num_correct_at_best(labels_N: Tensor) -> float:
    """Return how many images the best answer that is the same for all classifies correctly, as `num_correct` counts."""
    if not has_several(labels_N):
        return int(torch.bincount(labels_N).max())
    sizes_L = labels_N.sum(0)
    return float(torch.maximum(sizes_L, len(labels_N) - sizes_L).mean())
