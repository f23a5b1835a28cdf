"""Pooling by attention, the head of SigLIP's towers (big_vision's MAPHead)."""

import torch
from torch import Tensor, nn


class MapHead(nn.Module):
    """Attention of one learned query to the patches, then an MLP: (B, P, D) to (B, D).

    `attn`, `norm` and `ffn` are those of a block of width D. Source: Zhai et al., Scaling Vision
    Transformers, arXiv:2106.04560.
    """

    def __init__(self, width: int, attn: nn.Module, norm: nn.Module, ffn: nn.Module):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attn, self.norm, self.ffn = attn, norm, ffn

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x, probe=self.probe.expand(x.shape[0], -1, -1))  # (B, 1, D)
        return (x + self.ffn(self.norm(x))).squeeze(1)
