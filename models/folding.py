"""Remove the differences between the libraries from a state dict that has our names.

In shape comments D is width, R registers.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from math import isqrt, prod

import torch
from torch import Tensor

from models.configs import ViTConfig
from models.errors import UserError
from models.state_dict import LAYER, POSITIONS, REGISTERS, Metadata

IN_BLOCK = re.compile(LAYER.format(r"(\d+)") + "(.*)")


def check_blocks(state: Mapping[str, Tensor]) -> None:
    """Raise UserError if one block lacks what another has: a scale, for example."""
    names = [match.groups() for match in map(IN_BLOCK.match, state) if match]
    numbers = {number for number, _ in names}
    for part in sorted({part for _, part in names}):
        if lacking := numbers - {number for number, other in names if other == part}:
            raise UserError(f"it lacks {LAYER.format(min(lacking, key=int))}{part}")


def fold_layers(state: dict[str, Tensor], found: Metadata) -> None:
    """Split stacked layers, join SwiGLU's, fold layer scale, give missing biases zeros."""
    for key, name in found.keys.items():
        if match := re.search(r"\.attn\.(qkv|kv)\.", name):
            stacked = ("query", "key", "value")[-len(match[1]) :]
            parts = [name.replace(f".{match[1]}.", f".{part}.") for part in stacked]
            # Loading refuses the shapes if the rows are not three times the width, or two times.
            state |= zip(parts, state.pop(name).chunk(len(parts)), strict=False)
            found.keys[key] = parts[0]
        elif ".ffn.up." in name:  # fc1 of SwiGLU is both
            gate, both = (name.replace(".up.", f".{part}.") for part in ("gate", "fc1"))
            if gate not in state or state[gate].shape != state[name].shape:
                raise UserError(f"{key} has no gate of its shape")
            state[both] = torch.cat([state.pop(gate), state.pop(name)])
            found.keys |= {k: both for k, ours in found.keys.items() if ours in (gate, name)}
        elif name.endswith(".scale"):  # scale * (W x + b) is one linear layer
            scale, layer = state.pop(name), name.removesuffix(".scale")  # (D)
            weight, bias = state.get(f"{layer}.weight"), state.get(f"{layer}.bias")
            if weight is None or bias is None or not len(scale) == len(weight) == len(bias):
                raise UserError(f"{key} has {len(scale)} values, which do not fit its layer")
            state[f"{layer}.weight"], state[f"{layer}.bias"] = scale[:, None] * weight, scale * bias
            found.keys[key] = f"{layer}.weight"
    if any(key.endswith((".gamma", ".lambda1")) for key in found.keys):
        found.notes.append("layer scale folded into the output layers")
    weights = [name for name in state if re.search(r"attn\.(query|key|value)\.weight$", name)]
    zeros = {name.replace("weight", "bias"): torch.zeros(len(state[name])) for name in weights}
    if zeros.keys() - state.keys():
        found.notes.append("queries, keys or values have no biases: zeros")
    state |= zeros | state


def average_heads(state: dict[str, Tensor], found: Metadata) -> None:
    """Make one head of a distilled DeiT's two: it reads both tokens, and gives their mean."""
    for leaf, dim in (("weight", 1), ("bias", None)):
        own, other = state.get(f"head.{leaf}"), state.get(f"head_dist.{leaf}")
        if own is None or other is None or own.shape != other.shape:
            raise UserError("its heads of the class and the distillation token do not fit together")
        state[f"head.{leaf}"] = (torch.cat([own, other], dim) if dim else own + other) / 2
    for key, name in found.keys.items():
        if name.startswith("head_dist."):
            del state[name]
            found.keys[key] = name.replace("head_dist", "head")
    found.notes.append("the mean of both heads predicts; a new head reads the class token alone")


def complete_positions(state: dict, config: ViTConfig, said, wanted, found: Metadata) -> None:
    """Find the image size of the positions: the first that fits of these.

    What a config `said`, a square, the size that is `wanted`, another square.

    Some libraries give no position to the class token: it gets zeros. Some give one to registers:
    it is added to them.
    """
    positions = state[POSITIONS]  # (1, tokens, D)
    count, has_token = positions.shape[1], config.classifier == "token"
    prefix = config.num_prefix
    # h x (h + 2) patches and a token make a square, too. That is rare, and not handled.
    tokens = (count - has_token, count, count - prefix)
    square, *others = (isqrt(max(0, number)) * config.stride for number in tokens)
    for size in filter(None, [said, square, wanted, *others]):
        with suppress(UserError, TypeError, IndexError):  # the patches do not tile it; no size
            sides = (size, size) if isinstance(size, int) else tuple(size[-2:])  # timm's: (C, h, w)
            patches = prod(config.grid(sides))
            if count in (patches, patches + has_token, patches + prefix):
                break
    else:
        return
    found.img_size = sides
    if has_token and count == patches:
        state[POSITIONS] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        found.notes.append("the class token has no position: zeros")
    elif count > patches + has_token:
        own = positions[:, has_token:prefix]
        if own.shape != state[REGISTERS].shape:
            raise UserError(f"positions of registers have shape {tuple(own.shape)}")
        state[REGISTERS] = state[REGISTERS] + own  # (1, R, D)
        state[POSITIONS] = torch.cat([positions[:, :has_token], positions[:, prefix:]], dim=1)
