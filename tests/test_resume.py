"""A run is never lost: stopped anywhere and resumed, it ends in the same bits."""

import json
import os
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import train
from flags import parse_flags
from models.checkpoints import load_torch, save_torch
from models.errors import RunError, UserError
from resume import FREE_FLAGS, check_same_run, take_steps
from tests.helpers import ROOT, run_command, words, write_images
from tests.stress_kill import kill_and_resume
from tests.test_dist_util import TORCHRUN, workers_of
from utils.checkpoint import SavedRun, read_run, restore_run
from utils.stream import global_batch

TINY = words(
    "--model_type ViT-Mini_8 --img_size 8 --dataset digits --warmup_steps 2 --train_batch_size 16 "
    "--eval_batch_size 360 --pretrained_dir none --num_steps 8 --log_every 2"
)

pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Pictures take a third of the time of these small runs, and do not change their bits."""
    picture = Image.new("RGB", (2, 2))
    monkeypatch.setattr(train.figures, "confusion_matrix", lambda *_: picture)


def run(name, *flags):
    return run_command(train, *TINY, "--name", name, *flags)


def after_step(monkeypatch, step, action):
    """Call `action(run)` right after step `step` (from 0) has been made, once."""
    update, due = train.update, [True]

    def wrapped(one_run, *rest):
        result = update(one_run, *rest)
        if one_run.state.step == step and due:
            due.clear()
            action(one_run)
        return result

    monkeypatch.setattr(train, "update", wrapped)


def send(number):
    return lambda _: os.kill(os.getpid(), number)


def cut(monkeypatch, name, step, *flags, number=signal.SIGTERM):
    """A run that is stopped by a signal after step `step`."""
    with monkeypatch.context() as patch:
        after_step(patch, step, send(number))
        assert run(name, *flags) == 128 + number


def wait_until(ready, process):
    while not ready():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)


def weights(name):
    """Everything of the last save that the next step would depend on."""
    last = load_torch(f"output/{name}_last.pt")
    state = {f"model/{k}": v for k, v in last["precision"]["parameters"].items()}
    state |= {f"average {i}": v for i, v in enumerate(last["precision"]["averages"])}
    for i, slots in last["optimizer"]["state"].items():
        state |= {f"{i}/{k}": torch.as_tensor(v) for k, v in slots.items() if v is not None}
    return state, last["state"]


def assert_equal(a, b):
    (x, state_x), (y, state_y) = weights(a), weights(b)
    assert min(state_x.pop("seconds"), state_y.pop("seconds")) > 0
    assert x.keys() == y.keys() and state_x == state_y
    for key in x:
        assert torch.equal(x[key], y[key]), key
    best = [load_torch(f"output/{name}_checkpoint.bin") for name in (a, b)]
    assert best[0]["step"] == best[1]["step"] and best[0]["metrics"] == best[1]["metrics"]


def error_line(capsys):
    line = capsys.readouterr().err.strip()
    assert "\n" not in line, line
    return line


RECIPES = {
    "fp32": "",
    "crop+flip, dropout": "--augmentation crop+flip --dropout_rate 0.1",
    "bf16 O1": "--bf16 --fp16_opt_level O1",
    "bf16 O2, two micro-batches": "--bf16 --gradient_accumulation_steps 2",
    "bf16 O3": "--bf16 --fp16_opt_level O3",
    "weighted loss": "--balance loss --label_smoothing 0.1 --select_by loss",
    "balanced draws, two micro-batches": "--balance sampling --gradient_accumulation_steps 2 "
    "--select_by macro_f1",
    "bfloat16 momentum": "--momentum_dtype bfloat16 --bf16",
    "everything": "--bf16 --optimizer adamw --weight_decay 0.1 --mixup 0.4 --cutmix 1 "
    "--label_smoothing 0.1 --dropout_rate 0.1 --layer_decay 0.75 --drop_path 0.2 --ema 0.9 "
    "--rand_augment 2,9 --random_erasing 0.25 --loss bce",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_resumed_is_bit_identical(recipe, monkeypatch, capsys):
    flags = [*words(RECIPES[recipe]), "--eval_every", "3"]
    assert run("whole", *flags) == 0
    for step in (0, 2, 6) if recipe == "everything" else (2,):  # an evaluation is due after 2
        cut(monkeypatch, "cut", step, *flags, "--overwrite")
        err = capsys.readouterr().err
        assert "stopped by SIGTERM" in err and "output/cut_last.pt" in err and "error" not in err
        assert load_torch("output/cut_last.pt")["state"]["step"] == step + 1
        assert run("cut", *flags, "--resume") == 0
        assert_equal("whole", "cut")


@pytest.mark.parametrize("frozen", ["--freeze backbone", "--freeze 4", "--lora 2 --ema 0.5"])
def test_a_run_continues_with_what_is_frozen(frozen, monkeypatch):
    assert run("start") == 0
    probe = words(f"--pretrained_dir output/start_checkpoint.bin --bf16 {frozen}")
    assert run("whole", *probe) == 0
    cut(monkeypatch, "cut", 3, *probe)
    assert run("cut", *probe, "--resume") == 0
    assert_equal("whole", "cut")
    names = ("start", "whole", "cut")
    records = [load_torch(f"output/{name}_checkpoint.bin")["model"] for name in names]
    for key, value in records[0].items():
        assert torch.equal(records[1][key], records[2][key])
        parts = {"4": "(embed|layer.[0-3])", "backbone": "transformer"}
        kept = parts.get(frozen.split()[1], "(?!.*(query|value).weight)transformer")
        trained = not re.search(kept, key)
        assert trained or torch.equal(value, records[2][key])
        assert not trained or key.endswith("bias") or not torch.equal(value, records[2][key])


def test_another_number_of_micro_batches_continues_to_rounding(monkeypatch):
    assert run("whole") == 0
    cut(monkeypatch, "cut", 3, number=signal.SIGINT)
    other = words("--gradient_accumulation_steps 4 --eval_batch_size 100 --num_workers 0")
    assert run("cut", "--resume", *other) == 0
    (whole, _), (resumed, _) = weights("whole"), weights("cut")
    assert max((whole[k] - resumed[k]).abs().max() for k in whole) < 1e-5
    assert any(not torch.equal(whole[k], resumed[k]) for k in whole)


def test_two_processes_stop_together_and_one_resumes(tmp_path, capsys):
    """SIGUSR1 to one of two saves once. SIGTERM to their launcher: both end at the same step, which
    one process can resume, to the weights of one that was never stopped."""
    flags = ["--num_steps", "60"]
    command = [sys.executable, *TORCHRUN, str(ROOT / "train.py"), *TINY, *flags, "--name", "run"]
    last, log = tmp_path / "output/run_last.pt", tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "step 2/60 " in log.read_text(), process)
    os.kill(workers_of(process.pid)["1"], signal.SIGUSR1)  # the other one saves, and both go on
    wait_until(last.exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert err.count("train.py: stopped by SIGTERM") == 1
    assert log.read_text().count("saved: ") == 2
    step = load_torch(last)["state"]["step"]
    assert 4 <= step < 60
    # --num_steps is part of the schedule: another number is another run.
    assert run("run", "--num_steps", step + 2, "--resume") == 2
    assert f"--num_steps {step + 2} (was 60)" in capsys.readouterr().err
    assert run("run", *flags, "--resume") == 0
    assert f"after step {step} of 60" in capsys.readouterr().out
    assert run("whole", *flags) == 0
    (whole, _), (resumed, _) = weights("whole"), weights("run")
    assert max((whole[key] - resumed[key]).abs().max() for key in whole) < 1e-5


def test_an_evaluation_that_fails_is_repeated(monkeypatch, capsys):
    """It costs no step that was saved before it."""
    flags = words("--eval_every 4 --save_every 4")
    assert run("whole", *flags) == 0

    def no_memory(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(train.metrics, "predict_dataset", no_memory)
        assert run("cut", *flags) == 1
    assert "out of memory (no room): a smaller batch" in error_line(capsys)
    assert load_torch("output/cut_last.pt")["state"]["step"] == 4
    assert run("cut", *flags, "--resume") == 0
    assert_equal("whole", "cut")


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_during_an_evaluation_stops_after_it(last, monkeypatch):
    """Not one step later, and also after the last one."""
    flags = words("--eval_every 4 --save_every 100")
    assert run("whole", *flags) == 0
    predict, calls = train.metrics.predict_dataset, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 1 + last:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train.metrics, "predict_dataset", signalled)
        assert run("cut", *flags) == 143
    assert load_torch("output/cut_last.pt")["state"]["step"] == (8 if last else 4)
    assert run("cut", *flags, "--resume") == 0
    results = [json.loads(Path(f"output/{n}_results.json").read_text()) for n in ("whole", "cut")]
    assert results[0]["loss"] == results[1]["loss"]
    assert results[0]["training"] | {"seconds": 0} == results[1]["training"] | {"seconds": 0}


@pytest.mark.parametrize("by, best", [("accuracy", 1.0), ("loss", 0.25)])
def test_results_speak_of_the_weights_that_are_there(by, best, monkeypatch):
    """A killed run wrote best weights after its last save; resumed, nothing better comes."""
    cut(monkeypatch, "run", 3, "--select_by", by)
    assert run("other", "--select_by", by) == 0
    record = load_torch("output/other_checkpoint.bin") | {"step": 6, "metrics": {by: best}}
    save_torch(record, "output/run_checkpoint.bin")
    assert run("run", "--select_by", by, "--resume") == 0
    training = json.loads(Path("output/run_results.json").read_text())["training"]
    assert (training[f"best_{by}"], training["best_step"]) == (best, 6)


def test_a_save_older_than_a_flag_has_its_default(monkeypatch, capsys):
    """Saves were once without --balance and --select_by, and the score was called accuracy."""
    assert run("whole", "--eval_every", "3") == 0
    cut(monkeypatch, "cut", 4, "--eval_every", "3")
    save = load_torch("output/cut_last.pt")
    for flag in ("balance", "select_by", "lora_on", "epochs", "ema"):
        del save["flags"][flag]
    state = save["state"]
    del state["select_by"]
    for name in ("best", "last"):
        state[f"{name}_accuracy"] = state.pop(f"{name}_score")
    save_torch(save, "output/cut_last.pt")
    assert read_run(Path("output/cut_last.pt"))[1].last_score == state["last_accuracy"] > 0
    capsys.readouterr()
    assert run("cut", "--resume", "--eval_every", "3", "--balance", "loss") == 2
    assert "--balance loss (was none)" in error_line(capsys)
    assert run("cut", "--resume", "--eval_every", "3") == 0
    assert_equal("whole", "cut")


def test_killed_at_random_moments(tmp_path):
    """The short form of stress_kill.py: real SIGKILLs; the end is that of the quiet run."""
    hits, inside = kill_and_resume(tmp_path, kills=2, seed=1, steps=30)
    assert hits == 2 and inside >= 1


SAVES = {
    "step": ("--eval_every 2", [2, 3, 8]),
    "save": ("--save_every 2", [2, 2, 4, 6, 8]),
    "minutes": ("--save_minutes 1", [3, 8]),
    "always": ("--save_minutes 0", [1, 2, 3, 4, 5, 6, 7, 8]),
}


@pytest.mark.parametrize("why, flags, steps", [(why, *row) for why, row in SAVES.items()])
def test_when_a_run_is_saved(why, flags, steps, monkeypatch):
    """By SIGUSR1, also where it comes during another save; by steps; by the clock; at the end.
    By an evaluation only if there is no save yet, to which the best weights belong."""
    seen, save, clock = [], train.Saver.save, time.monotonic

    def spy(saver):
        seen.append(saver.state.step)
        save(saver)
        if why == "save" and seen == [2]:
            os.kill(os.getpid(), signal.SIGUSR1)
        saver.writer.join()

    monkeypatch.setattr(train.Saver, "save", spy)
    if why == "step":
        after_step(monkeypatch, 2, send(signal.SIGUSR1))
    if why == "minutes":
        late = lambda _: monkeypatch.setattr(time, "monotonic", lambda: clock() + 61)  # noqa: E731
        after_step(monkeypatch, 2, late)
    assert run("run", *words(flags)) == 0
    assert seen == steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_terminal_signals_the_workers_too(number, tmp_path):
    """Ctrl-C and launchers reach the whole process group; without its workers no run could save."""
    for split, count in (("train", 8), ("val", 4)):
        write_images(tmp_path / split, count=count, size=(70, 80))
    steps = "60" if number == signal.SIGUSR1 else "2000"
    flags = words("--dataset folder --data_dir . --num_workers 2 --name run --save_every 1")
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *flags, "--num_steps", steps]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    wait_until((tmp_path / "output/run_last.pt").exists, process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGUSR1:
        assert process.returncode == 0
        assert load_torch("output/run_last.pt")["state"]["step"] == 60
        return
    assert process.returncode == 128 + number, err
    assert "saved in output/run_last.pt" in err and "Traceback" not in err


def test_a_closed_terminal_saves_the_run(tmp_path):
    """As when ssh breaks off: SIGHUP, and nothing left to write to."""
    flags = [*TINY, "--name", "run", "--num_steps", "20000", "--save_every", "100"]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever this test was started with
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *flags])
    printed = b""
    while not (tmp_path / "output/run_last.pt").exists():
        if select.select([terminal], [], [], 0.05)[0]:
            printed += os.read(terminal, 4096)  # raises if the run has ended
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP, printed
    assert 100 <= read_run(Path("output/run_last.pt"))[1].step < 20000


def test_the_kernel_of_a_step_is_this_device_s():
    weight = torch.nn.Parameter(torch.ones(2))
    saved = torch.optim.SGD([weight], 0.1, 0.9, fused=True)
    own = torch.optim.SGD([weight], 0.2, fused=False)
    content = {"data": "d", "optimizer": saved.state_dict(), "precision": None}
    saved = SavedRun(content, None, None, Path("x"))
    restore_run(saved, Namespace(load_state_dict=lambda _: None), own, "d")
    assert [own.param_groups[0][key] for key in ("fused", "lr", "momentum")] == [False, 0.1, 0.9]


# ------------------------------------------------------------------------ names and overwriting


def test_results_are_not_overwritten_silently(capsys):
    assert run("run") == 0
    before = weights("run")[0]
    assert run("run", "--seed", "1") == 2
    line = error_line(capsys)
    assert "output/run_last.pt exists already" in line and "--resume" in line and "--over" in line
    assert all(torch.equal(v, before[k]) for k, v in weights("run")[0].items())
    results = Path("output/run_results.json").read_text()
    assert json.loads(results)["training"]["seconds"] > 0
    model = ["--checkpoint", "output/run_checkpoint.bin", "--dataset", "digits"]
    assert run_command(evaluate, *model, "--name", "run") == 2
    assert "holds the results of a training" in error_line(capsys)
    assert Path("output/run_results.json").read_text() == results
    assert run_command(evaluate, *model, "--name", "e") == 0
    capsys.readouterr()
    assert run("e") == 2  # the results of an evaluation are results
    assert "output/e_results.json exists already: --overwrite" in error_line(capsys)
    assert run("run", "--seed", "1", "--overwrite") == 0
    assert any(not torch.equal(v, before[k]) for k, v in weights("run")[0].items())
    assert run("run", "--overwrite", "--resume") == 2


def test_flags_that_say_how_may_change_and_flags_that_say_what_may_not():
    assert run("run") == 0
    path = Path("output/run_last.pt")
    flags = load_torch(path)["flags"]
    assert flags.keys() > FREE_FLAGS
    for name in flags:
        value = 7 if name == "num_steps" else "another"  # more steps would extend the run
        changed = Namespace(**flags | {name: value})
        if name in FREE_FLAGS:
            check_same_run(changed, path, flags)
        else:
            with pytest.raises(UserError, match=f"--{name} {value}"):
                check_same_run(changed, path, flags)


def test_only_the_same_run_is_resumed(capsys):
    assert run("run") == 0
    capsys.readouterr()
    assert run("run", "--resume", "--learning_rate", "0.5") == 2
    assert "belongs to another run: --learning_rate 0.5 (was 0.03)" in error_line(capsys)
    assert run("none", "--resume") == 2
    assert "output/none_last.pt: no such file" in error_line(capsys)
    save_torch(load_torch("output/run_last.pt") | {"data": "7 train images"}, "other_last.pt")
    assert run("new", "--resume", "other_last.pt") == 2
    assert "was trained on other data: 7 train images, not" in error_line(capsys)


def test_a_new_run_that_breaks_is_not_resumed_as_the_old_one(monkeypatch):
    assert run("run") == 0
    monkeypatch.setattr(train, "update", lambda *_: 1 / 0)
    assert run("run", "--overwrite") == 1
    assert [path.name for path in Path("output").glob("[!.]*")] == ["run_flags.txt"]


def test_the_flags_file_makes_the_same_run_again():
    flags = words("--bf16 --fp16_opt_level O1 --img_size 8x16 --seed 3 --resize 9 --eval_every 3")
    assert run("run", *flags, "--output_dir", "two words") == 0
    read = ["@two words/run_flags.txt", "--name", "again", "--output_dir", "output"]
    assert run_command(train, *read) == 0
    assert run("run", *flags) == 0
    assert_equal("run", "again")
    assert run_command(train, "@output/again_flags.txt") == 2  # it has results
    assert run_command(train, "@output/again_flags.txt", "--overwrite") == 0
    assert_equal("run", "again")
    assert run_command(train, "@output/again_flags.txt", "--resume", "auto") == 0  # finished


def test_a_length_in_epochs_is_one_in_steps(monkeypatch, capsys):
    """1,438 images in batches of 16: 0.1 epochs are 8.99 steps, 0.02 are 1.8."""
    assert run("steps", *words("--num_steps 9")) == 0
    tiny = words(re.sub("--(num|warmup)_steps .", "", shlex.join(TINY)))
    epochs = [*tiny, *words("--epochs 0.1 --warmup_epochs 0.02")]
    assert run_command(train, *epochs, "--name", "epochs") == 0
    assert "step 9/9 (epoch 0.10): loss" in capsys.readouterr().out
    assert_equal("steps", "epochs")
    last = words("--name read --num_steps 3 --warmup_steps 1")  # of both, the last one counts
    assert parse_flags(["@output/epochs_flags.txt", *last], 1).epochs is None
    assert run_command(train, "@output/epochs_flags.txt", "--name", "read") == 0
    assert_equal("steps", "read")
    with monkeypatch.context() as patch:
        after_step(patch, 4, send(signal.SIGTERM))
        assert run_command(train, *epochs, "--name", "cut") == 143
    assert run_command(train, *epochs, "--name", "cut", "--resume") == 0
    assert_equal("steps", "cut")
    capsys.readouterr()
    assert run_command(train, *epochs, "--name", "cut", "--resume") == 0
    assert "already finished after step 9 of 9" in capsys.readouterr().out
    assert run_command(train, *epochs, "--name", "cut", "--resume", *words("--epochs 0.12")) == 0
    assert "extended from 9" in capsys.readouterr().out
    tiny = [*tiny, "--name", "tiny"]
    assert run_command(train, *tiny, *words("--epochs 1e-9 --warmup_epochs 1e308")) == 0
    assert weights("tiny")[1]["step"] == 1
    args = parse_flags([*epochs, "--name", "x"], 1)
    take_steps(args, {"num_steps": 14, "epochs": 0.1, "warmup_steps": 2})
    assert args.num_steps == 14
    args.epochs = 0.3
    take_steps(args, {"num_steps": 14, "epochs": 0.3, "warmup_steps": 2})
    assert args.num_steps == 14  # 14 * 0.3 / 0.3 is a little more
    assert weights("cut")[1]["step"] == 11
    assert run("cut", "--resume") == 2  # in steps: another run
    assert "--epochs None (was 0.12)" in error_line(capsys)


def test_the_last_weights_count_if_asked(monkeypatch, capsys):
    """At an lr of 0 the first evaluation stays the best one."""
    flags = words("--select last --learning_rate 0 --eval_every 3 --val_fraction 0.1")
    assert run("run", *flags) == 0
    assert "test accuracy of the last weights" in capsys.readouterr().out
    training = json.loads(Path("output/run_results.json").read_text())["training"]
    assert training["select"] == "last" and training["best_step"] == 3
    assert load_torch("output/run_checkpoint.bin")["step"] == 8
    cut(monkeypatch, "cut", 6, *flags)  # after the evaluations of steps 3 and 6
    assert load_torch("output/cut_checkpoint.bin")["step"] == 6
    assert run("cut", *flags, "--resume") == 0
    assert_equal("run", "cut")


def test_a_named_file_is_resumed_under_another_name(monkeypatch, capsys):
    assert run("whole") == 0
    cut(monkeypatch, "cut", 3)
    capsys.readouterr()
    named = ["--resume", "output/cut_last.pt"]
    assert run("whole", *named) == 2
    assert "output/whole_last.pt exists already" in error_line(capsys)
    assert run("new", *named) == 0
    assert_equal("whole", "new")
    assert load_torch("output/cut_last.pt")["state"]["step"] == 4  # the file that was named stays
    assert run("cut", *named) == 0
    assert_equal("whole", "cut")


@pytest.mark.parametrize("best", ["beside it", "lost"])
def test_the_best_weights_go_along(best, capsys):
    """An lr of 0: no later evaluation is better than the first."""
    still = words("--eval_every 4 --save_every 4 --learning_rate 0")
    assert run("run", *still) == 0
    first = load_torch("output/run_checkpoint.bin")
    if best == "lost":
        os.remove("output/run_checkpoint.bin")
    assert run("new", *still, "--resume", "output/run_last.pt") == 0
    record, out = load_torch("output/new_checkpoint.bin"), capsys.readouterr().out
    assert record["metrics"] == first["metrics"]
    assert (first["step"], record["step"]) == (4, 4 if best == "beside it" else 8)
    assert ("output/new_checkpoint.bin is missing" in out) == (best == "lost")


def test_the_time_of_all_sessions_is_counted(monkeypatch):
    cut(monkeypatch, "run", 3)
    saved = load_torch("output/run_last.pt")
    assert 0 < saved["state"]["seconds"] < 600
    saved["state"]["seconds"] = 10_000.0
    save_torch(saved, "output/run_last.pt")
    assert run("run", "--resume") == 0
    results = json.loads(Path("output/run_results.json").read_text())
    assert 10_000 < results["training"]["seconds"] < 10_600


def test_the_curve_continues_without_doubled_points(monkeypatch):
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda _: 1 / 0)  # a crash after points that were never saved
        assert run("run", "--save_every", "2") == 1
    assert load_torch("output/run_last.pt")["state"]["step"] == 4
    assert run("run", "--resume") == 0
    events = EventAccumulator("logs/run")
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]


# --------------------------------------------------------------------------------------- trouble


def test_a_broken_image_loses_nothing(tmp_path, capsys):
    """A file that is broken behind its header is found late; repaired, the run continues."""
    images = sorted(write_images(tmp_path / "d/train", count=16, size=(70, 70)))
    write_images(tmp_path / "d/val", size=(70, 70))
    flags = words("--dataset folder --data_dir d --num_workers 0")
    assert run("whole", *flags) == 0
    indices, _ = global_batch(len(images), seed=42, step=1, batch_size=16)
    broken = images[indices[0]]
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert run("cut", *flags) == 2
    line = error_line(capsys)
    assert f"{broken.name} is not a readable image" in line and "after step 1; --resume" in line
    assert load_torch("output/cut_last.pt")["state"]["step"] == 1
    shutil.copy("output/cut_last.pt", "cut_last.pt")
    assert run("left", *flags, "--skip_unreadable", "--resume", "cut_last.pt") == 0
    assert f"left out: {broken.relative_to(tmp_path)} is not" in capsys.readouterr().out
    assert load_torch("output/left_last.pt")["unreadable"] == {"train": [int(indices[0])]}
    assert run("from_start", *flags, "--skip_unreadable") == 0  # step 0 does not have the file
    assert_equal("left", "from_start")
    broken.write_bytes(content)
    other = broken.rename(broken.with_name("new.png"))
    assert run("cut", *flags, "--resume") == 2
    assert "was trained on other data" in error_line(capsys)
    other.rename(broken)
    (tmp_path / "d").rename(tmp_path / "moved")  # the folder may have another name
    assert run("cut", *flags, "--data_dir", "moved", "--resume") == 0
    assert_equal("whole", "cut")


def test_an_image_stays_left_out(tmp_path, monkeypatch, capsys):
    """Found by a first resume, it is left out by the next one, repaired or not; so in val/."""
    trained = sorted(write_images(tmp_path / "d/train", count=32, size=(70, 70)))
    held_out = write_images(tmp_path / "d/val", size=(70, 70))
    flags = words("--dataset folder --data_dir d --num_workers 0")
    cut(monkeypatch, "cut", 1, *flags)
    late = int(global_batch(len(trained), seed=42, step=3, batch_size=16)[0][0])
    kept = [path.read_bytes() for path in (trained[late], held_out[1])]
    for path in (trained[late], held_out[1]):
        path.write_bytes(b"")
    cut(monkeypatch, "cut", 3, *flags, "--resume", "--skip_unreadable")
    assert run("cut", *flags, "--resume", "--skip_unreadable") == 0
    assert json.loads(Path("output/cut_results.json").read_text())["images"] == 3
    unreadable = load_torch("output/cut_last.pt")["unreadable"]
    assert unreadable == {"train": [late], "val": [1]}
    cut(monkeypatch, "repaired", 1, *flags, "--skip_unreadable")
    for path, content in zip((trained[late], held_out[1]), kept, strict=True):
        path.write_bytes(content)
    assert run("repaired", *flags, "--resume") == 0
    assert load_torch("output/repaired_last.pt")["unreadable"] == unreadable
    assert_equal("repaired", "cut")


def test_overflow_without_end_says_where(monkeypatch, capsys):
    update = train.update

    def overflow(one_run, *rest):
        if one_run.state.step == 5:
            raise RunError("gradients are not finite at dynamic loss scale 0.000977")
        return update(one_run, *rest)

    monkeypatch.setattr(train, "update", overflow)
    assert run("run", "--save_every", "2") == 1
    line = error_line(capsys)
    assert "loss scale 0.000977; after step 5" in line
    assert "--resume continues from output/run_last.pt" in line


@pytest.mark.parametrize("noticed", ["log", "save", "eval"])
def test_a_loss_that_is_not_finite_ends_the_run(noticed, monkeypatch, capsys):
    """What is poisoned is neither saved nor evaluated."""

    def poison(one_run):
        with torch.no_grad():
            one_run.model.head.weight.fill_(float("nan"))

    after_step(monkeypatch, 3, poison)
    every = {"log": "8", "save": "8", "eval": "8"} | {noticed: "2"}
    assert run("run", *words(" ".join(f"--{k}_every {v}" for k, v in every.items()))) == 1
    out, err = capsys.readouterr()
    assert "not finite" in err and f"after step {8 if noticed == 'save' else 4}" in err
    if noticed == "save":
        assert "--resume continues from output/run_last.pt" in err
        assert weights("run")[1]["step"] == 2
        line = "warning: output/run_last.pt is not written: a weight is not finite; the training"
        assert out.count(line) == 2
    assert Path("output/run_checkpoint.bin").exists() == (noticed == "eval")


@pytest.mark.parametrize("until", ["a stop", "the end", "step 7"])
def test_a_full_disk_leaves_the_older_checkpoint(until, monkeypatch, capsys):
    """A file-size limit stands in for the disk: writing beyond it fails, as ENOSPC does. What
    could not be written meanwhile is written at the end: with an lr of 0 the first evaluation,
    after step 6, is the best."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size, one_run):
        one_run.saver.writer.thread.submit(int).result()  # what has begun is done
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))

    lasting = until != "step 7"
    after_step(monkeypatch, 4, partial(limit, 10**6))
    if until != "the end":
        room = partial(limit, old[0])
        after_step(monkeypatch, 6, room if until == "step 7" else send(signal.SIGTERM))
    try:
        assert run("run", *words("--save_every 3 --eval_every 6 --learning_rate 0")) == lasting
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    out, err = capsys.readouterr()
    for file, intact in (("last.pt", "the old file is intact"), ("checkpoint.bin", "no file is")):
        path = Path(f"output/run_{file}").resolve()
        assert f"warning: {path} could not be written (File too large); {intact}" in out
    assert load_torch("output/run_last.pt")["state"]["step"] == (3 if lasting else 8)
    if lasting:
        assert "output/run_last.pt could not be written (File too large)" in err
        assert "the old file is intact" in err
        assert {path.name for path in Path("output").glob("[!.]*")} == {
            "run_last.pt",
            "run_flags.txt",
        }
    else:
        assert load_torch("output/run_checkpoint.bin")["step"] == 6


def test_a_damaged_save_is_named(capsys):
    assert run("run") == 0
    capsys.readouterr()
    whole = Path("output/run_last.pt").read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:9000] + b"\xff" * 9 + whole[9009:], b""):
        Path("output/run_last.pt").write_bytes(damage)
        assert run("run", "--resume") == 2
        assert "output/run_last.pt" in error_line(capsys)
    assert run("new", "--resume", "output/run_checkpoint.bin") == 2
    assert "output/run_checkpoint.bin is no saved run" in error_line(capsys)
    Path("output/run_last.pt").write_bytes(whole)
    save_torch(load_torch("output/run_last.pt") | {"format": 2}, "old_last.pt")
    assert run("new", "--resume", "old_last.pt") == 2
    assert "an earlier version" in error_line(capsys)


def test_deterministic_runs_are_the_same_bits():
    try:
        for name in ("a", "b"):
            assert run(name, "--deterministic", "--bf16") == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal("a", "b")
