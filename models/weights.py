"""Google's `.npz` checkpoints <-> state dicts, through one name table read in both directions.

The table says which official array is which parameter and how it is laid out. Reading applies
it, writing applies its inverse; the report of every key follows from it. Array names:
google-research/vision_transformer, vit_jax/checkpoint.py.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import zoom
from torch import Tensor, nn
from tqdm import tqdm

from models.configs import ViTConfig
from models.structure import POSITIONS, WeightsError, check_variant

# Layout -> (official array -> parameter, parameter and head count -> official array).
LAYOUTS = {
    "same": (lambda a: a, lambda a, heads: a),
    "norm": (lambda a: a.reshape(-1), lambda a, heads: a),  # hybrids also store (1, 1, 1, C)
    "dense": (lambda a: a.T, lambda a, heads: a.T),  # (in, out) <-> (out, in)
    "conv": (  # (h, w, in, out) <-> (out, in, h, w)
        lambda a: a.transpose(3, 2, 0, 1),
        lambda a, heads: a.transpose(2, 3, 1, 0),
    ),
    "heads_in": (  # (D, H, d) <-> (H*d, D)
        lambda a: a.reshape(a.shape[0], -1).T,
        lambda a, heads: a.T.reshape(a.shape[1], heads, -1),
    ),
    "heads_bias": (lambda a: a.reshape(-1), lambda a, heads: a.reshape(heads, -1)),  # (H, d)
    "heads_out": (  # (H, d, D) <-> (D, H*d)
        lambda a: a.reshape(-1, a.shape[-1]).T,
        lambda a, heads: a.T.reshape(heads, -1, a.shape[0]),
    ),
}

_BLOCK = [("LayerNorm_0", "attention_norm", "norm"), ("LayerNorm_2", "ffn_norm", "norm")]
_BLOCK += [(f"MultiHeadDotProductAttention_1/{n}", f"attn.{n}", "in") for n in ("query", "key")]
_BLOCK += [("MultiHeadDotProductAttention_1/value", "attn.value", "in")]
_BLOCK += [("MultiHeadDotProductAttention_1/out", "attn.out", "out")]
_BLOCK += [("MlpBlock_3/Dense_0", "ffn.fc1", "dense"), ("MlpBlock_3/Dense_1", "ffn.fc2", "dense")]

# Kind of module -> its two arrays: official leaf, parameter leaf, layout.
_LEAVES = {
    "norm": [("scale", "weight", "norm"), ("bias", "bias", "norm")],
    "dense": [("kernel", "weight", "dense"), ("bias", "bias", "same")],
    "in": [("kernel", "weight", "heads_in"), ("bias", "bias", "heads_bias")],
    "out": [("kernel", "weight", "heads_out"), ("bias", "bias", "same")],
    "conv": [("kernel", "weight", "conv"), ("bias", "bias", "same")],
    "std_conv": [("kernel", "weight", "conv")],
}

# Flax Linen counts the sub-modules of a block by kind, the files of the papers all together.
_LINEN = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}


@dataclass(frozen=True)
class Row:
    """One line of the name table: `official` array, state-dict `name`, key of LAYOUTS."""

    official: str
    name: str
    layout: str


def name_table(config: ViTConfig) -> list[Row]:
    """Every parameter of a model with this structure, head and `pre_logits` last."""
    modules = []
    emb, enc = "transformer.embeddings", "transformer.encoder"
    if config.resnet_layers is not None:
        modules += [("conv_root", f"{emb}.hybrid_model.root.conv", "std_conv")]
        modules += [("gn_root", f"{emb}.hybrid_model.root.gn", "norm")]
        for i, units in enumerate(config.resnet_layers, 1):
            for j in range(1, units + 1):
                official = f"block{i}/unit{j}"
                ours = f"{emb}.hybrid_model.body.block{i}.unit{j}"
                for k in (1, 2, 3):
                    modules += [(f"{official}/conv{k}", f"{ours}.conv{k}", "std_conv")]
                    modules += [(f"{official}/gn{k}", f"{ours}.gn{k}", "norm")]
                if j == 1:
                    modules += [(f"{official}/conv_proj", f"{ours}.downsample", "std_conv")]
                    modules += [(f"{official}/gn_proj", f"{ours}.gn_proj", "norm")]
    modules += [("embedding", f"{emb}.patch_embeddings", "conv")]
    for i in range(config.num_layers):
        official, ours = f"Transformer/encoderblock_{i}", f"{enc}.layer.{i}"
        modules += [(f"{official}/{a}", f"{ours}.{b}", kind) for a, b, kind in _BLOCK]
    modules += [("Transformer/encoder_norm", f"{enc}.encoder_norm", "norm")]
    if config.representation_size is not None:
        modules += [("pre_logits", "pre_logits", "dense")]
    modules += [("head", "head", "dense")]

    rows = [Row(POSITIONS, f"{emb}.position_embeddings", "same")]
    if config.classifier == "token":
        rows += [Row("cls", f"{emb}.cls_token", "same")]
    for official, ours, kind in modules:
        rows += [Row(f"{official}/{a}", f"{ours}.{b}", layout) for a, b, layout in _LEAVES[kind]]
    return rows


# ---------------------------------------------------------------------------------- reading


def read_npz(path: str | Path, progress: bool = False) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`, fully read (which checks the archive's CRCs), nothing unpickled.

    Raises WeightsError with one sentence for a file that is missing, truncated, altered, not an
    npz, or holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    if not zipfile.is_zipfile(path):
        try:
            with path.open("rb") as file:
                cut = file.read(4) == b"PK\x03\x04"
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
        why = "truncated: its end is missing, fetch it again" if cut else "not an .npz archive"
        raise WeightsError(f"{path}: {why}")
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in tqdm(archive.files, desc=f"read {path.name}", disable=not progress or None):
                arrays[key] = archive[key]
                if not isinstance(arrays[key], np.ndarray):
                    raise ValueError(f"{key} is no array")
    except Exception as error:  # altered archives make zipfile and numpy raise nearly anything
        if "allow_pickle" in str(error):
            why = f"{key} is a pickled object, which is never loaded"
        else:
            why = f"damaged, fetch it again ({' '.join(str(error).split())[:200]})"
        raise WeightsError(f"{path}: {why}") from None
    return arrays


def canonical(weights: Mapping) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Undo the spellings that occur: prefixes, optimizer state beside it, Linen's numbering.

    Returns (arrays by the names of the table, {key that was left out: why}).
    """
    arrays, left_out = {}, {}
    keys = list(weights.keys())
    linen = any("/LayerNorm_1/" in key for key in keys)
    for key in keys:
        name = re.sub(r"^((opt|optimizer)/target/|params/)+", "", key)
        if re.match(r"(opt|opt_state|optimizer|state)/|step$", name):
            left_out[key] = "optimizer state"
            continue
        if linen:
            for linen_name, name_on_disk in _LINEN.items():
                name = name.replace(f"/{linen_name}/", f"/{name_on_disk}/")
        if name in arrays:
            raise WeightsError(f"two arrays of the file are called {name}")
        arrays[name] = _as_float(key, np.asarray(weights[key]))
    return arrays, left_out


def _as_float(key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # numpy knows no bfloat16: the upper half of a float32
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind != "f":
        raise WeightsError(f"{key} holds {array.dtype}, not floating-point numbers")
    return array


@dataclass
class LoadReport:
    """What became of every key: loaded, or left out and why; and what was changed on the way."""

    loaded: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} arrays loaded"]
        for why in dict.fromkeys(self.left_out.values()):
            keys = [key for key, reason in self.left_out.items() if reason == why]
            some = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            lines.append(f"left out {some}: {why}")
        return "; ".join(lines + self.notes)


def load_official(
    model: nn.Module, weights: Mapping, position_grid: tuple[int, int] | None = None
) -> LoadReport:
    """Load official arrays into a VisionTransformer; `VisionTransformer.load_from` is its face."""
    arrays, left_out = canonical(weights)
    report = LoadReport(left_out=left_out)
    config = model.config
    check_variant(config, {key: array.shape for key, array in arrays.items()})
    _check_head(model, arrays)
    rows = name_table(config)
    if model.zero_head:
        rows = [row for row in rows if not row.official.startswith("head/")]
    parameters = dict(model.named_parameters())

    # First every array is found, checked and laid out; only then the model changes.
    ready: dict[str, np.ndarray] = {}
    missing = [row.official for row in rows if row.official not in arrays]
    if missing:
        raise WeightsError(f"the file lacks {', '.join(missing[:4])} ({len(missing)} in all)")
    for row in rows:
        array = arrays.pop(row.official)
        wanted = tuple(parameters[row.name].shape)
        if row.official == POSITIONS:
            array, note = _fit_positions(array, model, position_grid)
            report.notes += [note] if note else []
        expected = official_shape(row, wanted, config.num_heads)
        if row.layout == "conv" and array.ndim == 4 and array.shape[2] != expected[2]:
            array, note = _fit_channels(row.official, array, expected[2])
            report.notes.append(note)
        if array.shape != expected and array.shape != (1, 1, 1, *expected):
            raise WeightsError(f"{row.official} has shape {array.shape}, the model {expected}")
        if not np.isfinite(array).all():
            raise WeightsError(f"{row.official} holds values that are not finite")
        ready[row.name] = LAYOUTS[row.layout][0](array)
        report.loaded.append(row.official)
    for key in arrays:
        known = model.zero_head and key.startswith(("head/", "pre_logits/"))
        report.left_out[key] = "the head is new" if known else "unknown to this model"

    with torch.no_grad():
        for name, array in ready.items():
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        if model.zero_head:
            model.head.weight.zero_()
            model.head.bias.zero_()
        elif not model.head.weight.any():
            report.notes.append("the file's head is all zeros: its predictions mean nothing")
    return report


def _check_head(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """The file's own head is used whole or not at all."""
    if model.zero_head:
        return
    if "head/bias" in arrays and arrays["head/bias"].shape != (model.num_classes,):
        raise WeightsError(
            f"the file's head has {arrays['head/bias'].size} classes, the model "
            f"{model.num_classes}: use zero_head=True for a new head, or the file's class count"
        )
    if "pre_logits/kernel" in arrays and model.config.representation_size is None:
        width = arrays["pre_logits/kernel"].shape[-1]
        raise WeightsError(
            "the file's head sits on a pre_logits layer: use a config with "
            f"representation_size={width} for it, or zero_head=True for a new head"
        )


def _fit_positions(array, model: nn.Module, stored_grid) -> tuple[np.ndarray, str | None]:
    tokens = 1 if model.config.classifier == "token" else 0
    if array.ndim != 3 or array.shape[1] <= tokens:
        raise WeightsError(f"{POSITIONS} has shape {array.shape}, not (1, tokens, width)")
    count = array.shape[1] - tokens
    if stored_grid is None:
        side = isqrt(count)
        # Official grids are square; a grid that is not, but has as many patches as ours, is one
        # that this program wrote for the same image size.
        stored_grid = (side, side) if side * side == count else tuple(model.grid)
    if stored_grid[0] * stored_grid[1] != count:
        raise WeightsError(
            f"{POSITIONS} has {count} patches, not {stored_grid[0]}x{stored_grid[1]}: say its "
            "(h, w) in position_grid"
        )
    if tuple(stored_grid) == tuple(model.grid):
        return array, None
    resized = resize_positions(array, stored_grid, model.grid)
    old, new = ("x".join(map(str, grid)) for grid in (stored_grid, model.grid))
    return resized, f"positions resized from {old} to {new}"


def resize_positions(array: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Position embeddings (1, [1 +] h*w, D) of grid `old` for grid `new`, class token untouched.

    As in the official loader, linear interpolation with aligned corners; mode="nearest" keeps
    scipy from zeroing the last row where rounding puts it a hair outside (28 to 48, for one).
    """
    tokens = array.shape[1] - old[0] * old[1]
    grid = array[0, tokens:].reshape(*old, -1)  # (h, w, D)
    factors = (new[0] / old[0], new[1] / old[1], 1)
    if grid.dtype == np.float16:  # scipy reads no half precision
        grid = grid.astype(np.float32)
    grid = zoom(grid, factors, order=1, mode="nearest").reshape(1, new[0] * new[1], -1)
    return np.concatenate([array[:, :tokens], grid], axis=1)


def _fit_channels(key: str, kernel: np.ndarray, channels: int) -> tuple[np.ndarray, str]:
    """A first kernel (h, w, in, out) for another number of image channels.

    One channel gets the sum, so that a grey image gives what it gave as RGB; more channels repeat
    the file's in turn, scaled to keep the size of the response.
    """
    stored = kernel.shape[2]
    kernel = kernel.astype(np.float32)
    if channels == 1:
        fitted = kernel.sum(axis=2, keepdims=True)
    else:
        fitted = kernel[:, :, np.arange(channels) % stored] * np.float32(stored / channels)
    return fitted, f"{key} fitted from {stored} to {channels} channels"


# ---------------------------------------------------------------------------------- writing


def official_shape(row: Row, shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """Shape of an official array, from that of its parameter; no memory is touched."""
    return LAYOUTS[row.layout][1](np.broadcast_to(np.int8(0), shape), heads).shape


def to_official(
    state: Mapping[str, Tensor], config: ViTConfig, dtype=np.float32
) -> dict[str, np.ndarray]:
    """A state dict as official arrays, bit for bit where `dtype` is the parameters' own.

    Raises WeightsError for a key too many or too few.
    """
    rows = name_table(config)
    names = {row.name for row in rows}
    if odd := names.symmetric_difference(state):
        raise WeightsError(f"the state dict does not fit its config: {', '.join(sorted(odd)[:4])}")
    arrays = {}
    for row in rows:
        tensor = state[row.name].detach().cpu()  # numpy has no bfloat16
        array = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
        array = LAYOUTS[row.layout][1](array, config.num_heads)
        arrays[row.official] = np.ascontiguousarray(array, dtype=dtype)
    return arrays
