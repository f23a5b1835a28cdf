"""Least squares against scikit-learn's, the drawn images, and the command."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import Ridge

import fewshot
from fewshot import draw_shots, features, least_squares
from models.errors import UserError
from tests.helpers import random_model, run_command, save_bin, tiny_config
from utils.image_set import ImageSet

FLAGS = ("--checkpoint", "m.bin", "--dataset", "digits")
NAMES = ("cat", "eel", "dog", "emu")


@pytest.mark.parametrize("n", [6, 40], ids=["fewer images than features", "more"])
def test_least_squares_is_ridge_regression(n):
    torch.manual_seed(0)
    rows, labels = 3 + 2 * torch.randn(n, 9).double(), torch.arange(n) % 3
    standard = (rows - rows.mean(0)) / (rows.std(0, correction=0) + 1e-5)
    design = torch.cat([standard, torch.ones(n, 1).double()], dim=1)
    peer = Ridge(alpha=2.5, fit_intercept=False).fit(design, 2 * torch.eye(3)[labels] - 1)
    scores = least_squares(rows, labels, 3, 2.5)(rows)
    assert (scores - torch.from_numpy(peer.predict(design))).abs().max() < 1e-9


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_features_are_what_the_head_reads(classifier):
    model = random_model(tiny_config(classifier=classifier), 16, 3, std=0.3)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    found = features(model, ImageSet(torch.zeros(5, dtype=torch.int64), pixels), "", batch_size=2)
    with torch.no_grad():
        tokens = model.transformer(pixels / 127.5 - 1)
        wanted = tokens[:, 0] if classifier == "token" else tokens.mean(dim=1)
        assert found.dtype == torch.float64 and (found - wanted).abs().max() < 1e-5
        assert (model.head(wanted) - model(pixels / 127.5 - 1)).abs().max() < 1e-5


def test_draws_are_balanced_nested_and_seeded():
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    five, ten = (draw_shots(labels, shots, 1, NAMES) for shots in (5, 10))
    assert labels[five].bincount().tolist() == [5] * 4 and len(ten.unique()) == 40
    assert set(five.tolist()) < set(ten.tolist())
    assert set(five.tolist()) != set(draw_shots(labels, 5, 2, NAMES).tolist())
    # Pinned, so that published numbers can be repeated.
    assert draw_shots(torch.arange(40) % 2, 3, 0, NAMES).tolist() == [18, 8, 28, 21, 9, 7]
    with pytest.raises(UserError, match="class 'eel' has 1 image, not 2"):
        draw_shots(torch.tensor([0, 0, 1]), 2, 1, NAMES)


def test_the_command(workdir, capsys):
    def accuracies(words):
        assert run_command(fewshot, *FLAGS, "--output", "f.json", *words.split()) == 0
        return json.loads(Path("f.json").read_text())["accuracy"]

    save_bin("m.bin", random_model(img_size=8, classes=2), ("a", "b"))
    found = accuracies("--seeds 2 --shots 1 10")
    mean = {shots: sum(values) / 2 for shots, values in found.items()}
    assert list(found) == ["1", "10"] and len(found["1"]) == 2
    assert 0.15 < mean["1"] < mean["10"] < 1  # ten classes: chance is 0.1
    out = capsys.readouterr().out
    assert f"{mean['10']:.4f}" in out and "test accuracy over 359 images" in out
    plain = accuracies("--seeds 2 --shots 5")["5"]
    assert accuracies("--seeds 3 --shots 5")["5"][:2] == plain
    for change in ("--l2 1e7", "--img_size 16 --batch_size 50", "--val_fraction 0.9"):
        assert accuracies(f"--seeds 2 --shots 5 {change}")["5"] != plain, change


def test_wrong_flags_are_one_line(workdir, capsys):
    save_bin("m.bin", random_model(img_size=8, classes=2), ("a", "b"))
    cases = {"no folder gone": "--output gone/f.json", "not ViT-L_16": "--model_type ViT-L_16"}
    cases |= {"class '0' has 142 images, not 1000": "--shots 1000", "--l2 0 leaves": "--l2 0"}
    for message, words in cases.items():
        assert run_command(fewshot, *FLAGS, *words.split()) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
