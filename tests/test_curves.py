"""Curves of several runs: the values in the table, and where the lines are drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import curves
from tests.helpers import run_command


def log_run(folder, values, tag="test/accuracy"):
    with SummaryWriter(folder) as writer:
        for step, value in values.items():
            writer.add_scalar(tag, value, step)


@pytest.fixture
def runs(workdir):
    log_run("logs/a_1", {10: 0.5, 20: 0.75})
    log_run("logs/a_2", {10: 0.75, 20: 0.625})
    log_run("logs/b", {10: 0.125, 20: 0.25}, tag="val/accuracy")
    log_run("logs/b", {20: 1.0})  # the test accuracy at the end of such a run
    return workdir


def heights(picture, colour):
    """Rows of the pixels of one colour, from left to right; without the legend."""
    pixels = np.asarray(picture)[:, :400].astype(int)
    rows, columns = (np.abs(pixels - colour).sum(axis=2) < 30).nonzero()
    return rows[np.argsort(columns)]


def test_runs_with_one_label_are_one_curve(runs, capsys):
    argv = ["tuned=logs/a_1", "tuned=logs/a_2", "from scratch=logs/b", "--output", "new/c.png"]
    assert run_command(curves, *argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| | runs | steps | last accuracy | best accuracy |",
        "|---|---|---|---|---|",
        "| tuned | 2 | 20 | 0.6875 (0.6250 to 0.7500) | 0.7500 (0.7500 to 0.7500) |",
        "| from scratch | 1 | 20 | 0.2500 | 0.2500 |",
        "curves: new/c.png",
    ]
    picture = Image.open("new/c.png")
    tuned, scratch = (heights(picture, c) for c in ((31, 119, 180), (255, 127, 14)))
    assert max(tuned) < min(scratch)  # higher in the picture at every step
    for curve in (tuned, scratch):  # each rises
        assert curve[:50].mean() > curve[-50:].mean()
    assert [p.name for p in Path("new").iterdir()] == ["c.png"]


def test_labels_and_folders_may_contain_an_equals_sign(runs, capsys):
    log_run("logs/lr=0.1", {10: 0.5})
    assert run_command(curves, "logs/lr=0.1", "a=b=logs/lr=0.1", "logs/b") == 0
    out = capsys.readouterr().out
    assert "| lr=0.1 | 1 | 10 | 0.5000 |" in out and "| a=b | 1 | 10 | 0.5000 |" in out
    assert "| b | 1 | 20 | 0.2500 | 0.2500 |" in out  # the folder's name where there is no label


MISTAKES = {
    "logs/none": "logs/none has no accuracies",
    "x=logs": "logs has no accuracies",
    "x=logs/a_1 x=logs/short": "short was not evaluated at the steps of other runs of 'x'",
    f"logs/b --output {__file__}/c.png": "test_curves.py: File exists",
    "logs/a_1 --output c.txt": "--output c.txt must end in .png or .jpg",
    "logs/a_1 --output folder.png": "folder.png is a folder",
    "": "LABEL=FOLDER",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(command, runs, capsys):
    log_run("logs/short", {10: 0.5})
    Path("folder.png").mkdir()
    before = sorted(runs.rglob("*"))
    assert run_command(curves, *command.split()) == 2
    error = capsys.readouterr().err
    assert MISTAKES[command] in error
    assert error.startswith("curves.py: error: ") and error.count("\n") == 1
    assert sorted(runs.rglob("*")) == before
