"""What the config files of timm, Hugging Face and open_clip say of the weights beside them."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from models.configs import ViTConfig
from models.errors import UserError
from models.layouts import GELUS, POOLS
from models.pixels import Pixels, library_recipe
from models.state_dict import WHITE, Metadata

# The libraries' names in config files -> those of METADATA_KEYS.
CONFIG_KEYS = {"num_attention_heads": "num_heads", "hidden_act": "gelu", "act_layer": "gelu"}
CONFIG_KEYS |= {"layer_norm_eps": "norm_eps", "image_mean": "mean", "image_std": "std"}
CONFIG_KEYS |= {"image_size": "img_size", "input_size": "img_size"}
CONFIG_KEYS |= {"global_pool": "pool", "label_names": "classes"}


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


def pooling(config: ViTConfig, values: Mapping) -> str | None:
    """`pool` of the config, for what the library's says. Raises UserError for another one."""
    given = str(values.get("pool", ""))
    if given not in POOLS or values.get("pool_include_prefix"):
        raise UserError(f"its pooling is {given!r:.40}, or unknown: unsupported")
    pool = config.pool if config.pool == "map" else POOLS[given] or config.pool
    return None if pool == replace(config, pool=None).pooling else pool


def with_numerics(config: ViTConfig, tensors: Mapping, values: Mapping) -> ViTConfig:
    """`config` with the form of GELU and the eps of its norms, which no tensor shows.

    Where `values` do not say it: transformers' CLIP has QuickGELU, its SigLIP the tanh form; its
    ViT has an eps of 1e-12, every CLIP 1e-5, and all others here 1e-6. Raises UserError.
    """
    gelu, eps = "gelu", 1e-6
    if any("layer_norm1" in key for key in tensors):
        gelu = "quick" if config.pre_norm else "tanh"
    if any("layernorm_before" in key for key in tensors):
        eps = 1e-12
    if config.pre_norm:
        eps = 1e-5
    gelu = str(values.get("gelu", gelu))
    if config.mlp == "swiglu" and gelu not in GELUS:  # it reads none: its config names SiLU
        gelu = "gelu"
    if gelu not in GELUS:
        raise UserError(f"its activation is {gelu!r:.40}: only GELU is supported")
    return replace(config, gelu=GELUS[gelu], norm_eps=values.get("norm_eps", eps))


def class_names(values: Mapping, count: int) -> tuple[str, ...] | None:
    """The names of the `count` classes of a head, None for none. Raises UserError."""
    by_number, names = values.get("id2label", {}), values.get("classes", [])
    if not isinstance(by_number, dict) or not isinstance(names, list | tuple):
        raise UserError(f"its class names are {names or by_number!r:.60}")
    names = names or [by_number.get(str(i)) for i in range(len(by_number))]
    own = all(isinstance(name, str) for name in names) and "LABEL_0" not in names  # the default
    return tuple(names) if own and len(names) == count else None


def set_recipe(values: Mapping, found: Metadata) -> None:
    """How images are decoded and resized, and positions resized. Raises UserError."""
    found.set_decoding(values.get("bit_depth"), values.get("background", list(WHITE)))
    if "pixels" in values:  # an export of ours
        found.pixels = Pixels.stored(values["pixels"])
        found.set_positions(values.get("positions", "linear"))
        return
    # Of transformers' models, only DINOv2 with registers has antialiasing.
    smooth = re.compile("pos_embed|positional_embedding|register_tokens")
    antialias = any(map(smooth.search, found.keys))
    found.set_positions("bicubic with antialiasing" if antialias else "bicubic")
    try:
        found.pixels = library_recipe(values)
    except UserError as error:
        found.notes.append(f"{error}: they are squashed here")
