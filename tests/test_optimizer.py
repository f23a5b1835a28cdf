"""The optimizers: which parameters decay, and that every parameter moves."""

import pytest
import torch

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils.optimizer import build_optimizer
from utils.precision import Precision


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
