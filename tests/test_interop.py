"""timm's and Hugging Face's own models, random weights, against what we make of their files."""

import json
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file

import export
import train
from models.configs import CONFIGS
from models.interop import from_foreign, read_safetensors, to_timm
from models.structure import WeightsError
from tests.helpers import random_model, save_bin, tiny_config
from utils.checkpoint import load_model
from utils.classifier import Classifier, open_model

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
        "mlp_ratio": 2, "num_classes": 5}  # fmt: skip
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
      "patch_size": 8, "num_labels": 5}  # fmt: skip


def randomized(model):
    """Large enough that the wrong GELU or eps shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def gap(ours, theirs, size=32):
    """Largest difference of logits, relative to the largest logit."""
    images = torch.randn(3, 3, *((size, size) if isinstance(size, int) else size)) * 0.5
    a, b = ours(images), theirs(images)
    b = getattr(b, "logits", b)
    return ((a - b).abs().max() / b.abs().max()).item()


TIMM_CASES = {
    "plain": {},
    "tanh GELU is unknown to a bare file": {"act_layer": "gelu_tanh"},
    "DINOv2": {"init_values": 0.7},
    "DeiT3": {"init_values": 0.7, "no_embed_class": True},
    "no biases": {"qkv_bias": False},
    "gap": {"global_pool": "avg", "class_token": False, "fc_norm": False},
}


@pytest.mark.parametrize("case", TIMM_CASES)
def test_timm_files_give_timms_logits(case, tmp_path):
    theirs = randomized(timm.models.VisionTransformer(**TIMM, **TIMM_CASES[case]))
    path = tmp_path / "m.safetensors"
    save_file(theirs.state_dict(), path)
    config = {"model_args": {"num_heads": 2}}
    if "tanh" in case:
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert gap(open_model(path)[0], theirs) > 1e-4  # so the other cases do see GELU's form
        config["model_args"]["act_layer"] = "gelu_tanh"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert gap(open_model(path)[0], theirs) < 1e-5


@pytest.mark.parametrize("said", ["by its config", "by the user"])
def test_a_grid_that_makes_a_square_with_its_token(said, tmp_path):
    """2 x 4 patches and a class token are 9 positions, like 3 x 3 patches without one."""
    theirs = randomized(timm.models.VisionTransformer(**TIMM | {"img_size": (16, 32)}))
    path = tmp_path / "m.safetensors"
    save_file(theirs.state_dict(), path)
    config = {"model_args": {"num_heads": 2}}
    if said == "by its config":
        config["pretrained_cfg"] = {"input_size": [3, 16, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, _ = open_model(path, img_size=(16, 32) if said == "by the user" else None)
    assert ours.grid == (2, 4) and gap(ours, theirs, (16, 32)) < 1e-5


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_hugging_face_files_give_its_logits(act, tmp_path):
    transformers = pytest.importorskip("transformers")
    names = {i: f"name {i}" for i in range(5)}
    config = transformers.ViTConfig(**HF, intermediate_size=64, hidden_act=act, id2label=names)
    theirs = randomized(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    trained = Classifier.open(tmp_path / "model.safetensors", device="cpu")
    assert gap(trained.model, theirs) < 1e-5 and trained.classes[3] == "name 3"
    assert trained.model.config.norm_eps == 1e-12
    save_file(theirs.state_dict(), tmp_path / "new names.safetensors")
    assert gap(open_model(tmp_path / "new names.safetensors")[0], theirs) < 1e-5
    assert trained.classes == tuple(names.values())
    assert from_foreign(theirs.state_dict(), 2).norm_eps == 1e-12  # where nothing is said


def test_hugging_face_dinov2_features(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = randomized(transformers.Dinov2Model(transformers.Dinov2Config(**HF, mlp_ratio=2)))
    theirs.save_pretrained(tmp_path)
    ours, record = open_model(tmp_path / "model.safetensors", head=False)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs(images).last_hidden_state[:, :1]
        assert (ours.transformer(images, 1) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert any("mask_token" in note for note in record["notes"])
    with pytest.raises(WeightsError, match="has no head"):
        open_model(tmp_path / "model.safetensors")


SAID = {
    "timm": ("config.json", lambda mean, std: {"pretrained_cfg": {"mean": mean, "std": std}}),
    "transformers": ("preprocessor_config.json",
                     lambda mean, std: {"image_mean": mean, "image_std": std}),
}  # fmt: skip


@pytest.mark.parametrize("library", SAID)
@pytest.mark.parametrize(
    "mean, std",
    [
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ([0.5] * 3, [0.25] * 3),
        ([0.4] * 3, [0.5] * 3),
    ],
)
def test_other_pixels_are_folded_into_the_patch_layer(mean, std, library, tmp_path):
    theirs = randomized(timm.models.VisionTransformer(**TIMM))
    save_file(theirs.state_dict(), tmp_path / "m.safetensors")
    name, content = SAID[library]
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2}))
    (tmp_path / name).write_text(json.dumps({"num_heads": 2} | content(mean, std)))
    ours, _ = open_model(tmp_path / "m.safetensors")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
        wanted = theirs((pixels - mean) / std)
        assert (ours(2 * pixels - 1) - wanted).abs().max() < 1e-5 * wanted.abs().max()


REFUSED = {
    "register tokens": {"reg_tokens": 4},
    "a norm after pooling": {"global_pool": "avg"},
    "a norm before the first block": {"pre_norm": True},
    "norms of queries and keys": {"qk_norm": True},
    "a SwiGLU MLP": {"mlp_layer": timm.layers.SwiGLUPacked},
}


@pytest.mark.parametrize("structure", REFUSED)
def test_structures_that_cannot_be_taken_are_named(structure):
    theirs = timm.models.VisionTransformer(**TIMM, **REFUSED[structure])
    with pytest.raises(WeightsError, match=f"it has {structure}") as caught:
        from_foreign(theirs.state_dict(), 2)
    assert "\n" not in str(caught.value)


def test_unknown_and_damaged_files_are_one_line(tmp_path):
    state = timm.models.VisionTransformer(**TIMM).state_dict()
    with pytest.raises(WeightsError, match=r"extra\.weight \(1 in all\) belong to a structure"):
        from_foreign(state | {"extra.weight": torch.zeros(1)}, 2)
    with pytest.raises(WeightsError, match=r"does not fit its config: .*attention_norm\.bias"):
        from_foreign({k: v for k, v in state.items() if k != "blocks.0.norm1.bias"}, 2)
    with pytest.raises(WeightsError, match="not a ViT in timm's"):
        from_foreign({"conv.weight": torch.zeros(1)})
    save_file(state, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (("cut", "no safetensors file, or damaged"), ("gone", "no such file"),
                          ("folder", "a folder")):  # fmt: skip
        with pytest.raises(WeightsError, match=message) as caught:
            read_safetensors(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


def test_a_damaged_config_is_not_passed_over(tmp_path):
    """It may hold the heads and the norm's eps, without which the logits would be others."""
    save_file(timm.models.VisionTransformer(**TIMM).state_dict(), tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text('{"num_heads": 2,')
    with pytest.raises(WeightsError, match=r"config\.json beside it, .* cannot be read"):
        read_safetensors(tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text('{"pretrained_cfg": "augreg"}')
    with pytest.raises(WeightsError, match="or what is said of them, do not fit"):
        read_safetensors(tmp_path / "m.safetensors")


def test_pixel_means_that_nobody_states_or_that_do_not_fit_are_said():
    state = timm.models.VisionTransformer(**TIMM).state_dict()
    note = "no config says its pixel means: taken as 0.5, like the deviations"
    assert note in from_foreign(state, 2).notes
    means = {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.5, 0.5, 0.5]}
    assert note not in from_foreign(state, 2, means).notes
    assert note not in from_foreign(state, 2, means | {"image_mean": [0.0, 0.0, 0.0]}).notes
    with pytest.raises(WeightsError, match="are no lists of numbers"):
        from_foreign(state, 2, means | {"image_mean": "abc"})
    hybrid = to_timm(random_model(tiny_config(resnet_layers=(1,))).state_dict(),
                     tiny_config(resnet_layers=(1,)))  # fmt: skip
    assert from_foreign(hybrid, 2, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}).arrays
    for theirs, facts in ((hybrid, means), (state, {"image_mean": [0.4], "image_std": [0.4]})):
        with pytest.raises(WeightsError, match="do not fold into its first layer"):
            from_foreign(theirs, 2, facts)


HYBRIDS = {"vit_tiny_r_s16_p8_224": "R+ViT-Ti_16", "vit_small_r26_s32_224": "R26+ViT-S_32"}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_have_timms_names(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=3, img_size=32).state_dict()
        ours = random_model(CONFIGS[HYBRIDS[name]], 32, 3)
        state = to_timm(ours.state_dict(), ours.config)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.items()}


def test_files_beside_an_export_of_ours_are_not_about_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, names = random_model(classes=3), ("ant", "bee", "cat")
    save_bin("m.bin", model, names)
    foreign = {"id2label": {str(i): f"imagenet {i}" for i in range(1000)}, "layer_norm_eps": 1e-12,
               "num_attention_heads": 4, "hidden_act": "gelu"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(foreign))
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(means))
    assert export.run(["m.bin", "m.safetensors"]) == 0
    found = Classifier.open("m.safetensors", device="cpu")
    assert not any("pixel means" in note for note in found.record["notes"])
    assert found.classes == names and found.model.config == model.config
    assert gap(found.model, model) < 1e-6
    theirs = from_foreign(to_timm(model.state_dict(), model.config), 2, foreign)
    assert theirs.classes is None  # 1000 names are not those of three classes


def test_to_timm_and_back_is_bit_for_bit():
    model = random_model(tiny_config(resnet_layers=(1, 2)), 32)
    back = from_foreign(to_timm(model.state_dict(), model.config), 2, {"gelu": "tanh"})
    again = random_model(model.config, 32)
    again.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    again.load_from(back.arrays)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    with pytest.raises(WeightsError, match="no pre_logits layer"):
        deep = random_model(tiny_config(representation_size=8))
        to_timm(deep.state_dict(), deep.config)


def test_training_starts_from_a_foreign_file_and_keeps_its_numerics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    theirs = timm.models.VisionTransformer(**size, norm_layer=norm, init_values=0.5)
    save_file(theirs.state_dict(), "m.safetensors")
    flags = ["--name", "r", "--dataset", "digits", "--model_type", "ViT-Ti_4", "--img_size", "8",
             "--train_batch_size", "8", "--num_steps", "2", "--eval_batch_size", "360"]  # fmt: skip
    assert train.run([*flags, "--warmup_steps", "0", "--pretrained_dir", "m.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "layer scale folded" in out and "GELU: erf" in out
    model, _ = load_model("output/r_checkpoint.bin")
    assert model.config.gelu == "erf"
    results = json.loads((tmp_path / "output" / "r_results.json").read_text())
    assert results["accuracy"] == results["training"]["best_accuracy"] and results["images"] == 359
