"""SIGKILL a run at random moments, half of them inside a save, resume it each time, and compare its
end with a quiet run's.

python3 -m tests.stress_kill --kills 50    # test_resume.py runs a short form
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from models.checkpoints import load_torch
from tests.helpers import ROOT, words
from utils.checkpoint import RunPaths

FLAGS = words(
    "--dataset digits --model_type ViT-Mini_8 --img_size 8 --pretrained_dir none --bf16 "
    "--train_batch_size 16 --warmup_steps 5 --eval_every 10 --optimizer adamw --mixup 0.4 "
    "--dropout_rate 0.1 --layer_decay 0.75 --drop_path 0.2 --ema 0.9 --rand_augment 2,9 "
    "--random_erasing 0.25 --loss bce --resume auto"
)
SAVING = (words("--save_every 1"), words("--save_minutes 0"))


def command(name: str, steps: int, number: int = 0) -> list[str]:
    script = [sys.executable, str(ROOT / "train.py")]
    return [*script, "--name", name, "--num_steps", str(steps), *FLAGS, *SAVING[number % 2]]


def kill_and_resume(folder: Path, kills: int, seed: int, steps: int) -> tuple[int, int]:
    """Kill a run `kills` times. Raises AssertionError.

    Returns how many kills found it alive, and how many of these inside a save.
    """
    options = {"cwd": folder, "text": True}
    quiet = subprocess.run(command("quiet", steps), capture_output=True, **options)
    assert quiet.returncode == 0, quiet.stderr
    chance, hits, inside = random.Random(seed), 0, 0
    paths = RunPaths(folder / "output", "killed")
    half = paths.last.with_name(".killed_last.tmp.pt")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for number in range(kills):
        process = subprocess.Popen(command("killed", steps, number // 2), **pipes, **options)
        before = saved_at(paths.last)
        # Let it make some saves, so that the kills fall everywhere in the run, then strike.
        while process.poll() is None and saved_at(paths.last) == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, steps / 400))
        if number % 2:
            freeze_with(half, process)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        hits, inside = hits + alive, inside + (alive and half.exists())
        step = load_torch(paths.last)["state"]["step"]  # whole, whenever the kill came
        print(f"killed after step {step} of {steps}", flush=True)
        if step == steps:
            paths.delete()  # begin again
    ended = subprocess.run(command("killed", steps), capture_output=True, **options)
    assert ended.returncode == 0, ended.stderr
    a, b = (load_torch(folder / f"output/{name}_last.pt") for name in ("quiet", "killed"))
    del a["state"]["seconds"], b["state"]["seconds"]
    assert a["state"] == b["state"], (a["state"], b["state"])
    for key, value in a["precision"]["parameters"].items():
        assert torch.equal(value, b["precision"]["parameters"][key]), key
    averages = zip(*(each["precision"]["averages"] for each in (a, b)), strict=True)
    assert all(torch.equal(*pair) for pair in averages)
    best = [load_torch(folder / f"output/{name}_checkpoint.bin") for name in ("quiet", "killed")]
    assert best[0]["step"] == best[1]["step"] and best[0]["metrics"] == best[1]["metrics"]
    return hits, inside


def freeze_with(path: Path, process: subprocess.Popen) -> None:
    """Stop the process at a moment when `path` is there."""
    while process.poll() is None:
        time.sleep(0.001)
        if path.exists():
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if path.exists():
                return
            process.send_signal(signal.SIGCONT)


def saved_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400, help="steps of the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hits, inside = kill_and_resume(Path(folder), args.kills, 0, args.steps)
    found = f"{hits} of {args.kills} kills found the run alive, {inside} of them inside a save"
    print(f"{found}; its end is the quiet run's bits")
