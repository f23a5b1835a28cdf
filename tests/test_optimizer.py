"""The optimizers: which parameters decay, which lr they have, and that every parameter moves."""

import re
from dataclasses import replace

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from models.configs import CONFIGS
from models.interop import FOREIGN, TIMM_STEM
from models.modeling import VisionTransformer
from models.state_dict import rename
from tests.helpers import random_model
from utils.optimizer import build_optimizer
from utils.precision import Precision
from utils.scheduler import set_lr

TIMM_NAMES = {
    "ViT-B_16": "vit_base_patch16_224",
    "ViT-L_16": "vit_large_patch16_224",
    "R50+ViT-B_16": "vit_base_r50_s16_224",
}


def test_adamw_decays_matrices_only():
    model = VisionTransformer(CONFIGS["ViT-Ti_4"], 8, 7)
    decaying, others = build_optimizer(Precision(model), "adamw", 1e-3, 0.1).param_groups
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[1] for p in decaying["params"]} == {"weight"}
    spared = {names[id(p)] for p in others["params"]}
    assert "transformer.embeddings.position_embeddings" in spared
    assert "transformer.embeddings.cls_token" in spared
    assert len(decaying["params"]) == 12 * 6 + 2 and len(decaying["params"]) + len(spared) == 200


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_every_parameter_moves(name, level):
    """With torch 2.11 the fused SGD of a CPU leaves half-precision vectors as they are."""
    model = torch.nn.Linear(64, 64)
    precision = Precision(model, level, torch.bfloat16)
    optimizer = build_optimizer(precision, name, lr=0.5, weight_decay=0.0)
    before = [p.detach().clone() for p in precision.parameters]
    for parameter in precision.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip(precision.parameters, before, strict=True):
        assert (old - parameter).min() > 0.4


@pytest.mark.parametrize("variant", ["ViT-B_16", "ViT-L_16", "R50+ViT-B_16"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_layer_decay_is_timm_s(variant, name):
    """The same factor of every parameter, and the same weight decay with AdamW."""
    config = replace(CONFIGS[variant], hidden_size=48, mlp_dim=96)
    model = VisionTransformer(config, 64, 7)
    precision = Precision(model)
    groups = build_optimizer(precision, name, 0.1, 0.05, layer_decay=0.75).param_groups
    names = {id(p): re.sub("query|key|value", "qkv", n) for n, p in model.named_parameters()}
    table = FOREIGN if config.resnet_layers else TIMM_STEM + FOREIGN
    found = {
        rename(names[id(p)], table, back=True): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    shape = {"embed_dim": 48, "depth": config.num_layers, "mlp_ratio": 2, "num_classes": 7}
    theirs = timm.create_model(TIMM_NAMES[variant], img_size=64, **shape)
    names = {id(p): name for name, p in theirs.named_parameters()}
    spared = theirs.no_weight_decay()
    wanted = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(theirs, 0.05, spared, layer_decay=0.75)
        for p in group["params"]
    }
    assert set(found) == set(wanted)
    for key, (scale, decay) in wanted.items():
        assert found[key][0] == pytest.approx(scale, rel=1e-12), key
        # timm spares the 1-dimensional ones and those that are named; SGD here decays all.
        assert found[key][1] == (0.05 if name == "sgd" else decay), key


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_factors_hold_through_the_schedule(name):
    precision = Precision(random_model())
    optimizer = build_optimizer(precision, name, 0.1, 0.0, layer_decay=0.5)
    for step in (1, 7):
        lr = set_lr(optimizer, step, 0.1, 10, 2, "cosine")
        wanted = {lr * 0.5**above for above in range(4)}  # head, two blocks, embeddings
        assert {group["lr"] for group in optimizer.param_groups} == wanted
    plain = build_optimizer(precision, name, 0.1, 0.0)
    assert len(plain.param_groups) == {"sgd": 1, "adamw": 2}[name]
