"""Least squares against scikit-learn's, draws, and the command."""

import json

import pytest
import torch
from sklearn.linear_model import Ridge

import fewshot
from tests.helpers import random_model, save_bin, tiny_config
from utils.fewshot import draw_shots, features_of, least_squares
from utils.stream import EvalStream, ImageSet, Slice


@pytest.mark.parametrize("n", [6, 40], ids=["fewer images than features", "more"])
def test_least_squares_is_ridge_regression(n):
    torch.manual_seed(0)
    features, labels = 3 + 2 * torch.randn(n, 9).double(), torch.arange(n) % 3
    standard = (features - features.mean(0)) / (features.std(0, correction=0) + 1e-5)
    ones = torch.ones(n, 1).double()
    peer = Ridge(alpha=2.5, fit_intercept=False)
    peer.fit(torch.cat([standard, ones], 1), 2 * torch.eye(3)[labels] - 1)
    ours = least_squares(features, labels, 3, 2.5)(features)
    wanted = torch.from_numpy(peer.predict(torch.cat([standard, ones], 1)))
    assert (ours - wanted).abs().max() < 1e-9


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_features_are_what_the_head_reads(classifier):
    model = random_model(tiny_config(classifier=classifier), 16, 3, std=0.3)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    stream = EvalStream(ImageSet(torch.zeros(5, dtype=torch.int64), pixels), (16, 16), batch=2,
                        part=Slice(), device=torch.device("cpu"))  # fmt: skip
    images = pixels / 127.5 - 1
    with torch.no_grad():
        tokens = model.transformer(images)
        wanted = tokens[:, 0] if classifier == "token" else tokens.mean(dim=1)
        assert (features_of(model, stream) - wanted).abs().max() < 1e-5
        assert (model.head(wanted) - model(images)).abs().max() < 1e-5


def test_draws_are_balanced_nested_and_seeded():
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    five, ten = draw_shots(labels, 5, seed=1), draw_shots(labels, 10, seed=1)
    assert labels[five].bincount().tolist() == [5] * 4 and len(ten.unique()) == 40
    assert set(five.tolist()) < set(ten.tolist())
    assert set(five.tolist()) != set(draw_shots(labels, 5, seed=2).tolist())
    with pytest.raises(ValueError, match=r"class 0 has .* images, not 100"):
        draw_shots(labels, 100, seed=1)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_bin("m.bin", random_model(img_size=8, classes=2), ("a", "b"))
    flags = ["--checkpoint", "m.bin", "--dataset", "digits", "--seeds", "2"]
    assert fewshot.run([*flags, "--shots", "1", "10", "--output", "f.json"]) == 0
    accuracy = json.loads((tmp_path / "f.json").read_text())["accuracy"]
    assert list(accuracy) == ["1", "10"] and len(accuracy["1"]) == 2
    mean = {shots: sum(values) / 2 for shots, values in accuracy.items()}
    assert 0.15 < mean["1"] < mean["10"] < 1  # ten classes: chance is 0.1
    assert f"{mean['10']:.4f}" in capsys.readouterr().out
    grown = ["--img_size", "16", "--val_fraction", "0.2", "--eval_batch_size", "50"]
    assert fewshot.run([*flags, *grown, "--shots", "5"]) == 0
    again = capsys.readouterr().out
    assert "test accuracy over 359 images" in again
    written = {}
    for name, argv in {
        "plain": [],
        "again": [],
        "stronger": ["--l2", "1e7"],
        "fewer": ["--val_fraction", "0.9"],
        "three": ["--seeds", "3"],
    }.items():
        command = [*flags, *argv, "--shots", "5", "--output", "f.json"]
        assert fewshot.run(command) == 0
        written[name] = json.loads((tmp_path / "f.json").read_text())["accuracy"]["5"]
    capsys.readouterr()
    assert written["again"] == written["plain"] == written["three"][:2]
    assert len(written["three"]) == 3
    assert written["stronger"] != written["plain"] and written["fewer"] != written["plain"]
    for argv, message in ((["--output", "gone/f.json"], "no such folder: gone"),
                          (["--model_type", "ViT-L_16"], "no known variant, not ViT-L_16"),
                          (["--shots", "1000"], "has 142 images, not 1000"),
                          (["--l2", "0"], "--l2 0 leaves")):  # fmt: skip
        assert fewshot.run([*flags, *argv]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
