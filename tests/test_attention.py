"""Attention maps, rollouts and overlays against plain float64 computations written out here."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image

from models.cpu import use_cpu_kernels
from models.modeling import VisionTransformer
from tests.helpers import tiny_config
from utils import attention

SHAPES = {  # name -> (changes of the tiny configuration, image size)
    "token": ({}, 32),
    "gap": ({"classifier": "gap"}, 32),
    "oblong": ({}, (24, 40)),
    "oblong gap": ({"classifier": "gap", "patch_size": 4}, (12, 20)),
    "pre_logits": ({"representation_size": 16}, 32),
    "hybrid": ({"resnet_layers": (1, 1)}, (48, 80)),
    "stem hybrid": ({"resnet_layers": (), "patch_size": 4}, (48, 32)),
}


def build(shape: str, **more):
    changes, size = SHAPES[shape]
    torch.manual_seed(0)
    model = VisionTransformer(replace(tiny_config(**changes), num_layers=3, **more), size, 5)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros, and no uniform attention
            parameter.add_(torch.randn_like(parameter) * 0.2)
        torch.nn.init.normal_(model.head.weight, std=0.5)
    model = model.double().eval()
    images = torch.randn(2, 3, *model.img_size, dtype=torch.float64)
    return model, images


def plain(model, images):
    """(attention of each layer (B, H, N, N), logits), without fused kernels or left-out rows."""
    state = {k.removeprefix("transformer.encoder."): v for k, v in model.state_dict().items()}

    def linear(y, name):
        return F.linear(y, state[name + ".weight"], state[name + ".bias"])

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)

    x, maps = model.transformer.embeddings(images).detach(), []
    for i in range(model.config.num_layers):
        layer = f"layer.{i}."
        y = norm(x, layer + "attention_norm")
        projections = [linear(y, f"{layer}attn.{name}") for name in ("query", "key", "value")]
        heads = [p.chunk(model.config.num_heads, dim=-1) for p in projections]
        q, k, v = (torch.stack(chunks, dim=1) for chunks in heads)
        scores = torch.exp(torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5)
        a = (scores / scores.sum(-1, keepdim=True)).requires_grad_()
        maps.append(a)
        o = torch.cat(list(torch.einsum("bhqk,bhkd->bhqd", a, v).unbind(1)), dim=-1)
        x = x + linear(o, layer + "attn.out")
        y = linear(norm(x, layer + "ffn_norm"), layer + "ffn.fc1")
        x = x + linear(F.gelu(y, approximate="tanh"), layer + "ffn.fc2")
    x = norm(x, "encoder_norm")
    x = x[:, 0] if model.config.classifier == "token" else x.mean(1)
    x = torch.tanh(linear(x, "pre_logits")) if hasattr(model, "pre_logits") else x
    return maps, linear(x, "head")


@cache
def plain_maps(shape: str) -> tuple:
    return tuple(a.detach() for a in plain(*build(shape))[0])


def numpy_rollout(maps, start, fuse="mean", discard=0.0):
    """The formula of the paper, with whole matrices: (B, N)."""
    result = np.eye(len(start))
    for layer in maps:
        a = getattr(layer.numpy(), fuse)(axis=1).copy()  # (B, N, N)
        for image in a:
            image.flat[np.argsort(image, axis=None)[: int(discard * image.size)]] = 0
        a += np.eye(len(start))
        result = a / a.sum(axis=2, keepdims=True) @ result
    return start @ result


def start_of(model, patch=None):
    tokens = model.config.classifier == "token"
    n = model.grid[0] * model.grid[1] + tokens
    if patch is None and not tokens:
        return np.full(n, 1 / n)
    return np.eye(n)[0 if patch is None else patch + tokens]


def grid_of(model, rows):
    grid = rows[..., -model.grid[0] * model.grid[1] :].reshape(*rows.shape[:-1], *model.grid)
    return grid / grid.max(axis=(-2, -1), keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_maps_equal_the_plain_computation(shape):
    model, images = build(shape)
    wanted, logits = plain(model, images)
    assert (logits - model(images)).abs().max() < 1e-10  # it is the same model
    maps = attention.attention_maps(model, images)
    assert len(maps) == 3
    for a, b in zip(maps, wanted, strict=True):
        assert (a - b).abs().max() < 1e-12
        assert (a.sum(-1) - 1).abs().max() < 1e-12
    assert maps[0].std() > 1e-3  # uniform maps would always agree
    last, first = attention.attention_maps(model, images, layers=[-1, 0])
    assert torch.equal(last, maps[2]) and torch.equal(first, maps[0])
    # float32 adds the model's own rounding; real weights have larger scores, and errors of 3e-5.
    half = deepcopy(model).bfloat16()
    fast = use_cpu_kernels(deepcopy(model).float())
    for other, error in ((model.float(), 5e-6), (fast, 5e-6), (half, 0.1)):
        for a, b in zip(attention.attention_maps(other, images), wanted, strict=True):
            assert a.dtype == torch.float32 and (a - b).abs().max() < error
            assert (a.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("patch", [None, 0, 7])
@pytest.mark.parametrize("shape", ["oblong", "gap"])
def test_head_maps_are_rows_of_the_attention(shape, patch):
    model, images = build(shape)
    wanted = np.einsum("n,lbhnm->lbhm", start_of(model, patch), np.stack(plain_maps(shape)))
    maps = attention.head_maps(model, images, patch=patch)
    assert maps.shape == (3, 2, 2, *model.grid)
    patches = wanted[..., -model.grid[0] * model.grid[1] :]
    assert np.abs(maps.flatten(3).numpy() - patches).max() < 1e-12


@pytest.mark.parametrize("patch", [None, 5])
@pytest.mark.parametrize("discard", [0.0, 0.6])
@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
@pytest.mark.parametrize("shape", ["oblong", "gap", "stem hybrid"])
def test_rollout_equals_the_formula(shape, fuse, discard, patch):
    model, images = build(shape)
    maps, start = plain_maps(shape), start_of(model, patch)
    depths = attention.rollout(model, images, fuse, discard, patch, by_depth=True)
    assert depths.shape == (3, 2, *model.grid)
    for depth in (1, 2, 3):
        wanted = grid_of(model, numpy_rollout(maps[:depth], start, fuse, discard))
        assert np.abs(depths[depth - 1].numpy() - wanted).max() < 1e-10
    heat = attention.rollout(model, images, fuse, discard, patch)
    assert torch.equal(heat, depths[-1]) and heat.min() >= 0 and heat.amax((1, 2)).eq(1).all()
    if not discard:  # near the threshold, rounding decides what is discarded
        single = attention.rollout(deepcopy(model).float(), images, fuse, patch=patch)
        assert (single - heat).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_rollout_equals_autograd_through_the_attention_itself(shape):
    model, images = build(shape)
    model.requires_grad_(False)  # a frozen model still has gradients of its attention
    classes = [3, 1]
    maps, logits = plain(model, images)
    gradients = torch.autograd.grad(logits[[0, 1], classes].sum(), maps)
    start = start_of(model)
    result = np.eye(len(start))
    for a, grad in zip(maps, gradients, strict=True):
        result = result + (a.detach() * grad).clamp(min=0).mean(1).numpy() @ result
    wanted = grid_of(model, start @ (result - np.eye(len(start))))
    heat = attention.gradient_rollout(model, images, classes)
    assert np.abs(heat.numpy() - wanted).max() < 1e-10
    assert (heat - attention.gradient_rollout(model, images, [0, 2])).abs().max() > 1e-3
    assert not images.requires_grad and not heat.requires_grad
    fast = attention.gradient_rollout(use_cpu_kernels(model.float()), images, classes)
    assert (fast - heat).abs().max() < 1e-4
    half = attention.gradient_rollout(model.bfloat16(), images, classes)
    assert half.dtype == torch.float32 and half.isfinite().all()
    model.head.weight.data.zero_()
    assert not attention.gradient_rollout(model, images, classes).any()


def test_the_model_is_left_as_it_was():
    model, images = build("token", dropout_rate=0.5, attention_dropout_rate=0.5)
    model.train()
    model.transformer.encoder.layer[0].eval()  # a layer that the user does not train
    modes = {name: module.training for name, module in model.named_modules()}
    state = deepcopy(model.state_dict())
    heat = attention.rollout(model, images)  # without dropout, even in training mode
    wanted = grid_of(model, numpy_rollout(plain_maps("token"), start_of(model)))
    assert np.abs(heat.numpy() - wanted).max() < 1e-10
    attention.gradient_rollout(model, images, [0, 1])
    with pytest.raises(RuntimeError):
        attention.rollout(model, images[:, :2])  # an error must restore the model as well
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_wrong_options_are_refused():
    for option, value in (("fuse", "median"), ("discard", 1.0), ("patch", 16), ("patch", -1)):
        with pytest.raises(ValueError, match=f"{option} '?{value}'? is not "):
            attention.rollout(*build("token"), **{option: value})


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_overlay_keeps_the_size_and_marks_the_right_place(mode):
    image = Image.new("RGB", (90, 40), (150, 100, 50)).convert(mode)
    heat = torch.zeros(4, 6)
    heat[0, 5] = 0.3  # upper right
    result = attention.overlay(image, heat)
    assert result.size == (90, 40) and result.mode == "RGB"
    light = np.asarray(result).sum(axis=-1)
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert y < 10 and x >= 75
    clear = attention.overlay(image, heat, opacity=0)
    assert np.array_equal(np.asarray(clear), np.asarray(image.convert("L").convert("RGB")))
    grey = Image.new("L", (8, 8), 90)
    flat = attention.overlay(grey, torch.full((2, 2), 0.5))  # no division by zero
    assert len(flat.getcolors()) == 1


@pytest.mark.parametrize("side", [4, 10])
def test_an_outlier_does_not_dim_the_other_patches(side):
    """The quantile 0.98 of these maps is their patch number 14 of 0 to 15, or 97 of 0 to 99."""
    image = Image.new("L", (side, side), 100)
    heat = torch.arange(side**2, dtype=torch.float64).view(side, side)
    outlier = heat.clone()
    outlier[-1, -1] = 1e6
    plain, drawn = (np.asarray(attention.overlay(image, h)).reshape(-1, 3) for h in (heat, outlier))
    assert np.array_equal(plain, drawn)
    last = {4: 14, 10: 97}[side]
    assert (drawn[last:] == drawn[-1]).all() and (drawn[last - 1] != drawn[-1]).any()
    colour = np.array(colormaps["inferno"](0.5)[:3]) * 255
    assert np.abs(drawn[round(last / 2)] - (0.4 * 100 + 0.6 * colour)).max() < 4


def test_different_heads():
    corners = torch.zeros(3, 4, 4)
    corners[0, :2, :2] = corners[1, :2, 2:] = corners[2, 2:, :2] = 1
    first, second, third = corners
    both = first + 0.3 * second  # most like all others
    third[3, 0] = 1000  # an outlier says nothing
    maps = torch.stack([first, first, first, both, second, third]).view(2, 3, 4, 4)
    assert attention.different_heads(maps) == [(1, 0), (1, 2), (1, 1)]
    assert len(set(attention.different_heads(maps, 9))) == 6  # there are no more
