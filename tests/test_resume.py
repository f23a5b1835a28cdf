"""A run is never lost: stopped anywhere and resumed, it ends in the same bits."""

import errno
import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from flags import parse_flags
from run_files import check_same_run
from tests.helpers import ROOT
from tests.stress_kill import kill_and_resume
from utils import files, run_state
from utils.checkpoint import load, save_atomic
from utils.cli import FlagError
from utils.precision import Precision

TINY = ["--model_type", "ViT-Mini_8", "--img_size", "8", "--dataset", "digits",
        "--warmup_steps", "2", "--train_batch_size", "16", "--eval_batch_size", "360",
        "--pretrained_dir", "none", "--num_steps", "8", "--log_every", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = Image.new(
        "RGB", (2, 2)
    )  # a third of the time of these small runs, and not their bits
    monkeypatch.setattr(train.figures, "confusion_picture", lambda *_: picture)


def at_update(monkeypatch, step, action):
    """Do something right after update `step` (from 0) has been made, once."""
    update, due = train.update, [True]

    def wrapped(args, now, *rest):
        result = update(args, now, *rest)
        if now == step and due:
            due.clear()
            action()
        return result

    monkeypatch.setattr(train, "update", wrapped)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def weights(name):
    """Everything of the last save that the next update would depend on."""
    last = load(f"output/{name}_last.pt")
    state = {f"model/{k}": v for k, v in last["precision"]["parameters"].items()}
    for i, slots in last["optimizer"]["state"].items():
        state |= {f"{i}/{k}": torch.as_tensor(v) for k, v in slots.items() if v is not None}
    return state, last["state"]


def assert_equal(a, b):
    (x, state_x), (y, state_y) = weights(a), weights(b)
    assert min(state_x.pop("seconds"), state_y.pop("seconds")) > 0
    assert x.keys() == y.keys() and state_x == state_y
    for key in x:
        assert torch.equal(x[key], y[key]), key


RECIPES = {
    "fp32": [],
    "crop+flip, dropout": ["--augmentation", "crop+flip", "--dropout_rate", "0.1"],
    "bf16 O1": ["--bf16", "--fp16_opt_level", "O1"],
    "bf16 O2, two micro-batches": ["--bf16", "--gradient_accumulation_steps", "2"],
    "bf16 O3": ["--bf16", "--fp16_opt_level", "O3"],
    "everything": ["--bf16", "--optimizer", "adamw", "--weight_decay", "0.1", "--mixup", "0.4",
                   "--cutmix", "1", "--label_smoothing", "0.1", "--dropout_rate", "0.1"],
}  # fmt: skip


def test_a_linear_probe_goes_on_with_its_frozen_backbone(monkeypatch):
    assert train.run([*TINY, "--name", "start"]) == 0
    probe = [*TINY, "--pretrained_dir", "output/start_checkpoint.bin", "--freeze", "backbone",
             "--bf16"]  # fmt: skip
    assert train.run([*probe, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        at_update(patch, 3, send(signal.SIGTERM))
        assert train.run([*probe, "--name", "cut"]) == 143
    assert train.run([*probe, "--name", "cut", "--resume"]) == 0
    assert_equal("whole", "cut")
    records = [load(f"output/{name}_checkpoint.bin")["model"] for name in ("start", "whole", "cut")]
    for key, value in records[0].items():
        assert torch.equal(records[1][key], records[2][key])
        assert torch.equal(value, records[2][key]) == (not key.startswith("head."))


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_resumed_is_bit_identical(recipe, monkeypatch, capsys):
    flags = [*TINY, *RECIPES[recipe], "--eval_every", "3"]
    assert train.run([*flags, "--name", "whole"]) == 0
    for step in (0, 2, 6) if recipe == "everything" else (2,):  # an evaluation is due after 2
        with monkeypatch.context() as patch:
            at_update(patch, step, send(signal.SIGTERM))
            assert train.run([*flags, "--name", "cut", "--overwrite"]) == 143
        err = capsys.readouterr().err
        assert "stopped by SIGTERM" in err and "--resume goes on" in err and "error" not in err
        assert load("output/cut_last.pt")["state"]["step"] == step + 1
        assert train.run([*flags, "--name", "cut", "--resume"]) == 0
        assert_equal("whole", "cut")
        best = [load(f"output/{name}_checkpoint.bin") for name in ("whole", "cut")]
        assert best[0]["step"] == best[1]["step"] and best[0]["metrics"] == best[1]["metrics"]


def test_another_number_of_micro_batches_goes_on_to_rounding(monkeypatch):
    assert train.run([*TINY, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        at_update(patch, 3, send(signal.SIGINT))
        assert train.run([*TINY, "--name", "cut"]) == 130
    resumed = ["--name", "cut", "--resume", "--gradient_accumulation_steps", "4"]
    assert train.run([*TINY, *resumed, "--eval_batch_size", "100", "--num_workers", "0"]) == 0
    (whole, _), (cut, _) = weights("whole"), weights("cut")
    assert max((whole[k] - cut[k]).abs().max() for k in whole) < 1e-5
    assert any(not torch.equal(whole[k], cut[k]) for k in whole)


def test_two_processes_stop_together_and_one_goes_on(tmp_path, capsys):
    """SIGTERM to the launcher of two: both end at the same update, which one process can resume,
    to the weights of one that was never stopped."""
    flags = list(TINY)
    flags[flags.index("--num_steps") + 1] = "60"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "train.py"), *flags, "--name", "run", "--save_every", "5"]
    process = subprocess.Popen([*launch, "2", *command], env=env, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    last = tmp_path / "output/run_last.pt"
    while not last.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert err.count("stopped by SIGTERM") == 1
    saved = load(last)["state"]
    assert 5 <= saved["step"] < 60
    goal = str(saved["step"] + 2)
    # --num_steps is part of the schedule: another number is another run.
    assert train.run([*flags, "--name", "run", "--num_steps", goal, "--resume"]) == 2
    assert f"--num_steps {goal} (was 60)" in capsys.readouterr().err
    assert train.run([*flags, "--name", "run", "--resume"]) == 0
    assert f"after update {saved['step']} of 60" in capsys.readouterr().out
    assert train.run([*flags, "--name", "whole"]) == 0
    (whole, _), (cut, _) = weights("whole"), weights("run")
    assert max((whole[key] - cut[key]).abs().max() for key in whole) < 1e-5


def test_an_evaluation_that_fails_or_is_stopped_costs_no_update(monkeypatch, capsys):
    flags = [*TINY, "--eval_every", "4"]
    assert train.run([*flags, "--name", "whole"]) == 0
    evaluate = train.evaluate

    def no_memory(*_):
        raise MemoryError("no room")

    def stopped(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*rest)

    for instead, status in ((no_memory, 1), (stopped, 143)):
        with monkeypatch.context() as patch:
            patch.setattr(train, "evaluate", instead)
            assert train.run([*flags, "--name", "cut", "--overwrite"]) == status
        err = capsys.readouterr().err
        assert ("--eval_batch_size" in err) == (status == 1)
        assert load("output/cut_last.pt")["state"]["step"] == 4  # not one update more
        assert train.run([*flags, "--name", "cut", "--resume"]) == 0
        assert_equal("whole", "cut")


def test_killed_at_random_moments(tmp_path):
    """The short form of stress_kill.py: real SIGKILLs; the end is that of the quiet run."""
    assert kill_and_resume(tmp_path, kills=2, seed=1, steps=30) == 2


def test_a_warning_signal_saves_and_goes_on(monkeypatch):
    seen = []
    at_update(monkeypatch, 2, send(signal.SIGUSR1))
    save_last = train.save_last
    monkeypatch.setattr(train, "save_last", lambda run: (seen.append(run.state.step),
                                                         save_last(run)))  # fmt: skip
    assert train.run([*TINY, "--name", "run"]) == 0
    assert seen == [3, 8, 8]  # before the last evaluation, and after it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_terminal_signals_the_workers_too(number, tmp_path):
    """Ctrl-C and launchers reach the whole process group; without its workers no run could save."""
    for i in range(24):
        folder = tmp_path / ("train" if i < 16 else "val") / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 80), (10 * i, 0, 0)).save(folder / f"{i}.png")
    flags = [*TINY, "--dataset", "folder", "--data_dir", ".", "--num_workers", "2", "--name", "run",
             "--save_every", "1"]  # fmt: skip
    flags[flags.index("--num_steps") + 1] = "60" if number == signal.SIGUSR1 else "2000"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"},
                               start_new_session=True)  # fmt: skip
    while not (tmp_path / "output/run_last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGUSR1:
        assert process.returncode == 0 and load("output/run_last.pt")["state"]["step"] == 60
        return
    assert process.returncode == 128 + number, err
    assert "saved in output/run_last.pt" in err and "Traceback" not in err


def test_a_closed_terminal_saves_the_run(tmp_path):
    """As when ssh breaks off: SIGHUP, and nothing left to write to."""
    flags = [*TINY, "--name", "run"]
    flags[flags.index("--num_steps") + 1] = "20000"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever this test was started with
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *flags])
    said = b""
    while not (tmp_path / "output/run_last.pt").exists():  # the evaluation after 100
        if select.select([terminal], [], [], 0.05)[0]:
            said += os.read(terminal, 4096)  # raises where the run has ended
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP, said
    step = load("output/run_last.pt")["state"]["step"]
    assert 100 <= step < 20000
    check_same_run(
        parse_flags([*flags, "--resume"], 1), Path("x"), load("output/run_last.pt")["flags"]
    )
    assert run_state.read(Path("output/run_last.pt"))[1].step == step


def test_a_warning_signal_that_comes_late_is_met_at_the_next_update(monkeypatch):
    seen, weight_norm, save_last = [], Precision.weight_norm, train.save_last

    def late(precision):
        if not seen:
            seen.append("signal")
            os.kill(os.getpid(), signal.SIGUSR1)  # update 2 is being logged, its requests are read
        return weight_norm(precision)

    monkeypatch.setattr(Precision, "weight_norm", late)
    monkeypatch.setattr(train, "save_last", lambda run: (seen.append(run.state.step),
                                                         save_last(run)))  # fmt: skip
    assert train.run([*TINY, "--name", "run"]) == 0
    assert seen == ["signal", 3, 8, 8]


@pytest.mark.parametrize("where", ["load_data", "evaluate_only"])
def test_ctrl_c_where_there_is_nothing_to_save(where, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, where, interrupted)
    only = ["--eval_only"] if where == "evaluate_only" else []
    assert train.run([*TINY, "--name", "run", *only]) == 130
    assert capsys.readouterr().err == "train.py: stopped by SIGINT\n"


def test_a_second_signal_leaves_at_once(tmp_path):
    script = (
        "import os, signal, train\n"
        "update = train.update\n"
        "def twice(*args):\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return update(*args)\n"
        "train.update = twice\n"
        f"train.run({[*TINY, '--name', 'run']})\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 143 and "leaving at once" in done.stderr
    assert not (tmp_path / "output/run_last.pt").exists()


def test_the_kernel_of_an_update_is_this_device_s():
    weight = torch.nn.Parameter(torch.ones(2))
    saved = torch.optim.SGD([weight], 0.1, 0.9, fused=True)
    own = torch.optim.SGD([weight], 0.2, fused=False)
    content = {"data": "d", "optimizer": saved.state_dict(), "precision": None}
    run_state.restore(Path("x"), content, Namespace(restore=lambda _: None), own, "d")
    assert [own.param_groups[0][key] for key in ("fused", "lr", "momentum")] == [False, 0.1, 0.9]


def test_results_are_not_overwritten_silently(capsys):
    assert train.run([*TINY, "--name", "run"]) == 0
    before = weights("run")[0]
    assert train.run([*TINY, "--name", "run", "--seed", "1"]) == 2
    err = capsys.readouterr().err
    assert "output/run_last.pt is there already" in err and "--resume" in err and "--ov" in err
    assert all(torch.equal(v, before[k]) for k, v in weights("run")[0].items())
    save_atomic(load("output/run_checkpoint.bin"), "other.bin")
    training = json.loads(Path("output/run_results.json").read_text())["training"]
    whole = str(Path("output/run_checkpoint.bin").absolute())  # the same file by another name
    assert train.run(["--name", "run", "--dataset", "digits", "--eval_only", whole]) == 0
    facts = Path("output/run_results.json").read_text()
    assert json.loads(facts)["training"] == training and training["seconds"] > 0
    assert train.run([*TINY, "--name", "run", "--eval_only", "other.bin"]) == 2
    assert f"states the training of {whole}" in capsys.readouterr().err
    assert Path("output/run_results.json").read_text() == facts
    assert train.run(["--name", "run", "--dataset", "digits", "--eval_only"]) == 0
    assert Path("output/run_report/confusion.csv").exists()
    assert json.loads(Path("output/run_results.json").read_text())["training"] == training
    assert train.run([*TINY, "--name", "run", "--seed", "1", "--overwrite"]) == 0
    assert not Path("output/run_report").exists()  # it was about the weights of before
    assert any(not torch.equal(v, before[k]) for k, v in weights("run")[0].items())
    assert train.run([*TINY, "--name", "run", "--overwrite", "--resume"]) == 2
    # An evaluation's results are results, too; a report of other weights does not outlive them.
    assert train.run(["--name", "e", "--dataset", "digits", "--eval_only", whole]) == 0
    assert train.run([*TINY, "--name", "e"]) == 2
    assert "output/e_results.json is there already: --overwrite" in capsys.readouterr().err
    assert train.run(["--name", "run", "--dataset", "digits", "--eval_only"]) == 0
    assert train.run([*TINY, "--name", "run", "--seed", "1", "--resume"]) == 0
    assert Path("output/run_report/confusion.csv").exists()  # nothing new was found


def test_the_figures_of_a_training_are_not_replaced_by_those_of_other_images(capsys):
    flags = ["--dataset", "digits", "--val_fraction", "0.2"]
    assert train.run([*TINY, *flags, "--name", "run", "--seed", "1"]) == 0
    facts = Path("output/run_results.json").read_text()
    only = ["--name", "run", *flags, "--eval_only"]
    for other in (["--val_fraction", "0.3", "--dataset", "folder", "--data_dir", "d"],
                  ["--img_size", "16"]):  # fmt: skip
        if "--data_dir" in other:
            for part in "01":
                Path("d", part).mkdir(parents=True)
                for i in range(4):
                    Image.new("L", (8, 8), 60 * i).save(Path("d", part, f"{i}.png"))
        assert train.run([*only, *other]) == 2
        assert "states the result of this training on 359 other images" in capsys.readouterr().err
        assert Path("output/run_results.json").read_text() == facts
    assert train.run(only) == 0  # the test images do not hang on the seed
    assert train.run([*only, "--img_size", "16", "--overwrite"]) == 0
    results = json.loads(Path("output/run_results.json").read_text())
    assert results["img_size"] == [16, 16] and results["training"] == json.loads(facts)["training"]


def test_flags_that_say_how_may_change_and_flags_that_say_what_may_not():
    assert train.run([*TINY, "--name", "run"]) == 0
    path = Path("output/run_last.pt")
    flags = load(path)["flags"]
    how = {"name", "resume", "overwrite", "output_dir", "data_dir", "num_workers", "log_every",
           "save_every", "eval_batch_size", "gradient_accumulation_steps", "local_rank", "timeout",
           "deterministic", "offline", "compile", "grad_checkpointing", "eval_only"}  # fmt: skip
    assert how < flags.keys()
    for name in flags:
        changed = flags | {name: "another"}
        if name in how:
            check_same_run(Namespace(**changed), path, flags)
        else:
            with pytest.raises(FlagError, match=f"--{name} another"):
                check_same_run(Namespace(**changed), path, flags)


def test_a_broken_image_loses_nothing(tmp_path, monkeypatch, capsys):
    """What is broken behind its head is met late; mended, the run goes on as if nothing was."""
    for part in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "d" / part / name).mkdir(parents=True)
            for j in range(4):
                picture = Image.effect_noise((70 + j, 70), 50 + 90 * i).convert("RGB")
                picture.save(tmp_path / "d" / part / name / f"{j}.jpg")
    flags = [*TINY, "--dataset", "folder", "--data_dir", "d", "--num_workers", "0"]
    assert train.run([*flags, "--name", "whole"]) == 0
    broken = tmp_path / "d" / "val" / "dog" / "0.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    assert train.run([*flags, "--name", "cut"]) == 2
    err = capsys.readouterr().err
    assert "0.jpg is not a readable image" in err and "--resume goes on" in err
    broken.write_bytes(content)
    broken.rename(broken.with_name("new.jpg"))
    assert train.run([*flags, "--name", "cut", "--resume"]) == 2
    assert "was trained on other data" in capsys.readouterr().err
    broken.with_name("new.jpg").rename(broken)
    (tmp_path / "d").rename(tmp_path / "moved")  # the folder may
    assert train.run([*flags, "--name", "cut", "--resume", "--data_dir", "moved"]) == 0
    assert_equal("whole", "cut")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux's")
def test_a_console_that_takes_no_more_does_not_end_the_run(tmp_path):
    command = [sys.executable, ROOT / "train.py", *TINY, "--name", "run"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr
    assert done.stderr.count("the run goes on, its output does not (No space left") == 1
    assert (tmp_path / "output" / "run_results.json").is_file()


def test_other_data_is_refused(capsys):
    assert train.run([*TINY, "--name", "run"]) == 0
    saved = load("output/run_last.pt")
    save_atomic(saved | {"data": "7 to train on"}, "other_last.pt")
    assert train.run([*TINY, "--name", "new", "--resume", "other_last.pt"]) == 2
    assert "was trained on other data: 7 to train on, not" in capsys.readouterr().err


def test_a_new_run_that_breaks_is_not_resumed_as_the_old_one(monkeypatch):
    assert train.run([*TINY, "--name", "run"]) == 0
    monkeypatch.setattr(train, "update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run([*TINY, "--name", "run", "--overwrite"])
    assert not list(Path("output").glob("[!.]*"))


def test_a_named_file_is_resumed_under_another_name(monkeypatch, capsys):
    assert train.run([*TINY, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        at_update(patch, 3, send(signal.SIGTERM))
        assert train.run([*TINY, "--name", "cut"]) == 143
    named = ["--resume", "output/cut_last.pt"]
    assert train.run([*TINY, "--name", "whole", *named]) == 2
    assert "output/whole_last.pt is there already" in capsys.readouterr().err
    assert train.run([*TINY, "--name", "new", *named]) == 0
    assert_equal("whole", "new")
    assert load("output/cut_last.pt")["state"]["step"] == 4  # the file that was named is kept
    assert train.run([*TINY, "--name", "cut", *named]) == 0
    assert_equal("whole", "cut")


@pytest.mark.parametrize("best", ["beside it", "lost"])
def test_the_best_weights_go_along(best, capsys):
    """A rate of 0: no later evaluation is better than the first."""
    still = [*TINY, "--eval_every", "4", "--learning_rate", "0"]
    assert train.run([*still, "--name", "run"]) == 0
    first = load("output/run_checkpoint.bin")
    if best == "lost":
        os.remove("output/run_checkpoint.bin")
    assert train.run([*still, "--name", "new", "--resume", "output/run_last.pt"]) == 0
    record, out = load("output/new_checkpoint.bin"), capsys.readouterr().out
    assert record["metrics"] == first["metrics"]
    assert (first["step"], record["step"]) == (4, 4 if best == "beside it" else 8)
    assert ("output/new_checkpoint.bin is not here" in out) == (best == "lost")


def test_the_time_of_all_sessions_is_counted(monkeypatch):
    with monkeypatch.context() as patch:
        at_update(patch, 3, send(signal.SIGTERM))
        assert train.run([*TINY, "--name", "run"]) == 143
    saved = load("output/run_last.pt")
    assert 0 < saved["state"]["seconds"] < 600
    saved["state"]["seconds"] = 10_000.0
    save_atomic(saved, "output/run_last.pt")
    assert train.run([*TINY, "--name", "run", "--resume"]) == 0
    results = json.loads(Path("output/run_results.json").read_text())
    assert 10_000 < results["training"]["seconds"] < 10_600


def test_overflow_without_end_says_where(monkeypatch, capsys):
    def overflow(*rest):
        raise train.NonFiniteError("gradients are not finite at dynamic loss scale 0.000977")

    update = train.update
    monkeypatch.setattr(train, "update", lambda args, step, *rest:
                        overflow() if step == 5 else update(args, step, *rest))  # fmt: skip
    assert train.run([*TINY, "--name", "run", "--save_every", "2"]) == 1
    err = capsys.readouterr().err.strip()
    assert "loss scale 0.000977 at update 6 (rate 0.0" in err and "\n" not in err
    assert "the last good checkpoint is output/run_last.pt" in err


def test_only_the_same_run_is_resumed(capsys):
    assert train.run([*TINY, "--name", "run"]) == 0
    changes = {
        "--learning_rate": "0.5", "--seed": "3", "--num_steps": "9", "--train_batch_size": "32",
        "--augmentation": "none", "--optimizer": "adamw",
    }  # fmt: skip
    for flag, value in changes.items():
        assert train.run([*TINY, "--name", "run", "--resume", flag, value]) == 2
        assert f"belongs to another run: {flag} {value} (was" in capsys.readouterr().err
    assert train.run([*TINY, "--name", "none", "--resume"]) == 2
    assert "output/none_last.pt: no such file" in capsys.readouterr().err
    assert train.run([*TINY, "--name", "run", "--resume"]) == 0  # finished: nothing left to do
    assert "after update 8 of 8" in capsys.readouterr().out


def test_the_curve_goes_on_without_doubled_points(monkeypatch):
    with monkeypatch.context() as patch:
        at_update(patch, 5, lambda: 1 / 0)  # a crash after points that were never saved
        with pytest.raises(ZeroDivisionError):
            train.run([*TINY, "--name", "run", "--save_every", "3"])
    assert load("output/run_last.pt")["state"]["step"] == 3
    assert train.run([*TINY, "--name", "run", "--resume"]) == 0
    events = EventAccumulator("logs/run")
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]


# --------------------------------------------------------------------------------------- trouble


def test_a_full_disk_leaves_the_older_checkpoint(monkeypatch, capsys):
    """A file-size limit stands in for the disk: writing beyond it fails, as ENOSPC does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_update(monkeypatch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, old[1])))
    try:
        status = train.run([*TINY, "--name", "run", "--save_every", "3"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert status == 1
    err = capsys.readouterr().err.strip()
    assert "output/run_last.pt could not be written (File too large)" in err
    assert "the one before is whole" in err and "\n" not in err
    assert load("output/run_last.pt")["state"]["step"] == 3
    assert {path.name for path in Path("output").glob("[!.]*")} == {"run_last.pt"}


def test_curves_that_cannot_be_written_do_not_end_the_run(monkeypatch, capsys):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = train.RunLog

    class Full(full):
        def scalars(self, values, step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
            super().scalars(values, step)
            self._draw("flush")
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    monkeypatch.setattr(train, "RunLog", Full)
    try:
        assert train.run([*TINY, "--name", "run"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    seen = capsys.readouterr()
    assert seen.out.count("note: the curves end here: logs/run cannot be written to (") == 1
    assert "Traceback" not in seen.err and "best weights: output/run" in seen.out


def test_results_that_cannot_be_written_are_one_line(monkeypatch, capsys):
    def full(path):
        if path.suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    flush = files.flush
    monkeypatch.setattr(files, "flush", full)
    assert train.run([*TINY, "--name", "run"]) == 1
    err = capsys.readouterr().err.strip()
    assert "run_results.json could not be written (No space left on device)" in err
    assert "\n" not in err


def test_the_output_folder_is_removed(monkeypatch, capsys):
    at_update(monkeypatch, 1, lambda: shutil.rmtree("output"))
    assert train.run([*TINY, "--name", "run"]) == 1
    assert "could not be written (No such file or directory)" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(monkeypatch, capsys):
    def poison():
        with torch.no_grad():
            model[0].head.weight.fill_(float("nan"))

    model = []
    build = train.build_model
    monkeypatch.setattr(train, "build_model", lambda *a: model.append(build(*a)) or model[0])
    at_update(monkeypatch, 3, poison)
    assert train.run([*TINY, "--name", "run", "--save_every", "2"]) == 1
    err = capsys.readouterr().err.strip()
    assert "noticed at update 4 (rate 0.0" in err
    assert "the last good checkpoint is output/run_last.pt" in err and "\n" not in err
    assert weights("run")[1]["step"] == 2  # what was poisoned was not saved


def test_a_damaged_checkpoint_is_named(capsys):
    assert train.run([*TINY, "--name", "run"]) == 0
    whole = open("output/run_last.pt", "rb").read()  # noqa: SIM115
    for damage in (whole[: len(whole) // 2], whole[:9000] + b"\xff" * 9 + whole[9009:], b""):
        Path("output/run_last.pt").write_bytes(damage)
        assert train.run([*TINY, "--name", "run", "--resume"]) == 2
        err = capsys.readouterr().err.strip()
        assert "output/run_last.pt" in err and "\n" not in err
    for file in ("output/run_checkpoint.bin", "half.pt"):
        Path("output/run_last.pt").write_bytes(whole)
        saved = load("output/run_last.pt")
        saved["state"]["step"] = "four"
        save_atomic(saved, "half.pt")
        assert train.run([*TINY, "--name", "new", "--resume", file]) == 2
        err = capsys.readouterr().err.strip()
        assert f"{file} is no" in err and "\n" not in err


def test_deterministic_runs_are_the_same_bits():
    try:
        for name in ("a", "b"):
            assert train.run([*TINY, "--name", name, "--deterministic", "--bf16"]) == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal("a", "b")
