"""The checkpoint that comes with the program: complete, as its README says, worth starting from."""

import hashlib
import json
import re

import timm
import torch

import train
from models.checkpoints import open_model, read_npz
from tests.helpers import ROOT, run_command
from utils.classifier import Classifier

FILE = ROOT / "checkpoint/ViT-Mini_8.npz"
CARD = (ROOT / "checkpoint/README.md").read_text()


def test_it_is_the_file_that_its_readme_describes():
    content = FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() in CARD
    assert f"{len(content):,} bytes" in CARD and len(content) < 12e6
    arrays = read_npz(FILE)
    assert all(array.dtype == "float16" for array in arrays.values())
    assert f"{sum(array.size for array in arrays.values()):,} parameters" in CARD


def test_it_loads_completely_and_timm_reads_it():
    model, metadata = open_model(FILE, variant="ViT-Mini_8")
    assert metadata.img_size == (32, 32) and model.num_classes == 200
    assert metadata.notes == [f"{len(model.state_dict())} tensors loaded"]
    notes = open_model(FILE, img_size=224)[1].notes  # the default of training
    assert "the file was made for 32 pixels, 49 times fewer patches" in notes[0]
    config = model.config
    size = {"img_size": 32, "patch_size": 8, "num_classes": 200, "num_heads": config.num_heads}
    size |= {"embed_dim": config.hidden_size, "depth": config.num_layers}
    other = timm.models.VisionTransformer(**size, act_layer="gelu_tanh")
    other.load_pretrained(FILE)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        ours, theirs = model(images), other.eval()(images)
    assert ours.std() > 0.3  # its head is trained
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()
    labels = FILE.with_suffix(".txt")
    assert len(Classifier.open(FILE, labels=labels, device="cpu").classes) == 200


def accuracy_after_twenty_steps(name, *start) -> float:
    """Accuracy on the validation set of 359 digits."""
    flags = (
        "--dataset digits --img_size 32 --train_batch_size 64 --optimizer adamw --num_steps 20 "
        "--learning_rate 1e-3 --warmup_steps 5 --crop_min_area 0.7 --eval_batch_size 180"
    )
    assert run_command(train, "--name", name, *start, *flags.split()) == 0
    with open(f"output/{name}_results.json") as file:
        return json.load(file)["accuracy"]


def test_twenty_steps_on_digits(workdir):
    stated = re.search(r"twenty \w+ on digits.*?above (0\.\d+)", CARD, re.DOTALL)
    pretrained = accuracy_after_twenty_steps("pretrained", "--pretrained_dir", FILE)
    new = ("--pretrained_dir", "none", "--model_type", "ViT-Mini_8")
    scratch = accuracy_after_twenty_steps("scratch", *new)
    assert pretrained > float(stated[1]) > scratch + 0.1
