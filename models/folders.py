"""Folders that timm and Hugging Face open by themselves: model.safetensors, configs and a card.

Sources: timm's models/_hub.py and data/transforms_factory.py; transformers' ViTConfig,
ViTImageProcessor and BitImageProcessor, which is its processor with a central crop.
"""

import json
import re
from collections.abc import Iterator, Mapping
from math import floor
from pathlib import Path

import torch
from torch import Tensor

from models.configs import ViTConfig, config_name, describe
from models.errors import UserError
from models.hub import CONFIGS, WEIGHTS
from models.interop import FOREIGN, exported_means, write_safetensors, write_timm
from models.pixels import ALIASED
from models.state_dict import WHITE, Checkpoint, rename

LAYOUTS = {"timm": "timm", "hf": "transformers"}  # the names of their libraries
CARD = "README.md"
FILES = (WEIGHTS, *CONFIGS, CARD)
# Names of transformers' files; version 5 has others in memory, and reads and writes these.
_HF = r"embeddings|classifier|layernorm|encoder\.layer\.\{\}\."
_HF_BLOCK = r"(?!.*(norm\d|qkv|attn|mlp|ls\d|_proj|lambda))"
HUGGING_FACE = [row for row in FOREIGN if re.match(f"({_HF}){_HF_BLOCK}", row[0])]
WORDS = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}  # of timm's names
HYBRIDS = {"R+ViT-Ti_16": "vit_tiny_r_s16_p8_224", "R26+ViT-S_32": "vit_small_r26_s32_224"}
HYBRIDS |= {"R26+ViT-B_32": "vit_base_r26_s32_224", "R50+ViT-L_32": "vit_large_r50_s32_224"}
HYBRIDS |= {"R50+ViT-B_16": "vit_base_r50_s16_224"}


def write_folder(folder: Path, layout: str, checkpoint: Checkpoint, dtype, title: str) -> None:
    """Write the files of a layout, a key of LAYOUTS; `title` is that of the card.

    The metadata must have the image size and the classes. Raises UserError for what the library
    lacks.
    """
    configs = (timm_configs if layout == "timm" else hugging_face_configs)(checkpoint)
    naming = write_timm if layout == "timm" else write_hugging_face
    write_safetensors(folder / WEIGHTS, checkpoint, dtype, naming)
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(layout, checkpoint, title), encoding="utf-8")


def write_hugging_face(state: Mapping, config: ViTConfig, dtype=torch.float32) -> dict[str, Tensor]:
    """A state dict under the names of transformers' ViTForImageClassification."""
    tensors = {}
    for name, tensor in state.items():
        theirs = rename(name, HUGGING_FACE, back=True)
        theirs = theirs if theirs.startswith("classifier") else f"vit.{theirs}"
        tensors[theirs] = tensor.to(dtype).contiguous()
    return tensors


def timm_configs(checkpoint: Checkpoint) -> dict[str, dict]:
    """{file name: content} of timm's layout. Raises UserError for what timm lacks."""
    import timm

    config, metadata, pixels = checkpoint.config, checkpoint.metadata, checkpoint.metadata.pixels
    _check(checkpoint, "timm")
    size, classes, name = metadata.img_size, metadata.classes, config_name(config)
    arguments = timm_arguments(config, size, checkpoint.in_channels, len(classes))
    if config.mlp == "swiglu":
        raise UserError("timm's config has no word for a SwiGLU MLP: export a .safetensors instead")
    if config.resnet_layers is None:
        letter = (name or "").removeprefix("ViT-").partition("_")[0]
        architecture = f"vit_{WORDS.get(letter)}_patch{config.patch_size}_224"
        if not timm.is_model(architecture):  # the arguments make any other of this
            architecture = "vit_base_patch16_224"
        first = "patch_embed.proj"
    else:
        architecture = HYBRIDS.get(name)
        more = config.num_registers or config.pre_norm or config.fc_norm
        if architecture is None or config.pooling != "token" or more:
            raise UserError("timm has no such hybrid")
        stem = ".stem" if name != "R+ViT-Ti_16" else ""
        first = f"patch_embed.backbone{stem}.conv"
    mean, std = exported_means(checkpoint)
    fraction = pixels.crop_fraction
    if tuple(floor(side / fraction) for side in size) != pixels.covered(size):
        fraction *= 1 - 1e-8  # timm rounds down what is a whole number but for rounding
    cfg = {"input_size": [checkpoint.in_channels, *size], "fixed_input_size": True}
    cfg |= {"interpolation": pixels.interpolation, "crop_pct": fraction}
    cfg |= {"crop_mode": "squash" if pixels.resize == "squash" else "center"}
    cfg |= {"mean": mean, "std": std, "num_classes": len(classes), "custom_load": False}
    cfg |= {"first_conv": first, "classifier": "head"}
    content = {"architecture": architecture, "num_classes": len(classes)}
    content |= {"num_features": config.hidden_size, "label_names": classes}
    pool = arguments.get("global_pool", "token")
    content |= {"global_pool": pool, "model_args": arguments, "pretrained_cfg": cfg}
    return {"config.json": content}


def timm_arguments(config: ViTConfig, img_size, in_chans: int, num_classes: int) -> dict:
    """Arguments of timm's VisionTransformer, but for its norms and the class of a SwiGLU.

    A hybrid is made by a function of its own, and takes fewer.
    """
    words = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes}
    words["act_layer"] = {"tanh": "gelu_tanh", "erf": "gelu", "quick": "quick_gelu"}[config.gelu]
    if config.resnet_layers is not None:
        return words
    words |= {"patch_size": config.patch_size, "embed_dim": config.hidden_size}
    words |= {"depth": config.num_layers, "num_heads": config.num_heads}
    words["mlp_ratio"] = config.mlp_dim / config.hidden_size
    if (pool := config.pooling) != "token" or config.fc_norm:
        words |= {"global_pool": "avg" if pool == "mean" else pool, "fc_norm": config.fc_norm}
    if config.classifier == "gap":
        words["class_token"] = False
    if config.num_registers:
        words |= {"reg_tokens": config.num_registers, "no_embed_class": True}
    if config.pre_norm:
        words["pre_norm"] = True
    if config.mlp == "swiglu":  # fc1 gives gates and values
        words |= {"mlp_ratio": 2 * words["mlp_ratio"], "act_layer": "silu"}
    return words


def hugging_face_configs(checkpoint: Checkpoint) -> dict[str, dict]:
    """{file name: content} of Hugging Face's layout. Raises UserError for what its ViT lacks."""
    config, metadata, pixels = checkpoint.config, checkpoint.metadata, checkpoint.metadata.pixels
    lacks = {"a ResNet stem": config.resnet_layers is not None}
    lacks |= {"registers": config.num_registers > 0, "a norm before its blocks": config.pre_norm}
    lacks |= {"mean pooling": config.pooling == "mean", "a norm after pooling": config.fc_norm}
    lacks |= {f"pooling by {config.pooling}": config.pooling not in ("token", "mean")}
    lacks |= {"a SwiGLU MLP": config.mlp == "swiglu"}
    lacks |= {"a pre_logits layer": config.representation_size is not None}
    for part in (part for part, present in lacks.items() if present):
        raise UserError(f"Hugging Face's ViT has no {part.removeprefix('a ')}")
    _check(checkpoint, "Hugging Face's ViT")
    (h, w), classes = metadata.img_size, metadata.classes
    content = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
    content |= {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers}
    content |= {"num_attention_heads": config.num_heads, "intermediate_size": config.mlp_dim}
    names = {"tanh": "gelu_pytorch_tanh", "erf": "gelu", "quick": "quick_gelu"}
    content["hidden_act"] = names[config.gelu]
    content |= {"layer_norm_eps": config.norm_eps, "image_size": h if h == w else [h, w]}
    content |= {"patch_size": config.patch_size, "num_channels": checkpoint.in_channels}
    content |= {"qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    content |= {"id2label": dict(enumerate(classes))}
    content |= {"label2id": {name: number for number, name in enumerate(classes)}}
    whole = pixels.covered((h, w))
    crop = pixels.resize == "smaller_side" or pixels.crop_fraction < 1
    if pixels.resize == "smaller_side" and h != w:
        raise UserError("Hugging Face's processors squash to a size that is no square: do so, too")
    mean, std = exported_means(checkpoint)
    kind = "BitImageProcessor" if crop else "ViTImageProcessor"
    steps = {"image_processor_type": kind, "do_resize": True, "do_center_crop": crop}
    steps["size"] = {"height": whole[0], "width": whole[1]}
    if pixels.resize == "smaller_side":
        steps["size"] = {"shortest_edge": whole[0]}
    steps |= {"crop_size": {"height": h, "width": w}} if crop else {}
    steps |= {"resample": {"bilinear": 2, "bicubic": 3}[pixels.interpolation]}
    steps |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    steps |= {"image_mean": mean, "image_std": std}
    steps["do_convert_rgb"] = checkpoint.in_channels == 3
    return {"config.json": content, "preprocessor_config.json": steps}


def _check(checkpoint: Checkpoint, library: str) -> None:
    if checkpoint.metadata.pixels.interpolation == ALIASED:
        raise UserError(f"{library} has no bilinear resize without antialiasing: take bilinear")


def layout_limits(layout: str, checkpoint: Checkpoint) -> Iterator[str]:
    """What a layout cannot say, and a user of the library must know."""
    metadata, pixels = checkpoint.metadata, checkpoint.metadata.pixels
    if metadata.bit_depth is not None or metadata.background != WHITE:
        yield "does not say how images were decoded: their bit depth and background"
    cropped = pixels.resize == "smaller_side" or pixels.crop_fraction < 1
    if cropped and pixels.round_down != (layout == "hf"):
        yield "rounds the place of a central crop in another way: it may be one pixel off"
    eps = checkpoint.config.norm_eps
    if layout == "timm" and eps != 1e-6:
        yield f"does not say that LayerNorm eps is {eps:g}: timm takes 1e-06"


def card(layout: str, checkpoint: Checkpoint, title: str) -> str:
    """The README.md of a model on the hub."""
    config, metadata = checkpoint.config, checkpoint.metadata
    size, classes = "x".join(map(str, metadata.img_size)), metadata.classes
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    facts = [f"{describe(config)} for images of {size} pixels and {len(classes)} classes: {shown}."]
    facts += [f"- step: {metadata.step}"] if metadata.step else []
    facts += [f"- {key}: {value:.4g}" for key, value in metadata.metrics.items()]
    facts += [f"- pixels: {metadata.pixels.describe(metadata.img_size)}"]
    head = ["---", f"library_name: {LAYOUTS[layout]}", "pipeline_tag: image-classification"]
    head += ["tags:", "- image-classification", "- vit", "---", f"# {title}"]
    lines = usage_lines(layout, "DIR")
    lines = ["```python", "# DIR: this folder", *lines, "```"]
    return "\n".join([*head, "", *facts, "", *lines, ""])


def usage_lines(layout: str, folder: str) -> list[str]:
    """Lines of Python that make `model`, and images ready for it."""
    if layout == "timm":
        make = f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()'
        data = "timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        return [
            "import timm",
            make,
            f"transform = {data}",
            "logits = model(transform(image)[None])",
        ]
    return [
        "from transformers import AutoImageProcessor, ViTForImageClassification",
        f"model = ViTForImageClassification.from_pretrained({folder!r})",
        f"processor = AutoImageProcessor.from_pretrained({folder!r})",
        'logits = model(**processor(image, return_tensors="pt")).logits',
    ]
