"""Stochastic depth: timm's rule, and the same factors for every split of a batch."""

import pytest
import torch
from timm.layers import drop_path
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmViT

from tests.helpers import random_model, tiny_config
from utils.drop_path import DropPath

CPU = torch.device("cpu")


def drawn(rate=0.3, blocks=3, frozen=0, seed=1, batch=4000):
    return DropPath(rate, blocks, frozen, seed, batch, CPU, torch.float32)


def test_rates_rise_as_timm_s_and_factors_keep_the_expectation():
    factors = drawn().factors(5)  # (B, L, 2)
    theirs = TimmViT(
        img_size=8, patch_size=8, embed_dim=8, depth=3, num_heads=2, drop_path_rate=0.3
    )
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    for block, rate in enumerate(rates):
        values = factors[:, block].unique().tolist()
        assert values == pytest.approx([0, 1 / (1 - rate)] if rate else [1.0])
    dropped = (factors == 0).float().mean(dim=0)  # (L, 2)
    assert torch.allclose(dropped, torch.tensor(rates)[:, None].expand(3, 2), atol=0.03)
    assert (factors.mean(dim=0) - 1).abs().max() < 0.03
    both = ((factors[:, 2] == 0).all(dim=1)).float().mean()
    assert both == pytest.approx(0.09, abs=0.02)  # branches are drawn by themselves


def test_a_pure_function_of_seed_and_step_however_the_batch_is_split():
    one = drawn(batch=8)
    whole = one.paths(3, 0, 1)
    parts = [one.paths(3, number, 4) for number in range(4)]
    for block in range(3):
        for branch in (0, 1):
            joined = torch.cat([part[block][branch] for part in parts])
            assert joined.shape == (8, 1, 1) and joined.equal(whole[block][branch])
    assert not one.factors(3).equal(one.factors(4))
    assert not one.factors(3).equal(drawn(batch=8, seed=2).factors(3))
    assert (drawn(frozen=3).factors(3) == 1).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_with_fixed_factors_is_timm_s(checkpointing, monkeypatch):
    """Outputs and gradients; timm's own masks are replaced by the same ones."""
    model = random_model(tiny_config(), 16).train()
    model.transformer.encoder.grad_checkpointing = checkpointing
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    paths = drawn(0.6, 2, batch=4).paths(0, 0, 1)
    assert torch.cat(paths[1]).unique().tolist() == pytest.approx([0, 2.5])

    tokens = model.transformer.embeddings(images).detach()
    wanted = tokens
    for block, factors in zip(model.transformer.encoder.layer, paths, strict=True):
        theirs = TimmBlock(32, 2, mlp_ratio=2, qkv_bias=True, drop_path=0.5).train()
        attn = block.attn
        qkv = (attn.query, attn.key, attn.value)
        theirs.norm1, theirs.norm2 = block.attention_norm, block.ffn_norm
        theirs.attn.qkv.weight.data = torch.cat([each.weight.data for each in qkv])
        theirs.attn.qkv.bias.data = torch.cat([each.bias.data for each in qkv])
        theirs.attn.proj, theirs.mlp.fc1, theirs.mlp.fc2 = attn.out, block.ffn.fc1, block.ffn.fc2
        theirs.mlp.act = torch.nn.GELU(approximate="tanh")
        for part, factor in zip((theirs.drop_path1, theirs.drop_path2), factors, strict=True):
            monkeypatch.setattr(part, "forward", lambda x, factor=factor: x * factor)
        wanted = theirs(wanted)
    wanted = model.transformer.encoder.encoder_norm(wanted)[:, 0]
    assert (model.features(images, paths) - wanted).abs().max() < 1e-5
    assert (model.features(images) - wanted).abs().max() > 0.1  # without factors nothing is dropped

    weight = model.transformer.encoder.layer[0].ffn.fc1.weight
    (own,) = torch.autograd.grad(model.features(images, paths).square().sum(), weight)
    (theirs,) = torch.autograd.grad(wanted.square().sum(), weight)
    assert torch.allclose(own, theirs, atol=1e-4, rtol=1e-4)


def test_the_scale_is_timm_s():
    torch.manual_seed(0)
    values = drop_path(torch.ones(1000, 1, 1), 0.3, training=True).unique()
    assert values.tolist() == pytest.approx(drawn().factors(0)[:, 2].unique().tolist())
