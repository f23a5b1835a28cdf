"""The hub: every checkpoint format becomes our state dict, and enters a model in one way.

A reader (models.weights for Google's files, models.interop for timm's and Hugging Face's,
models.checkpoints for PyTorch's) returns a `Checkpoint`; `load` puts it into a model. In shape
comments D is width, C channels, h w the grid in patches.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import isqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import CONFIGS, ViTConfig, architecture, config_names, is_count
from models.errors import UserError
from models.pixels import PLAIN, Pixels

EMBEDDINGS, LAYER = "transformer.embeddings", "transformer.encoder.layer.{}"
POSITIONS = f"{EMBEDDINGS}.position_embeddings"
PATCHES = f"{EMBEDDINGS}.patch_embeddings.weight"
REGISTERS, PRE_NORM = f"{EMBEDDINGS}.register_tokens", f"{EMBEDDINGS}.pre_norm"
FAMILIES = (REGISTERS, f"{PRE_NORM}.", "fc_norm.", "map_head.")  # what Google's models lack
FLAT_PATCHES = "its patch layer is a matrix for flat patches, as in SigLIP 2 NaFlex: unsupported"
RESNET_ROOT = f"{EMBEDDINGS}.hybrid_model.root.conv.weight"
WHITE = (255, 255, 255)
# The first is Google's own.
RESIZES_OF_POSITIONS = ("linear", "bicubic", "bicubic with antialiasing")


@dataclass
class Metadata:
    """What a file holds beside its tensors.

    `keys` maps the file's own tensor names to ours, and `left_out` maps the others to the reason.
    `notes` say what was changed. `img_size` is (height, width) in pixels of the stored position
    embeddings, None if the file does not say. `classes` are class names, and `named` is true if
    they are the folder names of the training data. `step` and `metrics` are those of the training.
    `bit_depth` and `background` say how its images were decoded, as in `utils.images.Decoding`,
    `pixels` how they were resized, and `positions` how its library resizes the embeddings.
    """

    keys: dict[str, str] = field(default_factory=dict, repr=False)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    img_size: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None
    named: bool = False
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    bit_depth: int | None = None
    background: tuple[int, int, int] | None = WHITE
    pixels: Pixels = PLAIN
    positions: str = RESIZES_OF_POSITIONS[0]

    def set_positions(self, how) -> None:
        """Take `positions` as files store it. Raises UserError for an unknown way."""
        if how not in RESIZES_OF_POSITIONS:
            raise UserError(f"its positions are resized in an unknown way ({how!r:.40})")
        self.positions = how

    def set_decoding(self, bit_depth, background) -> None:
        """Take both as files store them: a number or None, and 3 numbers, or 0 for no background.

        Raises UserError for anything else.
        """
        known = bit_depth is None or bit_depth in range(129)
        if not known or not isinstance(background, list) or len(background) not in (0, 3):
            raise UserError(f"unknown bit depth {bit_depth!r:.40} or background {background!r:.40}")
        if not all(value in range(256) for value in background):
            raise UserError(f"its background is {background!r:.40}, not three numbers up to 255")
        self.bit_depth, self.background = bit_depth, tuple(map(int, background)) or None


@dataclass
class Checkpoint:
    """A file's tensors under our names, the config that they form, and the rest."""

    state: dict[str, Tensor]
    config: ViTConfig
    metadata: Metadata = field(default_factory=Metadata)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.state[PATCHES if self.config.resnet_layers is None else RESNET_ROOT].shape[1]


@dataclass
class LoadReport:
    """What happened to every tensor of a file, by the file's own names."""

    loaded: list[str]
    left_out: dict[str, str]
    notes: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for reason in dict.fromkeys(self.left_out.values()):
            keys = [key for key, why in self.left_out.items() if why == reason]
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            parts.append(f"left out {', '.join(keys[:4])}{more}: {reason}")
        return "; ".join(parts + self.notes)


def rename(key: str, table: list[tuple[str, str]], back: bool = False) -> str | None:
    """`key` under its name on the other side of `table`, by the first row that fits, else None.

    A row is (their module or parameter, ours). {} stands for a number, {+1} for the same number
    plus one. A final `.weight` or `.bias` is kept.
    """
    for theirs, ours in table:
        source, target = (ours, theirs) if back else (theirs, ours)
        if match := _regex(source).fullmatch(key):
            *numbers, leaf = match.groups()
            shift = ("{+1}" in ours) * (-1 if back else 1)
            shifted = (str(int(number) + shift) for number in numbers)
            return re.sub(r"\{(\+1)?\}", lambda _, s=shifted: next(s), target) + leaf
    return None


@cache
def _regex(pattern: str) -> re.Pattern:
    body = re.sub(r"\\\{(\\\+1)?\\\}", r"(\\d+)", re.escape(pattern))
    return re.compile(body + r"((?:\.weight|\.bias)?)")


def infer_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> ViTConfig:
    """The config that the shapes of a state dict form; dropout rates are 0.

    Without `num_heads`, which no shape shows, it is that of a known variant of the same width.
    Raises UserError if the tensors are no ViT.
    """
    patches, fc1 = state.get(PATCHES), state.get(f"{LAYER.format(0)}.ffn.fc1.weight")
    if patches is not None and patches.ndim == 2:
        raise UserError(FLAT_PATCHES)
    if patches is None or fc1 is None or (patches.ndim, fc1.ndim) != (4, 2):
        raise UserError("not a Vision Transformer: it lacks a patch embedding or encoder blocks")
    hidden, _, patch, patch_width = patches.shape
    if patch != patch_width:
        raise UserError(f"its patches are {patch}x{patch_width} pixels: only squares are supported")
    same_width = [row.num_heads for row in CONFIGS.values() if row.hidden_size == hidden]
    usual = next(iter(same_width), max(1, hidden // 64))
    heads = usual if num_heads is None else num_heads
    if not is_count(heads) or hidden % heads:
        raise UserError(f"its width {hidden} is not a multiple of {heads!r:.40} heads")
    blocks = {m[1] for m in (re.match(LAYER.format(r"(\d+)"), name) for name in state) if m}
    units = {m.groups() for m in (re.search(r"\.block(\d+)\.unit(\d+)\.", k) for k in state) if m}
    stages = [sum(int(stage) == i for stage, _ in units) for i in range(1, len(units) + 1)]
    root, pre_logits = state.get(RESNET_ROOT), state.get("pre_logits.weight")
    if root is not None and (root.ndim != 4 or len(root) % 32):
        raise UserError(f"its ResNet begins with a kernel of shape {tuple(root.shape)}")
    fc2, registers = state.get(f"{LAYER.format(0)}.ffn.fc2.weight"), state.get(REGISTERS)
    gated = fc2 is not None and fc2.ndim == 2 and 2 * fc2.shape[1] == len(fc1)
    has_token, fc_norm = f"{EMBEDDINGS}.cls_token" in state, "fc_norm.weight" in state
    pool = "map" if "map_head.probe" in state else "mean" if fc_norm and has_token else None
    return ViTConfig(
        patch_size=patch,
        hidden_size=hidden,
        mlp_dim=len(fc1) // (1 + gated),
        num_heads=heads,
        num_layers=len(blocks),
        classifier="token" if has_token else "gap",
        representation_size=None if pre_logits is None else len(pre_logits),
        resnet_layers=None if root is None else tuple(n for n in stages if n),
        resnet_width=1.0 if root is None else len(root) / 64,
        num_registers=0 if registers is None else registers.shape[1],
        pre_norm=f"{PRE_NORM}.weight" in state,
        pool=pool,
        fc_norm=fc_norm,
        mlp="swiglu" if gated else "gelu",
    )


def square_size(state: Mapping[str, Tensor], config: ViTConfig) -> tuple[int, int] | None:
    """(height, width) in pixels of the stored positions if their grid is a square, else None."""
    if POSITIONS not in state or state[POSITIONS].ndim != 3:
        return None
    count = state[POSITIONS].shape[1] - (config.classifier == "token")
    side = isqrt(max(count, 0))
    return (side * config.stride,) * 2 if side and side * side == count else None


def check_architecture(found: ViTConfig, wanted: ViTConfig) -> None:
    """Raise UserError, naming the variant that fits, if a file's config is another than wanted."""
    file, model = architecture(found), architecture(wanted)
    if file == model:
        return
    names = ["/".join(config_names(config)) or "no known variant" for config in (found, wanted)]
    fields = (f for f in vars(file) if getattr(file, f) != getattr(model, f))
    differences = [f"{f}: file {getattr(file, f)}, model {getattr(model, f)}" for f in fields]
    raise UserError(f"the file fits {names[0]}, not {names[1]} ({'; '.join(differences)})")


def load(model: nn.Module, checkpoint: Checkpoint) -> LoadReport:
    """Copy a checkpoint into a VisionTransformer; with `model.zero_head` the head becomes zeros.

    Positions are resized to the model's grid, and the first kernel is fitted to its channels.
    Everything is checked before the first parameter changes. Raises UserError if a tensor is
    missing, has another shape, or holds values that are not finite.
    """
    state, metadata = checkpoint.state, checkpoint.metadata
    check_architecture(checkpoint.config, model.config)
    report = LoadReport([], dict(metadata.left_out), list(metadata.notes))
    parameters = dict(model.named_parameters())
    if model.zero_head:
        wanted = [name for name in parameters if not name.startswith("head.")]
    else:
        wanted = list(parameters)
        _check_head(model, state)
    if missing := [name for name in wanted if name not in state]:
        raise UserError(f"the file lacks {', '.join(missing[:4])} ({len(missing)} in all)")

    file_names = {ours: theirs for theirs, ours in metadata.keys.items()}
    fitted = {}
    for name in wanted:
        tensor, shape = state[name], parameters[name].shape
        if name == POSITIONS:
            tensor = _fit_positions(tensor, model, metadata, report.notes)
        elif name in (PATCHES, RESNET_ROOT) and tensor.ndim == 4 and tensor.shape[1] != shape[1]:
            report.notes.append(f"first layer fitted from {tensor.shape[1]} to {shape[1]} channels")
            tensor = _fit_channels(tensor, shape[1])
        label = file_names.get(name, name)
        if tensor.shape != shape:
            raise UserError(f"{label} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
        if not tensor.isfinite().all():
            raise UserError(f"{label} holds values that are not finite")
        fitted[name] = tensor
    for key, name in metadata.keys.items():
        if name in wanted:
            report.loaded.append(key)
        elif name.startswith(("head.", "pre_logits.")):
            report.left_out[key] = "the head is new"
        else:
            report.left_out[key] = "unknown to this model"

    with torch.no_grad():
        for name, tensor in fitted.items():
            parameters[name].copy_(tensor)
        if model.zero_head:
            model.head.weight.zero_()
            model.head.bias.zero_()
        elif not model.head.weight.any():
            report.notes.append("the file's head is all zeros: its predictions mean nothing")
    return report


def _check_head(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the file's own head can be used as a whole."""
    if "head.bias" in state and state["head.bias"].shape != (model.num_classes,):
        raise UserError(
            f"the file's head has {state['head.bias'].numel()} classes, the model "
            f"{model.num_classes}: use zero_head=True for a new head, or the file's class count"
        )
    if "pre_logits.weight" in state and model.config.representation_size is None:
        raise UserError(
            "the file's head reads a pre_logits layer: use a config with representation_size="
            f"{len(state['pre_logits.weight'])}, or zero_head=True for a new head"
        )


def _fit_positions(tensor: Tensor, model: nn.Module, metadata: Metadata, notes) -> Tensor:
    """Position embeddings (1, tokens, D) of the file's grid for the model's grid."""
    tokens = int(model.config.classifier == "token")
    if tensor.ndim != 3 or tensor.shape[1] <= tokens:
        raise UserError(f"position embeddings have shape {tuple(tensor.shape)}")
    count = tensor.shape[1] - tokens
    img_size = metadata.img_size or square_size({POSITIONS: tensor}, model.config)
    # A grid of unknown form that has as many patches as the model's is taken to be the model's.
    old = model.config.grid(img_size) if img_size else model.grid
    if old[0] * old[1] != count:
        raise UserError(
            f"it has positions of {count} patches, not {old[0]}x{old[1]}, and their grid is no "
            "square: give the image size that the file was made for"
        )
    if old == model.grid:
        return tensor
    grids = f"from {old[0]}x{old[1]} to {model.grid[0]}x{model.grid[1]}"
    notes.append(f"positions resized {grids} ({metadata.positions})")
    if (times := model.grid[0] * model.grid[1] / count) >= 4:
        size = old[0] * model.config.stride
        notes.append(f"the file was made for {size} pixels, {times:.0f} times fewer patches")
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if metadata.positions == "linear":
        return torch.from_numpy(resize_positions(tensor.numpy(), old, model.grid))
    grid = tensor[:, tokens:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, h, w)
    antialias = metadata.positions.endswith("antialiasing")
    grid = F.interpolate(grid, model.grid, mode="bicubic", antialias=antialias)
    return torch.cat([tensor[:, :tokens], grid.flatten(2).mT], dim=1)


def resize_positions(array: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Position embeddings (1, [1 +] h*w, D) of grid `old` for grid `new`; the class token stays.

    Linear interpolation with aligned corners, as in Google's loader. mode="nearest" keeps scipy
    from writing zeros into the last row where rounding puts it just outside (28 to 48).
    """
    from scipy.ndimage import zoom

    tokens = array.shape[1] - old[0] * old[1]
    grid = array[0, tokens:].reshape(*old, -1)  # (h, w, D)
    factors = (new[0] / old[0], new[1] / old[1], 1)
    grid = zoom(grid, factors, order=1, mode="nearest").reshape(1, new[0] * new[1], -1)
    return np.concatenate([array[:, :tokens], grid], axis=1)


def _fit_channels(kernel: Tensor, channels: int) -> Tensor:
    """A first kernel (D, C, h, w) for another number of image channels.

    One channel gets the sum, so that a grey image gives what it gave as RGB. More channels repeat
    the file's in turn, scaled so that the response keeps its size.
    """
    stored, kernel = kernel.shape[1], kernel.float()
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, torch.arange(channels) % stored] * (stored / channels)
