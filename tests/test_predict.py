"""predict.py as a user meets it, and `--eval_only` beside it: the two must agree."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import attend
import evaluation
import export
import fewshot
import predict
import train
from models.download import DownloadError
from models.weights import to_official
from tests.helpers import random_model, save_bin, tiny_config
from utils.checkpoint import write_npz
from utils.classifier import Classifier

CLASSES = ("ant", "bee", "cat")
FOLDER = ["--dataset", "folder", "--data_dir", "d", "--num_workers", "0"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_images(folder, each, side):
    """`each` images of every class, sized `side` or up to twice as much: noise on a tint."""
    noise = np.random.default_rng(3)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            size = (side, side) if side <= 64 else (side + int(noise.integers(side)), side)
            pixels = noise.integers(0, 256, (*size, 3)) * 0.7 + 70 * np.eye(3)[label]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture
def trained(tmp_path):
    model = random_model(img_size=(32, 24), classes=3, std=0.2)
    save_bin(tmp_path / "m.bin", model, CLASSES)
    return model


def predicted(capsys, *argv, status=0):
    capsys.readouterr()
    assert predict.run(["--checkpoint", "m.bin", "--format", "jsonl", *argv]) == status
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


@pytest.mark.parametrize("side", [20, 70], ids=["in memory", "files"])
def test_a_folder_with_broken_files_agrees_with_eval_only(side, tmp_path, trained, capsys):
    write_images(tmp_path / "d" / "test", 40 if side == 20 else 12, side)
    flags = [
        "--dataset",
        "folder",
        "--data_dir",
        "d",
        "--eval_batch_size",
        "7",
        "--num_workers",
        "0",
    ]
    assert train.run(["--name", "e", "--eval_only", "m.bin", *flags]) == 0
    results = json.loads((tmp_path / "output" / "e_results.json").read_text())
    whole = (tmp_path / "d" / "test" / "ant" / "0.png").read_bytes()
    for name, content in (("bee/x.png", b"no image"), ("cat/y.png", whole[:600]), ("a.jpg", b"")):
        (tmp_path / "d" / "test" / name).write_bytes(content)
    (tmp_path / "d" / "test" / "ant" / "._0.png").write_bytes(b"a Mac's remark on 0.png")

    rows, err = predicted(capsys, "d", "--batch_size", "5", status=1)
    for name in ("bee/x.png", "cat/y.png", "a.jpg"):
        assert f"predict.py: d/test/{name} is not a readable image" in err
    count = results["images"]
    assert len(rows) == count and f"3 of {count + 3} files could not be read" in err
    right = sum(row["top"][0]["class"] == row["file"].split("/")[2] for row in rows)
    assert right / count == results["accuracy"] and 0 < right < count
    shares = [entry["probability"] for entry in rows[0]["top"]]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and shares == sorted(shares, reverse=True)


def test_names_from_everywhere_in_every_format(tmp_path, trained, capsys, monkeypatch):
    write_images(tmp_path / "d", 2, 20)
    stdin = io.BytesIO(b"d/cat/1.png\n\nd/gone\xff.png\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, "utf-8", errors="strict"))
    rows, err = predicted(capsys, "d/bee/0.png", "d/ant", "d/*/1.png", "-", status=1)
    names = ["d/bee/0.png", "d/ant/0.png", "d/ant/1.png", "d/ant/1.png", "d/bee/1.png",
             "d/cat/1.png", "d/cat/1.png"]  # fmt: skip
    assert [row["file"] for row in rows] == names and "d/gone\\udcff.png" in err

    common = ["--checkpoint", "m.bin", "d/ant", "--top_k", "2"]
    assert predict.run([*common, "--format", "csv", "--output", "p.csv"]) == 0
    with open("p.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["file"][-5:], row["rank"]) for row in table[:3]] == [
        ("0.png", "1"), ("0.png", "2"), ("1.png", "1")]  # fmt: skip
    best = rows[1]["top"][0]
    assert table[0]["class"] == best["class"] and len(table) == 4
    assert float(table[0]["probability"]) == pytest.approx(best["probability"], abs=2e-6)
    assert predict.run(common) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("d/ant/0.png: ") and table[0]["class"] in line


def test_three_lines_of_python_and_exact_probabilities(tmp_path, trained):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    (found,) = Classifier.open("m.bin").predict(["a.png"])
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = trained(images)[0].softmax(0)
    for name, share in found.top:
        assert share == pytest.approx(wanted[CLASSES.index(name)].item(), abs=1e-5)


def test_a_grey_model_is_given_grey_images(tmp_path):
    model = random_model(classes=3, in_channels=1, std=0.3)
    save_bin("grey.bin", model, CLASSES)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    grey = np.array(Image.fromarray(pixels).convert("L"))
    (found,) = Classifier.open("grey.bin", device="cpu").predict(["a.png"])
    with torch.no_grad():
        wanted = model(torch.from_numpy(grey)[None, None] / 127.5 - 1)[0].softmax(0)
    assert dict(found.top) == pytest.approx(dict(zip(CLASSES, wanted.tolist(), strict=True)))


def test_an_npz_with_its_own_head_and_labels(tmp_path, capsys):
    """pre_logits and the stored size come from the file; another size resizes positions."""
    model = random_model(tiny_config(representation_size=24), 40, 3, std=0.2)
    write_npz("m.npz", to_official(model.state_dict(), model.config))
    write_images(tmp_path / "d", 1, 20)
    (tmp_path / "names.txt").write_text("eins\nzwei\ndrei\n")
    trained = Classifier.open("m.npz", labels="names.txt")
    assert trained.model.img_size == (40, 40) and trained.classes == ("eins", "zwei", "drei")
    noise = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(trained.model(noise), model(noise))
    assert Classifier.open("m.npz").classes == ("0", "1", "2")
    assert Classifier.open("m.npz", img_size=24).model.grid == (3, 3)
    # Folders of an npz are its classes in sorted order.
    flags = [*FOLDER, "--pretrained_dir", "m.npz"]
    assert train.run(["--name", "n", "--eval_only", *flags]) == 0
    assert "40x40 pixels" in capsys.readouterr().out


def test_every_wrong_word_is_one_line_and_exit_2(tmp_path, trained, capsys):
    model = random_model(classes=3)
    arrays = to_official(model.state_dict(), model.config)
    write_npz("zero.npz", arrays | {"head/kernel": arrays["head/kernel"] * 0})
    write_npz("none.npz", {k: v for k, v in arrays.items() if not k.startswith("head/")})
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.txt").write_text("a\nb\n")
    Image.new("RGB", (8, 8)).save("a.png")
    cases = {
        "its head is all zeros, so it knows no classes yet": ["zero.npz", "a.png"],
        "none.npz: has no head": ["none.npz", "a.png"],
        "gone.npz: no such file": ["gone.npz", "a.png"],
        "gone.png: no such file or folder": ["m.bin", "gone.png"],
        "empty holds no images": ["m.bin", "empty"],
        "two.txt has 2 class names, the model 3": ["m.bin", "a.png", "--labels", "two.txt"],
        "m.bin: image size 30x30 is not a multiple": ["m.bin", "a.png", "--img_size", "30"],
        "m.bin holds no known variant, not ViT-L_16": ["m.bin", "a.png", "--model_type",
                                                       "ViT-L_16"],
        "m.npz: the file fits no known variant, not ViT-L_16": ["m.npz", "a.png", "--model_type",
                                                                "ViT-L_16"],
        "two.bin: its images have 2 channels": ["two.bin", "a.png"],
        "two.npz: its images have 2 channels": ["two.npz", "a.png"],
        "--labels gone.txt: no such file": ["m.bin", "a.png", "--labels", "gone.txt"],
        "--output m.bin is an input": ["m.bin", "a.png", "--output", "m.bin"],
        "--output ./a.png is an input": ["m.bin", "a.png", "--output", "./a.png"],
        "--output two.txt is an input": ["m.bin", "a.png", "--labels", "two.txt", "--output",
                                         "two.txt"],
        "--attention photos/seen lies in a folder": ["m.bin", "photos", "--attention",
                                                     "photos/seen"],
        "m.onnx: an .onnx is for other programs": ["m.onnx", "a.png"],
        "run_last.pt is a saved run, to be resumed": ["run_last.pt", "a.png"],
        "--attention two.txt cannot be made: File exists": ["m.bin", "a.png", "--attention",
                                                            "two.txt"],
    }  # fmt: skip
    write_npz("m.npz", arrays)
    (tmp_path / "run_last.pt").touch()
    two = random_model(classes=3, in_channels=2)
    save_bin("two.bin", two, CLASSES)
    write_npz("two.npz", to_official(two.state_dict(), two.config))
    (tmp_path / "m.onnx").touch()
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/a.png")
    assert predict.run(["--checkpoint", "m.bin", "a.png", "--output", "gone/p"]) == 2
    assert "--output gone/p: no such folder: gone" in capsys.readouterr().err
    for message, (checkpoint, *argv) in cases.items():
        assert predict.run(["--checkpoint", checkpoint, "--output", "p", *argv]) == 2, message
        err = capsys.readouterr().err
        assert message in err and err.startswith("predict.py: error: "), err
        assert err.count("\n") == 1 and not (tmp_path / "p").exists()


def test_attention_overlays(tmp_path, trained):
    pytest.importorskip("utils.attention")
    write_images(tmp_path / "d", 1, 70)
    assert predict.run(["--checkpoint", "m.bin", "d", "--attention", "seen"]) == 0
    for name in CLASSES:
        drawn = tmp_path / "seen" / f"d_{name}_0.png.png"
        with Image.open(drawn) as drawn, Image.open(f"d/{name}/0.png") as image:
            assert drawn.size == image.size


def test_every_image_has_its_own_overlay(tmp_path, trained):
    long = tmp_path / ("x" * 120) / ("y" * 120)
    for folder in (long, tmp_path / "p", tmp_path / "p" / "p"):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 80), "red").save(folder / "1.png")
    paths = [str(long / "1.png"), "p/1.png", "p/../p/1.png", "./p/1.png", "p/p/1.png"]
    assert predict.run(["--checkpoint", "m.bin", *paths, "--attention", "seen"]) == 0
    names = {p.name for p in (tmp_path / "seen").iterdir()}
    assert len(names) == 5 and {"p_1.png.png", "p_p_1.png.png"} < names


# ------------------------------------------------------------------------------------ --eval_only


def test_eval_only_is_about_the_files_that_are_named(tmp_path, trained, capsys):
    """Class folders by name, some of them missing; another model's classes are refused."""
    write_images(tmp_path / "d" / "val", 3, 20)
    for name in CLASSES[:2]:
        (tmp_path / "d" / "val" / name).rename(tmp_path / f"away_{name}")
    flags = ["--name", "e", *FOLDER]
    assert train.run([*flags, "--eval_only", "m.bin"]) == 0
    results = json.loads((tmp_path / "output" / "e_results.json").read_text())
    assert results["split"] == "val" and [r["images"] for r in results["classes"]] == [0, 0, 3]
    (tmp_path / "d" / "val" / "cat").rename(tmp_path / "d" / "val" / "dog")
    assert train.run([*flags, "--eval_only", "m.bin"]) == 2
    assert "has the class 'dog', which the model's 3 classes" in capsys.readouterr().err
    assert train.run([*flags, "--eval_only"]) == 2  # the best weights of --name e
    assert "output/e_checkpoint.bin: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--eval_only", "--pretrained_dir"], ["--eval_only"]])
def test_eval_only_fetches_what_is_not_here(given, tmp_path, trained, monkeypatch, capsys):
    write_images(tmp_path / "d", 1, 20)
    write_npz("m.npz", to_official(trained.state_dict(), tiny_config()))
    flags = ["--name", "e", "--img_size", "32x24", *FOLDER]
    assert train.run([*flags, *given, "sam/ViT-B_16", "--offline"]) == 2
    assert "--offline forbids fetching https://" in capsys.readouterr().err
    asked = []

    def locate(name, *, variant, head, offline):
        asked.append((name, head, offline))
        return "m.npz"

    monkeypatch.setattr(evaluation, "locate", locate)
    assert train.run([*flags, *given, "sam/ViT-B_16"]) == 0
    assert asked == [("sam/ViT-B_16", True, False)]
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("script, argv", [
    (predict, ["--checkpoint", "sam/ViT-B_16", "a.png"]), (export, ["sam/ViT-B_16", "m.npz"]),
    (fewshot, ["--checkpoint", "sam/ViT-B_16", "--dataset", "digits"]),
    (attend, ["--checkpoint", "sam/ViT-B_16"])])  # fmt: skip
def test_every_script_fetches_google_s_files(script, argv, tmp_path, trained, monkeypatch):
    Image.new("RGB", (8, 8)).save("a.png")
    asked = []

    def fetch(name, **options):
        asked.append((name, options.get("head", False)))
        raise DownloadError("enough")

    monkeypatch.setattr(script, "locate", fetch)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    assert script.run(argv) == 2
    assert asked == [("sam/ViT-B_16", script in (predict, export))]


def test_links_are_followed_once_and_broken_ones_are_named(tmp_path, trained, capsys):
    (tmp_path / "real").mkdir()
    Image.new("RGB", (8, 8)).save("real/a.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "lost.png").symlink_to("/gone/lost.png")
    assert predict.run(["--checkpoint", "m.bin", "photos"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("photos/more/a.png: ") and out.count("\n") == 1
    assert "photos/lost.png is not a readable image (No such file or directory)" in err
