"""Folders as timm and Hugging Face open them: from a PIL image to logits, labels and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

import export
from models.checkpoints import open_model, write
from models.configs import CONFIGS
from models.pixels import ALIASED, Pixels
from tests.helpers import checkpoint_of, random_model, run_command, tiny_config
from tests.test_hub import server  # noqa: F401
from utils.images import Decoding, to_input

CLASSES = ("ant", "bee", "cat", "dog", "eel")
SIDE = {"classes": 5, "std": 0.3}
ODD = {"config": tiny_config(gelu="erf", mlp_dim=40, patch_size=4), "img_size": (16, 28)}
MODELS = {"tanh": {}, "erf, oblong": ODD, "grey": {"in_channels": 1}}
MEANS = {"mean": (0.4, 0.5, 0.45), "std": (0.2, 0.3, 0.25)}
RECIPES = {
    "plain": Pixels(),
    "cubic, means": Pixels("bicubic", **MEANS),
    "crop": Pixels("bilinear", "smaller_side", 32 / 37, **MEANS),
    "smaller side": Pixels("bicubic", "smaller_side", 1.0),
    "squash, crop": Pixels("bilinear", "squash", 0.8),
    "rounded": Pixels("bilinear", "smaller_side", 32 / 93),  # 32 / (32 / 93) is less than 93
}
SIZES = [(32, 32), (120, 90), (70, 200), (300, 211)]


def save_model(recipe="plain", **options):
    """(the model, its recipe), stored as `m.bin`."""
    model = random_model(**SIDE | options)
    channels, pixels = model.in_channels, RECIPES.get(recipe, recipe)
    if channels != 3:
        pixels = replace(pixels, mean=pixels.mean[:channels], std=pixels.std[:channels])
    metrics = {"accuracy": 0.875}
    write("m.bin", checkpoint_of(model, CLASSES, pixels=pixels, step=7, metrics=metrics))
    return model, pixels


def export_to(*words):
    return run_command(export, "--checkpoint", "m.bin", *words)


def images(model, sizes=SIZES):
    """PIL images of smooth noise."""
    for width, height in sizes:
        noise = np.random.default_rng(width).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        yield image.convert("L" if model.in_channels == 1 else "RGB")


def open_timm(folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model, create_transform(**resolve_model_data_config(model))


def open_hugging_face(folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    return model, transformers.AutoImageProcessor.from_pretrained(folder)


def combinations(recipes_of_oblong):
    cases = [("tanh", recipe) for recipe in RECIPES] + [("grey", "crop")]
    return cases + [("erf, oblong", recipe) for recipe in recipes_of_oblong]


@torch.no_grad()
@pytest.mark.parametrize("name, recipe", combinations(["plain", "crop", "squash, crop"]))
def test_timm_gives_the_same_logits(name, recipe, workdir):
    """timm resizes with Pillow, whose pixels may differ by 1; without a resize they are equal."""
    model, pixels = save_model(recipe, **MODELS[name])
    assert export_to("out", "--layout", "timm") == 0
    theirs, transform = open_timm("out")
    assert tuple(theirs.pretrained_cfg["label_names"]) == CLASSES
    mean, std = (torch.tensor(x or (0.5,)) for x in (pixels.mean, pixels.std))
    how = Decoding(model.in_channels, pixels=pixels)
    for image in images(model, [*SIZES, model.img_size[::-1]]):
        seen, ours = transform(image)[None], to_input(image, model, how)
        shown = (seen * std[:, None, None] + mean[:, None, None]) * 255
        apart = (shown - (ours * 127.5 + 127.5)).abs()
        assert apart.max() < (6.01 if pixels.interpolation == "bicubic" else 2.01)
        assert apart.mean() < 0.3
        if apart.max() < 0.01:
            assert (theirs(seen) - model(ours)).abs().max() < 1e-4
    assert apart.max() < 0.01 or pixels.crop_fraction < 1  # the last needs no resize
    ours = torch.rand(2, model.in_channels, *model.img_size) * 2 - 1
    seen = ((ours + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    assert (theirs(seen) - model(ours)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name, recipe", combinations(["plain", "squash, crop"]))
def test_hugging_face_gives_the_same_logits(name, recipe, workdir):
    model, pixels = save_model(recipe, **MODELS[name])
    assert export_to("out", "--layout", "hf") == 0
    theirs, processor = open_hugging_face("out")
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.label2id["eel"] == 4
    how = Decoding(model.in_channels, pixels=replace(pixels, round_down=True))
    for image in images(model, SIZES[1:]):
        logits = theirs(**processor(image, return_tensors="pt")).logits
        assert (logits - model(to_input(image, model, how))).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["timm", "hf"])
def test_the_configs_alone_tell_our_reader_the_same(layout, workdir):
    """Without the metadata of our own files."""
    model, pixels = save_model("crop", config=tiny_config(gelu="erf"))
    assert export_to("out", "--layout", layout) == 0
    assert open_model("out/model.safetensors")[1].pixels == pixels
    save_file(load_file("out/model.safetensors"), "out/model.safetensors")
    ours, metadata = open_model("out/model.safetensors")
    assert ours.config == model.config and metadata.classes == CLASSES
    assert metadata.pixels == replace(pixels, round_down=layout == "hf")
    image = torch.randn(2, 3, 32, 32)
    assert (ours(image) - model(image)).abs().max() < 1e-5


def test_timms_names_of_variants_and_hybrids(workdir):
    for variant, name in {
        "ViT-Ti_16": "vit_tiny_patch16_224",
        "ViT-Ti_4": "vit_base_patch16_224",  # of any size, by its arguments
        "R+ViT-Ti_16": "vit_tiny_r_s16_p8_224",
    }.items():
        size = 64 if variant.startswith("R") else 32
        save_model(config=CONFIGS[variant], img_size=size, std=0.05)
        assert export_to(name, "--layout", "timm", "--img_size", str(size)) == 0
        assert json.loads(Path(name, "config.json").read_text())["architecture"] == name


REGISTERS = {"num_registers": 2, "pre_norm": True, "gelu": "quick"}
FAMILIES = {
    "registers": (REGISTERS, "Hugging Face's ViT has no registers"),
    "registers, mean": (REGISTERS | {"pool": "mean", "fc_norm": True}, "no registers"),
    "pre-norm": ({"pre_norm": True}, "Hugging Face's ViT has no norm before its blocks"),
    "fc_norm": ({"fc_norm": True}, "Hugging Face's ViT has no norm after pooling"),
    "mean, token": ({"pool": "mean"}, "Hugging Face's ViT has no mean pooling"),
    "map": ({"classifier": "gap", "pool": "map"}, "Hugging Face's ViT has no pooling by map"),
    "QuickGELU": ({"gelu": "quick"}, None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name, workdir, capsys):
    changes, message = FAMILIES[name]
    model, _ = save_model(config=tiny_config(**changes), img_size=(16, 32))
    ours = torch.randn(2, 3, 16, 32)
    assert export_to("t", "--layout", "timm") == 0
    assert (open_timm("t")[0](ours) - model(ours)).abs().max() < 1e-4
    capsys.readouterr()
    assert export_to("h", "--layout", "hf") == (2 if message else 0)
    if message:
        assert message in capsys.readouterr().err
    else:
        assert (open_hugging_face("h")[0](ours).logits - model(ours)).abs().max() < 1e-4


CASES = [
    ("Hugging Face's ViT has no ResNet stem", {"config": CONFIGS["R+ViT-Ti_16"]}, "hf"),
    ("Hugging Face's ViT has no mean pooling", {"config": tiny_config(classifier="gap")}, "hf"),
    ("has no pre_logits layer", {"config": tiny_config(representation_size=8)}, "hf"),
    ("timm has no pre_logits layer", {"config": tiny_config(representation_size=8)}, "timm"),
    ("Hugging Face's ViT has no SwiGLU MLP", {"config": tiny_config(mlp="swiglu")}, "hf"),
    ("timm's config has no word for a SwiGLU MLP", {"config": tiny_config(mlp="swiglu")}, "timm"),
    ("no head of two tokens", {"config": tiny_config(num_registers=1, pool="pair")}, "timm"),
    ("timm has no such hybrid", {"config": tiny_config(resnet_layers=(1, 1))}, "timm"),
    ("resize without antialiasing", {"recipe": Pixels(ALIASED)}, "hf"),
    ("resize without antialiasing", {"recipe": Pixels(ALIASED)}, "timm"),
    ("squash to a size that is no square", {"recipe": "crop", "img_size": (16, 32)}, "hf"),
]


@pytest.mark.parametrize("message, options, layout", CASES)
def test_what_a_library_lacks_is_named(message, options, layout, workdir, capsys):
    save_model(**options)
    assert export_to("out", "--layout", layout) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not Path("out").exists()


def test_notes(workdir, capsys):
    save_model("crop", config=tiny_config(norm_eps=1e-12))
    assert export_to("t", "--layout", "timm") == 0
    assert "note: timm's layout does not say that LayerNorm eps is 1e-12" in capsys.readouterr().out
    assert export_to("h", "--layout", "hf") == 0
    out = capsys.readouterr().out
    assert out.count("note:") == 1 and "place of a central crop" in out
    save_model(config=tiny_config(norm_eps=1e-2))
    assert export_to("u", "--layout", "timm") == 1  # timm's logits would be others
    assert "u was not written: read back, its logits differ by" in capsys.readouterr().err
    assert export_to("h", "--layout", "hf") == 0 and not Path("u").exists()


@pytest.mark.parametrize("layout", ["timm", "hf"])
def test_the_card_and_float16(layout, workdir, capsys):
    model, _ = save_model()
    assert export_to("vit", "--layout", layout, "--dtype", "float16") == 0
    lines = capsys.readouterr().out.split("load it with:\n")[1].splitlines()
    image, namespace = next(images(model)), {}
    namespace["image"] = image
    exec("\n".join(line.strip() for line in lines), namespace)
    ours = model(to_input(image, model)).detach()
    assert 1e-5 < (namespace["logits"].detach().float() - ours).abs().max() < 1e-2
    card = Path("vit/README.md").read_text(encoding="utf-8")
    library = {"timm": "timm", "hf": "transformers"}[layout]
    assert card.startswith(f"---\nlibrary_name: {library}\n") and "# vit\n" in card
    assert "accuracy: 0.875" in card and "5 classes: ant, bee" in card
    Path("vit/README.md").write_text("mine")
    assert export_to("vit", "--layout", layout) == 0
    assert Path("vit/README.md").read_text() == "mine"
    assert "note: vit/README.md was there, and stays as it is" in capsys.readouterr().out
    assert load_file("vit/model.safetensors").popitem()[1].dtype == torch.float32


WRONG = [
    ("--layout writes a folder", "out.npz --layout hf"),
    ("the suffix chooses the format", "out"),
    ("other holds notes.txt: give a new folder", "other --layout hf"),
    ("no/out: there is no folder no", "no/out --layout hf"),
    ("--push uploads the folder of a --layout", "m.npz --push hf:me/vit"),
    ("--push uploads the folder of a --layout", "out --layout hf --push me/vit"),
    ("hf:ORG/NAME", "out --layout hf --push hf:vit"),
    ("leave out @", "out --layout hf --push hf:me/vit@v1"),
]


def test_wrong_flags_are_one_line(workdir, capsys):
    save_model()
    Path("other").mkdir()
    Path("other/notes.txt").write_text("")
    before = sorted(workdir.rglob("*"))
    for message, words in WRONG:
        assert export_to(*words.split()) == 2, message
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert sorted(workdir.rglob("*")) == before
    assert export_to("vit", "--layout", "timm") == 0
    own = "vit/model.safetensors"
    for given in (own, "vit"):
        assert run_command(export, "--checkpoint", given, "vit", "--layout", "timm") == 2
        assert "is an input and would be overwritten" in capsys.readouterr().err
    assert export_to("vit", "--layout", "hf") == 0
    assert export_to("vit", "--layout", "timm") == 0
    assert not Path("vit/preprocessor_config.json").exists()  # Hugging Face's


def test_push_and_fetch(server, workdir, capsys):  # noqa: F811
    """Up to the hub's server, and from there by name into another export."""
    model, _ = save_model("cubic, means")
    assert export_to("vit", "--layout", "hf", "--push", "hf:me/pets") == 0
    assert f"uploaded: {server.url}/me/pets/commit/" in capsys.readouterr().out
    (*_, files), folder = server.repos["me/pets"], Path("vit")
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()} and len(files) == 4
    assert run_command(export, "--checkpoint", "hf:me/pets", "again.safetensors") == 0
    again, image = open_model("again.safetensors")[0], torch.randn(2, 3, 32, 32)
    assert (again(image) - model(image)).abs().max() < 1e-5
    server.token = "abc"
    assert export_to("vit", "--layout", "hf", "--push", "hf:me/pets") == 1
    err = capsys.readouterr().err
    assert "vit was not uploaded to hf:me/pets" in err and err.count("\n") == 1
