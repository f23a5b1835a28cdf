"""Exports, read by timm, onnxruntime and our own loader."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import export
from tests.helpers import random_model, save_bin, tiny_config
from utils.classifier import Classifier, open_model

CLASSES = ("ant", "bee", "cat", "dog", "eel")
MODELS = {
    "token": {},
    "gap": {"config": tiny_config(classifier="gap")},
    "erf, oblong, grey": {"config": tiny_config(gelu="erf", norm_eps=1e-5), "img_size": (16, 64),
                          "in_channels": 1},
}  # fmt: skip


@pytest.fixture(params=MODELS)
def trained(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = random_model(std=0.3, **MODELS[request.param])
    save_bin(tmp_path / "m.bin", model, CLASSES)
    return model


@torch.no_grad()
def gap(model, other, batch=3):
    images = torch.randn(batch, model.in_channels, *model.img_size)
    wanted = model(images)
    return ((other(images) - wanted).abs().max() / wanted.abs().max()).item()


def test_timm_loads_the_card_s_own_lines(trained, capsys):
    """Strictly: load_state_dict refuses any key too many or too few."""
    assert export.run(["m.bin", "m.safetensors"]) == 0
    card = Path("m.safetensors.md").read_text()
    code = "\n".join(re.findall(r"^    (.*)$", card.split("## Use")[1], re.M))
    space = {}
    exec(code, space)
    assert isinstance(space["model"], timm.models.VisionTransformer)
    assert gap(trained, space["model"]) < 1e-5
    assert "| accuracy on held-out images | 0.5000 |" in card and "3. dog" in card
    ours = Classifier.open("m.safetensors", device="cpu")  # its metadata says what arrays do not
    assert ours.classes == CLASSES and ours.model.config == trained.config
    assert ours.model.img_size == trained.img_size and gap(trained, ours.model) < 1e-6
    assert set(load_file("m.safetensors")) == set(space["model"].state_dict())


@pytest.mark.parametrize("size", [(16, 32), (24, 40), (32, 48)], ids=str)
def test_every_grid_comes_back(size, tmp_path, monkeypatch):
    """2 x 4 and 3 x 5 patches make squares with the class token."""
    monkeypatch.chdir(tmp_path)
    model = random_model(std=0.3, img_size=size)
    save_bin("m.bin", model, CLASSES)
    assert export.run(["m.bin", "m.safetensors"]) == 0
    assert gap(model, open_model("m.safetensors")[0]) < 1e-6


def test_another_size_is_not_the_one_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_bin("m.bin", random_model(), CLASSES)
    assert export.run(["m.bin", "m.npz", "--img_size", "48"]) == 0
    assert "held-out" not in Path("m.npz.md").read_text()


def test_npz_is_read_back(trained, capsys):
    assert export.run(["m.bin", "m.npz"]) == 0
    card, out = Path("m.npz.md").read_text(), capsys.readouterr().out
    if trained.config.gelu == "tanh":
        assert gap(trained, open_model("m.npz")[0]) == 0
        assert "predict.py --checkpoint m.npz --labels NAMES" in card and "note:" not in out
    else:  # the format cannot say this model's numerics, nor that its positions are no square
        assert "GELU, LayerNorm eps | erf, 1e-05" in card and "predict.py" not in card
        for text in (card, out):
            assert "readers take tanh and 1e-06" in text and "position_grid=(2, 8)" in text


@pytest.mark.parametrize("name", ["m.npz", "m.safetensors"])
def test_float16_halves_the_file_and_rounds(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = random_model(std=0.3)
    save_bin("m.bin", model, CLASSES)
    assert export.run(["m.bin", name, "--dtype", "float16"]) == 0
    read, half = open_model(name)[0], random_model(std=0.3).half().float()
    for found, wanted in zip(read.parameters(), half.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert 1e-5 < gap(model, read) < 1e-2
    half_size = Path(name).stat().st_size
    assert export.run(["m.bin", name]) == 0
    assert 1.3 < Path(name).stat().st_size / half_size < 2.1  # headers do not shrink


def test_onnx_keeps_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_bin("m.bin", random_model(), CLASSES)
    assert export.run(["m.bin", "m.onnx", "--dtype", "float16"]) == 2
    assert "an .onnx has float32" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.bin"]


@pytest.mark.filterwarnings("ignore")
def test_onnx_with_any_batch(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    model = random_model(std=0.3)
    save_bin("m.bin", model, CLASSES)
    assert export.run(["m.bin", "m.onnx"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.onnx", "m.onnx.md"]
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])

    def other(images):
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    assert max(gap(model, other, batch) for batch in (1, 2, 7)) < 1e-4
    assert '"bee"' in session.get_modelmeta().custom_metadata_map["classes"]


def test_wrong_words_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_bin("m.bin", random_model(), CLASSES)
    save_bin("deep.bin", random_model(tiny_config(representation_size=8)), CLASSES)
    (tmp_path / "d.npz").mkdir()
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    cases = {
        "the suffix says the format": ["m.bin", "m.pt"],
        "no such folder: gone": ["m.bin", "gone/m.npz"],
        "d.npz is a folder": ["m.bin", "d.npz"],
        "x.bin: no such file": ["x.bin", "m.npz"],
        "ONNX needs no_such_package: pip install -r requirements-export.txt": ["m.bin", "m.onnx"],
        "timm has no pre_logits layer": ["deep.bin", "m.safetensors"],
    }
    for message, argv in cases.items():
        assert export.run(argv) == 2, message
        err = capsys.readouterr().err
        assert message in err and err.startswith("export.py: error: ") and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "deep.bin", "m.bin"]


def test_other_words_and_another_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_bin("m.bin", random_model(), CLASSES)
    Path("names.txt").write_text("eins\nzwei\ndrei\nvier\nfünf\n")
    flags = ["m.bin", "m.safetensors", "--labels", "names.txt", "--img_size", "16"]
    assert export.run(flags) == 0
    found = Classifier.open("m.safetensors", device="cpu")
    assert found.classes[4] == "fünf" and found.model.img_size == (16, 16)
    assert export.run([*flags, "--model_type", "ViT-L_16"]) == 2
    assert "m.bin holds no known variant, not ViT-L_16" in capsys.readouterr().err


def test_weights_beyond_float16(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = random_model()
    with torch.no_grad():
        model.head.bias[2] = 1e5
    save_bin("m.bin", model, CLASSES)
    assert export.run(["m.bin", "m.npz", "--dtype", "float16"]) == 2
    err = capsys.readouterr().err
    assert "m.bin holds 100000, float16 ends at 65504" in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.bin"]


def test_a_folder_that_takes_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_bin("m.bin", random_model(), CLASSES)
    assert export.run(["m.bin", "/proc/m.safetensors"]) == 1
    err = capsys.readouterr().err
    assert "/proc/m.safetensors could not be written (" in err and err.count("\n") == 1


def test_what_does_not_read_back_is_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_bin("m.bin", random_model(), CLASSES)
    Path("m.npz").write_text("the one before")
    honest = export.to_official

    def wrong(state, config, dtype):
        arrays = honest(state, config, dtype)
        return arrays | {"head/bias": arrays["head/bias"] + np.float32(1e-3)}

    monkeypatch.setattr(export, "to_official", wrong)
    assert export.run(["m.bin", "m.npz"]) == 2
    assert "its logits differ by" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.npz"]
    assert Path("m.npz").read_text() == "the one before"


def test_a_link_to_be_written_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_bin("m.bin", random_model(), CLASSES)
    Path("far").mkdir()
    Path("m.npz").symlink_to("far/real.npz")
    assert export.run(["m.bin", "m.npz"]) == 0
    assert Path("m.npz").is_symlink() and not Path("far/real.npz").is_symlink()
    assert sorted(path.name for path in Path("far").iterdir()) == ["real.npz"]
