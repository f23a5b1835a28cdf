"""Google's `.npz` layout <-> our state dict: one table of names, read in both directions.

Array names: google-research/vision_transformer, vit_jax/checkpoint.py, and for the newer files
google-research/big_vision, models/vit.py. In shape comments D is width, H heads, d width per head,
h w the sides of a kernel, or of the grid in patches.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.configs import ViTConfig
from models.errors import UserError
from models.state_dict import (
    EMBEDDINGS,
    LAYER,
    POSITIONS,
    Checkpoint,
    Metadata,
    infer_config,
    rename,
    square_size,
)

_BLOCK, _STACKED = "Transformer/encoderblock_{}", "Transformer/encoderblock/"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_1"
_MAP, _MAP_ATTENTION = "MAPHead_0", "MAPHead_0/MultiHeadDotProductAttention_1"
_PARTS = ("query", "key", "value", "out")
_UNIT, _OUR_UNIT = "block{}/unit{}", f"{EMBEDDINGS}.hybrid_model.body.block{{}}.unit{{}}"

# Google's module, ours.
MODULES = [
    ("conv_root", f"{EMBEDDINGS}.hybrid_model.root.conv"),
    ("gn_root", f"{EMBEDDINGS}.hybrid_model.root.gn"),
    *[(f"{_UNIT}/conv{i}", f"{_OUR_UNIT}.conv{i}") for i in (1, 2, 3)],
    *[(f"{_UNIT}/gn{i}", f"{_OUR_UNIT}.gn{i}") for i in (1, 2, 3)],
    (f"{_UNIT}/conv_proj", f"{_OUR_UNIT}.downsample"),
    (f"{_UNIT}/gn_proj", f"{_OUR_UNIT}.gn_proj"),
    ("embedding", f"{EMBEDDINGS}.patch_embeddings"),
    (f"{_BLOCK}/LayerNorm_0", f"{LAYER}.attention_norm"),
    *[(f"{_ATTENTION}/{name}", f"{LAYER}.attn.{name}") for name in _PARTS],
    (f"{_BLOCK}/LayerNorm_2", f"{LAYER}.ffn_norm"),
    (f"{_BLOCK}/MlpBlock_3/Dense_0", f"{LAYER}.ffn.fc1"),
    (f"{_BLOCK}/MlpBlock_3/Dense_1", f"{LAYER}.ffn.fc2"),
    ("Transformer/encoder_norm", "transformer.encoder.encoder_norm"),
    # big_vision's head that pools by attention; it is read only.
    (f"{_MAP}/LayerNorm_0", "map_head.norm"),
    *[(f"{_MAP_ATTENTION}/{name}", f"map_head.attn.{name}") for name in _PARTS],
    (f"{_MAP}/MlpBlock_3/Dense_0", "map_head.ffn.fc1"),
    (f"{_MAP}/MlpBlock_3/Dense_1", "map_head.ffn.fc2"),
    ("pre_logits", "pre_logits"),
    ("head", "head"),
]
# Google's parameter, ours, where the parameter is no part of a module.
PARAMETERS = [
    ("cls", f"{EMBEDDINGS}.cls_token"),
    ("Transformer/posembed_input/pos_embedding", f"{EMBEDDINGS}.position_embeddings"),
    ("pos_embedding", f"{EMBEDDINGS}.position_embeddings"),  # big_vision's
    (f"{_MAP}/probe", "map_head.probe"),
]
_LEAVES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}

# What precedes the names: a training state's, and big_vision's for the tower that sees images.
_PREFIX = re.compile(r"((opt|optimizer)/target/|params/)*(?P<tower>img/)?")
# Flax Linen counts the modules of a block by kind; the files of the papers count them together.
_LINEN = {
    "/LayerNorm_1/": "/LayerNorm_2/",
    "/MultiHeadDotProductAttention_0/": "/MultiHeadDotProductAttention_1/",
    "/MlpBlock_0/": "/MlpBlock_3/",
}


def read_google(
    arrays: Mapping[str, np.ndarray],
    position_grid: tuple[int, int] | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> Checkpoint:
    """The arrays of one of Google's files, such as `np.load(path)`, as a Checkpoint.

    Prefixes of training states, optimizer state beside the weights, Linen's numbering, big_vision's
    stacked blocks and the towers of its SigLIP are understood. `position_grid` is the (h, w) in
    patches of its positions if that is no square; `img_size` in pixels is for a file without
    positions. Raises UserError for two arrays of one meaning, or for arrays that are no ViT.
    """
    state, metadata, num_heads = {}, Metadata(), None
    linen = any("/LayerNorm_1/" in key for key in arrays)
    has_tower = any(_PREFIX.match(key)["tower"] for key in arrays)
    for key in arrays:
        prefix = _PREFIX.match(key)
        name = key[prefix.end() :]
        if re.match(r"(opt|opt_state|optimizer|state|chrono)/|step$", name):
            metadata.left_out[key] = "optimizer state"
            continue
        if has_tower and not prefix["tower"]:
            metadata.left_out[key] = "not of the tower that sees images"
            continue
        for ours, on_disk in _LINEN.items() if linen else ():
            name = name.replace(ours, on_disk)
        for part, array in _unstacked(name, np.asarray(arrays[key])):
            name = _our_name(part)
            if name is None:
                metadata.left_out[key] = "unknown to this model"
                break
            if name in state:
                raise UserError(f"two arrays of the file are {name}")
            array = _as_float(key, array)
            if name.endswith(".attn.query.weight") and array.ndim == 3:
                if num_heads not in (None, array.shape[1]):
                    raise UserError(f"{key} has {array.shape[1]} heads, others have {num_heads}")
                num_heads = array.shape[1]
            state[name] = torch.from_numpy(np.ascontiguousarray(_from_google(name, array)))
            metadata.keys.setdefault(key, name)
    config = infer_config(state, num_heads)
    if "head.weight" in state and any(re.match(r"(params/)?(txt|llm)/", key) for key in arrays):
        metadata.notes.append("its head is the projection to the texts' space")
    if linen and not any(key.endswith("posembed_input/pos_embedding") for key in metadata.keys):
        position_grid = _big_vision_positions(state, config, img_size, metadata) or position_grid
    if position_grid is None:
        metadata.img_size = square_size(state, config)
    else:
        metadata.img_size = tuple(side * config.stride for side in position_grid)
    return Checkpoint(state, config, metadata)


def _unstacked(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) as it is, or of each block of the array that a scan over the blocks leaves."""
    before, stacked, after = name.partition(_STACKED)
    if not stacked or not array.shape or not len(array):
        yield name, array
        return
    for i, part in enumerate(array):
        yield f"{before}{_BLOCK.format(i)}/{after}", part


def _big_vision_positions(
    state: dict[str, Tensor], config: ViTConfig, img_size, metadata: Metadata
) -> tuple[int, int] | None:
    """Complete the positions in the two ways in which big_vision's differ; the grid if computed.

    Its class token has none, so it gets zeros. Those of sines and cosines are in no file.
    """
    grid = None
    if POSITIONS not in state:
        grid = config.grid(img_size or 224)
        state[POSITIONS] = sincos_positions(grid, config.hidden_size)
        size = "x".join(str(side * config.stride) for side in grid)
        metadata.notes.append(f"no positions in the file: sines and cosines for {size} pixels")
    if config.classifier == "token" and state[POSITIONS].ndim == 3:
        state[POSITIONS] = F.pad(state[POSITIONS], (0, 0, 1, 0))  # (1, h w, D) -> (1, 1 + h w, D)
        metadata.notes.append("the class token has no position: zeros")
    return grid


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed positions (1, h w, D): a quarter each of sin x, cos x, sin y, cos y.

    Source: big_vision's posemb_sincos_2d, after MoCo v3 (Chen et al., arXiv:2104.02057). Raises
    UserError if the width has no quarters.
    """
    if width % 4 or width < 8:
        raise UserError(f"it has no positions, and its width {width} is not a multiple of 4")
    frequencies = 10_000 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    rows, columns = (torch.arange(side)[:, None] * frequencies for side in grid)  # (h or w, D / 4)
    x, y = columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], 0)  # (h w, D / 4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].float()


def write_google(
    state: Mapping[str, Tensor], config: ViTConfig, dtype: type = np.float32
) -> dict[str, np.ndarray]:
    """A state dict as Google's arrays; the same bits if `dtype` is the parameters' own.

    Raises UserError for what that layout lacks.
    """
    lacks = {"register tokens": config.num_registers, "norm before the blocks": config.pre_norm}
    lacks |= {"norm after the pooling": config.fc_norm, "SwiGLU": config.mlp == "swiglu"}
    lacks[f"pooling by {config.pool!r} in such a model"] = config.pool
    if lacking := [what for what, there in lacks.items() if there]:
        raise UserError(f"Google's layout has no {lacking[0]}: export to .safetensors or .onnx")
    arrays = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        array = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()  # no bfloat16
        array = _to_google(name, array, config.num_heads)
        arrays[google_name(name)] = np.ascontiguousarray(array, dtype=dtype)
    return arrays


def google_name(name: str) -> str | None:
    """Google's name of our parameter `name`, None if there is none."""
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        leaf = "scale" if _is_norm(module) else "kernel"
    google = rename(module, MODULES, back=True)
    return f"{google}/{leaf}" if google else rename(name, PARAMETERS, back=True)


def _our_name(name: str) -> str | None:
    """Our name of the parameter that Google calls `name`, None if there is none."""
    module, _, leaf = name.rpartition("/")
    if leaf in _LEAVES:
        ours = rename(module, MODULES)
        return ours and ours + _LEAVES[leaf]
    return rename(name, PARAMETERS)


def _is_norm(module: str) -> bool:
    last = module.rpartition(".")[2]
    return last.endswith("norm") or last.startswith("gn")


def _as_float(key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # numpy has no bfloat16: it is the upper half of a float32
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"{key} holds {array.dtype}, not floating-point numbers")
    if 0 in array.shape:
        raise UserError(f"{key} has shape {array.shape}: it is empty")
    return array


# An array of another rank than expected is handed on as it is: loading refuses its shape.


def _from_google(name: str, array: np.ndarray) -> np.ndarray:
    """One of Google's arrays in the layout of our parameter `name`."""
    module, _, leaf = name.rpartition(".")
    if re.search(r"\.attn\.(query|key|value)$", module):
        if leaf == "bias":
            return array.reshape(-1)  # (H, d) -> (D)
        return array.reshape(array.shape[0], -1).T if array.ndim == 3 else array  # (D, H, d)
    if _is_norm(module):
        return array.reshape(-1)  # hybrids also store (1, 1, 1, C)
    if leaf == "weight" and module.endswith(".attn.out"):
        return array.reshape(-1, array.shape[-1]).T if array.ndim == 3 else array  # (H, d, D)
    if leaf == "weight" and array.ndim == 4:
        return array.transpose(3, 2, 0, 1)  # (h, w, in, out) -> (out, in, h, w)
    return array.T if leaf == "weight" else array  # (in, out) -> (out, in)


def _to_google(name: str, array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_from_google`."""
    module, _, leaf = name.rpartition(".")
    if re.search(r"\.attn\.(query|key|value)$", module):
        if leaf == "bias":
            return array.reshape(heads, -1)  # (D) -> (H, d)
        return array.T.reshape(array.shape[1], heads, -1)  # (D, D) -> (D, H, d)
    if leaf == "weight" and module.endswith(".attn.out"):
        return array.T.reshape(heads, -1, array.shape[0])  # (D, D) -> (H, d, D)
    if leaf == "weight" and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
    return array.T if leaf == "weight" else array
