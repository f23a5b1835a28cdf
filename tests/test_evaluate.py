"""evaluate.py: its figures, its files, and what each flag changes."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import evaluate
import export
import predict
import train
from tests.helpers import random_model, run_command, save_bin, save_npz, words, write_images
from utils.classifier import Classifier

CLASSES = ("ant", "bee", "cat")
EVALUATE = words("--name e --dataset folder --data_dir d --num_workers 0 --checkpoint m.bin")

pytestmark = pytest.mark.usefixtures("workdir")


def images(split="test", count=6):
    write_images(Path("d", split), CLASSES, count=count, size=(32, 40))


def model(std=0.3, **options):
    made = random_model(classes=3, std=std, **options)
    save_bin("m.bin", made, CLASSES)
    return made


def results(*flags):
    assert run_command(evaluate, *EVALUATE, *flags) == 0
    return json.loads(Path("output/e_results.json").read_text())


def test_figures_files_and_console(capsys):
    images(), model()
    found = results()
    rows = Path("output/e_report/misclassified.csv").read_text().splitlines()
    assert rows[0] == "image,label,prediction,confidence"
    wrong = [row.split(",") for row in rows[1:]]
    assert len(wrong) == round((1 - found["accuracy"]) * 18) > 0
    assert all(Path(path).parent.name == label != other for path, label, other, _ in wrong)
    confidences = [float(row[3]) for row in wrong]
    assert confidences == sorted(confidences, reverse=True)
    matrix = np.loadtxt(
        "output/e_report/confusion.csv", delimiter=",", skiprows=1, usecols=(1, 2, 3)
    )
    assert matrix.sum() == 18 and np.trace(matrix) == round(found["accuracy"] * 18)
    for name in ("confusion", "reliability", "misclassified"):
        assert np.asarray(Image.open(f"output/e_report/{name}.png")).std() > 10
    out = capsys.readouterr().out
    assert f"test accuracy {found['accuracy']:.4f}, balanced" in out and "over 18 images" in out
    assert [row["name"] for row in found["classes"]] == list(CLASSES)
    assert (
        found["img_size"] == [32, 32] and found["split"] == "test" and found["top5_accuracy"] == 1
    )
    run_command(predict, "--checkpoint", "m.bin", "--format", "csv", "--top_k", "1", "d")
    predicted = [line.split(",") for line in capsys.readouterr().out.splitlines()[1:]]
    correct = [Path(path).parent.name == name for path, _, name, _ in predicted]
    assert sum(correct) / len(correct) == found["accuracy"]


def test_every_probability_is_written():
    """In the order of the images, for scikit-learn or a spreadsheet to work on."""
    images(), model()
    shutil.rmtree("d/test/bee")
    found = results()
    with open("output/e_report/predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "label", "prediction", *CLASSES]
    assert [Path(row[0]).parent.name for row in rows] == [row[1] for row in rows]
    assert [row[1] for row in rows] == ["ant"] * 6 + ["cat"] * 6
    probabilities = np.array([row[3:] for row in rows], dtype=float)
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-5 < probabilities.std()
    assert [CLASSES[i] for i in probabilities.argmax(1)] == [row[2] for row in rows]
    labels = np.array([row[1] for row in rows])
    areas = [roc_auc_score(labels == CLASSES[i], probabilities[:, i]) for i in (0, 2)]
    assert found["macro_roc_auc"] == pytest.approx(np.mean(areas), abs=1e-12)
    columns = ([row[1] for row in rows], [row[2] for row in rows])
    balanced = np.mean([row["recall"] for row in found["classes"] if row["images"]])
    assert found["balanced_accuracy"] == pytest.approx(balanced, abs=1e-12)
    accuracy = np.mean([a == b for a, b in zip(*columns, strict=True)])
    assert found["accuracy"] == pytest.approx(accuracy)


def test_too_many_classes_have_neither_matrix_nor_probabilities(monkeypatch):
    images(), model()
    results()
    files = {path.name for path in Path("output/e_report").iterdir()}
    monkeypatch.setattr(evaluate.figures, "MAX_CLASSES", 2)
    assert results()["macro_roc_auc"] is None
    fewer = {path.name for path in Path("output/e_report").iterdir()}
    assert files - fewer == {"predictions.csv", "confusion.csv", "confusion.png"}


def test_the_name_is_that_of_the_file():
    images(), model()
    argv = words("--dataset folder --data_dir d --num_workers 0 --checkpoint m.bin --output_dir o")
    assert run_command(evaluate, *argv) == 0
    assert Path("o/m_results.json").is_file() and Path("o/m_report/confusion.csv").is_file()
    Path("m.bin").rename("m-lr_0.01-res_32.bin")
    assert run_command(evaluate, *argv, "--checkpoint", "m-lr_0.01-res_32.bin") == 0
    assert Path("o/m-lr_0.01-res_32_results.json").is_file()


def test_training_states_the_same_figures(capsys):
    flags = words("--dataset digits --model_type ViT-Mini_8 --img_size 8 --num_steps 6")
    start = words("--name run --pretrained_dir none --warmup_steps 2 --train_batch_size 16")
    assert run_command(train, *flags, *start) == 0
    best = words("--checkpoint output/run_checkpoint.bin --dataset digits --name again")
    assert run_command(evaluate, *best) == 0
    a, b = (json.loads(Path(f"output/{n}_results.json").read_text()) for n in ("run", "again"))
    assert a.pop("training")["best_accuracy"] == b["accuracy"] and a["macro_roc_auc"] > 0.5
    assert a.pop("name") == "run" and b.pop("name") == "again" and a == b


def test_half_precision_is_half():
    images(), model()
    full, half = results(), results("--bf16")
    assert 0 < abs(full["loss"] - half["loss"]) < 0.1 * full["loss"]
    assert full["loss"] == results("--bf16", "--fp16_opt_level", "O0")["loss"]


def test_a_grey_model_is_evaluated_on_grey_images():
    images(), model(in_channels=1)
    grey = results()
    for path in Path("d").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert results()["loss"] == grey["loss"]


@pytest.mark.parametrize("flag", ["--img_size 16", "--img_size=16"])
def test_another_size_than_the_file_s(flag, capsys):
    images(), model()
    results()
    assert "32x32 pixels" in capsys.readouterr().out
    assert results(*words(flag))["img_size"] == [16, 16]


def test_broken_files_are_refused_or_left_out(capsys):
    images(), model()
    broken = Path("d/test/ant/ant0.png")
    broken.write_bytes(broken.read_bytes()[:600])
    assert run_command(evaluate, *EVALUATE) == 2
    assert "d/test/ant/ant0.png is not a readable image" in capsys.readouterr().err
    assert results("--skip_unreadable")["images"] == 17


def test_which_images():
    """test/ before val/."""
    model()
    images("val", 2)
    assert (results()["split"], results()["images"]) == ("val", 6)
    images("test", 1)
    assert (results()["split"], results()["images"]) == ("test", 3)


def test_a_report_without_misclassified_images():
    made = model(std=0.1)
    with torch.no_grad():
        made.head.weight.zero_()
        made.head.weight[0, 0], made.head.bias[:] = 1e-3, torch.tensor([1.0, 0, 0])
    images(), results()
    assert Path("output/e_report/misclassified.png").exists()
    save_bin("m.bin", made, CLASSES)
    for name in CLASSES[1:]:
        shutil.rmtree(Path("d/test", name))
    assert results()["accuracy"] == 1
    assert not Path("output/e_report/misclassified.png").exists()
    assert len(Path("output/e_report/misclassified.csv").read_text().splitlines()) == 1


def test_a_file_without_names_and_folders_of_numbers_need_labels(capsys):
    """Twelve classes called 0 to 11, of which 10 and 11 come before 2 as text."""
    made, names = random_model(classes=12, std=0.3), [str(i) for i in range(12)]
    save_bin("m.bin", made, tuple(names))
    save_npz("m.npz", made)
    write_images(Path("d/test"), names, count=4, size=(32, 40))
    own = results()
    nameless = [*EVALUATE[:-1], "m.npz", "--name", "n"]
    assert run_command(evaluate, *nameless) == 2
    assert "give --labels FILE" in capsys.readouterr().err
    Path("names.txt").write_text("\n".join(names))
    assert run_command(evaluate, *nameless, "--labels", "names.txt") == 0
    found = json.loads(Path("output/n_results.json").read_text())
    assert found["classes"] == own["classes"] and found["accuracy"] == own["accuracy"]
    for name in names[:3]:  # the names of a .bin are names, even if they are numbers
        shutil.rmtree(Path("d/test", name))
    assert results()["images"] == 36


def test_the_checkpoint_keeps_how_images_are_decoded(capsys):
    """12-bit images with an alpha: training, evaluation, prediction and an export agree."""
    for part in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            folder = Path("d", part, name)
            folder.mkdir(parents=True)
            for k in range(4):
                grey = np.random.default_rng([i, k]).integers(0, 4096, (70, 80), dtype=np.uint16)
                Image.fromarray(grey).save(folder / f"{k}.png")
            glass = np.zeros((70, 80, 4), np.uint8)
            glass[20:50, 20 + 10 * i : 60, 3] = 255
            Image.fromarray(glass).save(folder / "glass.png")
    data = words("--dataset folder --data_dir d --num_workers 0")
    start = words("--name run --pretrained_dir none --model_type ViT-Mini_8 --img_size 16")
    steps = words("--num_steps 3 --warmup_steps 1 --train_batch_size 4 --background blue")
    assert run_command(train, *data, *start, *steps) == 0
    out = capsys.readouterr().out
    assert "; 12-bit pixels" in out and "(0, 0, 255) is put behind" in out
    assert run_command(export, "--checkpoint", "output/run_checkpoint.bin", "m.safetensors") == 0
    losses = []
    for file in ("output/run_checkpoint.bin", "m.safetensors"):
        assert run_command(evaluate, "--name", "e", "--checkpoint", file, *data) == 0
        losses.append(json.loads(Path("output/e_results.json").read_text())["loss"])
        opened = Classifier.open(file)
        how = opened.decoding
        assert (how.bit_depth, how.background) == (12, (0, 0, 255))
        rows = list(opened.predict(sorted(Path("d/val").rglob("*.png")), num_workers=0))
        truth = [Path(row.path).parent.name for row in rows]
        own = [-np.log(dict(row.top)[name]) for row, name in zip(rows, truth, strict=True)]
        assert np.mean(own) == pytest.approx(losses[-1], abs=1e-5)
        assert 100 < rows[0].input.float().mean() < 155 and rows[4].input[2].float().mean() > 150
    trained = json.loads(Path("output/run_results.json").read_text())["loss"]
    assert losses == pytest.approx([trained] * 2, abs=1e-5)


def test_wrong_input_is_one_line_and_exit_2(capsys):
    images(), model()
    np.savez("zero.npz", **{"head/kernel": np.zeros((3, 3))})
    wrong = {
        "--checkpoint no.bin": "no.bin: no such file",
        "--checkpoint zero.npz": "zero.npz: not a Vision Transformer",
        "--data_dir nowhere": "nowhere: no such folder",
        "--name a/b": "plain file name",
        "--fp16 --bf16": "not allowed with argument",
        "--img_size 33": "33x33 is not a multiple",
        "--model_type ViT-B_16": "not ViT-B_16",
    }
    for flags, message in wrong.items():
        assert run_command(evaluate, *EVALUATE, *words(flags)) == 2, flags
        line = capsys.readouterr().err.strip()
        assert re.match("evaluate.py: error: .*" + re.escape(message), line), line
        assert not Path("output").exists()
