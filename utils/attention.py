"""Attention maps of a VisionTransformer, rollouts of them, and overlays on images.

Hooks record the input of each attention layer, and the softmax is computed again from the layer's
own `query` and `key`. So the maps do not depend on the kernel that the model uses, and the model
needs no code for them. Shape comments: L layers, B batch, H heads, N tokens (the class token
first, if there is one, then registers), D width, d width per head, h w the grid of patches.

A map shows where one query looks. By default the query is what the classifier reads: the class
token (in a distilled DeiT, the mean of it and its second token), or, in a model that pools the
patches, the mean over all of them. `patch`, a number counted row by row from the upper left, takes
one patch as the query instead.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.modeling import VisionTransformer

FUSIONS = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}
CLIP = 0.98  # this quantile of a map and all above it have one colour: else one patch dims the rest


@torch.no_grad()
def attention_maps(
    model: VisionTransformer, images: Tensor, layers: Sequence[int] | None = None
) -> list[Tensor]:
    """softmax(q k^T / sqrt(d)) of every layer: a list of (B, H, N, N), whose rows sum to 1.

    `images` is (B, C, H, W) in [-1, 1]. `layers` selects some, -1 is the last: one image in B/8 at
    384 pixels has 255 MB a layer. The maps are float32 or wider. Against float64, a
    `model.double()` is exact to 1e-13, and float32 to about 1e-5 with real weights.
    """
    inputs = _attention_inputs(model, images)
    chosen = inputs if layers is None else [inputs[layer] for layer in layers]
    return [_softmax(*_queries_and_keys(attn, x)) for attn, x in chosen]


@torch.no_grad()
def head_maps(model: VisionTransformer, images: Tensor, patch: int | None = None) -> Tensor:
    """The attention of each head of each layer from the query to each patch: (L, B, H, h, w).

    Each map sums to 1 minus the attention to class token and registers. The module's docstring
    explains `patch`.
    """
    query, maps = _query_weights(model, patch), []
    rows = query.nonzero().flatten()
    for attn, x in _attention_inputs(model, images):
        q, k = _queries_and_keys(attn, x)
        weights = query[rows].to(q)
        # One head at a time: in a gap model all tokens are queries, and the maps are large.
        heads = [weights @ _softmax(q[:, i, rows], k[:, i]) for i in range(q.shape[1])]
        maps.append(torch.stack(heads, dim=1))  # (B, H, N)
    return _to_grid(model, torch.stack(maps))


@torch.no_grad()
def rollout(
    model: VisionTransformer,
    images: Tensor,
    fuse: str = "mean",
    discard: float = 0.0,
    patch: int | None = None,
    by_depth: bool = False,
) -> Tensor:
    """Attention rollout through all layers: (B, h, w), each divided by its largest value.

    A_l is the attention of layer l, with its heads fused by "mean", "max" or "min". I stands for
    the residual connection:

        A'_l = (A_l + I), each row divided by its sum        R = A'_L A'_(L-1) ... A'_1

    The result is the query's row of R (module docstring: `patch`). `discard`, a fraction in [0, 1),
    first sets that fraction of each A_l, its smallest entries, to 0. This makes clearer pictures;
    the paper does not do it. With `by_depth` the result is (L, B, h, w): the rollout after the
    first layer, after the first two, ..., after all. Raises ValueError for a wrong option.
    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, arXiv:2005.00928.
    """
    if fuse not in FUSIONS:
        raise ValueError(f"fuse {fuse!r} is not one of {', '.join(FUSIONS)}")
    if not 0 <= discard < 1:
        raise ValueError(f"discard {discard} is not a fraction in [0, 1)")
    layers = []
    for attn, x in _attention_inputs(model, images):
        a = _fuse_heads(*_queries_and_keys(attn, x), fuse)  # (B, N, N)
        flat = a.view(len(a), -1)  # a view: the next lines change `a`
        count = int(discard * flat.shape[1])
        flat.scatter_(1, flat.topk(count, largest=False, sorted=False).indices, 0)
        a.diagonal(dim1=1, dim2=2).add_(1)
        layers.append(a.div_(a.sum(dim=2, keepdim=True)))
    query = _query_weights(model, patch).to(layers[0])
    heat = []
    for depth in range(1 if by_depth else len(layers), len(layers) + 1):
        row = query.expand(len(images), 1, -1)  # (B, 1, N)
        for a in reversed(layers[:depth]):  # vector times matrix: no product of two (N, N)
            row = row @ a
        heat.append(_to_grid(model, row.squeeze(1)))
    return _normalize_max(torch.stack(heat) if by_depth else heat[0])


def gradient_rollout(
    model: VisionTransformer, images: Tensor, classes: Sequence[int] | Tensor
) -> Tensor:
    """The patches that raise the logit of one class: (B, h, w), each divided by its largest value.

    A_l is the attention of layer l; G_l is the gradient of the class's logit with respect to A_l:

        M_l = mean over heads of max(G_l * A_l, 0)        R = (I + M_L) ... (I + M_1)

    The result is the row of R - I of what the classifier reads. `classes` has one class an image.
    The map is all zeros if no patch raises the logit: a head of zeros has no gradient.
    Source: Chefer, Gur and Wolf, Generic Attention-model Explainability for Interpreting Bi-Modal
    and Encoder-Decoder Transformers, arXiv:2103.15679, equations 5 and 6.
    """
    with torch.enable_grad(), _recorded(model) as records:
        # Gradients reach the attention even if all parameters of the model are frozen.
        logits = model(images.to(model.head.weight).detach().requires_grad_())
        classes = torch.as_tensor(classes, device=logits.device)
        score = logits.gather(1, classes[:, None]).sum()
        gradients = torch.autograd.grad(score, [out for _, _, out in records])
    wide = torch.promote_types(logits.dtype, torch.float32)
    query = _query_weights(model).to(logits.device, wide)  # (N,)
    query = row = query.expand(len(images), 1, -1)  # (B, 1, N)
    with torch.no_grad():
        for (attn, x, _), grad in reversed(list(zip(records, gradients, strict=True))):
            row = row + row @ _positive_relevance(attn, x, grad)
    return _normalize_max(_to_grid(model, (row - query).squeeze(1)))


def different_heads(maps: Tensor, count: int = 3) -> list[tuple[int, int]]:
    """(layer, head), counted from 0, of `count` heads that differ: `maps` (L, H, h, w), one image.

    The first head is the most like all the others. Each next one is the least like those before it.
    """
    flat = F.normalize(_stretch(maps).flatten(0, 1).flatten(1), dim=1)  # (L * H, h * w)
    likeness = (flat @ flat.T).fill_diagonal_(2)  # no head is chosen twice
    chosen = [int(likeness.sum(dim=0).argmax())]
    while len(chosen) < min(count, len(flat)):
        chosen.append(int(likeness[chosen].amax(dim=0).argmin()))
    return [divmod(i, maps.shape[1]) for i in chosen]


def overlay(image: Image.Image, heat: Tensor, opacity: float = 0.8) -> Image.Image:
    """Draw `heat` (h, w) over the whole of `image`, in grey: all colour is attention.

    The colours run from the lowest value to the quantile CLIP. They have `opacity` where the heat
    is highest, and half of it where it is lowest. The result is RGB, with the size of `image`.
    """
    from matplotlib import colormaps

    smooth = Image.fromarray(_stretch(heat).numpy()).resize(image.size, Image.Resampling.BICUBIC)
    smooth = np.asarray(smooth).clip(0, 1)[..., None]  # (H, W, 1); bicubic overshoots
    colours = colormaps["inferno"](smooth[..., 0])[..., :3] * 255
    alpha = opacity * (1 + smooth) / 2
    mixed = np.asarray(image.convert("L"))[..., None] * (1 - alpha) + colours * alpha
    return Image.fromarray(mixed.round().astype(np.uint8))


def _stretch(heat: Tensor) -> Tensor:
    """Maps (..., h, w) on the CPU, each from its lowest value, 0, to its quantile CLIP, 1."""
    flat = heat.detach().float().cpu().flatten(-2)
    low = flat.amin(dim=-1, keepdim=True)
    # "lower": of a few patches, too, the highest one is clipped.
    high = flat.quantile(CLIP, dim=-1, keepdim=True, interpolation="lower")
    return ((flat - low) / (high - low).clamp(min=1e-12)).clamp(max=1).view(heat.shape)


def _attention_inputs(model: VisionTransformer, images: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """(attention layer, its input (B, N, D)) of every layer."""
    with _recorded(model) as records:
        model.transformer(images.to(model.head.weight))  # device and dtype
    return [(attn, x) for attn, x, _ in records]


@contextmanager
def _recorded(model: VisionTransformer) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Inside, the model is in evaluation mode, and each layer that runs adds a record to the list:
    (attention layer, its input, its output). Afterwards the model is as it was before.
    """
    modes = [(module, module.training) for module in model.modules()]
    records = []

    def hook(attn: nn.Module, args: tuple, out: Tensor) -> None:
        records.append((attn, args[0], out))

    handles = [block.attn.register_forward_hook(hook) for block in model.transformer.encoder.layer]
    model.eval()
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


def _queries_and_keys(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, N, d) each, float32 or wider: in half precision the rows would not sum to 1."""
    q, k = attn.split_heads(attn.query(x)), attn.split_heads(attn.key(x))
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide), k.to(wide)


def _softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)  # (..., queries, keys)


def _fuse_heads(q: Tensor, k: Tensor, fuse: str) -> Tensor:
    """The attention of all heads as one (B, N, N); two such matrices at a time in memory."""
    fused = _softmax(q[:, 0], k[:, 0])
    for head in range(1, q.shape[1]):
        fused = FUSIONS[fuse](fused, _softmax(q[:, head], k[:, head]))
    return fused / q.shape[1] if fuse == "mean" else fused


def _positive_relevance(attn: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Mean over heads of max(G * A, 0): (B, N, N).

    `x` is the layer's input, `grad` the gradient of its output (B, queries, D). A head computes
    o = A v, so the gradient of A is the gradient of o times v^T.
    """
    q, k = _queries_and_keys(attn, x)
    v = attn.split_heads(attn.value(x)).to(q)
    grad = attn.split_heads(grad @ attn.out.weight).to(q)  # of o: (B, H, queries, d)
    m = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=q.dtype, device=q.device)
    # The last layer may compute its first rows only. The classifier reads no others: they stay 0.
    computed = m[:, : grad.shape[2]]
    for head in range(q.shape[1]):
        a = _softmax(q[:, head, : grad.shape[2]], k[:, head])
        computed += (grad[:, head] @ v[:, head].mT * a).clamp(min=0)
    return m / q.shape[1]


def _query_weights(model: VisionTransformer, patch: int | None = None) -> Tensor:
    """The query as weights (N,) over the tokens."""
    prefix, patches = model.config.num_prefix, model.grid[0] * model.grid[1]
    weights = torch.zeros(prefix + patches, dtype=torch.float64)
    if patch is not None:
        if not 0 <= patch < patches:
            raise ValueError(f"patch {patch} is not in [0, {patches})")
        weights[prefix + patch] = 1
    elif count := {"token": 1, "pair": 2}.get(model.config.pooling):
        weights[:count] = 1 / count
    else:
        weights[prefix:] = 1 / patches
    return weights


def _to_grid(model: VisionTransformer, rows: Tensor) -> Tensor:
    """(..., N) -> (..., h, w), without class token and registers."""
    h, w = model.grid
    return rows[..., rows.shape[-1] - h * w :].unflatten(-1, (h, w))


def _normalize_max(heat: Tensor) -> Tensor:
    """Divide each (h, w) by its largest value; a map of zeros stays a map of zeros."""
    return heat / heat.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
