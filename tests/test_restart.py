"""The same command given again: by hand, by a scheduler, or by torchrun after a failure."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.checkpoints import load_torch
from tests.helpers import ROOT, words
from tests.stress_kill import saved_at
from tests.test_dist_util import TORCHRUN, workers_of
from tests.test_resume import (
    TINY,
    after_step,
    assert_equal,
    cut,
    error_line,
    quick_pictures,  # noqa: F401
    run,
    wait_until,
)
from utils.checkpoint import RunState
from utils.scheduler import learning_rate

AUTO = ("--resume", "auto")

pytestmark = pytest.mark.usefixtures("workdir")


class Killed(BaseException):
    """Nothing in the program catches it. (PyTorch's autograd forbids a fork in some test runs.)"""


def killed(name, step, *flags):
    """A run that ends at once after step `step` and its saves."""

    def kill(one_run):
        one_run.saver.writer.join()
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        after_step(patch, step, kill)
        run(name, *flags)


def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def results(name):
    return json.loads(Path(f"output/{name}_results.json").read_text())


def test_auto_starts_goes_on_and_ends(monkeypatch, capsys):
    assert run("whole") == 0
    cut(monkeypatch, "run", 2, *AUTO)
    assert "resumed" not in capsys.readouterr().out
    assert run("run", *AUTO, "--learning_rate", "1") == 2
    assert "--learning_rate 1.0 (was 0.03)" in error_line(capsys)
    assert run("run", *AUTO) == 0
    assert "resumed: output/run_last.pt, after step 3 of 8" in capsys.readouterr().out
    assert_equal("whole", "run")
    before, found = files(), results("run")
    best = f"best accuracy {found['training']['best_accuracy']:.4f} at step 8"
    for resume in (AUTO, ["--resume"]):
        assert run("run", *resume) == 0
        assert capsys.readouterr().out == (
            f"already finished after step 8 of 8: {best}; test accuracy {found['accuracy']:.4f}; "
            "results: output/run_results.json\n"
        )
    assert files() == before


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[:9000]),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_starts_again_without_a_whole_save(damage, monkeypatch, capsys):
    """What a killed run has left is kept under another name."""
    flags = words("--eval_every 2")
    assert run("whole", *flags) == 0
    cut(monkeypatch, "run", 4, *flags)
    last = Path("output/run_last.pt")
    DAMAGES[damage](last)
    capsys.readouterr()
    assert run("run", *flags, *AUTO) == 0
    note = "note: output/run_last.pt is damaged.*, and the run starts again\n"
    assert bool(re.search(note, capsys.readouterr().out)) == (damage != "missing")
    assert_equal("whole", "run")
    left = ("run_checkpoint.bin",) if damage == "missing" else ("run_checkpoint.bin", last.name)
    kept = {path.name for path in Path("output").glob("*.damaged")}
    assert kept == {f"{name}.damaged" for name in left}
    DAMAGES[damage](last)  # with results, that is for the user to solve
    before = files()
    assert run("run", *flags, *AUTO) == 2
    found = "output/run_results.json exists" if damage == "missing" else "last.pt is damaged"
    assert found in error_line(capsys) and files() == before


def test_more_steps_extend_a_run(monkeypatch, capsys):
    """A finished one, or not; fewer steps are another run."""
    flags = words("--eval_every 3 --num_steps 12")
    for name in ("whole", "cut"):
        assert run(name, "--eval_every", "3") == 0
    assert run("whole", *flags, "--resume") == 0
    note = (
        "resumed: output/whole_last.pt, after step 8 of 12 (extended from 8: the schedule changes"
    )
    assert note in capsys.readouterr().out
    drawn = EventAccumulator("logs/whole").Reload().Scalars("train/lr")
    totals = dict.fromkeys((2, 3, 4, 6, 8), 8) | dict.fromkeys((9, 10, 12), 12)
    schedule = {"base": 3e-2, "warmup": 2, "decay": "cosine"}
    wanted = [learning_rate(step - 1, total=n, **schedule) for step, n in totals.items()]
    assert [event.step for event in drawn] == list(totals)
    assert [event.value for event in drawn] == pytest.approx(wanted)
    cut(monkeypatch, "cut", 9, *flags, *AUTO)
    capsys.readouterr()
    assert run("cut", "--eval_every", "3", *AUTO) == 2
    assert "--num_steps 8 (was 12)" in error_line(capsys)
    assert run("cut", *flags, *AUTO) == 0
    assert "extended" not in capsys.readouterr().out
    assert_equal("whole", "cut")


ACCURACY = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.3, 6: 0.6, 7: 0.1, 8: 0.1}  # by step


def test_patience_counts_as_if_the_run_was_never_killed(monkeypatch, capsys):
    """Killed before a better evaluation was in a save, and between two that were not better."""
    add = RunState.add_evaluation
    accuracy = lambda state, scores: scores.update(accuracy=ACCURACY[state.step])  # noqa: E731
    fake = lambda state, scores, _: accuracy(state, scores) or add(state, scores)  # noqa: E731
    monkeypatch.setattr(RunState, "add_evaluation", fake)
    flags = words("--eval_every 1 --save_every 2 --patience 3")
    assert run("whole", *flags) == 0
    assert "stopped after step 5: evaluations without a better: 3\n" in capsys.readouterr().out
    assert results("whole")["training"]["best_step"] == 2
    for step in (2, 4):
        killed("run", step, *flags, *AUTO)
        save = load_torch("output/run_last.pt")["state"]
        assert (save["step"], save["best_step"]) == (step, step // 2)
    assert run("run", *flags, *AUTO) == 0
    assert_equal("whole", "run")
    os.remove("output/run_results.json")  # killed after the last step
    assert run("run", *flags, *AUTO) == 0
    assert_equal("whole", "run")
    capsys.readouterr()
    assert run("run", *flags, *AUTO) == 0
    assert re.search(
        "already finished after step 5 of 8 .*: best accuracy 0.5000 at step 2",
        capsys.readouterr().out,
    )
    assert run("run", *flags, *AUTO, "--patience", "0") == 0  # goes on
    training = results("run")["training"]
    assert (training["best_step"], training["last_accuracy"]) == (6, 0.1)


@pytest.fixture
def start():
    """A function that starts a run of two processes; its output is added to the file `name`."""
    launchers = []

    def start(name, *flags, restarts=0):
        launch = [*TORCHRUN, "--max-restarts", str(restarts)]
        command = [sys.executable, *launch, str(ROOT / "train.py"), *TINY, *flags]
        command += words(f"--name {name} --num_steps 40 --save_every 2 --eval_every 20 --timeout 1")
        with open(name, "a") as file:
            launchers.append(subprocess.Popen(command, stdout=file, stderr=file, text=True))
        return launchers[-1]

    yield start
    for launcher in launchers:  # of a test that failed
        launcher.terminate()
        launcher.wait()


def test_two_processes_go_on_after_kills(start):
    """Processes whose launcher is killed save and end; the same command goes on. One process that
    is killed is started again, with the other one. Not a bit changes."""
    whole, first = start("whole"), start("run", *AUTO)
    last, log = Path("output/run_last.pt"), Path("run")
    wait_until(last.exists, first)
    first.kill()
    first.wait()
    second = start("run", *AUTO, restarts=3)
    wait_until(lambda: "resumed: output/run_last.pt, after step" in log.read_text(), second)
    before = saved_at(last)
    wait_until(lambda: saved_at(last) != before, second)
    os.kill(workers_of(second.pid)["1"], signal.SIGKILL)
    assert second.wait(120) == whole.wait(120) == 0, log.read_text()
    assert "stopped by SIGTERM; saved in output/run_last.pt" in log.read_text()
    assert log.read_text().count("resumed: ") >= 2
    assert_equal("whole", "run")


def test_a_full_disk_of_one_process_ends_all(start):
    """A file-size limit stands in for the disk, and lasts for the process that writes."""
    process, last = start("run"), Path("output/run_last.pt")
    wait_until(last.exists, process)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(workers_of(process.pid)["0"], resource.RLIMIT_FSIZE, (10**6, limits[1]))
    assert process.wait(120) == 1
    log, failed = Path("run").read_text(), f"{last.resolve()} could not be written (File too large)"
    assert f"warning: {failed}; the old file is intact; the training goes on" in log
    assert f"train.py: error: {failed}" in log
    assert load_torch(last)["state"]["step"] < 40 and not Path("output/run_results.json").exists()
