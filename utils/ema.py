"""The moving average of the weights, which is evaluated beside the weights themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """After every step: average = decay x average + (1 - decay) x weights, in float32.

    It begins as the weights that training starts from, as timm's ModelEmaV3 does.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float):
        self.decay = decay
        self.parameters = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        torch._foreach_lerp_(self.parameters, [p.float() for p in parameters], 1 - self.decay)
