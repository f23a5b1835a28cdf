"""The learning rate as a pure function of the step."""

from math import cos, pi

from torch.optim import Optimizer

DECAYS = ("cosine", "linear")


def learning_rate(step: int, *, base: float, total: int, warmup: int, decay: str) -> float:
    """The lr of `step` (from 0) of `total`: linear from 0 to `base` in `warmup` steps, then decay.

    "cosine" ends at 0 and "linear" at 1e-5, as in google-research/vision_transformer (utils.py).
    Steps after `total` keep the last value. With a warm-up, the lr of step 0 is 0.
    """
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
    if decay == "cosine":
        lr = base * 0.5 * (1.0 + cos(pi * progress))
    else:
        lr = 1e-5 + (base - 1e-5) * (1.0 - progress)
    return lr * min(1.0, step / warmup) if warmup else lr


def set_lr(optimizer: Optimizer, step: int, base: float, total: int, warmup: int, decay: str):
    """Set the `learning_rate` of `step`, times the factor of each group, and return it."""
    lr = learning_rate(step, base=base, total=total, warmup=warmup, decay=decay)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # a save may be older than the factor
    return lr
