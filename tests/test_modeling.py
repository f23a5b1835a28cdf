"""The model against numbers of the official JAX code, and its parameter counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.configs import (
    CONFIGS,
    ViTConfig,
    architecture,
    config_name,
    config_names,
    describe,
)
from models.errors import UserError
from models.modeling import VisionTransformer
from tests.helpers import golden_case, golden_config, tiny_config, words

CASES = words(
    "vit_token_p16_64 vit_prelogits vit_p14_70 vit_gap "
    "hybrid_r50_like hybrid_odd_97 hybrid_r_ti16_like"
)

# Parameters at 224 px with 1000 classes, as the papers' code counts them.
# fmt: off
COUNTS = {
    "ViT-Ti_16":      5_717_416, "ViT-S_16":      22_050_664, "ViT-S_32":      22_878_952,
    "ViT-B_8":       86_576_872, "ViT-B_16":      86_567_656, "ViT-B_32":      88_224_232,
    "ViT-L_16":     304_326_632, "ViT-L_32":     306_535_400, "ViT-H_14":     632_045_800,
    "R+ViT-Ti_16":    6_337_704, "R26+ViT-S_32":  36_431_912, "R26+ViT-B_32": 101_383_976,
    "R50+ViT-B_16":  98_659_112, "R50+ViT-L_32": 328_994_856,
}
# fmt: on
# Not in the papers, so counted by hand from their neighbours: patches, positions, blocks. A block
# has 4 + 2 * 4 squares of the width, 9 biases and 4 vectors of the norms.
COUNTS["ViT-S_14"] = COUNTS["ViT-S_16"] + (14**2 - 16**2) * 3 * 384 + (257 - 197) * 384
COUNTS["ViT-Ti_4"] = COUNTS["ViT-Ti_16"] + (4**2 - 16**2) * 3 * 192 + (3137 - 197) * 192
COUNTS["ViT-Mini_8"] = COUNTS["ViT-Ti_16"] + (8**2 - 16**2) * 3 * 192 + (785 - 197) * 192
COUNTS["ViT-Mini_8"] -= 6 * (12 * 192**2 + 13 * 192)

EITHER_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def official_weights(golden: dict) -> dict:
    return {key: array for key, array in golden.items() if key.startswith("params/")}


def official_images(golden: dict, dtype) -> torch.Tensor:
    return torch.from_numpy(golden["input"]).permute(0, 3, 1, 2).to(dtype)


@torch.no_grad()
@EITHER_DTYPE
@pytest.mark.parametrize("case", CASES)
def test_equals_official(case, dtype):
    golden = golden_case(case)
    config, values = golden_config(golden)
    assert (config.classifier == "gap") == (case == "vit_gap")
    model = VisionTransformer(config, tuple(values["image"]), values["num_classes"]).to(dtype)
    model.eval().load_from(official_weights(golden))
    images = official_images(golden, dtype)
    encoded, logits = model.transformer(images), model(images)
    suffix, limits = "", (6e-5, 3e-5) if config.resnet_layers is not None else (1e-5, 1e-5)
    if dtype == torch.float64:
        suffix, limits = "_f64", (1e-9, 1e-9)
    assert np.abs(encoded.numpy() - golden["encoded" + suffix]).max() < limits[0]
    assert np.abs(logits.numpy() - golden["logits" + suffix]).max() < limits[1]


@torch.no_grad()
@EITHER_DTYPE
@pytest.mark.parametrize("case", ["vit_posemb_resize", "vit_finetune_load"])
def test_other_resolution_equals_official(case, dtype):
    golden = golden_case(case)
    config, values = golden_config(golden)
    finetune = case == "vit_finetune_load"
    config = replace(config, representation_size=None)  # fine-tuning drops pre_logits
    classes = golden["new_head/bias"].size if finetune else values["num_classes"]
    images = official_images(golden, dtype)
    model = VisionTransformer(config, images.shape[-1], classes, zero_head=finetune)
    report = model.to(dtype).eval().load_from(official_weights(golden))
    assert "positions resized" in str(report)
    if finetune:
        assert not model.head.weight.any()
        assert "params/pre_logits/kernel" in report.left_out
        model.head.weight.copy_(torch.from_numpy(golden["new_head/kernel"].T))
        model.head.bias.copy_(torch.from_numpy(golden["new_head/bias"]))
    # The resized positions are float32 in both cases, so float64 has float32's rounding too.
    assert np.abs(model(images).numpy() - golden["logits_f64"]).max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = VisionTransformer(CONFIGS[name], 224, 1000)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[config_name(CONFIGS[name])]


def test_names_of_configs():
    hybrid = replace(CONFIGS["R50-ViT-B_16"], dropout_rate=0.5, gelu="erf", representation_size=8)
    assert config_names(hybrid) == ["R50+ViT-B_16", "R50-ViT-B_16"]
    assert architecture(hybrid) == architecture(CONFIGS["R50+ViT-B_16"])
    assert config_name(replace(CONFIGS["ViT-S_16"], classifier="gap")) == "ViT-S_16"
    assert config_name(tiny_config()) is None
    assert describe(tiny_config()) == "ViT (patches of 8, width 32, 2 blocks)"
    assert describe(hybrid) == "R50+ViT-B_16"


def test_names_are_the_earlier_ports():
    state = VisionTransformer(tiny_config(resnet_layers=(1,)), 32, 5).state_dict()
    resnet = "transformer.embeddings.hybrid_model."
    for prefix, names in {
        "transformer.embeddings.": "position_embeddings cls_token patch_embeddings.weight",
        f"{resnet}root.": "conv.weight gn.bias",
        f"{resnet}body.block1.unit1.": "gn_proj.weight downsample.weight",
        "transformer.encoder.layer.1.": "attn.query.weight attention_norm.bias ffn.fc1.weight",
        "": "transformer.encoder.encoder_norm.weight head.bias",
    }.items():
        assert {prefix + name for name in words(names)} <= state.keys()


def test_scratch_initialisation_is_the_official_one():
    torch.manual_seed(0)
    config = ViTConfig(patch_size=4, hidden_size=192, mlp_dim=768, num_heads=3, num_layers=2)
    model = VisionTransformer(config, 32, 10)
    embeddings = model.transformer.embeddings
    assert abs(embeddings.position_embeddings.std() - 0.02) < 1e-3
    assert not embeddings.cls_token.any() and not model.head.weight.any()
    lecun = (3 * 4 * 4) ** -0.5
    assert abs(embeddings.patch_embeddings.weight.std() / lecun - 1) < 0.03
    xavier = (2 / (192 + 768)) ** 0.5
    assert abs(model.transformer.encoder.layer[0].ffn.fc1.weight.std() / xavier - 1) < 0.03


def test_dropout_acts_after_positions_attention_and_both_mlp_layers():
    model, seen = VisionTransformer(tiny_config(dropout_rate=0.5), 32, 5), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.zeros(1, 3, 32, 32))
    layer = ["attn.proj_dropout", "ffn.dropout", "ffn.dropout"]
    layers = [f"transformer.encoder.layer.{i}.{name}" for i in range(2) for name in layer]
    assert seen == ["transformer.embeddings.dropout", *layers]


NOT_TILED = [
    ("ViT-B_16", 225, "image size 225x225", "use 224 or 240"),
    ("ViT-B_32", (64, 10), "image size 64x10", "use 32"),
    ("R+ViT-Ti_16", 40, "the ResNet's feature map 10x10", "use 32 or 64"),
]


@pytest.mark.parametrize("name, img_size, what, advice", NOT_TILED)
def test_image_size_that_the_patches_do_not_tile(name, img_size, what, advice):
    line = f"{what} is not a multiple of the patch size {CONFIGS[name].patch_size}; {advice}"
    with pytest.raises(UserError, match=f"^{line}$"):
        VisionTransformer(CONFIGS[name], img_size, 10)
