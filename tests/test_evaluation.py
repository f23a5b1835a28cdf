"""`--eval_only` and its flags: each changes what it should."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from models.weights import to_official
from tests.helpers import random_model, save_bin
from utils.checkpoint import write_npz
from utils.classifier import Classifier

CLASSES = ("ant", "bee", "cat")
EVALUATE = ["--name", "e", "--dataset", "folder", "--data_dir", "d", "--num_workers", "0",
            "--eval_only", "m.bin"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_images(*parts, each=6):
    noise = np.random.default_rng(0)
    for part in parts:
        for name in CLASSES:
            folder = Path("d", part, name)
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = noise.integers(0, 256, (40, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def results(*flags):
    assert train.run([*EVALUATE, *flags]) == 0
    return json.loads(Path("output/e_results.json").read_text())


def test_half_precision_is_half():
    write_images("test")
    save_bin("m.bin", random_model(classes=3, std=0.3), CLASSES)
    full, half = results(), results("--bf16")
    assert 0 < abs(full["loss"] - half["loss"]) < 0.1 * full["loss"]
    assert full["loss"] == results("--bf16", "--fp16_opt_level", "O0")["loss"]


def test_a_grey_model_is_evaluated_on_grey_images():
    write_images("test")
    save_bin("m.bin", random_model(classes=3, in_channels=1, std=0.3), CLASSES)
    found = results()
    paths = sorted(Path("d").rglob("*.png"))
    guesses = [p.top[0][0] for p in Classifier.open("m.bin").predict(paths)]
    right = [guess == path.parent.name for guess, path in zip(guesses, paths, strict=True)]
    assert found["accuracy"] == sum(right) / len(right) and 0 < sum(right) < len(right)


@pytest.mark.parametrize("flag", [["--img_size", "16"], ["--img_size=16"]])
def test_another_size_than_the_file_s(flag, capsys):
    write_images("test")
    save_bin("m.bin", random_model(classes=3), CLASSES)
    results()
    assert "32x32 pixels" in capsys.readouterr().out
    results(*flag)
    assert "16x16 pixels" in capsys.readouterr().out


def test_broken_files_are_refused_or_left_out(capsys):
    write_images("test")
    Path("d/test/ant/0.png").write_bytes(Path("d/test/ant/1.png").read_bytes()[:600])
    save_bin("m.bin", random_model(classes=3), CLASSES)
    assert train.run(EVALUATE) == 2
    assert "d/test/ant/0.png" in capsys.readouterr().err
    assert results("--skip_unreadable")["images"] == 17


def test_which_images():
    """test/ before val/."""
    save_bin("m.bin", random_model(classes=3), CLASSES)
    write_images("val", each=2)
    assert (results()["split"], results()["images"]) == ("val", 6)
    write_images("test", each=1)
    assert (results()["split"], results()["images"]) == ("test", 3)


def test_validation_images_are_drawn_by_the_seed():
    save_bin("m.bin", random_model(classes=3, std=0.3), CLASSES)
    write_images("train", each=8)
    first, again, other = (results("--val_fraction", "0.25", "--seed", seed) for seed in "112")
    assert first["split"] == "val" and first["images"] == 6
    assert first == again and first["loss"] != other["loss"]


def test_mistakes_are_named():
    write_images("test")
    save_bin("m.bin", random_model(classes=3, std=0.3), CLASSES)
    found = results()
    rows = Path("output/e_report/mistakes.csv").read_text().splitlines()[1:]
    assert len(rows) == round((1 - found["accuracy"]) * 18) > 0
    for row in rows:
        path, label, guess, _ = row.split(",")
        assert Path(path).parent.name == label != guess
    sure = [float(row.split(",")[3]) for row in rows]
    assert sure == sorted(sure, reverse=True)


def test_a_report_without_mistakes():
    """A model that is always right has no mistakes to draw."""
    write_images("test", each=1)
    model = random_model(classes=3)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[0, 0], model.head.bias[:] = 1e-3, torch.tensor([1.0, 0, 0])
    save_bin("m.bin", model, CLASSES)
    for name in CLASSES[1:]:
        for file in Path("d/test", name).iterdir():
            file.unlink()
    assert results()["accuracy"] == 1
    assert not Path("output/e_report/mistakes.png").exists()
    assert Path("output/e_report/mistakes.csv").read_text() == "image,label,guess,confidence\n"


def test_a_file_without_names_takes_the_folders_in_their_order(capsys):
    """Twelve classes called 0 to 11, of which 10 and 11 come before 2."""
    model, names = random_model(classes=12, std=0.3), sorted(str(i) for i in range(12))
    save_bin("m.bin", model, tuple(names))
    write_npz("m.npz", to_official(model.state_dict(), model.config))
    noise = np.random.default_rng(0)
    for name in names:
        Path("d/test", name).mkdir(parents=True)
        for i in range(4):
            pixels = noise.integers(0, 256, (40, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("d/test", name, f"{i}.png"))
    own = results()
    assert "sorted order" not in capsys.readouterr().out
    assert train.run([*EVALUATE[:-1], "m.npz", "--name", "n"]) == 0
    assert "classes are taken to be the data's in sorted order" in capsys.readouterr().out
    nameless = json.loads(Path("output/n_results.json").read_text())
    assert nameless["classes"] == own["classes"] and nameless["accuracy"] == own["accuracy"]
    for name in names[:3]:  # a .bin's names are names, though they be numbers
        shutil.rmtree(Path("d/test", name))
    assert results()["images"] == 36
