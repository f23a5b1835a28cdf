"""What a checkpoint's shapes say: its structure, its image size, the variant that it fits.

Shapes are by the official array names, which models.weights lays out.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import isqrt

from models.configs import CONFIGS, ViTConfig

POSITIONS = "Transformer/posembed_input/pos_embedding"

# Sides of the arrays whose shapes say what a model is; a stranger's may have any.
RANKS = {POSITIONS: 3, "embedding/kernel": 4, "conv_root/kernel": 4, "pre_logits/kernel": 2,
         "head/kernel": 2, "head/bias": 1}  # fmt: skip


class WeightsError(ValueError):
    """A checkpoint that cannot be read, or does not fit; the message says what would be right."""


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> ViTConfig:
    """The structure that a file's shapes (by names of the table) tell; dropout rates are 0.

    Raises WeightsError where it is not a ViT in Google's layout.
    """
    block = "Transformer/encoderblock_0"
    for key, ndim in RANKS.items():
        shape = shapes.get(key)
        if shape is not None and (len(shape) != ndim or 0 in shape):
            raise WeightsError(f"{key} has shape {shape}, not {ndim} sides above 0")
    try:
        patch, _, _, hidden = shapes["embedding/kernel"]
        _, heads, _ = shapes[f"{block}/MultiHeadDotProductAttention_1/query/kernel"]
        _, mlp = shapes[f"{block}/MlpBlock_3/Dense_0/kernel"]
    except (KeyError, ValueError):
        raise WeightsError(
            "not a ViT in Google's layout (no embedding/kernel, or no encoder blocks)"
        ) from None
    stages, width = None, 1.0
    if "conv_root/kernel" in shapes:
        width = shapes["conv_root/kernel"][-1] / 64
        units = {m.groups() for m in (re.match(r"block(\d+)/unit(\d+)/", k) for k in shapes) if m}
        count = [sum(1 for stage, _ in units if int(stage) == i) for i in range(1, len(units) + 1)]
        stages = tuple(n for n in count if n)
    return ViTConfig(
        patch_size=patch,
        hidden_size=hidden,
        mlp_dim=mlp,
        num_heads=heads,
        num_layers=len({k.split("/")[1] for k in shapes if "/encoderblock_" in k}),
        classifier="token" if "cls" in shapes else "gap",
        representation_size=shapes.get("pre_logits/kernel", (0, None))[-1],
        resnet_layers=stages,
        resnet_width=width,
    )


def infer_img_size(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Side in pixels of the images that a file was made for; None where they were not square."""
    config = infer_config(shapes)
    if POSITIONS not in shapes:
        raise WeightsError(f"the file lacks {POSITIONS}")
    patches = shapes[POSITIONS][1] - (config.classifier == "token")
    side = isqrt(patches)
    return side * config.stride if side * side == patches else None


def structure(config: ViTConfig) -> ViTConfig:
    """What every parameter but head and `pre_logits` depends on."""
    return replace(
        config, representation_size=None, dropout_rate=0.0, attention_dropout_rate=0.0,
        gelu="tanh", norm_eps=1e-6,
    )  # fmt: skip


def variant_names(config: ViTConfig) -> list[str]:
    """The rows of CONFIGS with this structure, whichever the classifier."""
    wanted = structure(replace(config, classifier="token"))
    return [name for name, row in CONFIGS.items() if structure(row) == wanted]


def check_variant(config: ViTConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError, naming the variant that fits, unless the file has this structure."""
    found = infer_config(shapes)
    if structure(found) == structure(config):
        return
    names = ["/".join(variant_names(c)) or "no known variant" for c in (found, config)]
    facts = [f"{f}: file {getattr(found, f)}, model {getattr(config, f)}"
             for f in ViTConfig.__dataclass_fields__
             if getattr(structure(found), f) != getattr(structure(config), f)]  # fmt: skip
    raise WeightsError(f"the file fits {names[0]}, not {names[1]} ({'; '.join(facts)})")
