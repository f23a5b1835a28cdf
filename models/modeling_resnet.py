"""The ResNet whose feature map a hybrid ViT reads (BiT style: GroupNorm, standardised weights).

Numerics follow google-research/vision_transformer, vit_jax/models_resnet.py; module names follow
the earlier PyTorch port, so that its state dicts load. Shapes: B batch, C channels, h w grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu import conv2d


def same_padding(size: tuple[int, int], kernel: int, stride: int) -> list[int]:
    """F.pad's (left, right, top, bottom) for TensorFlow's SAME: the odd pixel goes behind."""
    padding = []
    for side in reversed(size):
        out = -(-side // stride)
        total = max((out - 1) * stride + kernel - side, 0)
        padding += [total // 2, total - total // 2]
    return padding


class StdConv2d(nn.Conv2d):
    """A SAME convolution without bias whose kernels are standardised: (w - mean) / (std + 1e-5)."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1):
        super().__init__(cin, cout, kernel, stride, bias=False)

    def standardized_weight(self) -> Tensor:
        # In half precision 1e-5 is lost beside std, so the statistics are float32 at least.
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        return (w - mean) / (var.sqrt() + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        left, right, top, bottom = same_padding(x.shape[-2:], kernel, stride)
        weight = self.standardized_weight().to(x.dtype)
        if (left, top) == (right, bottom):  # padding inside the convolution saves a copy
            return conv2d(x, weight, stride=stride, padding=(top, left))
        return conv2d(F.pad(x, (left, right, top, bottom)), weight, stride=stride)


def group_norm(channels: int) -> nn.GroupNorm:
    """The official normalisation: 32 groups, eps 1e-6, everywhere."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class PreActBottleneck(nn.Module):
    """One residual unit, 1x1 - 3x3 - 1x1 (the name is the earlier port's; ReLU comes last)."""

    def __init__(self, cin: int, width: int, stride: int):
        super().__init__()
        cout = width * 4
        self.conv1 = StdConv2d(cin, width, 1)
        self.gn1 = group_norm(width)
        self.conv2 = StdConv2d(width, width, 3, stride)
        self.gn2 = group_norm(width)
        self.conv3 = StdConv2d(width, cout, 1)
        self.gn3 = group_norm(cout)
        if stride != 1 or cin != cout:
            self.downsample = StdConv2d(cin, cout, 1, stride)
            self.gn_proj = group_norm(cout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))  # (B, C, h/stride, w/stride)
        y = self.gn3(self.conv3(y))
        if hasattr(self, "downsample"):
            x = self.gn_proj(self.downsample(x))
        return F.relu(x + y)


class ResNetV2(nn.Module):
    """Stem and stages: (B, in_channels, H, W) -> (B, C, h, w).

    `layers` counts the units of each stage; () keeps the stem alone. All stages but the first
    halve the map, after the stem has quartered it.
    """

    def __init__(self, layers: tuple[int, ...], width: int, in_channels: int = 3):
        super().__init__()
        self.root = nn.Sequential()
        self.root.add_module("conv", StdConv2d(in_channels, width, 7, 2))
        self.root.add_module("gn", group_norm(width))
        self.body = nn.Sequential()
        cin = width
        for i, units in enumerate(layers):
            stage, stage_width = nn.Sequential(), width * 2**i
            for j in range(units):
                stride = 2 if i > 0 and j == 0 else 1
                stage.add_module(f"unit{j + 1}", PreActBottleneck(cin, stage_width, stride))
                cin = stage_width * 4
            self.body.add_module(f"block{i + 1}", stage)
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, StdConv2d):
                lecun_normal_(module.weight)
            elif isinstance(module, PreActBottleneck):
                nn.init.zeros_(module.gn3.weight)  # every unit starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.root(x))  # (B, C, H/2, W/2)
        x = F.pad(x, same_padding(x.shape[-2:], 3, 2), value=float("-inf"))
        x = F.max_pool2d(x, 3, 2)  # (B, C, H/4, W/4)
        return self.body(x)  # (B, C, h, w)


def lecun_normal_(weight: Tensor) -> None:
    """Flax's default for kernels: normal, variance 1 / fan_in, truncated at two deviations."""
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # the deviation that truncation leaves of 1
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
