"""The notebook: stored with its pictures, and run from top to bottom as a reader would."""

import base64
import io
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from models.modeling import VisionTransformer
from tests.bucket import Bucket
from tests.helpers import ROOT, random_model, save_npz, tiny_config

NOTEBOOK = ROOT / "visualize_attention_map.ipynb"
DEFAULT = "imagenet21k+imagenet2012/ViT-B_16-224"


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    data = [output.get("data", {}) for output in outputs(notebook)]
    found = [base64.b64decode(kinds["image/jpeg"]) for kinds in data if "image/jpeg" in kinds]
    return [np.asarray(Image.open(io.BytesIO(jpeg))).astype(int) for jpeg in found]


def printed(notebook):
    return "".join(output.get("text", "") for output in outputs(notebook))


@pytest.fixture
def execute(workdir, monkeypatch):
    """Run it in an empty folder, so that it finds no checkpoint of this machine."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def run(files=(), **settings):
        """`files` (path -> bytes) are what Google's bucket has; `settings` change its defaults."""
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        assert notebook.cells[1].metadata.tags == ["parameters"]
        changes = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
        notebook.cells.insert(2, nbformat.v4.new_code_cell(changes))  # as papermill does
        with Bucket(files) as server:
            monkeypatch.setenv("VIT_MODELS_URL", server.url)
            notebook.cells[2].source = changes.replace("SERVER", server.url)
            return NotebookClient(notebook, timeout=600).execute()

    return run


def test_it_is_stored_small_and_with_its_pictures():
    assert NOTEBOOK.stat().st_size < 2_000_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert f'CHECKPOINT = "{DEFAULT}"' in notebook.cells[1].source  # though the pictures are of
    lines = re.findall(r"(?m)^(\S+), (\S+), (\w+) pixels, image (\S+)$", printed(notebook))
    assert {line[:2] for line in lines} == {("ViT-S_14", "cifar10_checkpoint.bin")}
    cifar = [name for *_, size, name in lines if size == "224x224" and "cifar10" in name]
    assert len(cifar) == 4 and {line[3] for line in lines} >= {"flower.jpg", "china.jpg"}
    assert len(pictures(notebook)) == len(lines) == 12
    assert min(picture.std() for picture in pictures(notebook)) > 10  # none is blank
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # from top to bottom, once


def test_without_any_checkpoint_it_learns_digits(execute):
    done = execute()  # the bucket is empty
    text = printed(done)
    assert f"{DEFAULT} is not here. Instead this is shown: digits\n" in text
    assert len(pictures(done)) == 9 and min(p.std() for p in pictures(done)) > 10
    assert float(text.split("digits: test accuracy ")[1].split("\n")[0]) > 0.75


def test_it_downloads_its_default_with_a_bar_and_takes_an_image_by_its_address(execute, workdir):
    model = random_model(img_size=(32, 32), classes=3)
    save_npz("tiny.npz", model)
    Image.new("RGB", (90, 60), (200, 30, 30)).save("photo.png")
    files = {f"{DEFAULT}.npz": Path("tiny.npz"), "photo.png": Path("photo.png")}
    files = {name: path.read_bytes() for name, path in files.items()}
    done = execute(files, IMAGE="SERVER/photo.png", MORE={"photo.png": (32, 48)})
    text = printed(done)
    assert "B_16-224.npz: 100%" in text and f"checkpoint: checkpoint/{DEFAULT}.npz\n" in text
    assert re.search(r"^ViT, ViT-B_16-224.npz, 32x32 pixels, image http.*/photo.png$", text, re.M)
    assert "ViT, ViT-B_16-224.npz, 32x48 pixels, image photo.png\n" in text
    red = pictures(done)[0][30:220, 5:295]
    assert np.abs(red - (200, 30, 30)).max() < 20  # the image keeps its aspect of 300 to 200


def test_without_a_network_it_takes_what_is_here(execute, workdir):
    model = VisionTransformer(tiny_config(resnet_layers=(1, 1)), (32, 32), 3)  # head of zeros
    embeddings = model.transformer.embeddings
    rows = torch.tensor([1.0, -1, 1, -1]).repeat_interleave(4)  # a position is its row's sign
    embeddings.position_embeddings.data[0, 1:] = rows[:, None]
    filters = embeddings.hybrid_model.root.conv.weight.data
    filters[:] = torch.linspace(0.1, 1, len(filters))[:, None, None, None] * torch.arange(-3, 4)
    Path("checkpoint").mkdir()
    Path("checkpoint/ViT-Mini_8.npz").touch()  # the last choice
    save_npz("checkpoint/mine.npz", model)
    Image.new("RGB", (90, 50), (200, 30, 30)).save("photo.png")
    settings = {"IMG_SIZE": (32, 64), "HEAD": (1, 2), "FUSE": "mean", "DISCARD": 0.5}
    done = execute(IMAGE="photo.png", MORE={}, **settings)
    text = printed(done)
    assert f"{DEFAULT} is not here. Instead this is shown: checkpoint/mine.npz\n" in text
    assert "the head of this checkpoint" in text and "2 layers with 2 heads each" in text
    assert "images of 32x64 pixels in 4x8 patches" in text
    drawn = pictures(done)
    assert len(drawn) == 7  # no more images
    red, green, blue = np.moveaxis(drawn[-2], 2, 0)
    same, opposite = (red > 230) & (blue < 80), (green < 30) & (blue > 60)  # similarity 1 and -1
    assert same[:, :500].mean() > 0.15 and opposite[:, :500].mean() > 0.15
    assert same[:, 30].any() and opposite[:, 30].any()  # the stripes are rows
    first = drawn[-1][:48, :48, 0]  # the one pattern of all filters
    assert abs(first[0, 0] - first[0, -1]) > 230 and np.ptp(first, axis=0).max() < 10
