"""Attention, rollouts and overlays against plain float64 computations written anew here."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.modeling import VisionTransformer
from tests.helpers import tiny_config
from utils.attention import (
    attention_maps,
    gradient_rollout,
    head_maps,
    overlay,
    rollout,
    rollout_by_depth,
)

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
        for parameter in model.parameters():  # nothing may be zero, and attention not flat
            parameter.add_(torch.randn_like(parameter) * 0.2)
        torch.nn.init.normal_(model.head.weight, std=0.5)
    model = model.double().eval()
    images = torch.randn(2, 3, *model.img_size, dtype=torch.float64)
    return model, images


def plain(model, images):
    """(attention of each layer (B, H, N, N), logits) with nothing fused and nothing left out."""
    state = {k.removeprefix("transformer."): v.detach() for k, v in model.state_dict().items()}
    heads, eps = model.config.num_heads, 1e-6
    x, maps = model.transformer.embeddings(images).detach(), []
    for i in range(model.config.num_layers):
        p = {k.removeprefix(f"encoder.layer.{i}."): v for k, v in state.items()}

        def linear(y, name, p=p):
            return y @ p[name + ".weight"].T + p[name + ".bias"]

        def norm(y, name, p=p):
            y = (y - y.mean(-1, keepdim=True)) / (
                y.var(-1, correction=0, keepdim=True) + eps
            ) ** 0.5
            return y * p[name + ".weight"] + p[name + ".bias"]

        y = norm(x, "attention_norm")
        q, k, v = (torch.stack(linear(y, f"attn.{n}").chunk(heads, dim=-1), dim=1)
                   for n in ("query", "key", "value"))  # fmt: skip
        scores = torch.exp(torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5)
        a = (scores / scores.sum(-1, keepdim=True)).requires_grad_()
        maps.append(a)
        o = torch.cat(list(torch.einsum("bhqk,bhkd->bhqd", a, v).unbind(1)), dim=-1)
        x = x + linear(o, "attn.out")
        y = linear(norm(x, "ffn_norm"), "ffn.fc1")
        x = x + linear(F.gelu(y, approximate="tanh"), "ffn.fc2")
    x = F.layer_norm(x, x.shape[-1:], state["encoder.encoder_norm.weight"],
                     state["encoder.encoder_norm.bias"], eps)  # fmt: skip
    x = x[:, 0] if model.config.classifier == "token" else x.mean(1)
    return maps, model.head(torch.tanh(model.pre_logits(x)) if hasattr(model, "pre_logits") else x)


@cache
def plain_maps(shape: str) -> tuple:
    return tuple(a.detach() for a in plain(*build(shape))[0])


def numpy_rollout(maps, start, fuse="mean", discard=0.0):
    """The formula as it stands: whole matrices, one image and layer after the other."""
    rows = []
    for b in range(len(maps[0])):
        result = np.eye(maps[0].shape[-1])
        for layer in maps:
            a = getattr(layer[b].detach().numpy(), fuse)(axis=0).copy()
            a.flat[np.argsort(a, axis=None)[: int(discard * a.size)]] = 0
            a = a + np.eye(len(a))
            result = a / a.sum(axis=1, keepdims=True) @ result
        rows.append(start @ result)
    return np.stack(rows)


def start_of(model, patch=None):
    tokens = model.config.classifier == "token"
    n = model.grid[0] * model.grid[1] + tokens
    if patch is not None:
        return np.eye(n)[patch + tokens]
    return np.eye(n)[0] if tokens else np.full(n, 1 / n)


def grid_of(model, rows):
    grid = rows[..., -model.grid[0] * model.grid[1] :].reshape(*rows.shape[:-1], *model.grid)
    return grid / grid.max(axis=(-2, -1), keepdims=True)


# -------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_plain_computation(shape):
    model, images = build(shape)
    wanted, logits = plain(model, images)
    assert (logits - model(images)).abs().max() < 1e-10  # the plain one is this model
    maps = attention_maps(model, images)
    assert len(maps) == 3
    for a, b in zip(maps, wanted, strict=True):
        assert (a - b).abs().max() < 1e-12
        assert (a.sum(-1) - 1).abs().max() < 1e-12
    assert maps[0].std() > 1e-3  # flat maps would agree too easily
    # In float32 the model's own rounding comes on top; real weights have larger scores, and 3e-5.
    for a, b in zip(attention_maps(deepcopy(model).float(), images), wanted, strict=True):
        assert (a - b).abs().max() < 5e-6
        assert (a.sum(-1) - 1).abs().max() < 1e-6


def test_only_the_layers_and_queries_that_are_asked_for():
    model, images = build("token")
    whole = attention_maps(model, images)
    some = attention_maps(model, images, layers=[-1, 0], rows=slice(3, 5))
    assert [a.shape for a in some] == [(2, 2, 2, 17)] * 2
    for a, layer in zip(some, (2, 0), strict=True):
        assert (a - whole[layer][:, :, 3:5]).abs().max() < 1e-12


@pytest.mark.parametrize("patch", [None, 0, 7])
@pytest.mark.parametrize("shape", ["oblong", "gap"])
def test_head_maps_are_rows_of_the_attention(shape, patch):
    model, images = build(shape)
    wanted = torch.stack(plain(model, images)[0]).detach().numpy()  # (L, B, H, N, N)
    wanted = np.einsum("n,lbhnm->lbhm", start_of(model, patch), wanted)
    wanted = wanted[..., wanted.shape[-1] - model.grid[0] * model.grid[1] :]
    maps = head_maps(model, images, patch=patch)
    assert maps.shape == (3, 2, 2, *model.grid)
    assert np.abs(maps.flatten(3).numpy() - wanted).max() < 1e-12


@pytest.mark.parametrize("patch", [None, 5])
@pytest.mark.parametrize("discard", [0.0, 0.6])
@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
@pytest.mark.parametrize("shape", ["oblong", "gap", "stem hybrid"])
def test_rollout_equals_the_formula(shape, fuse, discard, patch):
    model, images = build(shape)
    maps, start = plain_maps(shape), start_of(model, patch)
    depths = rollout_by_depth(model, images, fuse, discard, patch)
    assert depths.shape == (3, 2, *model.grid)
    for depth in (1, 2, 3):
        wanted = grid_of(model, numpy_rollout(maps[:depth], start, fuse, discard))
        assert np.abs(depths[depth - 1].numpy() - wanted).max() < 1e-10
    heat = rollout(model, images, fuse, discard, patch)
    assert torch.equal(heat, depths[-1]) and heat.min() >= 0 and heat.amax((1, 2)).eq(1).all()
    if not discard:  # at a threshold, rounding decides what is discarded
        assert (
            rollout(deepcopy(model).float(), images, fuse, patch=patch) - heat
        ).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_rollout_equals_autograd_through_the_attention_itself(shape):
    model, images = build(shape)
    model.requires_grad_(False)  # a frozen model has gradients by its attention all the same
    classes = [3, 1]
    maps, logits = plain(model, images)
    gradients = torch.autograd.grad(logits[[0, 1], classes].sum(), maps)
    start = start_of(model)
    rows = []
    for b in range(2):
        result = np.eye(len(start))
        for a, grad in zip(maps, gradients, strict=True):
            m = (a[b].detach() * grad[b]).clamp(min=0).mean(0).numpy()
            result = result + m @ result
        rows.append(start @ (result - np.eye(len(start))))
    heat = gradient_rollout(model, images, classes)
    assert np.abs(heat.numpy() - grid_of(model, np.stack(rows))).max() < 1e-10
    assert (heat - gradient_rollout(model, images, [0, 2])).abs().max() > 1e-3
    assert not images.requires_grad and not heat.requires_grad


def test_a_head_of_zeros_speaks_for_no_class():
    model, images = build("token")
    torch.nn.init.zeros_(model.head.weight)
    assert not gradient_rollout(model, images, [0, 0]).any()


# ----------------------------------------------------------------------------- manners, memory


def test_the_model_is_left_as_it_was():
    model, images = build("token", dropout_rate=0.5, attention_dropout_rate=0.5)
    model.train()
    model.transformer.encoder.layer[0].eval()  # a part that the user keeps from training
    modes = {name: module.training for name, module in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = numpy_rollout(plain(model.eval(), images)[0], start_of(model))
    for name, module in model.named_modules():
        module.training = modes[name]
    heat = rollout(model, images)  # no dropout, although the model is training
    assert np.abs(heat.numpy() - grid_of(model, wanted)).max() < 1e-10
    gradient_rollout(model, images, [0, 1])
    with pytest.raises(RuntimeError):
        rollout(model, images[:, :2])  # an error on the way leaves nothing behind either
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_half_precision_rows_still_sum_to_one():
    model, images = build("token")
    exact = attention_maps(model, images)
    for a, b in zip(attention_maps(model.bfloat16(), images), exact, strict=True):
        assert a.dtype == torch.float32 and (a.sum(-1) - 1).abs().max() < 1e-6
        assert (a - b).abs().max() < 0.1
    heat = gradient_rollout(model, images, [0, 1])
    assert heat.dtype == torch.float32 and heat.isfinite().all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


@pytest.mark.parametrize("fuse", ["mean", "max"])
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_memory_never_holds_the_heads_side_by_side(classifier, fuse):
    """A 384 px image at patch 8 has 2305 tokens: 21 MB a matrix, 255 MB for twelve heads."""
    config = tiny_config(classifier=classifier, num_heads=8, patch_size=4)
    model = VisionTransformer(config, 64, 5).eval()  # 256 patches: a matrix exceeds the MLP
    tokens = 256 + (classifier == "token")
    for look in (
        lambda images: rollout(model, images, fuse),
        lambda images: head_maps(model, images),
        lambda images: gradient_rollout(model, images, [0]),
    ):
        with Largest() as largest:
            look(torch.randn(1, 3, 64, 64))
        assert largest.numel <= tokens**2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"fuse": "median"}, "none of mean, max, min"), ({"discard": 1.0}, "not a part of 1"),
     ({"patch": 16}, "not one of the 16"), ({"patch": -1}, "not one of the 16")],
)  # fmt: skip
def test_wrong_words(wrong, message):
    model, images = build("token")
    with pytest.raises(ValueError, match=message):
        rollout(model, images, **wrong)


# ------------------------------------------------------------------------------------- overlays


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_overlay_has_the_photographs_own_size_and_marks_the_right_place(mode):
    image = Image.new("RGB", (90, 40), (100, 100, 100)).convert(mode)
    heat = torch.zeros(4, 6)
    heat[0, 5] = 0.3  # upper right
    result = overlay(image, heat)
    assert result.size == (90, 40) and result.mode == "RGB"
    light = np.asarray(result).sum(axis=-1)
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert y < 10 and x >= 75
    assert np.array_equal(
        np.asarray(overlay(image, heat, opacity=0)), np.asarray(image.convert("RGB"))
    )


def test_flat_heat_is_no_division_by_zero():
    flat = np.asarray(overlay(Image.new("RGB", (8, 8), (90, 90, 90)), torch.full((2, 2), 0.5)))
    assert (flat == flat[0, 0]).all()
