"""Exports, read by timm, by onnxruntime and by our own loader."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import export
from models.checkpoints import open_model
from tests.helpers import random_model, run_command, save_bin, tiny_config

CLASSES = ("ant", "bee", "cat", "dog", "eel")
ODD = {"config": tiny_config(gelu="erf", norm_eps=1e-3), "img_size": (16, 64), "in_channels": 1}
MODELS = {"token": {}, "gap": {"config": tiny_config(classifier="gap")}, "erf, oblong, grey": ODD}


@pytest.fixture(params=MODELS)
def trained(request, workdir):
    return save_model(**MODELS[request.param])


def save_model(name="m.bin", **options):
    model = random_model(std=0.3, **options)
    save_bin(name, model, CLASSES)
    return model


def export_to(*words, checkpoint="m.bin"):
    return run_command(export, "--checkpoint", checkpoint, *words)


@torch.no_grad()
def gap(model, other, batch_size=3):
    """Largest difference of logits, relative to the largest logit."""
    images = torch.randn(batch_size, model.in_channels, *model.img_size)
    wanted = model(images)
    return ((other(images) - wanted).abs().max() / wanted.abs().max()).item()


def test_timm_loads_it_by_the_printed_lines(trained, capsys):
    """Strictly: load_state_dict refuses any key too many or too few."""
    assert export_to("m.safetensors") == 0
    lines = capsys.readouterr().out.split("load it with:\n")[1].splitlines()
    namespace = {}
    exec("\n".join(line.strip() for line in lines), namespace)
    assert isinstance(namespace["model"], timm.models.VisionTransformer)
    assert gap(trained, namespace["model"].eval()) < 1e-5
    assert set(load_file("m.safetensors")) == set(namespace["model"].state_dict())
    ours, metadata = open_model("m.safetensors")  # its metadata tells what tensors do not
    assert metadata.classes == CLASSES and ours.config == trained.config
    assert ours.img_size == trained.img_size and gap(trained, ours) < 1e-6


HYBRID = tiny_config(resnet_layers=(1, 1))  # 37 is an odd side, which SAME padding rounds up


@pytest.mark.parametrize("size, config", [((16, 32), None), ((24, 40), None), ((37, 64), HYBRID)])
def test_every_grid_comes_back(size, config, workdir):
    """2 x 4 and 3 x 5 patches make squares with the class token."""
    model = save_model(img_size=size, config=config)
    assert export_to("m.safetensors") == 0
    ours, _ = open_model("m.safetensors")
    assert ours.img_size == size and gap(model, ours) < 1e-6


def test_npz_is_read_back(trained, capsys):
    assert export_to("m.npz") == 0
    out = capsys.readouterr().out
    assert "input: the image as " in out and "5 logits" in out
    height, width = trained.img_size
    assert f"{height}x{width} float32 (bilinear, squash to {height}x{width})" in out
    assert "note: Google's format holds no class names" in out
    if trained.config.gelu == "tanh":
        assert gap(trained, open_model("m.npz")[0]) == 0 and out.count("note:") == 1
    else:  # the format tells neither this model's numerics nor that its grid is no square
        assert "GELU is erf and LayerNorm eps 0.001: readers take tanh" in out
        assert "grid of 2x8" in out and "position_grid=(2, 8)" in out


@pytest.mark.parametrize("name", ["m.npz", "m.safetensors"])
def test_float16_halves_the_file_and_rounds(name, workdir):
    model = save_model()
    assert export_to(name, "--dtype", "float16") == 0
    read, half_size = open_model(name)[0], Path(name).stat().st_size
    assert 1e-5 < gap(model, read) < 1e-2
    assert export_to(name) == 0
    assert 1.3 < Path(name).stat().st_size / half_size < 2.1  # headers do not shrink
    for found, wanted in zip(read.parameters(), model.half().parameters(), strict=True):
        assert torch.equal(found, wanted.float())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("external", [False, True], ids=["one file", "external weights"])
def test_onnx_with_any_batch_size(external, workdir, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if external:  # as for models of 2 GiB
        monkeypatch.setattr(export, "PROTOBUF_LIMIT", 1000)
    model = save_model()
    assert export_to("m.onnx") == 0
    files = {path.name for path in workdir.iterdir()}
    assert files == {"m.bin", "m.onnx"} | ({"m.onnx.data"} if external else set())
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])

    def other(images):
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    assert max(gap(model, other, batch_size) for batch_size in (1, 2, 7)) < 1e-4
    stored = session.get_modelmeta().custom_metadata_map
    assert '"bee"' in stored["classes"] and stored["img_size"] == "[32, 32]"


WRONG_FLAGS = [
    ("m.bin", "the suffix chooses the format", "m.pt"),
    ("x.bin", "x.bin: no such file", "m.npz"),
    ("m.bin", "no_such_package: pip install -r requirements-export.txt", "m.onnx"),
    ("m.bin", "an .onnx has float32", "m.onnx --dtype float16"),
    ("m.bin", "not ViT-L_16", "m.npz --model_type ViT-L_16"),
    ("deep.bin", "timm has no pre_logits layer", "m.safetensors"),
    ("large.bin", "holds 100000, float16 ends at 65504", "m.npz --dtype float16"),
    ("untrained.bin", "its head is all zeros", "m.npz"),
]


def test_wrong_flags_are_one_line(workdir, monkeypatch, capsys):
    model = save_model()
    save_model("deep.bin", config=tiny_config(representation_size=8))
    torch.nn.init.constant_(model.head.bias, 1e5)
    save_bin("large.bin", model, CLASSES)
    torch.nn.init.zeros_(model.head.weight)
    save_bin("untrained.bin", model, CLASSES)
    before = sorted(workdir.iterdir())
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    for checkpoint, message, words in WRONG_FLAGS:
        assert export_to(*words.split(), checkpoint=checkpoint) == 2, message
        err = capsys.readouterr().err
        assert message in err and err.startswith("export.py: error: ") and err.count("\n") == 1
    assert sorted(workdir.iterdir()) == before


def test_other_labels_and_another_size(workdir, capsys):
    save_model()
    Path("names.txt").write_text("eins\nzwei\ndrei\nvier\nfünf\n", encoding="utf-8")
    assert export_to("m.safetensors", "--labels", "names.txt", "--img_size", "16") == 0
    assert export_to("n.safetensors", checkpoint="m.safetensors") == 0  # an export of an export
    for name in ("m.safetensors", "n.safetensors"):
        ours, metadata = open_model(name)
        assert metadata.classes[4] == "fünf" and ours.img_size == (16, 16)
    assert export_to("m.safetensors", checkpoint="m.safetensors") == 2
    assert "is an input and would be overwritten" in capsys.readouterr().err


def test_what_does_not_read_back_is_not_kept(workdir, monkeypatch, capsys):
    save_model()
    honest = export.write
    Path("m.npz").write_text("the one before")

    def write(path, checkpoint, dtype):
        state = checkpoint.state | {"head.bias": checkpoint.state["head.bias"] + 1e-3}
        honest(path, replace(checkpoint, state=state), dtype)

    monkeypatch.setattr(export, "write", write)
    assert export_to("m.npz") == 1
    assert "m.npz was not written: read back, its logits differ by" in capsys.readouterr().err
    assert sorted(path.name for path in workdir.iterdir()) == ["m.bin", "m.npz"]
    assert Path("m.npz").read_text() == "the one before"
