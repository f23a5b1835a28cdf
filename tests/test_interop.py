"""Our model gives the numbers of timm and Hugging Face with their files, weights being random."""

import json
from functools import partial

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
import train
from models.checkpoints import open_model, read, write
from models.configs import CONFIGS
from models.errors import UserError
from models.interop import exported_means, read_foreign, write_timm
from models.pixels import Pixels
from models.state_dict import load
from tests.helpers import random_model, run_command, save_bin, tiny_config

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM |= {"mlp_ratio": 2, "num_classes": 5}
HUGGING_FACE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HUGGING_FACE |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def randomized(model):
    """Weights so large that another GELU or eps shows in the logits."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def timm_model(**options):
    return randomized(timm.models.VisionTransformer(**TIMM | options))


def write_files(folder, model, **configs):
    """The model's `m.safetensors`, and JSON files beside it; the path of the first."""
    save_file(model.state_dict(), folder / "m.safetensors")
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "m.safetensors"


@torch.no_grad()
def gap(ours, theirs, size=(32, 32)):
    """Largest difference of logits, relative to the largest logit."""
    images = torch.randn(3, 3, *size) * 0.5
    a, b = ours(images), theirs(images)
    b = getattr(b, "logits", b)
    return ((a - b).abs().max() / b.abs().max()).item()


HYBRIDS = {"vit_tiny_r_s16_p8_224": "R+ViT-Ti_16", "vit_small_r26_s32_224": "R26+ViT-S_32"}
TIMM_CASES = {"plain": {}, "tanh": {"act_layer": "gelu_tanh"}, "no biases": {"qkv_bias": False}}
TIMM_CASES |= {"gap": {"global_pool": "avg", "class_token": False, "fc_norm": False}}
TIMM_CASES |= {"DINOv2": {"init_values": 0.7}}
TIMM_CASES |= {"DeiT3": {"init_values": 0.7, "no_embed_class": True}}


@pytest.mark.parametrize("case", TIMM_CASES)
def test_timm_files_give_timms_logits(case, tmp_path):
    theirs, options = timm_model(**TIMM_CASES[case]), {"num_heads": 2} | TIMM_CASES[case]
    path = write_files(tmp_path, theirs, config={"model_args": options})
    assert gap(open_model(path)[0], theirs) < 1e-5
    if case == "tanh":  # a file alone does not tell it: the other cases notice GELU's form
        write_files(tmp_path, theirs, config={"num_heads": 2})
        assert gap(open_model(path)[0], theirs) > 1e-4


@pytest.mark.parametrize("source", ["config", "user", "nothing"])
def test_a_grid_that_makes_a_square_with_its_token(source, tmp_path):
    """2 x 4 patches and a class token are 9 positions, like 3 x 3 patches without one."""
    theirs = timm_model(img_size=(16, 32))
    size = {"input_size": [3, 16, 32]} if source == "config" else {}
    path = write_files(tmp_path, theirs, config={"num_heads": 2, "pretrained_cfg": size})
    ours, metadata = open_model(path, img_size=(16, 32) if source == "user" else None)
    if source == "nothing":
        assert ours.grid == (3, 3) and "the class token has no position" in metadata.notes[0]
    else:
        assert ours.grid == (2, 4) and gap(ours, theirs, (16, 32)) < 1e-5


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_hugging_face_files_give_its_logits(act, tmp_path):
    transformers = pytest.importorskip("transformers")
    names = {i: f"name {i}" for i in range(5)}
    options = HUGGING_FACE | {"intermediate_size": 64, "hidden_act": act, "id2label": names}
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**options))
    randomized(theirs).save_pretrained(tmp_path)
    ours, metadata = open_model(tmp_path / "model.safetensors")
    assert gap(ours, theirs) < 1e-5 and ours.config.norm_eps == 1e-12
    assert metadata.classes == tuple(names.values()) and metadata.img_size == (32, 32)
    path = write_files(tmp_path, theirs)  # the names of the model in memory are other ones
    assert set(load_file(path)) != set(load_file(tmp_path / "model.safetensors"))
    assert gap(open_model(path)[0], theirs) < 1e-5
    bare = read_foreign(theirs.state_dict(), num_heads=2)
    assert bare.config.norm_eps == 1e-12 and bare.metadata.classes is None


def test_hugging_face_dinov2_features(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(**HUGGING_FACE, mlp_ratio=2)
    theirs = randomized(transformers.Dinov2ForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    ours, metadata = open_model(path := tmp_path / "model.safetensors", head=False)

    def class_token(images):
        return theirs.dinov2(images).last_hidden_state[:, :1]

    assert gap(lambda images: ours.transformer(images, 1), class_token) < 1e-5
    assert "the head reads more than the class token" in metadata.left_out.values()
    assert {*metadata.keys, *metadata.left_out} == set(load_file(path))
    with pytest.raises(UserError, match="has no head"):
        open_model(path)


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("mean", [[0.485, 0.456, 0.406], [0, 0, 0], [0.5] * 3])
@pytest.mark.parametrize("std", [[0.229, 0.224, 0.225], [1, 1, 1]])
def test_other_pixels_are_folded_into_the_patch_layer(mean, std, library, tmp_path):
    theirs = timm_model()
    pixels = {"preprocessor_config": {"image_mean": mean, "image_std": std}}
    if library == "timm":
        pixels = {"config": {"num_heads": 2, "pretrained_cfg": {"mean": mean, "std": std}}}
    path = write_files(tmp_path, theirs, **{"config": {"num_heads": 2}} | pixels)
    ours, _ = open_model(path)
    means, stds = (torch.tensor(values)[:, None, None] for values in (mean, std))
    assert gap(lambda images: ours(2 * images - 1), lambda x: theirs((x - means) / stds)) < 1e-5
    exported = tmp_path / "exported.safetensors"
    write(exported, read(path))
    timms, patches = timm_model(), theirs.patch_embed.proj
    timms.load_state_dict(load_file(exported))
    for name, values in patches.state_dict().items():  # not equal bits: there and back is rounded
        assert (timms.patch_embed.proj.state_dict()[name] - values).abs().max() < 1e-5
    with safe_open(exported, "pt") as file:
        assert json.loads(file.metadata()["mean"]) == mean
    ours, _ = open_model(exported)
    assert gap(lambda images: ours(2 * images - 1), lambda x: timms((x - means) / stds)) < 1e-5


def test_the_report_counts_the_file_by_its_own_names():
    state = timm_model(init_values=0.7, no_embed_class=True).state_dict()
    state = {f"module.model.{key}": tensor for key, tensor in state.items()}
    report = load(random_model(), read_foreign(state, HALF, 2))
    assert report.loaded == list(state) and report.left_out == {}
    words = "36 tensors loaded; taken from 'module.model'; layer scale folded"  # 2 x (12 + 2) + 8
    assert str(report).startswith(words)


@pytest.mark.parametrize("name, variant", HYBRIDS.items())
def test_hybrids_have_timms_names(name, variant):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=3, img_size=32).state_dict()
        ours = random_model(CONFIGS[variant], 32, 3)
        state = write_timm(ours.state_dict(), ours.config)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("layers", [(), (1, 2)])
def test_to_timm_and_back_is_bit_for_bit(layers):
    model = random_model(tiny_config(resnet_layers=layers), 32)
    state = model.state_dict()
    timms, values = write_timm(state, model.config), HALF | {"gelu": "tanh"}
    back = read_foreign(timms, values, 2)
    assert back.config == model.config and back.state.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state.items())
    with pytest.raises(UserError, match="do not fit its first layer"):
        read_foreign(timms, values | {"image_mean": [0.5, 0.4, 0.5]}, 2)


def test_files_beside_our_own_export_are_not_about_it(workdir):
    model = random_model(classes=3)
    save_bin("m.bin", model, "abc")
    foreign = {"id2label": {str(i): f"imagenet {i}" for i in range(1000)}, "layer_norm_eps": 1e-12}
    foreign |= {"num_attention_heads": 4, "hidden_act": "gelu", "image_mean": [0.4] * 3}
    (workdir / "config.json").write_text(json.dumps(foreign | {"image_std": [0.3] * 3}))
    assert run_command(export, "--checkpoint", "m.bin", "m.safetensors") == 0
    ours, metadata = open_model("m.safetensors")
    assert metadata.classes == tuple("abc") and ours.config == model.config
    assert metadata.img_size == (32, 32) and gap(ours, model) < 1e-6
    theirs = read_foreign(write_timm(model.state_dict(), model.config), foreign | HALF)
    assert theirs.config.num_heads == 4 and theirs.config.norm_eps == 1e-12
    assert theirs.metadata.classes is None  # 1000 names are not those of three classes


def test_training_starts_from_a_foreign_file_and_keeps_its_numerics(workdir, capsys):
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    config = {"num_heads": 3, "interpolation": "bicubic", "crop_pct": 1, "std": [0.25] * 3}
    config |= {"mean": [0.5, 0.4, 0.3]}
    theirs = timm.models.VisionTransformer(**size, norm_layer=norm, init_values=0.5)
    write_files(workdir, theirs, config=config)
    flags = "--name r --dataset digits --model_type ViT-Ti_4 --img_size 8 --train_batch_size 8"
    flags += " --num_steps 2 --eval_batch_size 360 --warmup_steps 0 --pretrained_dir m.safetensors"
    assert run_command(train, *flags.split()) == 0
    assert "layer scale folded" in capsys.readouterr().out
    model, metadata = open_model("output/r_checkpoint.bin")
    assert model.config.gelu == "erf" and metadata.step in (1, 2)
    grey = flags.replace("--name r", "--name grey --in_channels 1")
    assert run_command(train, *grey.split()) == 0
    assert exported_means(read("output/grey_checkpoint.bin")) == [[0.5], [0.5]]
    means = {"mean": (0.5, 0.4, 0.3), "std": (0.25,) * 3}
    assert metadata.pixels == Pixels("bicubic", "smaller_side", **means)


def test_unsupported_structures_are_named(tmp_path):
    with pytest.raises(UserError, match=r"unsupported.*q_norm"):
        read_foreign(timm_model(qk_norm=True).state_dict(), HALF, 2)
    for given in ({"global_pool": "max"}, {"global_pool": "avg", "pool_include_prefix": True}):
        with pytest.raises(UserError, match=r"its pooling is '.*', or unknown: unsupported"):
            read_foreign(timm_model().state_dict(), HALF | given, 2)
    with pytest.raises(UserError, match="its pooling is 'map', or unknown: unsupported"):
        open_model(
            write_files(tmp_path, timm_model(embed_dim=48), config={"architecture": "test_vit3"})
        )
    resnet = timm.create_model("resnet18").state_dict()
    with pytest.raises(UserError, match=r"^tensors of another model: unsupported"):
        read_foreign(resnet, HALF)
    name = "vit_base_patch16_rpn_224"
    with pytest.raises(UserError, match="its blocks are timm's ResPostBlock: unsupported"):
        open_model(write_files(tmp_path, timm_model(), config={"architecture": name}))
    both = timm_model().state_dict() | timm_model(global_pool="avg").state_dict()
    with pytest.raises(UserError, match="fc_norm and a norm before the pooling: unsupported"):
        read_foreign(both, HALF, 2)


def test_wrong_tensors_are_one_line():
    state = timm_model(init_values=0.7).state_dict()
    for part in ("ls1.gamma", "attn.qkv.bias"):  # these may be missing, but in all blocks
        with pytest.raises(UserError, match=r"it lacks transformer\.encoder\.layer\.1\.attn"):
            read_foreign({key: x for key, x in state.items() if key != f"blocks.1.{part}"}, HALF, 2)
    state, ours = timm_model(init_values=0.7, depth=1).state_dict(), tiny_config(num_layers=1)
    for key, tensor in state.items():
        broken = [tensor.int(), tensor.sum(), tensor[..., None], tensor[..., :0], tensor[..., :1]]
        cases = [state | {key: other} for other in [*broken, tensor / 0]]
        if not key.endswith(("qkv.bias", "cls_token", "gamma")):  # these may be missing
            cases.append({name: other for name, other in state.items() if name != key})
        for i, case in enumerate(cases):
            with pytest.raises(UserError) as caught:
                load(random_model(ours), read_foreign(case, HALF, 2))
                pytest.fail(f"case {i} of {key} was loaded")
            assert "\n" not in str(caught.value)
    for key, shape, message in [
        ("patch_embed.proj.weight", (32, 3, 0, 0), r"patch_embed\.proj\.weight"),
        ("blocks.0.attn.qkv.weight", (4, 32), r"lacks .*attn\.value\.weight"),
        ("module.norm.bias", (32,), r"another model: unsupported \(module\.norm\.bias"),
        ("layernorm.bias", (32,), "two of its tensors are .*encoder_norm.bias"),
        ("extra.weight", (1,), r"another model: unsupported \(extra\.weight; 1 in all"),
    ]:
        with pytest.raises(UserError, match=message):
            load(random_model(ours), read_foreign(state | {key: torch.ones(shape)}, HALF, 2))


def test_untrusted_metadata():
    model = random_model(tiny_config(gelu="erf"))
    state = write_timm(model.state_dict(), model.config)
    nan, most = float("nan"), 10**400
    wrong = {"num_heads": [-2, 5, "2", 2.0, True, [], most], "hidden_act": ["relu", [], {}, True]}
    wrong |= {"norm_eps": ["a", [], "", -1, nan, most], "label_names": [True, "abcde", {}, 3.5]}
    wrong |= {"image_mean": [0.4, "abc", [0.4], [None] * 3, [0.5] * 4 + [0.1], ["a"] * 3, True]}
    wrong |= {
        "image_std": [[0.5, 0.5, 0], [-1] * 3, [nan] * 3, [1e30] * 3, [most] * 3, [True] * 3, []]
    }
    wrong |= {"id2label": [True, "x", [1]], "rescale_factor": [0, -1, "a", nan, most, []]}
    wrong |= {"pixels": ["\n", 3], "background": ["\n", 3], "positions": [3], "global_pool": ["\n"]}
    for key, value in [(key, value) for key, values in wrong.items() for value in values]:
        positions = {"pixels": {}} if key == "positions" else {}
        with pytest.raises(UserError) as caught:
            read_foreign(state, HALF | {"num_heads": 2, key: value} | positions)
            pytest.fail(f"{key}: {value}")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    for size in ("big", [3], {}, 2.5, -32, [32, "x"]):
        values = HALF | {"num_heads": 2, "norm_eps": None, "label_names": ["a"], "image_size": size}
        checkpoint = read_foreign(state, values)
        assert checkpoint.config == model.config and checkpoint.metadata.img_size == (32, 32)
        assert checkpoint.metadata.classes is None
    note = "no config gives its pixel means: taken as 0.5, like the deviations"
    assert note in read_foreign(state).metadata.notes and note not in checkpoint.metadata.notes


def test_damaged_files_are_one_line(tmp_path):
    """A damaged config is not passed over: without its heads and eps the logits would be others."""
    path, config = write_files(tmp_path, timm_model()), tmp_path / "config.json"
    content, header = path.read_bytes(), tmp_path / "header.safetensors"
    save_file({"head.bias": torch.zeros(3)}, header, {"classes": "["})
    cases = [(config, text.encode()) for text in ("{", "[1]", "null", '{"model_args": 7}')]
    cases += [(path, content[:n]) for n in (0, 99, 5000)] + [(path, header.read_bytes())]
    for file, damage in cases:
        config.write_text("{}")
        file.write_bytes(damage)
        what = "no safetensors file, or" if file == path else "config.json beside it is"
        with pytest.raises(UserError, match=f"{what} damaged") as caught:
            read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
