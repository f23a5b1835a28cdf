"""predict.py as a user meets it, and evaluate.py beside it: the two must agree."""

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
import evaluate
import export
import predict
import probe
from models import zoo
from models.checkpoints import write
from models.errors import UserError
from tests.helpers import (
    checkpoint_of,
    random_model,
    run_command,
    save_bin,
    save_npz,
    tiny_config,
    write_image,
    write_images,
)
from utils.classifier import Classifier

CLASSES = ("ant", "bee", "cat")
pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture
def trained(workdir):
    model = random_model(img_size=(32, 24), classes=3, std=0.2)
    save_bin("m.bin", model, CLASSES)
    return model


def predicted(capsys, *argv, status=0):
    """(predictions, stderr) of the command with the model of `trained`."""
    capsys.readouterr()
    assert run_command(predict, "--checkpoint", "m.bin", "--format", "jsonl", *argv) == status
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


@pytest.mark.parametrize("size", [(20, 20), (70, 90)], ids=["in memory", "files"])
def test_a_folder_with_damaged_files_agrees_with_evaluate(size, workdir, trained, capsys):
    test = workdir / "d" / "test"
    write_images(test, CLASSES, count=40 if size == (20, 20) else 12, size=size)
    data = ["--dataset", "folder", "--data_dir", "d", "--batch_size", "7", "--num_workers", "0"]
    assert run_command(evaluate, "--name", "e", "--checkpoint", "m.bin", *data) == 0
    results = json.loads((workdir / "output" / "e_results.json").read_text())
    image = (test / "ant" / "ant0.png").read_bytes()
    for name, content in (("bee/x.png", b"no image"), ("cat/y.png", image[:600]), ("a.jpg", b"")):
        (test / name).write_bytes(content)
    (test / "ant" / "._0.png").write_bytes(b"hidden")

    rows, err = predicted(capsys, "d", "--batch_size", "5", status=1)
    for name in ("bee/x.png", "cat/y.png", "a.jpg"):
        assert f"predict.py: d/test/{name} is not a readable image" in err
    count = results["images"]
    assert len(rows) == count and f"3 of {count + 3} files could not be read" in err
    correct = sum(row["top"][0]["class"] == row["file"].split("/")[2] for row in rows)
    assert correct / count == results["accuracy"] and 0 < correct < count
    shares = [entry["probability"] for entry in rows[0]["top"]]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and shares == sorted(shares, reverse=True)


def test_names_from_everywhere_in_every_format(workdir, trained, capsys, monkeypatch):
    write_images(workdir / "d", CLASSES, size=(20, 20))
    stdin = io.BytesIO(b"d/cat/cat1.png\0d/dog/dog1.png\0")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, "utf-8", errors="strict"))
    with pytest.raises(UserError, match="leave out -print0"):
        predict.find_images(["-"])
    stdin = io.BytesIO(b"d/cat/cat1.png\n\nd/gone\xff.png\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, "utf-8", errors="strict"))
    rows, err = predicted(capsys, "d/bee/bee0.png", "d/ant", "d/*/*1.png", "-", status=1)
    names = ["bee0", "ant0", "ant1", "ant1", "bee1", "cat1", "cat1"]
    assert [row["file"] for row in rows] == [f"d/{name[:3]}/{name}.png" for name in names]
    assert "d/gone\\udcff.png" in err

    common = ["--checkpoint", "m.bin", "d/ant", "--top_k", "2"]
    assert run_command(predict, *common, "--format", "csv", "--output", "p.csv") == 0
    with open("p.csv", newline="") as file:
        table = list(csv.DictReader(file))
    ranks = [(row["file"][-5:], row["rank"]) for row in table]
    assert ranks == [("0.png", "1"), ("0.png", "2"), ("1.png", "1"), ("1.png", "2")]
    best = rows[1]["top"][0]
    assert table[0]["class"] == best["class"]
    assert float(table[0]["probability"]) == pytest.approx(best["probability"], abs=2e-6)
    whole = ["--checkpoint", "m.bin", "d/ant", "--top_k", "all"]
    for form, lines in (("table", 2), ("csv", 7), ("jsonl", 2)):
        capsys.readouterr()
        assert run_command(predict, *whole, "--format", form) == 0
        text = capsys.readouterr().out
        assert text.count("\n") == lines and all(text.count(name) >= 2 for name in ("bee", "cat"))
    assert json.loads(text.splitlines()[0])["top"][0]["class"] == best["class"]
    assert run_command(predict, *whole, "--top_k", "some") == 2
    assert "--top_k: 'some' is not" in capsys.readouterr().err
    capsys.readouterr()
    assert run_command(predict, *common) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("d/ant/ant0.png: ") and table[0]["class"] in line


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_three_lines_of_python_and_exact_probabilities(channels, mode, workdir):
    model = random_model(img_size=(32, 24), classes=3, in_channels=channels, std=0.3)
    save_bin("m.bin", model, CLASSES)
    image = Image.open(write_image(workdir / "a.png", size=(24, 32)))
    (found,) = Classifier.open("m.bin", device="cpu").predict(["a.png"])
    pixels = np.array(image.convert(mode)).reshape(32, 24, channels).transpose(2, 0, 1)
    assert (found.input.numpy() == pixels).all()
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels)[None] / 127.5 - 1)[0].softmax(0).tolist()
    assert dict(found.top) == pytest.approx(dict(zip(CLASSES, wanted, strict=True)), abs=1e-5)


def test_an_npz_with_its_own_head_and_labels(workdir, capsys):
    """pre_logits and the stored size come from the file; another size resizes positions."""
    model = random_model(tiny_config(representation_size=24), 40, 3, std=0.2)
    save_npz("m.npz", model)
    write_images(workdir / "d", CLASSES, count=1, size=(20, 20))
    (workdir / "names.txt").write_text("eins\nzwei\ndrei\n")
    trained = Classifier.open("m.npz", labels="names.txt")
    assert trained.model.img_size == (40, 40) and trained.classes == ("eins", "zwei", "drei")
    assert trained.named
    assert not Classifier.open("m.npz").named
    noise = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert (trained.model(noise) - model(noise)).abs().max() < 1e-5
    assert Classifier.open("m.npz").classes == ("0", "1", "2")
    assert Classifier.open("m.npz", img_size=24).model.grid == (3, 3)
    data = ["--dataset", "folder", "--data_dir", "d", "--num_workers", "0"]
    assert run_command(evaluate, "--checkpoint", "m.npz", *data) == 0
    assert "40x40" in capsys.readouterr().out  # and folders are the classes in sorted order


def test_every_mistake_is_one_line_and_exit_status_2(workdir, trained, capsys):
    model = random_model(classes=3)
    save_npz("m.npz", model)
    torch.nn.init.zeros_(model.head.weight)
    save_npz("zero.npz", model)
    headless = checkpoint_of(model)
    headless.state = {k: v for k, v in headless.state.items() if not k.startswith("head.")}
    write("none.npz", headless)
    (workdir / "empty").mkdir()
    (workdir / "two.txt").write_text("a\nb\n")
    torch.save({"format": 3, "precision": {}, "state": {}}, "run_last.pt")
    write_image(workdir / "a.png")
    cases = {
        "zero.npz: its head is all zeros, so it knows no classes yet": ["zero.npz", "a.png"],
        "none.npz: it has no head": ["none.npz", "a.png"],
        "gone.npz: no such file": ["gone.npz", "a.png"],
        "run_last.pt is a saved run, to be resumed": ["run_last.pt", "a.png"],
        "gone.png: no such file or folder": ["m.bin", "gone.png"],
        "empty holds no images": ["m.bin", "empty"],
        "two.txt has 2 class names, the model 3": ["m.bin", "a.png", "--labels", "two.txt"],
        "gone.txt: No such file or directory": ["m.bin", "a.png", "--labels", "gone.txt"],
        "m.bin: image size 30x30 is not a multiple": ["m.bin", "a.png", "--img_size", "30"],
        "m.bin: the file fits no known variant": ["m.bin", "a.png", "--model_type", "ViT-L_16"],
        "m.npz: the file fits no known variant": ["m.npz", "a.png", "--model_type", "ViT-L_16"],
        "m.bin is an input": ["m.bin", "a.png", "--output", "m.bin"],
        "./a.png is an input": ["m.bin", "a.png", "--output", "./a.png"],
        "two.txt is an input": ["m.bin", "a.png", "--labels", "two.txt", "--output", "two.txt"],
        "gone/p: there is no folder gone": ["m.bin", "a.png", "--output", "gone/p"],
        "two.txt: File exists": ["m.bin", "a.png", "--attention", "two.txt"],
        "--features predicts no class": ["m.bin", "a.png", "--features", "f"],
    }
    for message, (checkpoint, *argv) in cases.items():
        argv = ["--output", "p", "--checkpoint", checkpoint, *argv]
        assert run_command(predict, *argv) == 2, message
        err = capsys.readouterr().err
        assert message in err and err.startswith("predict.py: error: "), err
        assert err.count("\n") == 1 and not (workdir / "p").exists()


def test_features_of_files_with_and_without_a_head(workdir, capsys):
    """A file without a head, and one with `pre_logits` and a head, give the same encoded tokens."""
    model = random_model(tiny_config(representation_size=24), 32, 3, std=0.2)
    save_npz("m.npz", model)
    headless = checkpoint_of(model)
    parts = ("head.", "pre_logits.")
    headless.state = {k: v for k, v in headless.state.items() if not k.startswith(parts)}
    write("none.npz", headless)
    paths = write_images(workdir / "d", CLASSES, count=1, size=(32, 32))
    (workdir / "d" / "broken.png").write_bytes(paths[0].read_bytes()[:600])
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    with torch.no_grad():
        wanted = model.features(pixels.permute(0, 3, 1, 2) / 127.5 - 1).numpy()
    for checkpoint in ("none.npz", "m.npz"):
        argv = ["d", "--checkpoint", checkpoint, "--features", "f.npz", "--batch_size", "3"]
        assert run_command(predict, *argv) == 1
        captured = capsys.readouterr()
        assert "d/broken.png is not a readable" in captured.err and not captured.out
        assert "1 of 4 files could not be read" in captured.err
        with np.load("f.npz", allow_pickle=False) as file:
            assert file["names"].tolist() == [f"d/{name}/{name}0.png" for name in CLASSES]
            assert file["features"].dtype == np.float32
            assert np.abs(file["features"] - wanted).max() < 1e-5
    broken = ["d/broken.png", "--checkpoint", "m.npz", "--features", "f.npz"]
    assert run_command(predict, *broken) == 1
    with np.load("f.npz", allow_pickle=False) as file:
        assert file["features"].shape == (0, 32) and file["names"].shape == (0,)


def test_every_image_has_its_own_picture_of_attention(workdir, trained, monkeypatch):
    long = f"{'x' * 120}/{'y' * 240}.png"
    for path in (long, "p/1.png", "p/p/1.png"):
        write_image(workdir / path, size=(70, 90))
    opened, decode = [], Image.open
    spy = lambda path, formats: opened.append(path.name) or decode(path)  # noqa: E731
    monkeypatch.setattr(Image, "open", spy)
    paths = [long, "p/1.png", "p/../p/1.png", "./p/1.png", "p/p/1.png"]
    command = ["--checkpoint", "m.bin", *paths, "--attention", "seen", "--num_workers", "0"]
    assert run_command(predict, *command) == 0
    # The heads are read first, in threads, to find the bit depth. Then each image is read for the
    # model, and once more to be drawn on.
    assert sorted(opened[:5]) == sorted(paths) and opened[5:10] == opened[10:] == paths
    sheets = sorted((workdir / "seen").iterdir())
    assert len(sheets) == 5 and sheets[-1].name == "00005_1.jpg"
    for sheet, path in zip(sheets, paths, strict=True):
        with decode(sheet) as drawn, decode(path) as image:
            assert drawn.width == 5 * 233 + 4 * 2  # the image, its rollout and three heads
            shown = np.asarray(drawn.crop((0, 25, 233, 325)).resize(image.size)).astype(int)
            assert np.abs(shown - np.asarray(image)).mean() < 45  # of another image: 85


DIGITS = ["--dataset", "digits"]
COMMANDS = [(predict, ["a.png"]), (evaluate, DIGITS), (export, ["m.npz"]), (probe, DIGITS)]


@pytest.mark.parametrize("script, argv", [*COMMANDS, (attend, [])])
def test_every_command_downloads_googles_files(script, argv, workdir, monkeypatch):
    write_image(workdir / "a.png")
    asked = []

    def download(url, path, **options):
        asked.append(url)
        raise UserError("enough")

    monkeypatch.setattr(zoo, "download", download)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    assert run_command(script, "--checkpoint", "sam/ViT-B_16", *argv) == 2
    assert len(asked) == 1 and asked[0].endswith("/sam/ViT-B_16.npz")
    # A head of zeros predicts nothing: such a file is refused before its download.
    assert run_command(script, "--checkpoint", "imagenet21k/ViT-B_16", *argv) == 2
    assert len(asked) == (1 if script in (predict, evaluate, export) else 2)
