"""Classifiers on frozen features: nearest neighbours, linear heads and least squares.

n training images, m images to classify, D width of the features, C classes, G heads.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.errors import UserError
from utils.scheduler import learning_rate
from utils.seeds import named_seed, permutation

TEMPERATURE = 0.07
BATCH = 256  # images of a step of the linear heads
SIMILARITIES = 2**25  # or votes that are in memory at a time: 128 MiB


def nearest_neighbours(
    features: Tensor, labels: Tensor, queries: Tensor, counts: Sequence[int]
) -> dict[int, Tensor]:
    """Labels (m,) of `queries` (m, D) for each k of `counts`, from features (n, D) and labels (n,).

    The k images with the largest cosine vote with weight exp(cosine / 0.07), as in DINO
    (arXiv:2104.14294, eval_knn.py). All images vote where n is smaller than k.
    """
    rows, nearest = F.normalize(features), min(max(counts), len(features))
    one_hot = torch.eye(int(labels.max()) + 1, device=rows.device)  # (C, C)
    found = {k: [] for k in dict.fromkeys(counts)}
    size = max(len(rows), nearest * len(one_hot))  # numbers for one query
    for some in F.normalize(queries).split(max(1, SIMILARITIES // size)):
        cosine, indices = (some @ rows.T).topk(nearest, dim=1)  # (b, nearest), the largest first
        weights = (cosine / TEMPERATURE).exp()
        for k in found:
            votes = weights[:, :k, None] * one_hot[labels[indices[:, :k]]]  # (b, k, C)
            found[k].append(votes.sum(dim=1).argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in found.items()}


@torch.no_grad()
def linear_heads(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    pairs: Sequence[tuple[float, float]],
    num_steps: int,
) -> Callable[[Tensor], Tensor]:
    """The function (m, D) -> (m, G, C) logits of a head for each of the `pairs` of (lr, L2).

    All heads train at once on the same batches of features (n, D), which are standardised: SGD
    with momentum 0.9, cross-entropy, cosine decay. L2 is PyTorch's `weight_decay`, of the bias too.
    DINOv2 trains its heads like this (dinov2/eval/linear.py), without L2.
    """
    design = standardised(features)
    rates, l2 = torch.tensor(pairs, device=features.device).T[:, None, :, None]  # (1, G, 1) each
    shape = features.shape[1] + 1, len(pairs), num_classes
    weights, momentum = torch.zeros(2, *shape, device=features.device)  # (D + 1, G, C) each
    batch = min(BATCH, len(features))
    for step in tqdm(range(num_steps), desc="linear", disable=None):
        epoch, part = divmod(step, len(features) // batch)
        if part == 0:
            order = permutation(len(features), 0, "linear", epoch).to(features.device)
        chosen = order[part * batch : (part + 1) * batch]
        rows = design(features[chosen])  # (B, D + 1)
        errors = (rows @ weights.flatten(1)).unflatten(1, shape[1:]).softmax(dim=2)  # (B, G, C)
        errors -= F.one_hot(labels[chosen], num_classes)[:, None]
        gradient = (rows.T @ errors.flatten(1)).view(shape) / batch + l2 * weights
        momentum.mul_(0.9).add_(gradient)
        decay = learning_rate(step, base=1, total=num_steps, warmup=0, decay="cosine")
        weights -= decay * rates * momentum
    return lambda rows: (design(rows) @ weights.flatten(1)).unflatten(1, shape[1:])


@torch.no_grad()
def validate(
    score: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor
) -> tuple[list[float], list[float]]:
    """(accuracies, losses) of the heads of `linear_heads` on features (m, D) and labels (m,)."""
    correct, loss = [], []
    for rows, wanted in zip(features.split(BATCH), labels.split(BATCH), strict=True):
        logits = score(rows)  # (b, G, C)
        correct.append(logits.argmax(dim=2) == wanted[:, None])
        targets = wanted[:, None].expand(logits.shape[:2])
        loss.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    correct, loss = (torch.cat(parts).cpu().double() for parts in (correct, loss))
    return correct.mean(dim=0).tolist(), loss.mean(dim=0).tolist()


def draw_shots(labels: Tensor, shots: int, seed: int, classes: Sequence[str]) -> Tensor:
    """Indices of `shots` images of every class. More shots of a seed contain its fewer.

    Raises UserError, by the name in `classes`, for a class with fewer images.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, "shots"))
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < shots:
            found = f"{len(members)} image{'s' * (len(members) > 1)}, not {shots}"
            raise UserError(f"class {classes[label]!r} has {found}")
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[:shots]])
    return torch.cat(chosen)


def least_squares(
    features: Tensor, labels: Tensor, num_classes: int, l2: float
) -> Callable[[Tensor], Tensor]:
    """The function (m, D) -> (m, C) scores that fits features (n, D) to labels (n,) in closed form.

    As in the ViT paper (arXiv:2010.11929, section 4.1), after `standardised`. The bias is
    regularised like the weights. The target of an image is 1 for its class and -1 for the others.
    """
    design = standardised(features)
    x = design(features)
    targets = 2.0 * F.one_hot(labels, num_classes).double() - 1  # (n, C)
    if len(x) < x.shape[1]:  # the same solution from a smaller system of equations
        gram = x @ x.T + l2 * torch.eye(len(x), dtype=x.dtype)  # (n, n)
        weights = x.T @ torch.linalg.solve(gram, targets)  # (D + 1, C)
    else:
        gram = x.T @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype)  # (D + 1, D + 1)
        weights = torch.linalg.solve(gram, x.T @ targets)  # (D + 1, C)
    return lambda rows: design(rows) @ weights


def standardised(features: Tensor) -> Callable[[Tensor], Tensor]:
    """The function (m, D) -> (m, D + 1): scaled by mean and deviation of `features`, then a 1."""
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-5

    def design(rows: Tensor) -> Tensor:
        rows = (rows - mean) / deviation
        return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)

    return design
