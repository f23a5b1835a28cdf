"""What a run prints and draws."""

import resource
import threading

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.run_log import PROGRESS_SECONDS, RunLog

FIGURES = {"loss": 1.23456, "lr": 0.03, "images_per_second": 31.42}


def test_only_rank_0_prints_and_draws(tmp_path, capsys):
    log = RunLog(main=False)
    log.print("a line")
    log.training(FIGURES, 1, 1, log.bar())
    log.open_tensorboard(tmp_path / "logs", 0, {})
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
    line = "step {}/4: loss 1.2346, lr 0.03, 31.4 images/s"
    assert out.splitlines() == ["a \\udcff", *(line.format(step) for step in (0, 2, 4))]
    assert list(log.bar(range(2))) == [0, 1] and err == ""  # no terminal, no bar


def test_a_full_disk_ends_the_curves_but_not_the_run(tmp_path, monkeypatch, capsys):
    log, old = RunLog(main=True), resource.getrlimit(resource.RLIMIT_FSIZE)
    dead = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: dead.set())
    log.open_tensorboard(tmp_path, 0, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        while log.writer:  # TensorBoard writes in a thread
            log.scalars({"loss": 1.0}, 1)
        assert dead.wait(10)
        log.image("red", Image.new("RGB", (5, 4), "red"), 1)
        log.hyperparameters({"lr": 0.1}, {"final": 0.5})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert capsys.readouterr().out == "warning: no more curves for TensorBoard (File too large)\n"


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    flags = {"lr": 0.1, "size": (4, 4), "data_dir": "\udcff"}
    for first, value in [(0, 1.0), (3, 2.0)]:
        log = RunLog(main=True)
        log.open_tensorboard(tmp_path, first, flags)
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
