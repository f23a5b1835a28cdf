"""The model against numbers of the official JAX code, and its parameter counts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.configs import CONFIGS, ViTConfig
from models.modeling import VisionTransformer
from tests.helpers import GOLDEN, golden_case, golden_config, tiny_config

CASES = [
    "vit_token_p16_64", "vit_prelogits", "vit_p14_70", "vit_gap",
    "hybrid_r50_like", "hybrid_odd_97", "hybrid_r_ti16_like",
]  # fmt: skip

# name -> parameters at 224 px with 1000 classes, from the papers' code
COUNTS = {
    "ViT-Ti_16": 5_717_416, "ViT-S_16": 22_050_664, "ViT-S_32": 22_878_952,
    "ViT-B_8": 86_576_872, "ViT-B_16": 86_567_656, "ViT-B_32": 88_224_232,
    "ViT-L_16": 304_326_632, "ViT-L_32": 306_535_400, "ViT-H_14": 632_045_800,
    "R+ViT-Ti_16": 6_337_704, "R26+ViT-S_32": 36_431_912, "R26+ViT-B_32": 101_383_976,
    "R50+ViT-B_16": 98_659_112, "R50+ViT-L_32": 328_994_856, "R50-ViT-B_16": 98_659_112,
    # not in the papers: patch 14 on S, patch 4 on Ti, patch 8 on half of Ti, counted by hand
    "ViT-S_14": 22_050_664 + (14 * 14 - 16 * 16) * 3 * 384 + (257 - 197) * 384,
    "ViT-Mini_8": 5_717_416 + (8 * 8 - 16 * 16) * 3 * 192 + (785 - 197) * 192
    - 6 * (12 * 192**2 + 13 * 192),  # blocks: 4 + 2 * 4 squares, 9 biases and 4 of norms
    "ViT-Ti_4": 5_717_416 + (4 * 4 - 16 * 16) * 3 * 192 + (3137 - 197) * 192,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", CASES)
def test_equals_official(case, dtype):
    golden = golden_case(case)
    config, facts = golden_config(golden)
    model = VisionTransformer(config, tuple(facts["image"]), facts["num_classes"]).to(dtype).eval()
    model.load_from({k: v for k, v in golden.items() if k.startswith("params/")})
    images = torch.from_numpy(golden["input"]).permute(0, 3, 1, 2).to(dtype)
    with torch.no_grad():
        encoded, logits = model.transformer(images), model(images)
    suffix, hybrid = ("_f64", None) if dtype == torch.float64 else ("", "hybrid" in case)
    limits = (1e-9, 1e-9) if hybrid is None else (6e-5, 3e-5) if hybrid else (1e-5, 1e-5)
    assert np.abs(encoded.numpy() - golden["encoded" + suffix]).max() < limits[0]
    assert np.abs(logits.numpy() - golden["logits" + suffix]).max() < limits[1]


@pytest.mark.parametrize("case", ["vit_posemb_resize", "vit_finetune_load"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_other_resolution_equals_official(case, dtype):
    golden = golden_case(case)
    config, facts = golden_config(golden)
    finetune = case == "vit_finetune_load"
    config = replace(config, representation_size=None)  # fine-tuning drops pre_logits
    classes = golden["new_head/bias"].size if finetune else facts["num_classes"]
    side = golden["input"].shape[1]
    model = VisionTransformer(config, side, classes, zero_head=finetune).to(dtype).eval()
    report = model.load_from({k: v for k, v in golden.items() if k.startswith("params/")})
    assert "positions resized" in str(report)
    if finetune:
        assert not model.head.weight.any()
        assert "pre_logits/kernel" in report.left_out
        with torch.no_grad():
            model.head.weight.copy_(torch.from_numpy(golden["new_head/kernel"].T))
            model.head.bias.copy_(torch.from_numpy(golden["new_head/bias"]))
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["input"]).permute(0, 3, 1, 2).to(dtype))
    # The resized table is float32 in both cases, so float64 is held to float32's rounding.
    assert np.abs(logits.numpy() - golden["logits_f64"]).max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = VisionTransformer(CONFIGS[name], 224, 1000)
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS[name.replace("R-", "R+").replace("R26-", "R26+").replace("R50-", "R50+")]


def test_names_are_the_earlier_ports():
    names = dict(VisionTransformer(tiny_config(resnet_layers=(1,)), 32, 5).named_parameters())
    for name in (
        "transformer.embeddings.position_embeddings",
        "transformer.embeddings.cls_token",
        "transformer.embeddings.patch_embeddings.weight",
        "transformer.embeddings.hybrid_model.root.conv.weight",
        "transformer.embeddings.hybrid_model.root.gn.bias",
        "transformer.embeddings.hybrid_model.body.block1.unit1.gn_proj.weight",
        "transformer.embeddings.hybrid_model.body.block1.unit1.downsample.weight",
        "transformer.encoder.layer.0.attn.query.weight",
        "transformer.encoder.layer.1.attention_norm.bias",
        "transformer.encoder.layer.1.ffn.fc1.weight",
        "transformer.encoder.encoder_norm.weight",
        "head.bias",
    ):
        assert name in names


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_short_last_block_equals_full(classifier):
    """The token head's last block skips rows that nobody reads; nothing else may change."""
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config(classifier=classifier), 32, 5).double()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    tokens = model.transformer(images)
    full = model.head(tokens[:, 0] if classifier == "token" else tokens.mean(dim=1))
    full_grads = torch.autograd.grad(full.square().mean(), list(model.parameters()))
    short_grads = torch.autograd.grad(model(images).square().mean(), list(model.parameters()))
    for a, b in zip(full_grads, short_grads, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_scratch_initialisation_is_the_official_one():
    torch.manual_seed(0)
    config = ViTConfig(patch_size=4, hidden_size=192, mlp_dim=768, num_heads=3, num_layers=2)
    state = VisionTransformer(config, 32, 10).state_dict()
    emb = "transformer.embeddings."
    assert abs(state[emb + "position_embeddings"].std() - 0.02) < 1e-3
    assert not state[emb + "cls_token"].any() and not state["head.weight"].any()
    lecun = (3 * 4 * 4) ** -0.5
    assert abs(state[emb + "patch_embeddings.weight"].std() / lecun - 1) < 0.03
    xavier = (2 / (192 + 768)) ** 0.5
    assert abs(state["transformer.encoder.layer.0.ffn.fc1.weight"].std() / xavier - 1) < 0.03


def test_any_image_shape_and_channels():
    model = VisionTransformer(tiny_config(), (32, 48), 5, in_channels=4)
    assert model.grid == (4, 6)
    assert model(torch.zeros(2, 4, 32, 48)).shape == (2, 5)


def test_dropout_acts_after_positions_attention_and_both_mlp_layers():
    model = VisionTransformer(tiny_config(dropout_rate=0.5), 32, 5)
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.zeros(1, 3, 32, 32))
    layer = ["attn.proj_dropout", "ffn.dropout", "ffn.dropout"]
    assert seen == ["transformer.embeddings.dropout"] + [
        f"transformer.encoder.layer.{i}.{name}" for i in range(2) for name in layer
    ]


def test_size_that_no_patch_tiles_is_refused():
    with pytest.raises(ValueError, match="225x225 is not a multiple of the patch size 16; us"):
        VisionTransformer(CONFIGS["ViT-B_16"], 225, 10)


def test_golden_files_are_there():
    assert {c + ".npz" for c in CASES} <= {p.name for p in GOLDEN.glob("*.npz")}
    assert json.loads(str(golden_case("vit_gap")["config_json"]))["classifier"] == "gap"
