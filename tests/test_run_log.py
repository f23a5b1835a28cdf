"""What a run prints and draws."""

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.run_log import PROGRESS_SECONDS, RunLog


def test_only_rank_0_prints_and_draws(tmp_path, capsys):
    log = RunLog(main=False)
    log.print("a line")
    log.progress("a line", last=True)
    log.open_tensorboard(tmp_path / "logs", 0, {})
    log.scalars({"loss": 1.0}, 1)
    log.close()
    assert list(log.bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_lines(monkeypatch, capsys):
    log = RunLog(main=True)
    log.print("a \udcff")  # a file name that is not UTF-8
    for step, seconds in enumerate([0, PROGRESS_SECONDS - 1, PROGRESS_SECONDS, PROGRESS_SECONDS]):
        monkeypatch.setattr("time.monotonic", lambda now=1000.0 + seconds: now)
        log.progress(f"step {step}")
    log.progress("the end", last=True)
    out, err = capsys.readouterr()
    assert out.splitlines() == ["a \\udcff", "step 0", "step 2", "the end"]
    assert list(log.bar(range(2))) == [0, 1] and err == ""  # no terminal, no bar


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
