"""Google's `.npz` layout <-> our state dict: one table of names, read in both directions.

Array names: google-research/vision_transformer, vit_jax/checkpoint.py. In shape comments D is
width, H heads, d width per head, h w the sides of a kernel.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from models.configs import ViTConfig
from models.errors import UserError
from models.state_dict import (
    EMBEDDINGS,
    LAYER,
    Checkpoint,
    Metadata,
    infer_config,
    rename,
    square_size,
)

_BLOCK = "Transformer/encoderblock_{}"
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

# Flax Linen counts the modules of a block by kind; the files of the papers count them together.
_LINEN = {
    "/LayerNorm_1/": "/LayerNorm_2/",
    "/MultiHeadDotProductAttention_0/": "/MultiHeadDotProductAttention_1/",
    "/MlpBlock_0/": "/MlpBlock_3/",
}


def read_google(
    arrays: Mapping[str, np.ndarray], position_grid: tuple[int, int] | None = None
) -> Checkpoint:
    """The arrays of one of Google's files, such as `np.load(path)`, as a Checkpoint.

    Prefixes of training states, optimizer state beside the weights, Linen's numbering, and the
    towers of big_vision's SigLIP are understood. `position_grid` is the (h, w) in patches of its
    positions if that is no square.
    Raises UserError for two arrays of one meaning, or for arrays that are no ViT.
    """
    state, metadata, num_heads = {}, Metadata(), None
    linen = any("/LayerNorm_1/" in key for key in arrays)
    for key in arrays:
        name = re.sub(r"^((opt|optimizer)/target/|params/)+(img/)?", "", key)
        if re.match(r"(opt|opt_state|optimizer|state)/|step$", name):
            metadata.left_out[key] = "optimizer state"
            continue
        for ours, on_disk in _LINEN.items() if linen else ():
            name = name.replace(ours, on_disk)
        name = _our_name(name)
        if name is None:
            metadata.left_out[key] = "unknown to this model"
            continue
        if name in state:
            raise UserError(f"two arrays of the file are {name}")
        array = _as_float(key, np.asarray(arrays[key]))
        if name.endswith(".0.attn.query.weight") and array.ndim == 3:
            num_heads = array.shape[1]
        state[name] = torch.from_numpy(np.ascontiguousarray(_from_google(name, array)))
        metadata.keys[key] = name
    config = infer_config(state, num_heads)
    if position_grid is None:
        metadata.img_size = square_size(state, config)
    else:
        metadata.img_size = tuple(side * config.stride for side in position_grid)
    return Checkpoint(state, config, metadata)


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
