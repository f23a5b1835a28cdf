"""The checkpoint that comes with the program: whole, as its README says, worth starting from."""

import hashlib
import re

import timm
import torch

import building
import train
from flags import parse_flags
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from models.weights import read_npz
from tests.helpers import ROOT
from utils.classifier import Classifier

FILE = ROOT / "checkpoint/ViT-Mini_8.npz"
CARD = (ROOT / "checkpoint/README.md").read_text()


def test_it_is_the_file_that_its_readme_describes():
    content = FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() in CARD
    assert f"{len(content):,} bytes" in CARD and len(content) < 12e6


def test_it_loads_strictly_and_timm_reads_it():
    model = VisionTransformer(CONFIGS["ViT-Mini_8"], 32, 200)
    arrays = read_npz(FILE)
    assert all(array.dtype == "float16" for array in arrays.values())
    model.load_from(arrays)  # refuses a key too many or too few
    config = model.config
    other = timm.models.VisionTransformer(
        img_size=32, patch_size=8, num_classes=200, embed_dim=config.hidden_size,
        depth=config.num_layers, num_heads=config.num_heads, act_layer="gelu_tanh",
    )  # fmt: skip
    other.load_pretrained(FILE)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        wanted, found = model.eval()(images), other.eval()(images)
    assert wanted.std() > 0.3  # it says something
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    classes = Classifier.open(FILE, device="cpu").classes
    assert len(classes) == 200


def after_twenty_updates(name, *start):
    """Accuracy on the 359 digits held out."""
    assert train.run(["--name", name, *start, "--dataset", "digits", "--img_size", "32",
                      "--train_batch_size", "64", "--optimizer", "adamw", "--learning_rate", "1e-3",
                      "--num_steps", "20", "--warmup_steps", "5", "--crop_min_area", "0.7",
                      "--eval_batch_size", "180"]) == 0  # fmt: skip
    return torch.load(f"output/{name}_checkpoint.bin", weights_only=True)["metrics"]["accuracy"]


def test_twenty_updates_on_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stated = float(re.search(r"twenty updates on digits.*?above (0\.\d+)", CARD, re.S)[1])
    tuned = after_twenty_updates("tuned", "--pretrained_dir", str(FILE))
    scratch = after_twenty_updates("scratch", "--pretrained_dir", "none", "--model_type",
                                   "ViT-Mini_8")  # fmt: skip
    assert tuned > stated > scratch + 0.1


def test_the_size_that_it_was_made_for_is_said(monkeypatch, tmp_path):
    """At the default 224 pixels it costs fifty times as much, and a laptop all its memory."""
    monkeypatch.chdir(tmp_path)
    for size, notes in (("224", 1), ("48", 0), ("32", 0)):
        args = parse_flags(["--name", "x", "--pretrained_dir", str(FILE), "--img_size", size], 1)
        found, _ = building.read_weights(args)
        assert len(found.notes) == notes
        assert not notes or (
            "made for 32x32 pixels" in found.notes[0] and "49 times" in found.notes[0]
        )
