"""Read the ViTs of timm, DINOv2, Hugging Face and CLIP, and write timm's.

Reading finds the model in the file, renames every tensor to our state dict by the tables of
models/layouts.py, and removes the differences between the libraries: stacked queries, keys and
values, layer scale, pixel means. In shape comments D is width, C channels, p the patch side, R
registers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from models.configs import ViTConfig
from models.errors import UserError
from models.folding import (
    IN_BLOCK,
    average_heads,
    check_blocks,
    complete_positions,
    fold_layers,
)
from models.layouts import (
    CLASS_TOKEN,
    FOREIGN,
    LEFT_OUT,
    METADATA_KEYS,
    NORM,
    PATCH_LAYER,
    RANKS,
    ROTARY,
    TIMM_STEM,
    TOWERS,
    UNSUPPORTED,
)
from models.library_config import (
    CONFIG_KEYS,
    class_names,
    pooling,
    set_recipe,
    with_numerics,
)
from models.state_dict import (
    FLAT_PATCHES,
    PATCHES,
    POSITIONS,
    PRE_NORM,
    REGISTERS,
    Checkpoint,
    Metadata,
    infer_config,
    rename,
)
from models.torch_files import unwrap


def write_safetensors(path, checkpoint: Checkpoint, dtype=torch.float32, naming=None) -> None:
    """Write timm's names, or those of `naming`, with `metadata_of` as the file's own metadata."""
    state, means = dict(checkpoint.state), exported_means(checkpoint)
    _change_pixel_means(state, _halves(checkpoint), means)
    tensors = (naming or write_timm)(state, checkpoint.config, dtype)
    # safetensors' save_file makes a file that only its owner may read.
    Path(path).write_bytes(save(tensors, {"format": "pt"} | metadata_of(checkpoint, means)))


def exported_means(checkpoint: Checkpoint) -> list[Sequence[float]]:
    """[pixel means, deviations] of a `.safetensors`: those of the library's file, or 0.5."""
    pixels = checkpoint.metadata.pixels
    own = len(pixels.mean) == len(pixels.std) == checkpoint.in_channels
    return [pixels.mean, pixels.std] if own else _halves(checkpoint)


def _halves(checkpoint: Checkpoint) -> list[Sequence[float]]:
    return [[0.5] * checkpoint.in_channels] * 2


def metadata_of(checkpoint: Checkpoint, means: Sequence | None = None) -> dict[str, str]:
    """What no tensor holds, by METADATA_KEYS, each value as JSON; `means` are 0.5 by default."""
    values = vars(checkpoint.config) | vars(checkpoint.metadata)
    values["pool"] = checkpoint.config.pooling
    values |= zip(("mean", "std"), means or _halves(checkpoint), strict=True)
    values |= {"background": checkpoint.metadata.background or ()}
    pixels = checkpoint.metadata.pixels
    values |= {"pixels": asdict(pixels if means else replace(pixels, mean=(), std=()))}
    return {key: json.dumps(values[key]) for key in METADATA_KEYS if values[key] is not None}


def write_timm(state: Mapping, config: ViTConfig, dtype=torch.float32) -> dict[str, Tensor]:
    """A state dict under timm's names, which its models load strictly. Raises UserError."""
    if config.representation_size is not None:
        raise UserError("timm has no pre_logits layer: export to .npz or .onnx instead")
    if config.pool == "pair":
        raise UserError("timm's ViT has no head of two tokens: export to .onnx instead")
    table = FOREIGN if config.resnet_layers else TIMM_STEM + FOREIGN
    tensors, state, has_token = {}, dict(state), config.classifier == "token"
    if config.pre_norm:  # timm's patch layer has no bias then: it goes into the positions
        bias, added = state.pop(f"{PATCH_LAYER}.bias"), torch.zeros_like(state[POSITIONS])
        added[:, has_token:] = bias
        state[POSITIONS] = state[POSITIONS] + added
    if config.num_registers and has_token:  # timm's models with registers have `no_embed_class`
        state[CLASS_TOKEN] = state[CLASS_TOKEN] + state[POSITIONS][:, :1]
        state[POSITIONS] = state[POSITIONS][:, 1:]
    for name, tensor in state.items():
        if match := re.search(r"\.attn\.(query|key|value)\.", name):
            stacked = ("query", "key", "value")[name.startswith("map_head.") :]
            if match[1] == stacked[0]:
                parts = [state[name.replace(match[1], part)] for part in stacked]
                short = "".join(part[0] for part in stacked)  # qkv or kv
                name, tensor = name.replace(match[1], short), torch.cat(parts)
            elif match[1] in stacked:
                continue
        tensors[rename(name, table, back=True)] = tensor.to(dtype).contiguous()
    return tensors


def read_foreign(content, metadata=None, num_heads=None, img_size=None) -> Checkpoint:
    """What a file of another library holds as a Checkpoint in float32: see `unwrap`.

    `metadata` is a dict of what the library's config says; `num_heads` and `img_size`, a side or
    (height, width) in pixels, are for what it does not say. Raises UserError.
    """
    tensors, own_names, note = unwrap(content)
    found, metadata = Metadata(notes=[note] if note else []), metadata or {}
    values = {CONFIG_KEYS.get(key, key): x for key, x in metadata.items() if x is not None}
    state = _rename_all(tensors, own_names, found)
    check_blocks(state)
    fold_layers(state, found)
    if "head.weight" in state and any("layer_norm1" in key for key in tensors):
        _pool_as_transformers(state, found)
    config = infer_config(state, heads := values.get("num_heads", num_heads))
    if config.fc_norm and f"{NORM}.weight" in state:
        raise UserError("fc_norm and a norm before the pooling: unsupported")
    config = replace(config, pool=pooling(config, values))
    head = state.get("head.weight")
    if "head_dist.weight" in state:
        average_heads(state, found)
        config = replace(config, pool="pair")
    elif head is not None and head.shape[1] != config.hidden_size:
        _drop("head.", "the head reads more than the class token", state, found)
    complete_positions(state, config, values.get("img_size"), img_size, found)
    config = with_numerics(config, tensors, values)
    mlp = f"GELU: {config.gelu}" if config.mlp == "gelu" else "MLP: SwiGLU"
    source = " (by the width: no config says it)" if heads is None else ""
    norms = f"LayerNorm eps {config.norm_eps:g}, pooling: {config.pooling}"
    found.notes.append(f"heads: {config.num_heads}{source}, {mlp}, {norms}")
    found.classes = class_names(values, len(state.get("head.bias", ())))
    set_recipe(values, found)
    _fold_pixel_means(state, values, found)
    return Checkpoint(state, config, found)


def _rename_all(
    tensors: Mapping[str, Tensor], own_names: Mapping[str, str], found: Metadata
) -> dict[str, Tensor]:
    """Every tensor under our names in float32. UserError for an unknown key, type or rank."""
    state, unknown, wrong = {}, [], None
    tower = next((name for name in TOWERS if any(name in key for key in tensors)), "")
    for key, tensor in tensors.items():
        own, bare = own_names[key], key.rpartition(tower)[2] if tower else key
        name = rename(bare, FOREIGN)
        reasons = [why for part, why in LEFT_OUT.items() if re.match(part, bare)]
        if tower not in key and not key.startswith("classifier."):
            reasons = ["not of the tower that sees images"]
        if reasons:
            found.left_out[own] = reasons[0]
        elif name is None:
            unknown.append(own)
        elif name in state:
            raise UserError(f"two of its tensors are {name}")
        else:
            rank = next(RANKS[part] for part in RANKS if re.search(part, name))
            if rank == 3 and tensor.ndim in (1, 2):  # CLIP's are (D) and (tokens, D)
                tensor = tensor[(None,) * (3 - tensor.ndim)]
            if tensor.ndim != rank or 0 in tensor.shape or not tensor.is_floating_point():
                wrong = wrong or f"{own} is {tensor.dtype} of shape {tuple(tensor.shape)}"
            if name == PATCHES and tensor.ndim == 2:
                wrong = FLAT_PATCHES
            state[name], found.keys[own] = tensor if wrong else tensor.float(), name
    if unknown:
        keys = " ".join(unknown)
        reasons = [why for part, why in UNSUPPORTED.items() if re.search(part, keys)]
        blocks = PATCHES in state and any(IN_BLOCK.match(name) for name in state)  # not a CNN
        if POSITIONS not in state and (blocks or REGISTERS in state):
            reasons = reasons or [ROTARY] * ("position" not in keys)
        what, some = [*reasons, "tensors of another model"][0], ", ".join(sorted(unknown)[:4])
        raise UserError(f"{what}: unsupported ({some}; {len(unknown)} in all)")
    if wrong:
        raise UserError(wrong)
    if f"{PRE_NORM}.weight" in state:  # CLIP's patch layer has no bias
        state.setdefault(f"{PATCH_LAYER}.bias", torch.zeros_like(state[f"{PRE_NORM}.weight"]))
    if missing := {POSITIONS, f"{PATCH_LAYER}.bias"} - state.keys():
        raise UserError(f"not a Vision Transformer, or incomplete: it lacks {min(missing)}")
    return state


def _pool_as_transformers(state: dict[str, Tensor], found: Metadata) -> None:
    """Its classifiers on CLIP and SigLIP read the mean of the patches, whatever the tower's pool.

    CLIP's are not normalised then, which our model has no form of: its head is left out.
    """
    if f"{PRE_NORM}.weight" in state:
        _drop("head.", "the head reads patches without a norm", state, found)
    else:
        _drop("map_head.", "the head reads the mean of the patches", state, found)


def _drop(part: str, why: str, state: dict[str, Tensor], found: Metadata) -> None:
    """Leave out all tensors whose names, which are ours, begin with `part`."""
    for key in [key for key, name in found.keys.items() if name.startswith(part)]:
        del found.keys[key]
        found.left_out[key] = why
    for name in [name for name in state if name.startswith(part)]:
        del state[name]


def _fold_pixel_means(state: dict[str, Tensor], values: Mapping, found: Metadata) -> None:
    """Make the patch layer read pixels from -1 to 1, whatever the library's are."""
    # A hybrid's kernel reads the ResNet's channels, not the image's: no means but 0.5 fit.
    channels = state[f"{PATCH_LAYER}.weight"].shape[1]
    mean, std = values.get("mean"), values.get("std")
    if values.get("do_normalize") is False:  # transformers'
        mean, std = [0.0] * channels, [1.0] * channels
    if mean is None or std is None:
        found.notes.append("no config gives its pixel means: taken as 0.5, like the deviations")
        return
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1
    rows = [mean, std, [factor]]
    if not all(row and type(row) in (list, tuple) and all(map(_is_number, row)) for row in rows):
        raise UserError(f"its pixel means are {mean!r:.60}, the deviations {std!r:.60}")
    if min([*std, factor]) <= 0:
        raise UserError(f"its pixel deviations are {std!r:.60}, the factor {factor!r:.20}")
    if abs(255 * factor - 1) > 1e-6:
        mean, std = ([x / (255 * factor) for x in row] for row in (mean, std))
    if {*mean, *std} == {0.5}:
        return
    if not len(mean) == len(std) == channels:
        raise UserError(f"pixel means {mean!r} and deviations {std!r} do not fit its first layer")
    _change_pixel_means(state, [mean, std], [[0.5] * channels] * 2)
    found.pixels = replace(found.pixels, mean=tuple(mean), std=tuple(std))
    found.notes.append("pixel means and deviations folded into the patch layer")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e3


def _change_pixel_means(state: dict[str, Tensor], old: Sequence, new: Sequence) -> None:
    """Make the patch layer read (x - mean) / std of `new` (mean, std), instead of `old`."""
    if [*map(list, old)] == [*map(list, new)]:
        return
    kernel, bias = state[f"{PATCH_LAYER}.weight"], state[f"{PATCH_LAYER}.bias"]  # (D, C, p, p), (D)
    (mean, std), (new_mean, new_std) = (torch.tensor(pair)[:, :, None, None] for pair in (old, new))
    state[f"{PATCH_LAYER}.bias"] = bias + (kernel * (new_mean - mean) / std).sum(dim=(1, 2, 3))
    state[f"{PATCH_LAYER}.weight"] = kernel * (new_std / std)
