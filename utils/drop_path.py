"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a training image skips random branches.

As in timm: the rate rises linearly with depth, and a branch that is kept is scaled up by 1 / (1 -
rate). B batch, L blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.augment import send
from utils.seeds import named_seed


@dataclass
class DropPath:
    """The factors of every step: pure functions of (seed, step), like the batches.

    The first `frozen` blocks skip nothing.
    """

    rate: float  # of the last block
    blocks: int
    frozen: int
    seed: int
    batch_size: int  # of a step, over all processes and micro-batches
    device: torch.device
    dtype: torch.dtype

    def factors(self, step: int) -> Tensor:
        """Those of each image's branches, two in a block, (B, L, 2): 0, or 1 / (1 - rate)."""
        generator = torch.Generator().manual_seed(named_seed(self.seed, "drop_path", step))
        draws = torch.rand(self.batch_size, self.blocks, 2, generator=generator)
        keep = 1 - torch.linspace(0, self.rate, self.blocks)[:, None]  # (L, 1)
        keep[: self.frozen] = 1
        return (draws < keep) / keep

    def paths(self, step: int, number: int, count: int) -> list[tuple[Tensor, ...]]:
        """Those of micro-batch `number` of `count`, as VisionTransformer takes them.

        That is for each block two tensors (B / count, 1, 1).
        """
        (own,) = send(self.device, self.factors(step).chunk(count)[number].to(self.dtype))
        return [block.unbind() for block in own.permute(1, 2, 0)[..., None, None].unbind()]
