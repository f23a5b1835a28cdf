"""Curves of several runs: their figures as a table, and where the lines are drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import curves
from utils.run_log import RunLog


def log_run(folder, values, tag="test/accuracy", test=None):
    log = RunLog(main=True)
    log.open_curves(Path(folder))
    for step, value in values.items():
        log.scalars({tag: value, "train/loss": 9.0}, step)
    if test is not None:
        log.scalars({"test/accuracy": test}, step)
    log.close()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log_run("logs/a_1", {10: 0.5, 20: 0.75})
    log_run("logs/a_2", {10: 0.75, 20: 0.625})
    log_run("logs/b", {10: 0.125, 20: 0.25}, tag="val/accuracy", test=1.0)
    return tmp_path


def heights(picture, colour):
    """Rows of the pixels of one colour, from the left."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    close = np.abs(pixels - colour).sum(axis=2) < 30
    close[:, 400:] = False  # the legend
    rows, columns = close.nonzero()
    return rows[np.argsort(columns)]


def test_runs_of_one_label_are_one_curve(runs, capsys):
    argv = ["tuned=logs/a_1", "tuned=logs/a_2", "from scratch=logs/b", "--output", "new/c.png"]
    assert curves.run(argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| | runs | updates | accuracy at the end | best |",
        "|---|---|---|---|---|",
        "| tuned | 2 | 20 | 0.6875 (0.6250 to 0.7500) | 0.7500 (0.7500 to 0.7500) |",
        "| from scratch | 1 | 20 | 0.2500 | 0.2500 |",
        "curves: new/c.png",
    ]
    picture = Image.open("new/c.png")
    tuned, scratch = (heights(picture, c) for c in ((31, 119, 180), (255, 127, 14)))
    assert max(tuned) < min(scratch)  # higher in the picture, all along
    assert tuned[:50].mean() > tuned[-50:].mean()  # 0.625, then 0.6875
    assert scratch[:50].mean() > scratch[-50:].mean()
    assert [p.name for p in Path("new").iterdir()] == ["c.png"]


def test_a_name_with_an_equals_sign(runs, capsys):
    log_run("logs/lr=0.1", {10: 0.5})
    assert curves.run(["logs/lr=0.1", "a=b=logs/lr=0.1"]) == 0
    out = capsys.readouterr().out
    assert "| lr=0.1 | 1 | 10 | 0.5000 |" in out and "| a=b | 1 | 10 | 0.5000 |" in out


def test_a_folder_without_a_label_is_called_by_its_name(runs, capsys):
    assert curves.run(["logs/b"]) == 0
    assert "| b | 1 | 20 | 0.2500 | 0.2500 |" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["logs/none"], "logs/none holds no accuracies"),
    (["x=logs"], "logs holds no accuracies"),
    (["x=logs/a_1", "x=logs/short"], "'x' were not evaluated at the same updates"),
    (["logs/b", "--output", f"{__file__}/c.png"], "test_curves.py cannot be made: "),
    (["logs/a_1", "--output", "c.txt"], "--output c.txt: must end in .png or .jpg"),
    (["logs/a_1", "--output", "folder.png"], "folder.png is a folder"),
    ([], "LABEL=FOLDER"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(argv, words, runs, capsys):
    log_run("logs/short", {10: 0.5})
    Path("folder.png").mkdir()
    before = sorted(runs.rglob("*"))
    assert curves.run(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("curves.py: error: ") and error.count("\n") == 1
    assert sorted(runs.rglob("*")) == before
