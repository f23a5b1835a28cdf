"""The config files that timm, Hugging Face and open_clip write beside their weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from models.errors import UserError


def library_config(folder: Path) -> dict:
    """The libraries' config files in `folder` as one dict, with the nested parts of timm's."""
    metadata = {}
    names = ("open_clip_config.json", "preprocessor_config.json", "config.json")
    for path in filter(Path.exists, (folder / name for name in names)):
        try:
            content = json.loads(path.read_bytes())
            metadata |= _open_clip(content) if path.name == names[0] else content
            for part in ("vision_config", "pretrained_cfg", "model_args"):
                metadata |= content.get(part) or {}
        except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
            raise UserError(f"{path.name} beside it is damaged: repair it ({error})") from error
    return _of_timm(metadata) | metadata


def _of_timm(values: Mapping) -> dict:
    """What the name of timm's model stands for: its files on the hub do not say it otherwise.

    Raises UserError for blocks that the names of their tensors do not show.
    """
    if not isinstance(name := values.get("architecture"), str):
        return {}
    import timm

    if not timm.is_model(name):
        return {}
    with torch.device("meta"):
        model = timm.create_model(name)  # its arguments are not trusted: depth, for example
    if not isinstance(model, timm.models.VisionTransformer):
        return {}
    block = model.blocks[0]
    if type(block) is not timm.models.vision_transformer.Block:
        raise UserError(f"its blocks are timm's {type(block).__name__}: unsupported")
    found = {"num_heads": block.attn.num_heads, "norm_eps": block.norm1.eps}
    found["act_layer"] = type(block.mlp.act).__name__.lower()
    found["pool_include_prefix"] = model.pool_include_prefix
    return found | {"global_pool": model.global_pool}


def _open_clip(content: dict) -> dict:
    """What open_clip's config file says of its tower that sees images, in timm's words."""
    model = content.get("model_cfg", {})
    vision, pixels = model.get("vision_cfg", {}), content.get("preprocess_cfg", {})
    values = {"image_size": vision.get("image_size")}
    if "timm_model_name" in vision:
        values |= {"architecture": vision["timm_model_name"]}
    else:
        values |= {"act_layer": "quick_gelu" if model.get("quick_gelu") else "gelu"}
        if "width" in vision:
            values["num_heads"] = vision["width"] // vision.get("head_width", 64)
    mode = pixels.get("resize_mode", "shortest")
    values |= {"crop_mode": {"shortest": "center"}.get(mode, mode), "crop_pct": 1.0}
    values |= {"interpolation": pixels.get("interpolation", "bicubic")}
    return values | {key: pixels.get(key) for key in ("mean", "std")}
