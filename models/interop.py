"""Read the ViTs of timm, DINOv2 and Hugging Face, and write timm's: tables of parameter names.

Reading renames every tensor to our state dict, then removes the differences between the libraries:
stacked queries, keys and values, layer scale, pixel means. Sources of the names: timm's
models/vision_transformer.py (DeiT and DINOv2 use the same), transformers' models/vit and
models/dinov2. In shape comments D is width, C channels, p the patch side.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from math import isqrt, prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.configs import ViTConfig
from models.errors import UserError
from models.pixels import Pixels, library_recipe
from models.state_dict import EMBEDDINGS, LAYER, WHITE, Checkpoint, Metadata, infer_config, rename

CLASS_TOKEN, POSITIONS = f"{EMBEDDINGS}.cls_token", f"{EMBEDDINGS}.position_embeddings"
PATCH_LAYER, NORM = f"{EMBEDDINGS}.patch_embeddings", "transformer.encoder.encoder_norm"

# Rows are (their module, ours); {} stands for a number, {+1} for one that is higher by 1 in ours.
# timm's come first: writing takes the first row that fits.
# fmt: off
FOREIGN = [
    ("cls_token", CLASS_TOKEN),         ("embeddings.cls_token", CLASS_TOKEN),
    ("pos_embed", POSITIONS),           ("embeddings.position_embeddings", POSITIONS),
    ("patch_embed.proj", PATCH_LAYER),  ("embeddings.patch_embeddings.projection", PATCH_LAYER),
    ("norm", NORM),                     ("layernorm", NORM),
    ("head", "head"),                   ("classifier", "head"),
]
# Our model has no layers `attn.qkv` and `scale`: reading splits the one and folds the other.
_BLOCK = [
    ("norm1", "attention_norm"),                 ("norm2", "ffn_norm"),
    ("attn.qkv", "attn.qkv"),                    ("attn.proj", "attn.out"),
    ("mlp.fc1", "ffn.fc1"),                      ("mlp.fc2", "ffn.fc2"),
    ("ls1.gamma", "attn.out.scale"),             ("ls2.gamma", "ffn.fc2.scale"),
    ("layernorm_before", "attention_norm"),      ("layernorm_after", "ffn_norm"),
    ("attention.attention.query", "attn.query"), ("attention.q_proj", "attn.query"),
    ("attention.attention.key", "attn.key"),     ("attention.k_proj", "attn.key"),
    ("attention.attention.value", "attn.value"), ("attention.v_proj", "attn.value"),
    ("attention.output.dense", "attn.out"),      ("attention.o_proj", "attn.out"),
    ("intermediate.dense", "ffn.fc1"),           ("output.dense", "ffn.fc2"),
    ("layer_scale1.lambda1", "attn.out.scale"),  ("layer_scale2.lambda1", "ffn.fc2.scale"),
]
_UNIT = [
    ("conv1", "conv1"), ("conv2", "conv2"), ("conv3", "conv3"), ("downsample.conv", "downsample"),
    ("norm1", "gn1"),   ("norm2", "gn2"),   ("norm3", "gn3"),   ("downsample.norm", "gn_proj"),
]
# fmt: on
for block in ("blocks.{}", "encoder.layer.{}", "layers.{}"):  # the last: transformers 5 in memory
    FOREIGN += [(f"{block}.{theirs}", f"{LAYER}.{ours}") for theirs, ours in _BLOCK]
_HYBRID, _STAGE = f"{EMBEDDINGS}.hybrid_model", "patch_embed.backbone.stages.{}.blocks.{}"
_OUR_STAGE = f"{_HYBRID}.body.block{{+1}}.unit{{+1}}"
FOREIGN += [(f"{_STAGE}.{theirs}", f"{_OUR_STAGE}.{ours}") for theirs, ours in _UNIT]
_STEM = {"conv": f"{_HYBRID}.root.conv", "norm": f"{_HYBRID}.root.gn"}
TIMM_STEM = [(f"patch_embed.backbone.{theirs}", ours) for theirs, ours in _STEM.items()]
FOREIGN += [(f"patch_embed.backbone.stem.{theirs}", ours) for theirs, ours in _STEM.items()]
FOREIGN += TIMM_STEM  # of a ResNet without stages

PREFIX = r"^((module|model|backbone|vit|deit|dinov2)\.)+"
# Part of a key that no table has -> what it belongs to, where the key itself does not say it.
UNSUPPORTED = {"reg_token|register_tokens": "register tokens", "dist": "a distillation token"}
UNSUPPORTED |= {r"\.w12\.|\.w3\.|weights_in|fc1_g": "a SwiGLU MLP"}
# Part of our name -> number of dimensions; the first that is found counts.
RANKS = {"cls_token|position_embeddings": 3, r"bias$|scale$|norm\.weight$|\.gn\w*\.weight$": 1}
RANKS |= {"embeddings": 4, "": 2}
GELUS = {"erf": "erf", "gelu": "erf", "gelu_erf": "erf", "tanh": "tanh", "gelu_tanh": "tanh"}
GELUS |= {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# What our own files say, each value as JSON, and the names in the libraries' config files.
METADATA_KEYS = ("num_heads", "gelu", "norm_eps", "classes", "img_size", "mean", "std")
METADATA_KEYS += ("bit_depth", "background", "pixels", "positions")
CONFIG_KEYS = {"num_attention_heads": "num_heads", "hidden_act": "gelu", "act_layer": "gelu"}
CONFIG_KEYS |= {"layer_norm_eps": "norm_eps", "image_mean": "mean", "image_std": "std"}
CONFIG_KEYS |= {"image_size": "img_size", "input_size": "img_size", "label_names": "classes"}


def read_safetensors(path: str | Path, num_heads: int | None = None, img_size=None) -> Checkpoint:
    """A `.safetensors` file in the layout of timm, DINOv2 or Hugging Face, or of our own export.

    `config.json` and `preprocessor_config.json` beside it, which both libraries write, hold heads,
    GELU, norm eps, class names, pixel means, and how images are resized. `num_heads` and
    `img_size`, a side or (height, width) in pixels, are for files without them. Raises UserError.
    """
    tensors, metadata = read_tensors(path)
    # Config files beside an export of ours are about other weights.
    metadata = metadata or _library_config(Path(path).parent)
    return read_foreign(tensors, metadata, num_heads, img_size)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a `.safetensors`, and its metadata of METADATA_KEYS. Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            stored = file.metadata() or {}
        return tensors, {key: json.loads(stored[key]) for key in METADATA_KEYS if key in stored}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"no safetensors file, or damaged ({error})") from error


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
    values |= zip(("mean", "std"), means or _halves(checkpoint), strict=True)
    values |= {"background": checkpoint.metadata.background or ()}
    pixels = checkpoint.metadata.pixels
    values |= {"pixels": asdict(pixels if means else replace(pixels, mean=(), std=()))}
    return {key: json.dumps(values[key]) for key in METADATA_KEYS if values[key] is not None}


def write_timm(state: Mapping, config: ViTConfig, dtype=torch.float32) -> dict[str, Tensor]:
    """A state dict under timm's names, which its models load strictly. Raises UserError."""
    if config.representation_size is not None:
        raise UserError("timm has no pre_logits layer: export to .npz or .onnx instead")
    table = FOREIGN if config.resnet_layers else TIMM_STEM + FOREIGN
    tensors = {}
    for name, tensor in state.items():
        if ".attn.query." in name:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            name, tensor = name.replace("query", "qkv"), torch.cat(parts)
        elif ".attn.key." in name or ".attn.value." in name:
            continue
        tensors[rename(name, table, back=True)] = tensor.to(dtype).contiguous()
    return tensors


def read_foreign(tensors, metadata=None, num_heads=None, img_size=None) -> Checkpoint:
    """A dict of tensors named as by timm, DINOv2 or Hugging Face as a Checkpoint in float32.

    `metadata` is a dict of what the library's config says; `num_heads` and `img_size` (pixels)
    are for what it does not say. Raises UserError.
    """
    found, metadata = Metadata(), metadata or {}
    values = {CONFIG_KEYS.get(key, key): x for key, x in metadata.items() if x is not None}
    state = _rename_all(tensors, found)
    _fold_layers(state, found)
    config = infer_config(state, values.get("num_heads", num_heads))
    fc2 = state.get(f"{LAYER.format(0)}.ffn.fc2.weight")
    if fc2 is not None and 2 * fc2.shape[1] == config.mlp_dim:  # timm packs both halves into fc1
        raise UserError("a SwiGLU MLP: unsupported (fc1 is twice as wide as fc2 reads)")
    head = state.get("head.weight")
    if head is not None and head.shape[1] != config.hidden_size:
        for key in [key for key, name in found.keys.items() if name.startswith("head.")]:
            del state[found.keys.pop(key)]
            found.left_out[key] = "the head reads more than the class token"
    _complete_positions(state, config, [values.get("img_size"), img_size], found)
    gelu = str(values.get("gelu", "gelu"))
    if gelu not in GELUS:
        raise UserError(f"its activation is {gelu!r:.40}: only GELU is supported")
    # Where no config says it, transformers' ViT has 1e-12; all others here have 1e-6.
    default = 1e-12 if any("layernorm_before" in key for key in tensors) else 1e-6
    config = replace(config, gelu=GELUS[gelu], norm_eps=float(values.get("norm_eps", default)))
    found.notes.append(f"GELU: {config.gelu}, LayerNorm eps {config.norm_eps:g}")
    by_number, count = values.get("id2label", {}), len(state.get("head.bias", ()))
    names = values.get("classes") or [by_number.get(str(i)) for i in range(len(by_number))]
    if len(names) == count and not {None, "LABEL_0"}.intersection(names):  # transformers' default
        found.classes = tuple(map(str, names))
    found.set_decoding(values.get("bit_depth"), values.get("background", list(WHITE)))
    if "pixels" in values:  # an export of ours
        found.pixels = Pixels.stored(values["pixels"])
        found.positions = str(values.get("positions", "linear"))
    else:
        timm = any("pos_embed" in key for key in tensors)
        found.positions = "bicubic with antialiasing" if timm else "bicubic"
        try:
            found.pixels = library_recipe(values)
        except UserError as error:
            found.notes.append(f"{error}: they are squashed here")
    _fold_pixel_means(state, values.get("mean"), values.get("std"), found)
    return Checkpoint(state, config, found)


def _rename_all(tensors: Mapping[str, Tensor], found: Metadata) -> dict[str, Tensor]:
    """Every tensor under our names in float32. UserError for an unknown key, type or rank."""
    state, unknown = {}, []
    for key, tensor in tensors.items():
        bare = re.sub(PREFIX, "", key)
        name = rename(bare, FOREIGN)
        if bare.startswith("pooler.") or bare.endswith("mask_token"):
            found.left_out[key] = "not used in classification"
        elif name is None:
            unknown.append(key)
        elif name in state:
            raise UserError(f"two of its tensors are {name}")
        else:
            rank = next(RANKS[part] for part in RANKS if re.search(part, name))
            if tensor.ndim != rank or 0 in tensor.shape or not tensor.is_floating_point():
                raise UserError(f"{key} is {tensor.dtype} of shape {tuple(tensor.shape)}")
            state[name], found.keys[key] = tensor.float(), name
    if unknown:
        reasons = [why for part, why in UNSUPPORTED.items() if re.search(part, " ".join(unknown))]
        what, some = [*reasons, "tensors of another model"][0], ", ".join(sorted(unknown)[:4])
        raise UserError(f"{what}: unsupported ({some}; {len(unknown)} in all)")
    if missing := {POSITIONS, f"{PATCH_LAYER}.bias"} - state.keys():
        raise UserError(f"not a Vision Transformer, or incomplete: it lacks {min(missing)}")
    return state


def _fold_layers(state: dict[str, Tensor], found: Metadata) -> None:
    """Split stacked queries, keys and values; fold layer scale; give missing biases zeros."""
    for key, name in found.keys.items():
        if ".attn.qkv." in name:
            parts = [name.replace("qkv", part) for part in ("query", "key", "value")]
            # Loading refuses the shapes if the rows are not three times the width.
            state |= zip(parts, state.pop(name).chunk(3), strict=False)
            found.keys[key] = parts[0]
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


def _complete_positions(state: dict, config: ViTConfig, sizes: list, found: Metadata) -> None:
    """Find the image size of the positions: the first of `sizes` that fits, else a square.

    Some libraries give no position to the class token: it gets zeros.
    """
    positions = state[POSITIONS]  # (1, tokens, D)
    count, has_token = positions.shape[1], config.classifier == "token"
    # h x (h + 2) patches and a token make a square, too. That is rare, and not handled.
    squares = [isqrt(tokens) * config.stride for tokens in (count - has_token, count)]
    for size in filter(None, [*sizes, *squares]):
        with suppress(UserError, TypeError, IndexError):  # the patches do not tile it; no size
            sides = (size, size) if isinstance(size, int) else tuple(size[-2:])  # timm's: (C, h, w)
            patches = prod(config.grid(sides))
            if count in (patches, patches + has_token):
                break
    else:
        return
    found.img_size = sides
    if has_token and count == patches:
        state[POSITIONS] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        found.notes.append("the class token has no position: zeros")


def _fold_pixel_means(state: dict[str, Tensor], mean, std, found: Metadata) -> None:
    """Make the patch layer read pixels from -1 to 1, whatever the library's are."""
    if mean is None or std is None:
        found.notes.append("no config gives its pixel means: taken as 0.5, like the deviations")
        return
    if {*mean, *std} == {0.5}:
        return
    # A hybrid's kernel reads the ResNet's channels, not the image's: no means fit.
    channels = state[f"{PATCH_LAYER}.weight"].shape[1]
    if not len(mean) == len(std) == channels:
        raise UserError(f"pixel means {mean!r} and deviations {std!r} do not fit its first layer")
    _change_pixel_means(state, [mean, std], [[0.5] * channels] * 2)
    found.pixels = replace(found.pixels, mean=tuple(mean), std=tuple(std))
    found.notes.append("pixel means and deviations folded into the patch layer")


def _change_pixel_means(state: dict[str, Tensor], old: Sequence, new: Sequence) -> None:
    """Make the patch layer read (x - mean) / std of `new` (mean, std), instead of `old`."""
    if [*map(list, old)] == [*map(list, new)]:
        return
    kernel, bias = state[f"{PATCH_LAYER}.weight"], state[f"{PATCH_LAYER}.bias"]  # (D, C, p, p), (D)
    (mean, std), (new_mean, new_std) = (torch.tensor(pair)[:, :, None, None] for pair in (old, new))
    state[f"{PATCH_LAYER}.bias"] = bias + (kernel * (new_mean - mean) / std).sum(dim=(1, 2, 3))
    state[f"{PATCH_LAYER}.weight"] = kernel * (new_std / std)


def _library_config(folder: Path) -> dict:
    """The libraries' config files in `folder` as one dict, with the nested parts of timm's."""
    metadata = {}
    for path in filter(Path.exists, (folder / "preprocessor_config.json", folder / "config.json")):
        try:
            content = json.loads(path.read_bytes())
            metadata |= content | content.get("pretrained_cfg", {}) | content.get("model_args", {})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path.name} beside it is damaged: repair it ({error})") from error
    return metadata
