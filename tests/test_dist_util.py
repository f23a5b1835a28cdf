"""Several real processes: both launchers, equal results, and deaths that are noticed."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import train as train_module
from flags import parse_flags
from tests.helpers import ROOT
from utils import dist_util
from utils.checkpoint import load
from utils.dist_util import LaunchError, launched

PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = [PYTHON, "-m", "torch.distributed.launch", "--nproc_per_node", "2"]
FLAGS = ["--dataset", "digits", "--model_type", "ViT-Ti_4", "--img_size", "8", "--learning_rate",
         "0.1", "--pretrained_dir", "none", "--train_batch_size", "32", "--warmup_steps", "2",
         "--eval_batch_size", "100"]  # fmt: skip


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def train(launcher, name, *flags, cwd, **kw):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*launcher, str(ROOT / "train.py"), "--name", name, *FLAGS, *flags]
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kw)  # fmt: skip


def finished(process):
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


def test_two_processes_by_two_micro_batches_equal_one_by_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ten = ["--num_steps", "10", "--eval_every", "10"]
    assert train_module.run(["--name", "alone", *FLAGS, *ten]) == 0
    out = capsys.readouterr().out
    several = {
        "torchrun": (TORCHRUN, ["--gradient_accumulation_steps", "2"]),
        "launch": ([*LAUNCH, "--master_port", free_port()], []),
    }
    alone = load(tmp_path / "output/alone_checkpoint.bin")
    start = torch.zeros(10)
    assert not torch.equal(alone["model"]["head.bias"], start)
    for name, (launcher, flags) in several.items():
        shared_out = finished(train(launcher, name, *ten, *flags, cwd=tmp_path))
        shared = load(tmp_path / f"output/{name}_checkpoint.bin")
        for key, value in alone["model"].items():
            assert (value - shared["model"][key]).abs().max() < 1e-5, (name, key)
        # Every test image was counted once: the accuracies are the same fraction of 359.
        assert shared["metrics"]["accuracy"] == alone["metrics"]["accuracy"]
        assert shared["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], abs=1e-5)
        # Only the main process speaks.
        assert shared_out.count("test accuracy") == out.count("test accuracy")


def test_bfloat16_masters_with_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = ["--num_steps", "6", "--bf16", "--gradient_accumulation_steps", "2"]
    assert train_module.run(["--name", "alone", *FLAGS, *half]) == 0
    finished(train(TORCHRUN, "two", *half, cwd=tmp_path))
    alone, two = (load(tmp_path / f"output/{n}_checkpoint.bin") for n in ("alone", "two"))
    for key, value in alone["model"].items():
        assert (value - two["model"][key]).abs().max() < 5e-3, key


def test_a_wrong_flag_is_said_once(tmp_path):
    process = train(TORCHRUN, "wrong", "--train_batch_size", "33", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("train.py: error: ")]
    assert len(said) == 1 and "--train_batch_size 33 is global" in said[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_takes_the_other_down(victim, tmp_path):
    process = train(TORCHRUN, "killed", "--num_steps", "100000", "--eval_every", "5", cwd=tmp_path)
    checkpoint = tmp_path / "output/killed_checkpoint.bin"
    while not checkpoint.exists():  # training is under way
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "SIGKILL" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    load(checkpoint)  # whole, whenever the kill came


SABOTAGE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train
update = train.update
def sabotaged(args, step, *rest):
    if step == 3 and os.environ["RANK"] == "1":
        {deed}
    return update(args, step, *rest)
train.update = sabotaged
sys.exit(train.run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("deed", "said"),
    [("raise ValueError('the first error')", "ValueError: the first error"),
     # Where nothing is met any more, the launcher's SIGTERM neither, its SIGKILL comes 30 s later.
     ("signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(3600)",
      "another process of this run has died or hangs")],
    ids=["exception", "hang"],
)  # fmt: skip
def test_one_process_that_fails_ends_all_with_its_line(deed, said, tmp_path):
    script = tmp_path / "sabotaged.py"
    script.write_text(SABOTAGE.format(root=str(ROOT), deed=deed))
    flags = [*FLAGS, "--name", "run", "--num_steps", "30", "--timeout", "0.1"]
    process = subprocess.Popen([*TORCHRUN, str(script), *flags], cwd=tmp_path, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    _, err = process.communicate(timeout=150)
    assert process.returncode != 0
    assert said in err
    if "raise" in deed:  # the launcher's summary ends with the root cause
        assert said in "\n".join(err.strip().splitlines()[-3:])
        assert err.count("Traceback (most recent call last)") == 2  # rank 1's and the launcher's


def children(pid):
    """The training processes of a launcher, main process first."""
    pids = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{entry}/environ") as file:
                environment = dict(v.split("=", 1) for v in file.read().split("\0") if "=" in v)
        except OSError:
            continue
        if parent == pid and "RANK" in environment:
            pids[int(environment["RANK"])] = int(entry)
    return [pids[rank] for rank in sorted(pids)]


def test_the_environment_wins_over_the_flag(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched(-1) == launched(0) == (0, 0, 1)
    with pytest.raises(LaunchError, match="--local_rank 1 without RANK and WORLD_SIZE"):
        launched(1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launched(1) == (5, 1, 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launched(1) == (5, 3, 8)


@pytest.mark.parametrize("rank, world", [("x", "1"), ("0", "0")])
def test_a_rank_that_is_no_number_is_one_line(rank, world, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert train_module.run(["--name", "run"]) == 2
    line = capsys.readouterr().err.strip()
    assert "must be whole numbers" in line and "\n" not in line


def test_a_port_that_is_taken_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(taken.getsockname()[1])}  # fmt: skip
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        assert train_module.run(["--name", "run", *FLAGS]) == 2
    err = capsys.readouterr().err
    assert (
        "2 processes are announced but cannot be joined" in err
        and err.count("train.py: error") == 1
    )
    assert "Traceback" not in err and err.strip().endswith("train.py ...")


def test_an_evaluation_has_no_training_batch_to_divide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_flags(["--name", "run", "--eval_only", "m.bin"], world=3).eval_only == "m.bin"


def test_a_process_that_fails_alone_does_not_wait_for_nccl(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    dist_util.leave_alone(1)  # one process: nobody to wait for
    monkeypatch.setattr(dist_util, "world", lambda: 2)
    for backend in ("gloo", "nccl"):
        monkeypatch.setattr(dist_util.dist, "get_backend", lambda backend=backend: backend)
        dist_util.leave_alone(2, ValueError("a bug"))
    assert left == [2] and capsys.readouterr().err.count("ValueError: a bug") == 1
