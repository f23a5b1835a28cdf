"""Where a VisionTransformer looks: its attention, rollouts of it, and overlays on photographs.

Everything is read off by hooks. The input of each attention layer is caught and its softmax
recomputed from the layer's own `query` and `key`, so that it does not matter which kernel the
model itself uses, and the model knows nothing of it. In shape comments L is layers, B batch, H
heads, N tokens (class token first, where there is one), D width, d width per head, h w the grid
of patches.

What the head of a classifier reads decides whose attention is shown. With a class token it is
that token's. A "gap" model reads the mean over all patches: there it is the mean over all of them
as queries. `patch`, a number counted row by row from the upper left, asks for one patch instead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.modeling import VisionTransformer

FUSIONS = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}


@torch.no_grad()
def attention_maps(
    model: VisionTransformer,
    images: Tensor,
    layers: Sequence[int] | None = None,
    rows: slice | Tensor | None = None,
) -> list[Tensor]:
    """softmax(q k^T / sqrt(d)) of every layer: a list of (B, H, N, N), whose rows sum to 1.

    `images` is (B, C, H, W) in [-1, 1]. All of it can be large: B/8 at 384 pixels has 255 MB a
    layer and image. `layers` takes only some, `rows` (into N) only some queries, and then only
    these are ever computed: (B, H, rows, N). Numbers are float32 at least, and as good as the
    model's own: against float64, `model.double()` gives 1e-13, float32 about 1e-5 in real weights.
    """
    every = range(len(model.transformer.encoder.layer))
    chosen = every if layers is None else [every[layer] for layer in layers]  # -1 is the last
    maps = {}

    def see(layer: int, attn: nn.Module, x: Tensor) -> None:
        if layer in chosen:
            q, k = _queries_and_keys(attn, x)
            maps[layer] = _softmax(q if rows is None else q[:, :, rows], k)

    _watch(model, images, see)
    return [maps[layer] for layer in chosen]


@torch.no_grad()
def head_maps(model: VisionTransformer, images: Tensor, patch: int | None = None) -> Tensor:
    """(L, B, H, h, w): what each head of each layer gives to each patch, asked by `patch` or by
    what the classifier reads. Sums over (h, w) are 1, less what goes to the class token."""
    reader, maps = _reader(model, patch), []
    rows = reader.nonzero().flatten()

    def see(layer: int, attn: nn.Module, x: Tensor) -> None:
        q, k = _queries_and_keys(attn, x)
        weights = reader[rows].to(q)
        # Head by head, since a gap model asks with all of its tokens.
        heads = [weights @ _softmax(q[:, i, rows], k[:, i]) for i in range(q.shape[1])]
        maps.append(torch.stack(heads, dim=1))  # (B, H, N)

    _watch(model, images, see)
    return _on_grid(model, torch.stack(maps))


def rollout(
    model: VisionTransformer,
    images: Tensor,
    fuse: str = "mean",
    discard: float = 0.0,
    patch: int | None = None,
) -> Tensor:
    """Attention rollout through all layers: (B, h, w), each divided by its largest value.

    With A_l the attention of layer l, its heads fused by "mean", "max" or "min", and I for the
    residual connection,

        A'_l = (A_l + I), each row divided by its sum        R = A'_L A'_(L-1) ... A'_1

    and the row of R shown is that of `patch` or of what the classifier reads (module docstring).
    `discard` in [0, 1) first sets that part of each A_l, its smallest entries, to 0: usual for
    clearer pictures, but not in the paper. Raises ValueError for another `fuse` or `discard`.
    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, arXiv:2005.00928.
    """
    return rollout_by_depth(model, images, fuse, discard, patch)[-1]


@torch.no_grad()
def rollout_by_depth(
    model: VisionTransformer,
    images: Tensor,
    fuse: str = "mean",
    discard: float = 0.0,
    patch: int | None = None,
) -> Tensor:
    """(L, B, h, w): `rollout` after the first layer, after two, ... and after all of them."""
    if fuse not in FUSIONS:
        raise ValueError(f"fuse {fuse!r} is none of {', '.join(FUSIONS)}")
    if not 0 <= discard < 1:
        raise ValueError(f"discard {discard} is not a part of 1, in [0, 1)")
    mixed: list[Tensor] = []

    def see(layer: int, attn: nn.Module, x: Tensor) -> None:
        a = _discard_smallest(_fused(*_queries_and_keys(attn, x), fuse), discard)  # (B, N, N)
        a.diagonal(dim1=1, dim2=2).add_(1)
        mixed.append(a.div_(a.sum(dim=2, keepdim=True)))

    _watch(model, images, see)
    reader = _reader(model, patch).to(mixed[0])
    depths = []
    for depth in range(1, len(mixed) + 1):
        row = reader.expand(len(images), 1, -1)  # (B, 1, N)
        for a in reversed(mixed[:depth]):  # a row at a time: no product of two (N, N)
            row = row @ a
        depths.append(row.squeeze(1))
    return _to_one(_on_grid(model, torch.stack(depths)))


def gradient_rollout(
    model: VisionTransformer, images: Tensor, classes: Sequence[int] | Tensor
) -> Tensor:
    """What speaks for one class in each image: (B, h, w), each divided by its largest value.

    With A_l the attention of layer l and G_l the gradient of the class's logit by it,

        M_l = mean over heads of max(G_l * A_l, 0)        R = (I + M_L) ... (I + M_1)

    and the row of R - I shown is that of what the classifier reads. `classes` names one for each
    image. All zeros where nothing speaks for the class: a head of zeros has no gradient.
    Source: Chefer, Gur and Wolf, Generic Attention-model Explainability for Interpreting Bi-Modal
    and Encoder-Decoder Transformers, arXiv:2103.15679, equations 5 and 6.
    """
    inputs, outputs = [], []

    def keep(attn: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        inputs.append(_first(args, kwargs))
        outputs.append(out)

    with torch.enable_grad(), _evaluating(model), _hooks(model, "forward", keep):
        # Gradients flow even through a model whose parameters are frozen.
        logits = model(_prepared(model, images).detach().requires_grad_())
        classes = torch.as_tensor(classes, device=logits.device)
        score = logits.gather(1, classes[:, None]).sum()
        gradients = torch.autograd.grad(score, outputs)

    wide = torch.promote_types(logits.dtype, torch.float32)
    row = start = _reader(model, None).to(wide).expand(len(images), 1, -1)  # (B, 1, N)
    attentions = [block.attn for block in model.transformer.encoder.layer]
    with torch.no_grad():
        for attn, x, grad in reversed(list(zip(attentions, inputs, gradients, strict=True))):
            m = _positive_influence(attn, x, grad)  # (B, N, N)
            row = row + row @ m
    return _to_one(_on_grid(model, (row - start).squeeze(1)))


def overlay(image: Image.Image, heat: Tensor, opacity: float = 0.75) -> Image.Image:
    """`heat` (h, w), stretched from its smallest to its largest value, over all of `image`.

    `opacity` is the colour's where the heat is highest, and half of it where it is lowest. The
    result is RGB of the image's own size and aspect, since evaluation resizes whole images.
    """
    heat = heat.detach().float().cpu()
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    smooth = Image.fromarray(heat.numpy()).resize(image.size, Image.Resampling.BICUBIC)
    smooth = np.asarray(smooth).clip(0, 1)[..., None]  # (H, W, 1); bicubic overshoots
    colours = mpl.colormaps["inferno"](smooth[..., 0])[..., :3] * 255
    below = np.asarray(image.convert("RGB"), dtype=np.float32)
    share = opacity * (1 + smooth) / 2
    mixed = below * (1 - share) + colours * share
    return Image.fromarray(mixed.round().astype(np.uint8))


# -------------------------------------------------------------------------------------- the parts


def _watch(
    model: VisionTransformer, images: Tensor, see: Callable[[int, nn.Module, Tensor], None]
) -> None:
    """Run all tokens through all layers; `see` (layer, attention, its input (B, N, D)) on the way.

    Nothing of a layer is kept, so memory is what `see` keeps.
    """
    attentions = [block.attn for block in model.transformer.encoder.layer]

    def hook(attn: nn.Module, args: tuple, kwargs: dict) -> None:
        see(attentions.index(attn), attn, _first(args, kwargs))

    with _evaluating(model), _hooks(model, "forward_pre", hook):
        model.transformer(_prepared(model, images))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _hooks(model: VisionTransformer, kind: str, hook: Callable) -> Iterator[None]:
    handles = [getattr(block.attn, f"register_{kind}_hook")(hook, with_kwargs=True)
               for block in model.transformer.encoder.layer]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _prepared(model: nn.Module, images: Tensor) -> Tensor:
    return images.to(next(model.parameters()))  # its device and dtype


def _queries_and_keys(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, N, d) each, float32 at least: half precision would spoil the sums of rows."""
    q, k = attn.split_heads(attn.query(x)), attn.split_heads(attn.key(x))
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide), k.to(wide)


def _softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)  # (..., queries, keys)


def _fused(q: Tensor, k: Tensor, fuse: str) -> Tensor:
    """The heads' attention in one (B, N, N), never more than two such matrices at a time."""
    fused = _softmax(q[:, 0], k[:, 0])
    for head in range(1, q.shape[1]):
        fused = FUSIONS[fuse](fused, _softmax(q[:, head], k[:, head]))
    return fused / q.shape[1] if fuse == "mean" else fused


def _discard_smallest(a: Tensor, part: float) -> Tensor:
    flat = a.flatten(1)  # (B, N*N)
    count = int(part * flat.shape[1])
    smallest = flat.topk(count, dim=1, largest=False, sorted=False).indices
    return flat.scatter(1, smallest, 0).view_as(a)


def _positive_influence(attn: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Mean over heads of max(G * A, 0), (B, N, N), from the layer's input and the gradient by its
    output (B, queries, D): the heads give o = A v, so the gradient by A is that by o times v^T."""
    q, k = _queries_and_keys(attn, x)
    v = attn.split_heads(attn.value(x)).to(q)
    grad = attn.split_heads(grad @ attn.out.weight).to(q)  # (B, H, queries, d), by o
    m = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=q.dtype, device=q.device)
    # The last layer may compute its first rows only: nobody reads the others, their gradient is 0.
    some = m[:, : grad.shape[2]]
    for head in range(q.shape[1]):
        a = _softmax(q[:, head, : grad.shape[2]], k[:, head])
        some += (grad[:, head] @ v[:, head].mT * a).clamp(min=0)
    return m / q.shape[1]


def _reader(model: VisionTransformer, patch: int | None) -> Tensor:
    """Weights (N,) over the tokens whose attention is asked for."""
    parameter = model.transformer.embeddings.position_embeddings
    tokens, count = parameter.shape[1], model.grid[0] * model.grid[1]
    weights = torch.zeros(tokens, dtype=torch.float64, device=parameter.device)
    if patch is not None:
        if not 0 <= patch < count:
            raise ValueError(f"patch {patch} is not one of the {count}, in [0, {count})")
        weights[tokens - count + patch] = 1
    elif model.config.classifier == "token":
        weights[0] = 1
    else:
        weights[:] = 1 / tokens
    return weights


def _on_grid(model: VisionTransformer, rows: Tensor) -> Tensor:
    """(..., N) -> (..., h, w), without the class token."""
    h, w = model.grid
    return rows[..., rows.shape[-1] - h * w :].unflatten(-1, (h, w))


def _to_one(heat: Tensor) -> Tensor:
    """Divided by the largest value of each (h, w), so that nothing stays nothing."""
    return heat / heat.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
