"""timm's, DINOv2's and Hugging Face's ViTs <-> this model, by their parameters' names.

A file is recognised by its keys and becomes official arrays, so that everything which reads an
`.npz` reads it too. What this model lacks is refused by name. Names: timm's
models/vision_transformer.py (DeiT and DINOv2 use the same), transformers' models/vit, dinov2.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.configs import CONFIGS, ViTConfig
from models.structure import WeightsError
from models.weights import name_table, to_official

_EMB, _LAYER = "transformer.embeddings", "transformer.encoder.layer.{}"

# (their module or parameter, ours); {} is a number, {+1} one that is higher by one with us.
TIMM = [
    ("cls_token", f"{_EMB}.cls_token"),
    ("pos_embed", f"{_EMB}.position_embeddings"),
    ("patch_embed.proj", f"{_EMB}.patch_embeddings"),
    ("blocks.{}.norm1", f"{_LAYER}.attention_norm"),
    ("blocks.{}.attn.qkv", f"{_LAYER}.attn.qkv"),  # query, key and value, one upon another
    ("blocks.{}.attn.proj", f"{_LAYER}.attn.out"),
    ("blocks.{}.ls1.gamma", f"{_LAYER}.attn.scale"),  # folded into the layer before it
    ("blocks.{}.norm2", f"{_LAYER}.ffn_norm"),
    ("blocks.{}.mlp.fc1", f"{_LAYER}.ffn.fc1"),
    ("blocks.{}.mlp.fc2", f"{_LAYER}.ffn.fc2"),
    ("blocks.{}.ls2.gamma", f"{_LAYER}.ffn.scale"),
    ("norm", "transformer.encoder.encoder_norm"),
    ("head", "head"),
]
_UNIT = (
    "patch_embed.backbone.stages.{}.blocks.{}",
    f"{_EMB}.hybrid_model.body.block{{+1}}.unit{{+1}}",
)
TIMM_RESNET = [
    ("patch_embed.backbone.stem.conv", f"{_EMB}.hybrid_model.root.conv"),
    ("patch_embed.backbone.stem.norm", f"{_EMB}.hybrid_model.root.gn"),
    *[(f"{_UNIT[0]}.conv{i}", f"{_UNIT[1]}.conv{i}") for i in (1, 2, 3)],
    *[(f"{_UNIT[0]}.norm{i}", f"{_UNIT[1]}.gn{i}") for i in (1, 2, 3)],
    (f"{_UNIT[0]}.downsample.conv", f"{_UNIT[1]}.downsample"),
    (f"{_UNIT[0]}.downsample.norm", f"{_UNIT[1]}.gn_proj"),
]
TIMM_STEM = [
    ("patch_embed.backbone.conv", f"{_EMB}.hybrid_model.root.conv"),
    ("patch_embed.backbone.norm", f"{_EMB}.hybrid_model.root.gn"),
]
HUGGING_FACE = [
    ("embeddings.cls_token", f"{_EMB}.cls_token"),
    ("embeddings.position_embeddings", f"{_EMB}.position_embeddings"),
    ("embeddings.patch_embeddings.projection", f"{_EMB}.patch_embeddings"),
    ("layernorm", "transformer.encoder.encoder_norm"),
    ("classifier", "head"),
]
for _layer in ("encoder.layer.{}", "layers.{}"):  # as files have it; as version 5 names it
    HUGGING_FACE += [
        (f"{_layer}.{theirs}", f"{_LAYER}.{ours}")
        for theirs, ours in (
            ("layernorm_before", "attention_norm"), ("norm1", "attention_norm"),
            ("attention.attention.query", "attn.query"), ("attention.q_proj", "attn.query"),
            ("attention.attention.key", "attn.key"), ("attention.k_proj", "attn.key"),
            ("attention.attention.value", "attn.value"), ("attention.v_proj", "attn.value"),
            ("attention.output.dense", "attn.out"), ("attention.o_proj", "attn.out"),
            ("layer_scale1.lambda1", "attn.scale"),
            ("layernorm_after", "ffn_norm"), ("norm2", "ffn_norm"),
            ("intermediate.dense", "ffn.fc1"), ("mlp.fc1", "ffn.fc1"),
            ("output.dense", "ffn.fc2"), ("mlp.fc2", "ffn.fc2"),
            ("layer_scale2.lambda1", "ffn.scale"),
        )
    ]  # fmt: skip

# Part of a key -> the structure that it betrays, which this model has not.
REFUSED = {
    r"reg_token|register_tokens": "register tokens",
    r"\.w12\.|\.w3\.|weights_in|fc1_g|gate_proj": "a SwiGLU MLP",
    r"dist_token|distillation_token|head_dist": "a distillation token",
    r"fc_norm": "a norm after pooling",
    r"norm_pre|pre_layrnorm": "a norm before the first block",
    r"q_norm|k_norm": "norms of queries and keys",
    r"relative_position|rope|freqs": "relative or rotary positions",
    r"attn_pool": "a pooling head with attention",
}
LEFT_OUT = {
    r"mask_token$": "used in pre-training only",
    r"^pooler\.": "a pooler, which classification does not use",
}
GELUS = {"gelu": "erf", "gelu_erf": "erf", "gelu_tanh": "tanh", "gelu_new": "tanh",
         "gelu_pytorch_tanh": "tanh"}  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """A file as official `arrays`, and what its arrays do not say.

    `gelu` and `norm_eps` are ViTConfig's; `classes` are names, where the file's config has some;
    `notes` say what was changed or left out; `grid` is the (h, w) of its positions, None for
    square.
    """

    arrays: dict[str, np.ndarray]
    gelu: str = "tanh"
    norm_eps: float = 1e-6
    classes: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    grid: tuple[int, int] | None = None


def read_safetensors(
    path: str | Path,
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> Imported:
    """A `.safetensors` file in timm's, DINOv2's or Hugging Face's layout.

    A `config.json` beside it, as both libraries write it, is believed about heads, GELU, norms,
    pixels and class names. Without one, `num_heads` or a variant of the same width says the heads.
    `img_size` in pixels, where it is known, tells a grid that is no square.
    Raises WeightsError with one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: no safetensors file, or damaged ({error})") from None
    try:
        return from_foreign(tensors, num_heads, _facts(path, metadata), img_size)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{path}: its arrays, or what is said of them, do not fit ({why})"
        ) from None


def _facts(path: Path, metadata: Mapping[str, str]) -> dict:
    """What is said beside the arrays: by our own metadata, or by config files of the libraries."""
    facts = {key: json.loads(metadata[key]) for key in FACTS if key in metadata}
    if facts:  # an export of ours: files beside it belong to others
        return facts
    for name in ("preprocessor_config.json", "config.json"):
        beside = path.parent / name
        if not beside.exists():
            continue
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{beside.name} beside it, which says what the arrays do not, "
                f"cannot be read ({error}): mend it, or move it away"
            ) from None
        if isinstance(content, dict):
            args, pixels = content.get("model_args") or {}, content.get("pretrained_cfg") or {}
            facts |= content | args | pixels
    return facts


# What our own exports say in their metadata.
FACTS = ("num_heads", "gelu", "norm_eps", "classes", "img_size", "mean", "std")


def from_foreign(
    tensors: Mapping[str, Tensor],
    num_heads: int | None = None,
    facts: Mapping | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> Imported:
    """Parameters under their library's names as official arrays; `facts` are its config's."""
    facts, notes = dict(facts or {}), []
    prefix = r"^((module|model|backbone|vit|deit|dinov2)\.)+"
    tensors = {re.sub(prefix, "", key): tensor for key, tensor in tensors.items()}
    _refuse(tensors)
    hugging_face = "embeddings.patch_embeddings.projection.weight" in tensors
    if hugging_face:
        table = HUGGING_FACE
    elif "patch_embed.proj.weight" in tensors and any(key.startswith("blocks.") for key in tensors):
        table = TIMM + TIMM_RESNET + TIMM_STEM
    else:
        raise WeightsError("not a ViT in timm's, DINOv2's or Hugging Face's layout")

    state, unknown = {}, []
    for key, tensor in tensors.items():
        reason = next((why for part, why in LEFT_OUT.items() if re.search(part, key)), None)
        name = rename(key, table)
        if reason:
            notes.append(f"left out {key}: {reason}")
        elif name is None:
            unknown.append(key)
        else:
            state[name] = tensor.float()
    if unknown:
        raise WeightsError(f"{', '.join(sorted(unknown)[:4])} ({len(unknown)} in all) belong to a "
                           "structure that this model has not")  # fmt: skip
    _split_qkv(state, notes)
    _fold_layer_scale(state, notes)
    config = _config(state, facts, num_heads)
    grid = _stored_grid(state, config, facts, img_size)
    _add_class_position(state, grid, notes)
    _fold_pixels(state, facts, notes)
    has_head = "head.weight" in state and state["head.weight"].shape[1] == config.hidden_size
    if not has_head:
        if state.pop("head.weight", None) is not None:
            notes.append("left out its head: it reads more than the class token")
        state |= {"head.weight": torch.zeros(1, config.hidden_size), "head.bias": torch.zeros(1)}
    arrays = to_official(state, config)
    if not has_head:
        del arrays["head/kernel"], arrays["head/bias"]

    activation = facts.get("hidden_act", facts.get("act_layer", "gelu"))
    gelu = facts.get("gelu") or GELUS.get(activation)
    if gelu not in ("tanh", "erf"):
        raise WeightsError(f"its activation is {activation}, this model's GELU")
    # transformers' ViT has 1e-12 where nothing is said, all others here 1e-6.
    plain_vit = hugging_face and not any("layer_scale" in key for key in tensors)
    default = 1e-12 if plain_vit else 1e-6
    eps = float(facts.get("norm_eps", facts.get("layer_norm_eps", default)))
    notes.append(f"GELU: {gelu}, LayerNorm eps {eps:g}")
    classes = _class_names(facts, len(state["head.bias"]))
    return Imported(arrays, gelu, eps, classes, notes, grid)


def to_timm(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """A state dict of ours under timm's names, which its models load strictly.

    Raises WeightsError for a `pre_logits` layer, which timm has not.
    """
    if config.representation_size is not None:
        raise WeightsError("timm has no pre_logits layer: export to .npz or .onnx instead")
    table = TIMM + (TIMM_RESNET if config.resnet_layers else TIMM_STEM)
    joined = {}
    for name in (row.name for row in name_table(config)):
        if re.search(r"\.attn\.(query|key|value)\.", name):
            if ".query." in name:
                parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
                joined[name.replace("query", "qkv")] = torch.cat(parts)
        else:
            joined[name] = state[name]
    return {rename(name, table, back=True): tensor.contiguous() for name, tensor in joined.items()}


def rename(key: str, table: list[tuple[str, str]], back: bool = False) -> str | None:
    """`key` in the other library's words, by the first row that fits; None where none does."""
    for theirs, ours in table:
        source, target = (ours, theirs) if back else (theirs, ours)
        if match := _pattern(source).fullmatch(key):
            *numbers, leaf = match.groups()
            if back:
                numbers = [int(n) - source.count("{+1}") // max(1, len(numbers)) for n in numbers]
            for number in numbers:
                hole = "{+1}" if "{+1}" in target else "{}"
                target = target.replace(hole, str(int(number) + (hole == "{+1}")), 1)
            return target + leaf
    return None


@cache
def _pattern(template: str) -> re.Pattern:
    body = re.escape(template).replace(r"\{\}", r"(\d+)").replace(r"\{\+1\}", r"(\d+)")
    return re.compile(body + r"((?:\.weight|\.bias)?)")


def _refuse(tensors: Mapping[str, Tensor]) -> None:
    for part, structure in REFUSED.items():
        if found := [key for key in tensors if re.search(part, key)]:
            raise WeightsError(f"it has {structure} ({found[0]}), which this model has not")
    first, second = (
        next((t for k, t in tensors.items() if re.search(rf"0\.mlp\.fc{i}\.weight", k)), None)
        for i in (1, 2)
    )
    if first is not None and second is not None and first.shape[0] != second.shape[1]:
        raise WeightsError("it has a SwiGLU MLP (mlp.fc1 is wider than mlp.fc2 reads), which this "
                           "model has not")  # fmt: skip


def _split_qkv(state: dict[str, Tensor], notes: list[str]) -> None:
    for name in [name for name in state if ".attn.qkv." in name]:
        for part, tensor in zip(("query", "key", "value"), state.pop(name).chunk(3), strict=True):
            state[name.replace("qkv", part)] = tensor
    lacking = [name for name in state if re.search(r"\.attn\.(query|key|value)\.weight$", name)
               and name.replace("weight", "bias") not in state]  # fmt: skip
    for name in lacking:
        state[name.replace("weight", "bias")] = torch.zeros(len(state[name]))
    if lacking:
        notes.append("queries, keys and values have no biases: zeros")


def _fold_layer_scale(state: dict[str, Tensor], notes: list[str]) -> None:
    """scale * (W x + b) is one dense layer."""
    scales = [name for name in state if name.endswith(".scale")]
    for name in scales:
        scale = state.pop(name)
        layer = name.replace("attn.scale", "attn.out").replace("ffn.scale", "ffn.fc2")
        state[f"{layer}.weight"] = scale[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = scale * state[f"{layer}.bias"]
    if scales:
        notes.append("layer scale folded into the output layers")


def _stored_grid(
    state: Mapping[str, Tensor], config: ViTConfig, facts: Mapping, img_size
) -> tuple[int, int] | None:
    """(h, w) of the positions, where a size that is said for the file, or wanted, is theirs."""
    count = state[f"{_EMB}.position_embeddings"].shape[1]
    said = (facts.get("img_size"), facts.get("image_size"), (facts.get("input_size") or ())[1:])
    for size in (*said, img_size):
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) != 2:
            continue
        with suppress(ValueError):  # patches do not tile it: it is not theirs
            grid = config.grid(sides)
            if count - grid[0] * grid[1] in (0, config.classifier == "token"):
                return grid
    return None


def _add_class_position(state: dict[str, Tensor], grid, notes: list[str]) -> None:
    """Some add positions to the patches alone: for the class token that is a position of zeros."""
    positions = state[f"{_EMB}.position_embeddings"]
    count = positions.shape[1]
    if grid is not None:
        lacking = count == grid[0] * grid[1]
    else:  # h x (h + 2) patches and a token make a square, too: rarer, and not told apart
        with_token = count > 1 and isqrt(count - 1) ** 2 == count - 1
        lacking = isqrt(count) ** 2 == count and not with_token
    if f"{_EMB}.cls_token" in state and lacking:
        zeros = torch.zeros_like(positions[:, :1])
        state[f"{_EMB}.position_embeddings"] = torch.cat([zeros, positions], dim=1)
        notes.append("the class token has no position: zeros")


def _fold_pixels(state: dict[str, Tensor], facts: Mapping, notes: list[str]) -> None:
    """Make the patch layer take [-1, 1] where its config says other means and deviations."""
    mean, std = (facts.get(f"image_{k}", facts.get(k)) for k in ("mean", "std"))
    kernel = state[f"{_EMB}.patch_embeddings.weight"]  # (D, C, p, p)
    if mean is None or std is None:
        notes.append("no config says its pixel means: taken as 0.5, like the deviations")
        return
    try:
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
    except (TypeError, ValueError, RuntimeError):
        raise WeightsError(f"its pixel means {mean!r} and deviations {std!r} are no lists of "
                           "numbers") from None  # fmt: skip
    if (mean == 0.5).all() and (std == 0.5).all():
        return
    # A hybrid's kernel has the ResNet's channels, not the image's.
    if {mean.shape, std.shape} != {kernel.shape[1:2]}:
        raise WeightsError(f"its pixel means {mean.tolist()} and deviations {std.tolist()} do not "
                           "fold into its first layer")  # fmt: skip
    shift, factor = ((0.5 - mean) / std)[:, None, None], (0.5 / std)[:, None, None]
    bias = f"{_EMB}.patch_embeddings.bias"
    state[bias] = state[bias] + (kernel * shift).sum(dim=(1, 2, 3))
    state[f"{_EMB}.patch_embeddings.weight"] = kernel * factor
    notes.append("its pixel means and deviations folded into the patch layer")


def _config(state: Mapping[str, Tensor], facts: Mapping, num_heads: int | None) -> ViTConfig:
    hidden, _, patch, other = state[f"{_EMB}.patch_embeddings.weight"].shape
    if patch != other:
        raise WeightsError(f"its patches are {patch}x{other}, this model's square")
    layers = {int(m[1]) for m in (re.search(r"encoder\.layer\.(\d+)\.", k) for k in state) if m}
    units = {m.groups() for m in (re.search(r"block(\d+)\.unit(\d+)\.", k) for k in state) if m}
    stages = [sum(int(stage) == i for stage, _ in units) for i in range(1, len(units) + 1)]
    root = state.get(f"{_EMB}.hybrid_model.root.conv.weight")
    same_width = [row.num_heads for row in CONFIGS.values() if row.hidden_size == hidden]
    said = facts.get("num_attention_heads", facts.get("num_heads"))
    heads = said or num_heads or (same_width or [max(1, hidden // 64)])[0]
    if not isinstance(heads, int) or hidden % heads:
        raise WeightsError(f"its width {hidden} is not a multiple of {heads} heads")
    fc1 = state.get(_LAYER.format(0) + ".ffn.fc1.weight")
    return ViTConfig(
        patch_size=patch,
        hidden_size=hidden,
        mlp_dim=0 if fc1 is None else len(fc1),
        num_heads=heads,
        num_layers=len(layers),
        classifier="token" if f"{_EMB}.cls_token" in state else "gap",
        resnet_layers=None if root is None else tuple(n for n in stages if n),
        resnet_width=1.0 if root is None else len(root) / 64,
    )


def _class_names(facts: Mapping, count: int) -> tuple[str, ...] | None:
    names = facts.get("classes", facts.get("label_names"))
    if isinstance(named := facts.get("id2label"), dict) and len(named) == count:
        names = [named.get(str(i), f"LABEL_{i}") for i in range(count)]
    if not isinstance(names, list) or len(names) != count or "LABEL_0" in names:
        return None
    return tuple(str(name) for name in names)
