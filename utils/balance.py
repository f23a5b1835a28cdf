"""The training loss, and classes of unequal sizes: class weights in the loss, or balanced draws.

n images, C classes, B batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.seeds import permutation

BALANCES = ("none", "loss", "sampling")
LOSSES = ("ce", "bce")


def class_weights(labels: Tensor) -> Tensor:
    """n / (C x images of the class) for each class (C,). The mean over the images is 1."""
    counts = labels.bincount()
    return len(labels) / (len(counts) * counts)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """The mean over images and classes, each class by itself, as in DeiT III (arXiv:2204.07118).

    Each class that a mixed image shows (`labels` (B, C)) has the target 1. `weights` are those of
    the images' classes; of a mixed image, in its proportions.
    """
    shares = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    targets = (shares > 0).to(logits.dtype) * (1 - label_smoothing)
    targets = targets + label_smoothing / logits.shape[1]
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    return (losses if weights is None else losses * (shares @ weights)).mean()


def cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """The mean over the images, with class `weights` (C,) or without. `labels` may be mixed (B, C).

    torch divides a weighted sum by the weights of the batch. Here it is divided by the number of
    images, so that micro-batches and processes together have the loss of the whole batch.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    options = {"reduction": "sum", "label_smoothing": label_smoothing}
    return F.cross_entropy(logits, labels, weights, **options) / len(labels)


def balanced_draws(members: Sequence[Tensor], seed: int, epoch: int) -> Tensor:
    """The indices (n,) that an epoch draws, class by class; `members` are each class's images.

    Draw j of the whole run is of class j mod C, and of this class number j // C. So classes differ
    by one draw at most. A class is drawn in one permutation of its images after the other.
    """
    n, classes, draws = sum(map(len, members)), len(members), []
    for label, images in enumerate(members):
        # The class's numbers of the draws from epoch * n to (epoch + 1) * n.
        start, stop = (-(-(first - label) // classes) for first in (epoch * n, (epoch + 1) * n))
        size = len(images)
        for cycle in range(start // size, -(-stop // size)):
            order = images[permutation(size, seed, "balance", label, cycle)]
            draws.append(order[max(start - cycle * size, 0) : stop - cycle * size])
    return torch.cat(draws)
