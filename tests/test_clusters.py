"""docs/clusters.md is true: its commands parse, its batch file runs, and two machines make one run.

Slurm is not there: stand-ins for its commands do what the batch file needs of them.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from flags import build_parser
from models.checkpoints import load_torch
from tests import two_machines
from tests.helpers import ROOT, words

PAGE = (ROOT / "docs/clusters.md").read_text()
BATCH = next(block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) if "#SBATCH" in block)
MISSING = two_machines.missing()
JOB = {  # what Slurm sets in a batch script
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "0",
    "SLURM_CPUS_PER_TASK": "1",
}
SMALL = (
    "--dataset digits --model_type ViT-Mini_8 --img_size 8 --pretrained_dir none --warmup_steps 2 "
    "--train_batch_size 16 --eval_batch_size 360 --num_steps 60 --save_every 5 --eval_every 60"
)
# Starts $SLURM_NTASKS processes, with the flags $SMALL. One that fails ends the others by SIGTERM,
# and the highest status counts, which may be theirs.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys, time
from pathlib import Path

words = sys.argv[1:]
options = [words.pop(0) for _ in iter(lambda: words[0].startswith("--"), False)]
assert sorted(options) == ["--cpus-per-task=1", "--kill-on-bad-exit=1"], options
count, tasks = int(os.environ["SLURM_NTASKS"]), []
step = {{"SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_TASKS_PER_NODE": str(count)}}
for i in range(count):
    task = os.environ | step | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}
    tasks.append(subprocess.Popen(words + os.environ["SMALL"].split(), env=task))
Path("tasks").write_text(" ".join(str(task.pid) for task in tasks))
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        for task in tasks:
            task.terminate()
    time.sleep(0.02)
sys.exit(max(128 - task.wait() if task.wait() < 0 else task.wait() for task in tasks))
"""
COMMANDS = """#!/bin/sh
case "$(basename "$0") $*" in
  "scontrol show hostnames node[0-1]") printf '127.0.0.1\\nnode1\\n' ;;
  "scontrol requeue $SLURM_JOB_ID") kill -KILL $(cat tasks); echo requeued >> requeued ;;
  "scancel --signal=TERM $SLURM_JOB_ID") kill -TERM $(cat tasks) ;;
  *) echo "$0 $*" >&2; exit 1 ;;
esac
"""


def test_the_commands_parse():
    """The flags of torchrun, and those of train.py after it or after python3."""
    text = PAGE.replace("\\\n", " ").replace('"$SLURM_CPUS_PER_TASK"', "8")
    lines = [line for line in text.splitlines() if re.search(r" train\.py .*--name", line)]
    assert len(lines) == 3
    for line in lines:
        before, after = line.rstrip(" &").split(" train.py ")
        args = build_parser().parse_args(words(after))
        assert args.name and args.resume == "auto"
        launcher = before.partition("torchrun ")[2].replace('"$SLURM_NNODES"', "2")
        if launcher:
            args = get_args_parser().parse_args([*words(launcher), "train.py"])
            assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2", "8", 3)
            assert args.rdzv_backend == "c10d" and args.rdzv_id and args.rdzv_endpoint


def test_the_batch_file_is_bash(workdir):
    Path("train.sbatch").write_text(BATCH)
    subprocess.run(["bash", "-n", "train.sbatch"], check=True)
    first, *rest = BATCH.splitlines()
    options = [line for line in rest if line.startswith("#SBATCH")]
    assert first == "#!/bin/bash" and rest[: len(options)] == options  # sbatch reads no later ones


@pytest.fixture
def submit(workdir):
    """Starts the batch file in a folder, like sbatch and after a requeue."""
    stand_ins = workdir / "bin"
    stand_ins.mkdir()
    for name, text in {"srun": SRUN, "scontrol": COMMANDS, "scancel": COMMANDS}.items():
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)

    def start(folder: str, small: str = SMALL) -> subprocess.Popen:
        place = Path(folder)
        if not place.exists():
            (place / ".venv/bin").mkdir(parents=True)
            path = f'PATH="{stand_ins}:{Path(sys.executable).parent}:$PATH"\n'
            (place / ".venv/bin/activate").write_text(path)
            (place / "train.py").symlink_to(ROOT / "train.py")
            (place / "train.sbatch").write_text(BATCH)
        env = os.environ | JOB | {"SLURM_JOB_ID": free_job(), "SMALL": small}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["bash", "train.sbatch"], cwd=place, env=env, **pipes)

    return start


def end(job: subprocess.Popen) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a job."""
    out, err = job.communicate(timeout=100)
    return job.returncode, out, err


def free_job() -> str:
    """The number of a job whose port, 20000 and its last four digits, is free."""
    for job in range(os.getpid() % 10000, 20000):
        with socket.socket() as server:
            if server.connect_ex(("127.0.0.1", 20000 + job % 10000)):
                return str(job)
    raise AssertionError("no free port")


def test_the_batch_file_saves_before_the_time_limit_and_continues(submit):
    """To the same bits as without a time limit."""
    [(name, seconds)] = re.findall(r"^#SBATCH --signal=B:(\w+)@(\d+)", BATCH, re.M)
    assert int(seconds) >= 60
    status, _, err = end(submit("whole"))
    assert status == 0 and not Path("whole/requeued").exists(), err
    job, last = submit("cut"), Path("cut/output/cifar10_last.pt")
    while not last.exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.05)
    job.send_signal(signal.Signals[f"SIG{name}"])  # to the script alone, as `B:` says
    status, _, err = end(job)
    assert status != 0 and "stopped by SIGTERM; saved in" in err, err
    assert 5 <= load_torch(last)["state"]["step"] < 60
    assert Path("cut/requeued").read_text() == "requeued\n"
    status, out, err = end(submit("cut"))
    assert status == 0 and "resumed: output/cifar10_last.pt" in out, err
    assert Path("cut/requeued").read_text() == "requeued\n"  # once
    one, two = (load_torch(path) for path in ("whole/output/cifar10_last.pt", last))
    assert one["state"]["step"] == two["state"]["step"] == 60
    for key, value in one["precision"]["parameters"].items():
        assert torch.equal(value, two["precision"]["parameters"][key]), key


def test_a_mistake_is_not_put_into_the_queue_again(submit):
    """Although the other processes end by SIGTERM, too."""
    status, _, err = end(submit("wrong", "--train_batch_size 33"))
    assert status in (2, 143) and not Path("wrong/requeued").exists()
    [line] = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert "--train_batch_size 33 must be a multiple of 2" in line


@pytest.mark.skipif(MISSING != "", reason=MISSING or "all is there")
def test_two_machines_make_one_run(tmp_path, capfd):
    """A process of one of them is killed on the way."""
    names = ["the process of machine 1 is killed"]
    two_machines.play(names, tmp_path)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == names
    assert not any("repeated" in line for line in lines)
