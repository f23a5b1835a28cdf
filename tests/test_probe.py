"""probe.py: the kinds of features, their cache, the choice of the linear head, and the figures."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import probe
from data_utils import load_data
from probe import KINDS, Features, embed
from tests.helpers import ROOT, random_model, run_command, save_bin, tiny_config, write_images
from utils.image_set import ImageSet
from utils.images import Decoding
from utils.probes import linear_heads, nearest_neighbours, validate

EARLIER = {"1": [0.4958217270194986, 0.532033426183844]}
EARLIER["5"] = [0.7047353760445683, 0.7353760445682451]
FLAGS = ("--checkpoint", "m.bin", "--dataset", "digits", "--num_steps", "30")


def result(words, *flags):
    """What the command writes as JSON."""
    assert run_command(probe, *(flags or FLAGS), "--output", "f.json", *words.split()) == 0
    return json.loads(Path("f.json").read_text())


@pytest.fixture
def model(workdir):
    model = random_model(img_size=8, classes=2)
    save_bin("m.bin", model, ("a", "b"))
    return model


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_features_are_what_the_head_reads(classifier):
    model = random_model(tiny_config(classifier=classifier), 16, 3, std=0.3)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    kind = "token" if classifier == "token" else "mean"
    store = Features(model, kind, None, "", {"batch_size": 2})
    found = store.of(ImageSet(torch.zeros(5, dtype=torch.int64), pixels), "")
    with torch.no_grad():
        tokens = model.transformer(pixels / 127.5 - 1)
        wanted = tokens[:, 0] if classifier == "token" else tokens.mean(dim=1)
        assert found.dtype == torch.float32 and (found - wanted).abs().max() < 1e-5
        assert (model.head(wanted) - model(pixels / 127.5 - 1)).abs().max() < 1e-5


@torch.no_grad()
def test_kinds_of_features_are_those_that_hooks_see():
    model = random_model(tiny_config(num_layers=6), 16, 3, std=0.3)
    seen, images = [], torch.randn(2, 3, 16, 16)
    for block in model.transformer.encoder.layer:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    model.transformer(images)
    tokens = [model.transformer.encoder.encoder_norm(output) for output in seen]  # (B, N, D) each
    first, mean = tokens[-1][:, 0], tokens[-1][:, 1:].mean(dim=1)
    wanted = {"token": first, "mean": mean, "token+mean": torch.cat([first, mean], dim=1)}
    wanted["last4"] = torch.cat([tokens[i][:, 0] for i in (2, 3, 4, 5)], dim=1)
    assert wanted.keys() == set(KINDS)
    for kind, features in wanted.items():
        assert (embed(model, images, kind) - features).abs().max() < 1e-5, kind


def test_fewshot_has_the_figures_of_the_earlier_command(workdir):
    """Printed by fewshot.py before it became a part of this command."""
    flags = ("--checkpoint", ROOT / "checkpoint/ViT-Mini_8.npz", "--dataset", "digits")
    found = result("--methods fewshot --shots 1 5 --seeds 2 --cache_dir none", *flags)["fewshot"]
    assert found["accuracy"] == EARLIER


def test_every_method_of_the_command(model, capsys, monkeypatch):
    found = result("--seeds 2 --shots 1 10 --k 3 9")
    shots = found["fewshot"]["accuracy"]
    mean = {n: sum(values) / 2 for n, values in shots.items()}
    assert list(shots) == ["1", "10"] and len(shots["1"]) == 2
    assert 0.15 < mean["1"] < mean["10"] < 1  # ten classes: chance is 0.1
    out = capsys.readouterr().out
    assert f"{mean['10']:.4f}" in out and "test accuracy over 359 images" in out

    data = load_data("digits", "", decoding=Decoding())
    store = Features(model, "token", None, "", {"batch_size": 64})
    rows, queries = store.of(data.train, ""), store.of(data.val, "")
    labels, wanted = data.train.labels, data.val.labels
    votes = nearest_neighbours(rows, labels, queries, [3, 9])
    exact = {str(k): (x == wanted).double().mean().item() for k, x in votes.items()}
    assert found["knn"] == exact and 0.2 < exact["3"] != exact["9"]
    linear = found["linear"]
    head = linear_heads(rows, labels, 10, [(linear["lr"], linear["l2"])], 30)
    assert linear["accuracy"] == pytest.approx(validate(head, queries, wanted)[0][0], abs=3e-3)
    assert f"lr {linear['lr']:g}, L2 {linear['l2']:g}" in out
    assert f"k 9                      {exact['9']:.4f}" in out
    plain = result("--methods fewshot --seeds 2 --shots 5 --cache_dir few")["fewshot"]
    plain = plain["accuracy"]["5"]
    counts = [len(np.load(file)["features"]) for file in Path("few").iterdir()]
    assert min(counts) <= 100 and max(counts) == 359  # only the drawn training images
    assert result("--seeds 3 --shots 5")["fewshot"]["accuracy"]["5"][:2] == plain
    for change in ("--l2 1e7", "--img_size 16 --batch_size 50", "--val_fraction 0.9"):
        changed = result(f"--methods fewshot --seeds 2 --shots 5 {change}")
        assert changed["fewshot"]["accuracy"]["5"] != plain, change


@pytest.mark.parametrize("own", [False, True], ids=["held out", "of the data"])
def test_the_head_is_chosen_on_validation_images(own, model, capsys):
    words = "--methods linear --rates 0.1 1e-7 0.01 --l2_grid 0 0.1" + own * " --val_fraction 0.1"
    found = result(words)["linear"]
    rows = found["validation"]
    assert [(r["lr"], r["l2"]) for r in rows[:3]] == [(0.1, 0), (0.1, 0.1), (1e-7, 0)]
    best = max(rows, key=lambda row: (row["accuracy"], -row["loss"]))
    assert (found["lr"], found["l2"]) == (best["lr"], best["l2"])
    assert len({row["accuracy"] for row in rows}) > 2
    # Held out or of the data, these are the same 10 % of each class, and the same heads.
    data = load_data("digits", "", decoding=Decoding(), val_fraction=0.1)
    store = Features(model, "token", None, "", {"batch_size": 64})
    parts = [(store.of(images, ""), images.labels) for images in (data.train, data.val)]
    score = linear_heads(*parts[0], 10, [(row["lr"], row["l2"]) for row in rows], 30)
    accuracies, losses = validate(score, *parts[1])
    assert [row["accuracy"] for row in rows] == accuracies
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-4)
    out = capsys.readouterr().out
    assert f"of 143 validation images {best['accuracy']:.4f} with" in out
    assert ("is at the edge of --rates" in out) == (found["lr"] != 0.01)
    assert ("is at the edge of --l2_grid" in out) == (found["l2"] != 0)
    again = result("--methods linear --rates 0.01 --l2_grid 0 20")["linear"]
    assert again["l2"] == 0 and "edge" not in capsys.readouterr().out  # less is not possible


@pytest.fixture
def computed(monkeypatch):
    """The number of images of every batch of features that is computed, not read."""
    counts = []
    monkeypatch.setattr(probe, "embed", lambda *args: counts.append(len(args[1])) or embed(*args))
    return counts


def test_features_are_read_again_only_for_the_same_model_and_pixels(model, computed, capsys):
    plain = result("--methods knn")
    files = sorted(Path("output/features").iterdir())
    assert [file.name.split("_")[:2] for file in files] == [["test", "token"], ["train", "token"]]
    count = len(computed)
    capsys.readouterr()
    assert result("--methods knn") == plain and len(computed) == count
    out = capsys.readouterr().out
    assert all(f"features: read from {file}" in out for file in files)

    files[0].write_bytes(files[0].read_bytes()[:-90])
    assert result("--methods knn") == plain and count < len(computed) < 2 * count
    assert f"{files[0]} is damaged" in capsys.readouterr().err
    changes = ["--features mean", "--img_size 16", "--interpolation bicubic", "--exact_decode"]
    for change in [*changes, "--cache_dir other", "--cache_dir none", "another checkpoint"]:
        before, words = len(computed), change
        if change.startswith("another"):
            model.transformer.encoder.encoder_norm.bias.data[3] += 1
            save_bin("m.bin", model, ("a", "b"))
            words = ""
        again = result(f"--methods knn {words}")
        assert len(computed) == before + count, change
        # Digits are arrays of 8x8 pixels: they are neither decoded nor resized.
        same = change.startswith(("--cache", "--exact", "--inter"))
        assert (again["knn"] == plain["knn"]) == same, change
    assert len(list(Path("output/features").iterdir())) == 2 * (1 + len(changes) + 1)
    assert not Path("none").exists() and len(list(Path("other").iterdir())) == 2


def test_a_changed_image_file_is_computed_anew(model, workdir, computed):
    """Images of two sizes stay files."""
    for part in ("train", "test"):
        write_images(workdir / "d" / part, size=(90, 70), count=3)
        write_images(workdir / "d" / part / "cat", ("more",), count=1, size=(70, 90))
    flags = ("--checkpoint", "m.bin", "--dataset", "folder", "--data_dir", "d", "--shots", "1")
    plain = result("--methods knn fewshot --seeds 1", *flags)
    assert result("--methods knn fewshot --seeds 1", *flags) == plain and len(computed) == 2
    file = workdir / "d/test/cat/cat0.png"
    later = file.stat().st_mtime_ns + 1
    os.utime(file, ns=(later, later))
    assert result("--methods knn fewshot --seeds 1", *flags) == plain and len(computed) == 3
    Image.fromarray(np.zeros((70, 90, 3), np.uint8)).save(file)
    os.utime(file, ns=(later, later))
    result("--methods knn fewshot --seeds 1", *flags)
    assert computed == [7, 7, 7, 7]


def test_wrong_flags_are_one_line(model, capsys):
    save_bin("gap.bin", random_model(tiny_config(classifier="gap"), 8, 2), ("a", "b"))
    cases = {"no folder gone": "--output gone/f.json", "not ViT-L_16": "--model_type ViT-L_16"}
    cases |= {"class '0' has 142 images, not 1000": "--shots 1000", "--l2 0 leaves": "--l2 0"}
    cases |= {"no class token, so take mean": "--checkpoint gap.bin --features last4"}
    cases |= {"m.bin: File exists": "--cache_dir m.bin"}
    for message, words in cases.items():
        assert run_command(probe, *FLAGS, *words.split()) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    for part in ("train", "test"):
        write_images(Path("d") / part, count=1)
    folder = ("--dataset", "folder", "--data_dir", "d", "--shots", "1")
    assert run_command(probe, *FLAGS, *folder) == 2
    assert "error: linear holds out images of each class" in capsys.readouterr().err
    result("--checkpoint gap.bin --methods knn")
    assert "; features: mean" in capsys.readouterr().out
