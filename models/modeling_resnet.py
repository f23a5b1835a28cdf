"""The ResNet whose feature map a hybrid ViT reads (BiT style: GroupNorm, standardised weights).

Numerics follow google-research/vision_transformer, vit_jax/models_resnet.py. Parameter names are
those of the earlier PyTorch port, so that its state dicts load. Shapes in comments: B batch, C
channels, H W pixels of the image, h w cells of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(size: tuple[int, int], kernel: int, stride: int) -> list[int]:
    """F.pad's (left, right, top, bottom) for TensorFlow's SAME: an odd pixel goes to the end."""
    padding = []
    for side in reversed(size):
        out = -(-side // stride)
        total = max((out - 1) * stride + kernel - side, 0)
        padding += [total // 2, total - total // 2]
    return padding


class StdConv2d(nn.Conv2d):
    """A SAME convolution without bias. Its kernels are standardised: (w - mean) / (std + 1e-5)."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1):
        super().__init__(cin, cout, kernel, stride, bias=False)

    def standardized_weight(self) -> Tensor:
        # In half precision std + 1e-5 rounds to std, so the statistics are at least float32.
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        return (w - mean) / (var.sqrt() + 1e-5)

    def convolve(self, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, stride=self.stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = same_padding(x.shape[-2:], self.kernel_size[0], self.stride[0])
        weight = self.standardized_weight().to(x.dtype)
        if (left, top) == (right, bottom):  # padding inside the convolution saves a copy
            return self.convolve(x, weight, (top, left))  # (B, C, h/stride, w/stride)
        return self.convolve(F.pad(x, (left, right, top, bottom)), weight, (0, 0))


def group_norm(channels: int) -> nn.GroupNorm:
    """The official normalisation, used everywhere: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class PreActBottleneck(nn.Module):
    """One residual unit, 1x1 - 3x3 - 1x1. The name is the earlier port's; ReLU comes last."""

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
        y = F.relu(self.gn1(self.conv1(x)))  # (B, width, h, w)
        y = F.relu(self.gn2(self.conv2(y)))  # (B, width, h/stride, w/stride)
        y = self.gn3(self.conv3(y))  # (B, 4*width, h/stride, w/stride)
        if hasattr(self, "downsample"):
            x = self.gn_proj(self.downsample(x))  # (B, 4*width, h/stride, w/stride)
        return F.relu(x + y)


class ResNetV2(nn.Module):
    """Stem and stages: (B, in_channels, H, W) to (B, C, h, w).

    `layers` counts the units of each stage; () is the stem alone. The stem divides the sides by
    four, and every stage but the first halves them again.
    """

    def __init__(self, layers: tuple[int, ...], width: int, in_channels: int = 3):
        super().__init__()
        self.root = nn.Sequential()
        self.root.add_module("conv", StdConv2d(in_channels, width, 7, 2))
        self.root.add_module("gn", group_norm(width))
        self.body, cin = nn.Sequential(), width
        for i, units in enumerate(layers):
            stage, stage_width = nn.Sequential(), width * 2**i
            for j in range(units):
                unit = PreActBottleneck(cin, stage_width, stride=2 if i > 0 and j == 0 else 1)
                stage.add_module(f"unit{j + 1}", unit)
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
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # std of the truncated normal
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
