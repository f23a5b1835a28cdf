"""Several real processes: both launchers, equal results, and failures that end all of them."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from unittest.mock import patch

import pytest
import torch

import evaluate
import train as train_command
from models.checkpoints import load_torch
from models.errors import UserError
from tests.helpers import ROOT, random_model, run_command, save_bin, words, write_images
from utils import dist_util
from utils.hardware import processes_here

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = ["-m", "torch.distributed.launch", "--standalone", "--nproc_per_node", "2"]
FLAGS = words(
    "--dataset digits --model_type ViT-Ti_4 --img_size 8 --pretrained_dir none --learning_rate 0.1 "
    "--warmup_steps 2 --train_batch_size 32 --eval_batch_size 100"
)

pytestmark = pytest.mark.usefixtures("workdir")


def start(launcher, name, flags="", script=ROOT / "train.py", **variables):
    command = [sys.executable, *launcher, str(script), "--name", name, *FLAGS, *words(flags)]
    env = os.environ | {"PYTHONWARNINGS": "ignore"} | variables
    return subprocess.Popen(command, env=env, text=True, stdout=PIPE, stderr=PIPE)


def end(process, fails=False):
    """(stdout, stderr) of a process that is to succeed, or to fail."""
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    assert (process.returncode != 0) == fails, err
    return out, err


MICRO = "--gradient_accumulation_steps"
TODAY = "--layer_decay 0.75 --drop_path 0.2 --ema 0.5 --rand_augment 2,9 --random_erasing 0.25"
CASES = {  # launcher, flags, micro-batches of one process and of each of two, limit
    "torchrun": (TORCHRUN, "--num_steps 10 --balance loss", 1, 2, 1e-5),
    "launch": (LAUNCH, "--num_steps 10 --balance sampling --drop_path 0.3", 1, 1, 1e-5),
    # The same four micro-batches; their gradients are added in float32, in another order.
    "bfloat16": (TORCHRUN, f"--num_steps 6 --bf16 {TODAY}", 4, 2, 1e-6),
}


@pytest.mark.parametrize("launcher, flags, one, two, limit", CASES.values(), ids=CASES)
def test_two_processes_equal_one(launcher, flags, one, two, limit, capsys):
    assert run_command(train_command, "--name", "one", *FLAGS, *words(flags), MICRO, one) == 0
    out = capsys.readouterr().out
    two_out, _ = end(start(launcher, "two", f"{flags} {MICRO} {two}"))
    one, two = (load_torch(f"output/{name}_checkpoint.bin") for name in ("one", "two"))
    assert one["model"]["head.bias"].abs().max() > 5e-3
    for key, value in one["model"].items():
        assert (value - two["model"][key]).abs().max() < limit, key
    # Every test image counts once: both accuracies are the same n / 359.
    assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], abs=1e-5)
    assert two_out.count("test accuracy") == out.count("test accuracy") > 0  # by rank 0 alone


def test_two_processes_evaluate_as_one():
    """To the last probability. Both lie in the order of the images."""
    save_bin("m.bin", random_model(img_size=8, classes=10, std=0.3), "0123456789")
    flags = words("--checkpoint m.bin --dataset digits --batch_size 100")
    assert run_command(evaluate, *flags, "--name", "one") == 0
    command = [sys.executable, *TORCHRUN, str(ROOT / "evaluate.py"), *flags, "--name", "two"]
    subprocess.run(command, check=True, capture_output=True, timeout=150)
    one, two = (json.loads(Path(f"output/{n}_results.json").read_text()) for n in ("one", "two"))
    assert one["macro_roc_auc"] == pytest.approx(two["macro_roc_auc"], abs=1e-6)
    assert one["balanced_accuracy"] == two["balanced_accuracy"] > 0
    tables = [Path(f"output/{name}_report/predictions.csv").read_text() for name in ("one", "two")]
    (header, *first), (other, *second) = (list(csv.reader(t.splitlines())) for t in tables)
    assert header == other and len(first) == 359
    for a, b in zip(first, second, strict=True):
        assert a[:3] == b[:3]
        assert list(map(float, a[3:])) == pytest.approx(list(map(float, b[3:])), abs=1e-5)


def test_slurms_processes_equal_torchruns():
    """To the bit, and only rank 0 prints."""
    flags = "--num_steps 6 --eval_every 3"
    expected, _ = end(start(TORCHRUN, "torchrun", flags))
    tasks = [start([], "srun", flags, **each) for each in slurm_tasks(2)]
    (out, _), (other_out, _) = map(end, tasks)
    scores = [[line for line in o.splitlines() if "accuracy" in line] for o in (out, expected)]
    assert scores[0] == scores[1] and not other_out and "2 processes" in out
    one, two = (load_torch(f"output/{name}_last.pt") for name in ("torchrun", "srun"))
    assert one["state"]["step"] == two["state"]["step"] == 6
    for key, value in one["precision"]["parameters"].items():
        assert torch.equal(value, two["precision"]["parameters"][key]), key


def slurm_tasks(count):
    """What srun sets in each of `count` processes on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    job = place | {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(count)}
    step = {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_TASKS_PER_NODE": str(count)}
    return [job | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]


REDUCED = f"""
import json
import os
import sys
from collections import Counter
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import train
from utils.cli import run_script

reduced, all_reduce, update = Counter(), dist.all_reduce, train.update

def counting(tensor, *rest, **options):
    reduced[str(tensor.dtype)] += tensor.numel()
    return all_reduce(tensor, *rest, **options)

def counted(*args):
    dist.all_reduce = counting
    try:
        return update(*args)
    finally:
        dist.all_reduce = all_reduce

class Model(train.DistributedDataParallel):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_comm_hook(None, allreduce_hook)  # which calls dist.all_reduce

train.update, train.DistributedDataParallel = counted, Model
status = run_script("train.py", train.main)
Path("reduced" + os.environ["RANK"] + ".json").write_text(json.dumps(reduced))
sys.exit(status)
"""


@pytest.mark.parametrize("precision", ["", "--bf16"], ids=["float32", "O2"])
def test_gradients_of_two_micro_batches_are_reduced_once(precision, workdir):
    """And in float32: bfloat16 would round their sum."""
    (workdir / "counted.py").write_text(REDUCED)
    end(start(TORCHRUN, "run", f"--num_steps 3 {MICRO} 2 {precision}", workdir / "counted.py"))
    model = load_torch("output/run_checkpoint.bin")["model"]
    numbers = 3 * sum(parameter.numel() for parameter in model.values())
    for rank in (0, 1):
        reduced = json.loads(Path(f"reduced{rank}.json").read_text())
        assert reduced == {"torch.float32": numbers}


FOLDER_OF_RANK = f"""
import os
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from utils.cli import run_script
sys.argv += ["--output_dir", "output" + os.environ["RANK"]]
sys.exit(run_script("train.py", train.main))
"""


@pytest.mark.parametrize("saved", [0, 1])
def test_processes_that_share_no_folder_are_refused(saved, workdir):
    """One of them finds the run of an earlier command, the other one finds none."""
    folder = workdir / f"output{saved}"
    flags = ("--name", "run", *FLAGS, "--output_dir", folder)
    assert run_command(train_command, *flags, "--num_steps", "2") == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (workdir / "unshared.py").write_text(FOLDER_OF_RANK)
    flags = "--num_steps 4 --resume auto"
    _, err = end(start(TORCHRUN, "run", flags, workdir / "unshared.py"), fails=True)
    lines = [line for line in err.splitlines() if line.startswith("train.py: error: ")]
    assert lines == ["train.py: error: processes find different runs in output0: share the folder"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    other = workdir / f"output{1 - saved}"
    assert not other.exists() or not list(other.iterdir())


def test_a_wrong_flag_is_printed_once():
    _, err = end(start(TORCHRUN, "wrong", "--train_batch_size 33"), fails=True)
    lines = [line for line in err.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1 and "--train_batch_size 33 must be a multiple of 2" in lines[0]


FROM_MAIN = f"""
import os
import sys
sys.path.insert(0, {str(ROOT)!r})
from models.errors import UserError
from utils import dist_util

def say(line):  # in one piece: the processes share the pipe
    os.write(1, (line + "\\n").encode())

def make(error):
    say("made by " + str(dist_util.rank()))
    if error:
        raise UserError("no such thing")
    return 7, dist_util.rank()

dist_util.init(-1)
say("got %d %d" % dist_util.from_main(lambda: make(False)))
try:
    dist_util.from_main(lambda: make(True))
except UserError as error:
    say("error " + str(error))
dist_util.shutdown()
"""


def test_what_one_process_makes_or_refuses_is_known_to_all(workdir):
    (workdir / "script.py").write_text(FROM_MAIN)
    out, _ = end(start(TORCHRUN, "x", script=workdir / "script.py"))
    lines = ["made by 0"] * 2 + ["got 7 0"] * 2 + ["error no such thing"] * 2
    assert sorted(out.splitlines()) == sorted(lines)


def test_a_damaged_image_is_one_line_for_all_processes(tmp_path):
    """Only the heads of the files show it, after all have joined."""
    write_images(tmp_path / "d/train", count=8, size=(70, 70))
    write_images(tmp_path / "d/val", size=(70, 70))
    (tmp_path / "d/train/cat/cat3.png").write_bytes(b"no image")
    data = "--dataset folder --data_dir d --num_workers 0 --num_steps 2 --train_batch_size 8"
    _, err = end(start(TORCHRUN, "bad", data), fails=True)
    assert err.count("error: d/train/cat/cat3.png is not a readable image") == 1
    assert 'train.py", line' not in err and not Path("output/bad_last.pt").exists()


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_process_ends_the_other(victim):
    process = start(TORCHRUN, "killed", "--num_steps 100000 --eval_every 5")
    best = Path("output/killed_checkpoint.bin")
    while not best.exists():  # the training has started
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    pids = workers_of(process.pid)
    assert len(pids) == 2
    os.kill(pids[victim], signal.SIGKILL)
    _, err = end(process, fails=True)
    assert "SIGKILL" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids.values())
    load_torch(best)  # complete, although the kill may have come during a save


def workers_of(launcher):
    """Rank to process id of the training processes."""
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # a process that has just ended
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_text().split("\0") if parent == launcher else []
            pids |= {v[5:]: int(folder.name) for v in variables if v.startswith("RANK=")}
    return pids


SABOTAGE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train
from utils.cli import run_script
update = train.update
def sabotaged(run, *rest):
    if run.state.step == 3 and os.environ["RANK"] == "1":
        {deed}
    return update(run, *rest)
train.update = sabotaged
sys.exit(run_script("train.py", train.main))
"""


DEEDS = {
    "raise KeyError('the first error')": "KeyError: 'the first error'",
    # Without a handler for the launcher's SIGTERM; its SIGKILL would come 30 s later.
    "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(3600)": "Timed out waiting",
}


@pytest.mark.parametrize("deed", DEEDS, ids=["exception", "hang"])
def test_one_process_that_fails_ends_all(deed, workdir):
    script = workdir / "sabotaged.py"
    script.write_text(SABOTAGE.format(root=str(ROOT), deed=deed))
    _, err = end(start(TORCHRUN, "run", "--num_steps 30 --timeout 0.1", script), fails=True)
    assert DEEDS[deed] in err[err.index("sabotaged.py FAILED") :]  # the summary of the launcher


def launch(monkeypatch, **variables):
    """Set the environment as a launcher does."""
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_the_environment_wins_over_the_flag(monkeypatch):
    assert dist_util.launcher_env(-1) == dist_util.launcher_env(0) == (0, 0, 1)
    with pytest.raises(UserError, match="local rank 1 without RANK and WORLD_SIZE"):
        dist_util.launcher_env(1)
    launch(monkeypatch, RANK=5, WORLD_SIZE=8)
    assert dist_util.launcher_env(1) == (5, 1, 8)
    launch(monkeypatch, LOCAL_RANK=3)
    assert dist_util.launcher_env(1) == (5, 3, 8)


@pytest.fixture
def environment():
    """The variables of this process, which are restored after the test."""
    with patch.dict(os.environ):
        yield os.environ


# What srun sets in a process; the machines of the job have 2, 2 and 1 of them.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_slurms_variables_are_taken_where_torchruns_are_missing(environment):
    environment |= SRUN
    assert dist_util.launcher_env() == (3, 1, 5)
    assert processes_here() == 2
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert dist_util.launcher_env() == (0, 0, 2)
    assert processes_here() == 1


UNEVEN = [("4", "0", 4), ("4,3(x2)", "0", 4), ("4,3(x2)", "2", 3), ("4(x2),3", "1", 4)]
UNEVEN += [("4(x2),3", "2", 3), ("4,13(x2),2", "3", 2)]


@pytest.mark.parametrize("text, machine, count", UNEVEN)
def test_slurms_processes_of_a_machine(text, machine, count, environment):
    environment |= SRUN | {"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": machine}
    dist_util.launcher_env()
    assert processes_here() == count


@pytest.mark.parametrize("alone", ["task", "batch script"])
def test_one_process_of_slurm_is_on_its_own(alone, environment):
    """Also a command in a batch script that srun does not start: the others would never come."""
    environment |= SRUN
    if alone == "task":
        environment |= {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    else:
        del environment["SLURM_STEP_NUM_TASKS"], environment["SLURM_STEP_TASKS_PER_NODE"]
    assert dist_util.launcher_env() == (0, 0, 1)
    assert "RANK" not in environment  # by which signals and errors know of other processes


def test_slurms_processes_without_an_address_are_one_line(environment, capsys):
    """At once, and not after --timeout."""
    environment |= SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert run_command(train_command, "--name", "run", *FLAGS, "--num_steps", "1") == 2
    line = capsys.readouterr().err.strip()
    assert "8 processes are announced" in line and "MASTER_ADDR" in line
    assert line.endswith("start them as in docs/clusters.md") and "\n" not in line
    assert not list(Path("output").glob("*"))


def test_an_environment_without_sense_is_one_line(monkeypatch, capsys):
    for rank, world_size in (("x", 1), (0, 0)):
        launch(monkeypatch, RANK=rank, WORLD_SIZE=world_size)
        assert run_command(train_command, "--name", "run") == 2
        line = capsys.readouterr().err.strip()
        assert "must be whole numbers" in line and "\n" not in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        launch(monkeypatch, RANK=0, WORLD_SIZE=2, **place)
        assert run_command(train_command, "--name", "run", *FLAGS) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("train.py: error: 2 processes are announced, but they cannot join")
    assert line.endswith("start them as in docs/clusters.md") and "\n" not in line


def test_every_process_finds_that_there_are_too_few_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launch(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    with pytest.raises(UserError, match="2 processes need 2 GPUs, this machine has 1"):
        dist_util.init(-1)


def test_a_process_of_slurm_may_see_one_gpu_only(environment, monkeypatch):
    """As with srun's --gpus-per-task: it takes that GPU, whatever its local rank is."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    environment |= SRUN
    with pytest.raises(UserError, match="MASTER_ADDR"):
        dist_util.init(-1)
    assert taken == [torch.device("cuda", 0)]
