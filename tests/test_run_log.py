"""What a run prints, draws and writes line by line."""

import json
import resource
import sys
import threading
import time
import types

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.errors import UserError
from utils.run_log import PROGRESS_SECONDS, RunLog

FIGURES = {"epoch": 0.25, "loss": 1.23456, "lr": 0.03, "images_per_second": 31.42}


def test_only_rank_0_prints_and_draws(tmp_path, capsys):
    log = RunLog(main=False)
    log.print("a line")
    log.training(FIGURES, 1, 1, log.bar())
    log.open(tmp_path / "logs", 0, {}, None)
    log.scalars({"loss": 1.0}, 1)
    log.close()
    assert list(log.bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_lines(monkeypatch, capsys):
    log = RunLog(main=True)
    log.print("a \udcff")  # a file name that is not UTF-8
    times = [0, PROGRESS_SECONDS - 1, PROGRESS_SECONDS, PROGRESS_SECONDS, PROGRESS_SECONDS]
    for step, seconds in enumerate(times):
        monkeypatch.setattr("time.monotonic", lambda now=1000.0 + seconds: now)
        log.training(FIGURES, step, 4, log.bar())
    out, err = capsys.readouterr()
    line = "step {}/4 (epoch 0.25): loss 1.2346, lr 0.03, 31.4 images/s"
    assert out.splitlines() == ["a \\udcff", *(line.format(step) for step in (0, 2, 4))]
    assert list(log.bar(range(2))) == [0, 1] and err == ""  # no terminal, no bar


def test_a_full_disk_ends_the_curves_but_not_the_run(tmp_path, monkeypatch, capsys):
    log, old = RunLog(main=True), resource.getrlimit(resource.RLIMIT_FSIZE)
    dead = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: dead.set())
    log.open(tmp_path, 0, {}, None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        while log.writer or log.lines:  # TensorBoard writes in a thread
            log.scalars({"loss": 1.0}, 1)
        assert dead.wait(10)
        log.image("red", Image.new("RGB", (5, 4), "red"), 1)
        log.hyperparameters({"lr": 0.1}, {"final": 0.5})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    what = ("curves for TensorBoard", "lines in metrics.jsonl")
    lines = {f"warning: no more {each} (File too large)" for each in what}
    assert set(capsys.readouterr().out.splitlines()) == lines


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path, monkeypatch):
    flags = {"lr": 0.1, "size": (4, 4), "data_dir": "\udcff"}
    now = time.time
    for first, value in [(0, 1.0), (3, 2.0)]:
        # TensorBoard reads files of the same second in no certain order.
        monkeypatch.setattr(time, "time", lambda first=first: now() + first)
        log = RunLog(main=True)
        log.open(tmp_path, first, flags, None)
        for step in range(first, 5):
            log.scalars({"loss": value, "lr": 10 * value}, step)
        log.image("red", Image.new("RGB", (5, 4), "red"), first)
        log.hyperparameters(flags, {"final": 0.5})
        log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert events.Scalars("lr")[-1].value == 20 and events.Scalars("final")[-1].value == 0.5
    assert [(e.step, e.width, e.height) for e in events.Images("red")] == [(0, 5, 4), (3, 5, 4)]
    text = events.Tensors("flags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.split() == ["lr", "0.1", "size", "(4,", "4)", "data_dir", "\\udcff"]


def test_every_point_is_a_line_of_json(tmp_path):
    """A resumed run replaces the lines that it repeats, and a line that a kill has cut."""
    path = tmp_path / "metrics.jsonl"
    for first, loss in [(1, 1.0), (3, float("nan"))]:
        log = RunLog(main=True)
        log.open(tmp_path, first, {}, None)
        for step in range(first, 5):
            log.scalars({"train/loss": loss, "train/lr": 0.5}, step)
            # It is there at once, so that other programs can follow the run.
            assert json.loads(path.read_text().splitlines()[-1])["step"] == step
        log.scalars({"test/accuracy": 0.25}, 4)
        log.close()
        if first == 1:
            path.open("ab").write(b'{"step": 0}\n\xff\n{"step": 0}')  # whole, but without an end
    lines = path.read_text().splitlines()
    assert lines.pop(2) == '{"step": 0}'
    rows = [json.loads(line) for line in lines]
    assert all(abs(row.pop("time") - time.time()) < 600 for row in rows)
    losses = [(1, 1.0), (2, 1.0), (3, None), (4, None)]
    wanted = [{"step": step, "train/loss": loss, "train/lr": 0.5} for step, loss in losses]
    assert rows == [*wanted, {"step": 4, "test/accuracy": 0.25}]


def test_weights_and_biases_get_the_same(tmp_path, monkeypatch):
    """A stand-in for wandb, which is not among the requirements."""
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.Error = type("Error", (Exception,), {})
    made = types.SimpleNamespace(
        log=calls.append, finish=lambda: calls.append("end"), define_metric=lambda *_, **__: None
    )
    wandb.init = lambda **options: calls.append(options) or made
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = RunLog(main=True)
    log.open(tmp_path / "run", 1, {"lr": 0.1}, "vit")
    log.scalars({"train/loss": 0.5}, 1)
    log.close()
    start = {"project": "vit", "name": "run", "group": "run", "config": {"lr": 0.1}}
    assert calls == [start, {"train/loss": 0.5, "step": 1}, "end"]

    def refuse(**options):
        raise wandb.Error("No API key")

    wandb.init = refuse
    with pytest.raises(UserError, match="Weights & Biases: No API key"):
        RunLog(main=True).open(tmp_path / "other", 1, {}, "vit")
    assert not (tmp_path / "other").exists()
