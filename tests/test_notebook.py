"""The notebook: stored with its pictures, and run from top to bottom as a reader would."""

import base64
import io
import os
import re

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from models.modeling import VisionTransformer
from tests.helpers import ROOT, save_bin, tiny_config

NOTEBOOK = ROOT / "visualize_attention_map.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    data = [output.get("data", {}) for output in outputs(notebook)]
    found = [base64.b64decode(kinds["image/jpeg"]) for kinds in data if "image/jpeg" in kinds]
    return [np.asarray(Image.open(io.BytesIO(jpeg))).astype(int) for jpeg in found]


def printed(notebook):
    return "".join(output.get("text", "") for output in outputs(notebook))


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run it in an empty folder, so that it finds no checkpoint of this machine."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def run(**settings):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        for name, value in settings.items():
            source = notebook.cells[1].source
            notebook.cells[1].source = re.sub(f"(?m)^{name} = .*", f"{name} = {value!r}", source)
        folder = {"metadata": {"path": str(tmp_path)}}
        return NotebookClient(notebook, timeout=600, resources=folder).execute()

    return run


def test_it_is_stored_small_and_with_its_pictures():
    assert NOTEBOOK.stat().st_size < 1_000_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(pictures(notebook)) == 10
    assert min(picture.std() for picture in pictures(notebook)) > 10  # none is blank
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # from top to bottom, once
    assert "trained on digits just now" in printed(notebook)


def test_it_runs_without_a_checkpoint(execute):
    done = execute()
    assert len(pictures(done)) == 10 and min(p.std() for p in pictures(done)) > 10
    accuracy = printed(done).split("digits: test accuracy ")[1].split("\n")[0]
    assert float(accuracy) > 0.75


def test_it_runs_with_a_checkpoint_an_image_and_all_settings(execute, tmp_path):
    model = VisionTransformer(tiny_config(resnet_layers=(1, 1)), (32, 48), 3)  # head of zeros
    embeddings = model.transformer.embeddings
    rows = torch.tensor([1.0, -1, 1, -1]).repeat_interleave(6)  # a position is its row's sign
    embeddings.position_embeddings.data[0, 1:] = rows[:, None]
    filters = embeddings.hybrid_model.root.conv.weight.data
    filters[:] = torch.linspace(0.1, 1, len(filters))[:, None, None, None] * torch.arange(-3, 4)
    save_bin(tmp_path / "tiny_checkpoint.bin", model, ("a", "b", "c"))
    Image.new("RGB", (90, 50), (200, 30, 30)).save(tmp_path / "photo.png")
    settings = {"IMAGE": "photo.png", "LAYER": 0, "HEAD": 1, "FUSE": "min", "DISCARD": 0.5}
    done = execute(CHECKPOINT="tiny_checkpoint.bin", IMG_SIZE=(32, 64), **settings)
    text = printed(done)
    assert "checkpoint: tiny_checkpoint.bin" in text and "the head of this checkpoint" in text
    assert "2 layers with 2 heads each" in text
    assert "images of 32x64 pixels in 4x8 patches" in text
    drawn = pictures(done)
    assert len(drawn) == 9  # all but the row of digits
    red, green, blue = np.moveaxis(drawn[-2], 2, 0)
    same, opposite = (red > 230) & (blue < 80), (green < 30) & (blue > 60)  # similarity 1 and -1
    assert same[:, :500].mean() > 0.15 and opposite[:, :500].mean() > 0.15
    assert same[:, 30].any() and opposite[:, 30].any()  # the stripes are rows
    first = drawn[-1][:48, :48, 0]  # the one pattern of all filters
    assert abs(first[0, 0] - first[0, -1]) > 230 and np.ptp(first, axis=0).max() < 10
