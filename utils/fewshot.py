"""Few-shot evaluation: regularised least squares on frozen features.

As in the ViT paper (arXiv:2010.11929, section 4.1): a few images of each class, their features
mapped to targets of -1 and 1 in closed form, accuracy on all test images. n images, D width,
C classes.
"""

import torch
from torch import Tensor

from models.modeling import VisionTransformer
from utils.seeds import named_seed
from utils.stream import EvalStream


@torch.no_grad()
def features_of(model: VisionTransformer, batches: EvalStream, bar=iter) -> Tensor:
    """The model's features of every image, (n, D) float64, in the order of the image set."""
    return torch.cat([model.features(images).double().cpu() for images, _ in bar(batches)])


def draw_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices of `shots` images of every class; fewer shots of a seed are among its more.

    Raises ValueError for a class with fewer images.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, "shots"))
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < shots:
            raise ValueError(f"class {int(label)} has {len(members)} images, not {shots}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen)


def least_squares(features: Tensor, labels: Tensor, classes: int, l2: float):
    """The function (m, D) -> (m, C) scores that fits features (n, D) and labels (n,) best.

    Features are standardised by their own mean and deviation; the bias is regularised like the
    rest. Every class is a target of 1, the others of -1.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-5

    def design(rows: Tensor) -> Tensor:
        rows = (rows - mean) / deviation
        return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)  # (m, D + 1)

    x = design(features)
    targets = 2.0 * torch.nn.functional.one_hot(labels, classes).double() - 1  # (n, C)
    if len(x) < x.shape[1]:  # the same solution from the smaller system of equations
        gram = x @ x.T + l2 * torch.eye(len(x), dtype=x.dtype)
        weights = x.T @ torch.linalg.solve(gram, targets)
    else:
        gram = x.T @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, x.T @ targets)  # (D + 1, C)
    return lambda rows: design(rows) @ weights
