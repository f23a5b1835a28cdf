"""Exports, read by timm, by onnxruntime and by our own loader."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import export
import predict
from models.checkpoints import open_model, write
from models.pixels import ALIASED, Pixels
from tests.helpers import checkpoint_of, random_model, run_command, save_bin, tiny_config
from utils import onnx_graph

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
        monkeypatch.setattr(onnx_graph, "PROTOBUF_LIMIT", 1000)
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


@pytest.mark.filterwarnings("ignore")
def test_onnx_in_float16(workdir, capsys):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = save_model(config=tiny_config(hidden_size=128, mlp_dim=512, num_layers=1))
    assert export_to("m.onnx") == 0 and export_to("h.onnx", "--dtype", "float16") == 0
    assert capsys.readouterr().out.count(f"ONNX opset {onnx_graph.OPSET}): read back") == 2
    (opset,) = onnx.load("h.onnx").opset_import
    assert opset.version == onnx_graph.OPSET == 20
    assert 1.7 < Path("m.onnx").stat().st_size / Path("h.onnx").stat().st_size < 2.1
    session = onnxruntime.InferenceSession("h.onnx", providers=["CPUExecutionProvider"])

    def other(images):  # float32 in and out
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    assert 1e-5 < gap(model, other) < 1e-2 and next(model.parameters()).dtype == torch.float32


PIXELS = {
    "plain": ({}, Pixels()),
    "cubic, oblong": (
        {"img_size": (16, 24)},
        Pixels("bicubic", "smaller_side", 0.8, mean=(0.4,) * 3, std=(0.3,) * 3),
    ),
    "square": ({}, Pixels("bilinear", "smaller_side", 0.875)),
    "aliased, oblong": ({"img_size": (32, 64)}, Pixels(ALIASED, "smaller_side", 0.7)),
    "grey": ({"in_channels": 1}, Pixels(ALIASED, "squash", 32 / 35, True)),
}
# The last is a strip, whose ends predict.py cuts off.
SIDES = [(32, 32), (70, 91), (301, 211), (1, 1), (33, 540), (700, 20), (101, 203)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PIXELS)
def test_onnx_with_pixels_predicts_as_predict_does(case, workdir, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    options, pixels = PIXELS[case]
    model = random_model(tiny_config(num_layers=1), std=0.4, **options)
    pixels = replace(pixels, mean=pixels.mean[: model.in_channels])
    write("m.bin", checkpoint_of(model, CLASSES, pixels=pixels))
    assert export_to("m.onnx", "--with_pixels") == 0
    assert "its probabilities differ by" in capsys.readouterr().out
    paths = []
    for height, width in SIDES:
        noise = np.random.default_rng(height).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        hard = height == 70  # a cubic leaves 0..255 at hard edges
        how = Image.Resampling.NEAREST if hard else Image.Resampling.BICUBIC
        image = Image.fromarray(noise).resize((width, height), how)
        paths.append(f"{height}.png")
        image.convert("L" if model.in_channels == 1 else "RGB").save(paths[-1])
    assert run_command(predict, *paths, "--checkpoint", "m.bin", "--format", "jsonl") == 0
    rows = [json.loads(line)["top"] for line in capsys.readouterr().out.splitlines()]
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    for path, row in zip(paths, rows, strict=True):
        pixels = np.array(Image.open(path))
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        (found,) = session.run(["probabilities"], {"image": pixels})
        wanted = {each["class"]: each["probability"] for each in row}
        assert abs(found - [wanted[name] for name in CLASSES]).max() < 4e-4, path


@pytest.mark.filterwarnings("ignore")
def test_onnx_with_wrong_pixels_is_not_kept(workdir, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    save_model(config=tiny_config(num_layers=1))
    honest = onnx_graph.side_weights
    monkeypatch.setattr(onnx_graph, "side_weights", lambda *given: 0.9 * honest(*given))
    assert export_to("m.onnx", "--with_pixels") == 1 and not Path("m.onnx").exists()
    assert "its probabilities differ by" in capsys.readouterr().err
    save_model("four.bin", in_channels=4)
    assert export_to("m.onnx", "--with_pixels", checkpoint="four.bin") == 2
    assert "reads 1 or 3 channels, not 4" in capsys.readouterr().err


WRONG_FLAGS = [
    ("m.bin", "the suffix chooses the format", "m.pt"),
    ("x.bin", "x.bin: no such file", "m.npz"),
    ("m.bin", "no_such_package: pip install -r requirements-export.txt", "m.onnx"),
    ("m.bin", "--with_pixels is for .onnx", "m.npz --with_pixels"),
    ("m.bin", "--with_pixels is for .onnx", "m --layout timm --with_pixels"),
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
